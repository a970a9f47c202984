"""`dense`: K and V as they are, the ordinary GQA cache. The oracle of every other mode."""

from __future__ import annotations

from typing import Any

import numpy as np

from .mode import Mode, Parts, Tokens


class Dense(Mode):
    """The heads themselves: one part X [g,d]."""

    name = "dense"
    rotated = "X"

    @classmethod
    def exact_rank(cls, g: int, d: int) -> int:
        return 0

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {"X": (self.g, self.d)}

    def encode(self, X_bkgd: np.ndarray, tokens: Tokens) -> Parts:
        return {"X": X_bkgd}

    def decode(self, parts: Parts, tokens: Tokens) -> Any:
        return parts["X"]
