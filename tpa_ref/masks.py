"""Which key a query sees. One rule on positions serves whole texts, chunks, rings and padding alike."""

from __future__ import annotations

import numpy as np

MASKED = -2.3819763e38  # finite, so that a row that sees nothing (padding) gives no NaN


def visible(
    positions_bq: np.ndarray, positions_bk: np.ndarray, window: int | None, last_bq: np.ndarray | None = None
) -> np.ndarray:
    """True where the query may look: 0 <= i - j < window (itself and window - 1 keys before), causal when None.

    last_bq: the last position that each query sees, where that is not its own: the tokens of an image see all of their
    image (`vision.last_seen`). An empty slot or a padding token has position -1 and is never seen. Keys may stand in
    any order, as in a ring.

    Shapes: [b,q], [b,k] -> bool [b,q,k].

    >>> visible(np.array([[2]]), np.array([[3, 1, 2, -1]]), window=2)[0, 0].tolist()
    [False, True, True, False]
    >>> visible(np.array([[2]]), np.array([[3, 1, 2, -1]]), window=2, last_bq=np.array([[3]]))[0, 0].tolist()
    [True, True, True, False]
    """
    last_bq = positions_bq if last_bq is None else last_bq
    seen_bqk = (positions_bk[:, None, :] <= last_bq[:, :, None]) & (positions_bk >= 0)[:, None, :]
    return seen_bqk if window is None else seen_bqk & (positions_bq[:, :, None] - positions_bk[:, None, :] < window)


def apply_mask(L_bhqk: np.ndarray, seen_bqk: np.ndarray) -> np.ndarray:
    """Logits with a very negative number wherever the query may not look."""
    return np.where(seen_bqk[:, None], L_bhqk, L_bhqk.dtype.type(MASKED))
