"""What attention on our codes has to know of a model of theirs, on each device, and where new tokens stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor

from tpa_ref.gemma.weights import Weights

from ..gemma.model import Model
from ..gemma.positions import Positions
from ..gemma.token_vectors import TokenTable
from ..lasting import lasting
from .theirs import Theirs, weight_of


class Place(Model):
    """What attention asks of a model, on one device: tables of RoPE and of the tokens, shared by all of its caches."""

    def __init__(self, theirs: Theirs, device: torch.device):
        one = torch.zeros(1, 1, device=device)
        super().__init__(theirs.config, Weights(one, [], one[0]))
        self.embedding = ref(theirs.text.embed_tokens)
        self.made_of: tuple[Any, ...] = ()

    @property
    def token_table(self) -> TokenTable:
        """Their embedding table as token vectors."""
        weight_vm = weight_of(self.embedding())  # another one, where the vocabulary was resized
        if self._token_table is None or self.made_of != (weight_vm.data_ptr(), weight_vm.shape):
            self.made_of = weight_vm.data_ptr(), weight_vm.shape
            with lasting():
                embed_vm = weight_vm.to(self.device)
                factor = torch.tensor(self.config.hidden_size**0.5, dtype=embed_vm.dtype, device=self.device)
                self._token_table = TokenTable(embed_vm, factor)
        return self._token_table


PLACES: WeakKeyDictionary[Any, dict[torch.device, Place]] = WeakKeyDictionary()  # by the model that they are for


@dataclass
class New:
    """The tokens of one forward pass: where they stand, -1 for padding; theirs_bq: the same by their own count.

    shift_b: how far their count is ahead of ours, where it is. plain: each token sees all real ones before it.
    """

    positions_bq: np.ndarray
    theirs_bq: np.ndarray
    shift_b: np.ndarray | None
    text_bt: np.ndarray | None
    plain: bool
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, name: str, place: Place, is_global: bool, make: Callable[[], Any]) -> Any:
        """Something that all layers of a kind share."""
        key = name, place.device, is_global
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def at(self, place: Place, is_global: bool) -> Positions:
        """Where they stand, for our own code."""
        make = lambda: Positions(place, is_global, self.positions_bq, None, self.text_bt)  # noqa: E731
        made: Positions = self.once("at", place, is_global, make)
        return made

    def turns(self, place: Place, is_global: bool) -> Tensor:
        """The turns that their keys come with, [b,q,d/2]."""
        made: Tensor = self.once("turns", place, is_global, lambda: turns_at(place, is_global, self.theirs_bq))
        return made

    def shift(self, place: Place, is_global: bool) -> Tensor | None:
        """The turns by which their count is ahead of ours, [b,1,d/2]."""
        if self.shift_b is None:
            return None
        shift_b1 = self.shift_b[:, None]

        def make() -> Tensor:
            turns = turns_at(place, is_global, np.abs(shift_b1))
            return torch.where(torch.from_numpy(shift_b1 < 0).to(turns.device)[..., None], turns.conj(), turns)

        made: Tensor = self.once("shift", place, is_global, make)
        return made


def turns_at(place: Place, is_global: bool, positions_bq: np.ndarray) -> Tensor:
    """cos + i sin at some positions, [b,q,d/2]."""
    positions_bq = np.maximum(positions_bq, 0)
    turns = place.rope_turns(is_global, int(positions_bq.max(initial=0)) + 1)
    return turns[torch.from_numpy(positions_bq).to(turns.device)]
