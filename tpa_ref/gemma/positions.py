"""Where the new tokens of one forward pass stand, and what follows from positions alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..core import rope
from ..core.mode import Tokens


@dataclass(eq=False)
class Positions:
    """Positions of new tokens as one kind of layer (global or window) sees them; the other kind rotates differently.

    positions_bq: -1 for padding. last_bq: the last position that each query sees, where that is not its own (within an
    image). text_bt: the ids so far, numbered from 1, where K or V is predicted from them.
    """

    model: Any
    is_global: bool
    positions_bq: np.ndarray
    last_bq: np.ndarray | None = None
    text_bt: np.ndarray | None = None

    @cached_property
    def new_tokens(self) -> Tokens:
        """What is known of the new tokens."""
        return self.tokens(self.positions_bq, "new")

    def tokens(self, positions_bk: np.ndarray, name: str) -> Tokens:
        """What is known of the tokens at some positions; name: which keys they are, for a backend that keeps them."""
        config = self.model.config
        tables = rope.rope_tables(positions_bk, config.head_dim, *config.rope(self.is_global))
        Z_bkz = None if self.text_bt is None else self.model.token_vectors(self.text_bt, positions_bk)
        return Tokens(tables, Z_bkz)
