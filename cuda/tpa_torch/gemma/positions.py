"""Where new tokens stand. Twin of `tpa_ref.gemma.positions`; what all layers of a kind share is made once here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.gemma import positions as reference
from tpa_ref.gemma.token_vectors import with_previous

from ..core.rope import rotate
from ..fast.kernels import matrices
from .token_vectors import TokenVectors


class Tokens:
    """What is known of some tokens: turns [1 or b,k,d/2], cos + i sin of their positions, and their token vectors."""

    def __init__(self, turns_bkp: Tensor, vectors: TokenVectors | None = None, keys: slice = slice(None)):
        self.turns_bkp, self.vectors, self.keys = turns_bkp[:, keys], vectors, keys

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin."""
        return self.turns_bkp.real, self.turns_bkp.imag

    @property
    def Z_bkz(self) -> Tensor | None:
        """The token vectors, where something is predicted from them."""
        return None if self.vectors is None else self.vectors(self.keys)

    def turn(self, X_bksd: Tensor) -> Tensor:
        """RoPE, of few tokens in one compiled call."""
        if matrices.turn_takes(X_bksd):
            return matrices.turned(X_bksd, self.turns_bkp)
        return rotate(X_bksd, *self.tables)

    def of(self, keys: slice) -> Tokens:
        """A slice of them."""
        return Tokens(self.turns_bkp, self.vectors, keys)


@dataclass(eq=False)
class Positions(reference.Positions):
    """Positions of new tokens as one kind of layer sees them."""

    def __post_init__(self) -> None:
        self.last_seen_bq = self.positions_bq if self.last_bq is None else self.last_bq
        self.kept: dict[Any, Any] = {}  # what the layers before this one have made

    def tokens(self, positions_bk: np.ndarray, name: str) -> Tokens:  # type: ignore[override]
        """What is known of the tokens at positions that all layers of a kind have under a name."""
        if name not in self.kept:
            vectors = None
            if self.text_bt is not None:
                found = with_previous(self.text_bt.astype(np.int64), positions_bk)
                numbers = (torch.from_numpy(numbers_bk).to(self.model.device) for numbers_bk in found)
                vectors = TokenVectors(self.model.token_table, *numbers)
            self.kept[name] = Tokens(self._turns(positions_bk), vectors)
        return self.kept[name]

    def _turns(self, positions_bk: np.ndarray) -> Tensor:
        turns = self.model.rope_turns(self.is_global, int(positions_bk.max(initial=0)) + 1)
        first = int(positions_bk[0, 0]) if positions_bk.size else 0
        if first >= 0 and (positions_bk == np.arange(first, first + positions_bk.shape[1])).all():
            return turns[None, first : first + positions_bk.shape[1]]
        return turns[torch.from_numpy(np.maximum(positions_bk, 0)).to(turns.device)]
