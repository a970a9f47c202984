"""Tensor Product Attention, to be written by you. Copy this file and fill in one step after the other.

Arrays are NumPy arrays and carry their axes as a suffix: b batch, q query position, k key position, h query heads,
g KV heads, d features, s and u the ranks of K and V. `notebooks/exercise.md` explains each step.
"""

from __future__ import annotations

import numpy as np


# Step 1
def from_factors(A_bksg: np.ndarray, B_bksd: np.ndarray) -> np.ndarray:
    """Eq. (3.1): K = (1/R) sum_s a_s (x) b_s, as [b,k,g,d]."""
    raise NotImplementedError


# Step 2
def best_factors(X_bkgd: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors (A_bksg, B_bksd) of that rank whose `from_factors` is closest to X, for every token by itself."""
    raise NotImplementedError


# Step 3
def rotate(x_bksd: np.ndarray, positions_bk: np.ndarray, base: float, scale: float = 1.0) -> np.ndarray:
    """RoPE, half-split: feature i pairs with i + d/2, rotated by +position * base^(-2i/d) / scale."""
    raise NotImplementedError


# Step 4
def scores(Q_bqhd: np.ndarray, A_bksg: np.ndarray, B_bksd: np.ndarray, scale: float) -> np.ndarray:
    """Eq. (A.2) with dense queries: logits [b,h,q,k]. Queries and B are rotated already. Form no K."""
    raise NotImplementedError


# Step 5
def attend(
    Q_bqhd: np.ndarray,
    AK_bksg: np.ndarray,
    BK_bksd: np.ndarray,
    AV_bkug: np.ndarray,
    BV_bkue: np.ndarray,
    scale: float,
    positions_bq: np.ndarray,
    positions_bk: np.ndarray,
    window: int | None,
) -> np.ndarray:
    """Eq. (A.3): output [b,q,h,e]. A query at i sees a key at j if 0 <= i - j < window (None: no window). No V."""
    raise NotImplementedError


# Step 6
class FactorCache:
    """Factors of one layer, batch 1, in `slots` slots; the token at position p goes to slot p mod slots."""

    def __init__(self, slots: int, rank: int, g: int, d: int):
        raise NotImplementedError

    def append(self, AK_bksg: np.ndarray, BK_bksd: np.ndarray, AV_bkug: np.ndarray, BV_bkue: np.ndarray) -> None:
        """Store one more token (b = k = 1)."""
        raise NotImplementedError

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(AK, BK, AV, BV, positions_bk) of the filled slots, in the order of the slots."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held. It must not grow."""
        raise NotImplementedError
