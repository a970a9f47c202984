"""Which key a query sees. One rule on positions serves whole texts, chunks, rings and padding alike."""

import numpy as np

MASKED = -2.3819763e38  # finite, so that a row that sees nothing (padding) gives no NaN


def visible(
    positions_bq: np.ndarray, positions_bk: np.ndarray, window: int | None, last_bq: np.ndarray | None = None
) -> np.ndarray:
    """True where the query may look: 0 <= i - j < window (itself and window - 1 keys before), causal when None.

    last_bq: the last position that each query sees, where that is not its own: the tokens of an image see all of their
    image (`vision.last_seen`). An empty slot or a padding token has position -1 and is never seen. Keys may stand in
    any order, as in a ring. Shapes: [b,q], [b,k] -> bool [b,q,k].

    >>> visible(np.array([[2]]), np.array([[3, 1, 2, -1]]), window=2)[0, 0].tolist()
    [False, True, True, False]
    """
    last_bq = positions_bq if last_bq is None else last_bq
    seen_bqk = (positions_bk[:, None, :] <= last_bq[:, :, None]) & (positions_bk >= 0)[:, None, :]
    return seen_bqk if window is None else seen_bqk & (positions_bq[:, :, None] - positions_bk[:, None, :] < window)


def segment_mask(
    kind: str, seen_bqk: np.ndarray, positions_bq: np.ndarray, positions_bk: np.ndarray, sinks: int, recent: int
) -> np.ndarray:
    """Which of the visible keys of a segment a query reads there: each key in exactly one segment.

    The first `sinks` tokens of the text are read from "sinks", the others from "recent" where j > i - recent, all that
    remain from "coded". The rule is by position, so a whole text, its chunks and its tokens one by one read the same.

    >>> i, j = np.array([[5]]), np.array([[0, 1, 4, 5]])
    >>> segment_mask("coded", visible(i, j, None), i, j, sinks=1, recent=2)[0, 0].tolist()
    [False, True, False, False]
    """
    sink_bqk = (positions_bk < sinks)[:, None, :]
    distance_bqk = positions_bq[:, :, None] - positions_bk[:, None, :]  # negative inside an image
    recent_bqk = ~sink_bqk & (distance_bqk < recent) & (recent > 0)
    return seen_bqk & {"sinks": sink_bqk, "recent": recent_bqk, "coded": ~sink_bqk & ~recent_bqk}[kind]


def apply_mask(L_bhqk: np.ndarray, seen_bqk: np.ndarray) -> np.ndarray:
    """Logits with a very negative number wherever the query may not look."""
    return np.where(seen_bqk[:, None], L_bhqk, L_bhqk.dtype.type(MASKED))
