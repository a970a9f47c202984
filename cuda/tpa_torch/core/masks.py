"""Which key a query sees. Twin of `tpa_ref.core.masks`."""

from __future__ import annotations

from torch import Tensor

from tpa_ref.core.masks import MASKED


def visible(positions_bq: Tensor, positions_bk: Tensor, window: int | None, last_bq: Tensor | None = None) -> Tensor:
    """True where the query may look: 0 <= i - j < window, causal when None; position -1 is never seen. [b,q,k].

    last_bq: the last position that each query sees, where that is not its own (within an image).
    """
    last_bq = positions_bq if last_bq is None else last_bq
    seen_bqk = (positions_bk[:, None, :] <= last_bq[:, :, None]) & (positions_bk >= 0)[:, None, :]
    return seen_bqk if window is None else seen_bqk & (positions_bq[:, :, None] - positions_bk[:, None, :] < window)


def segment_mask(
    kind: str, seen_bqk: Tensor, positions_bq: Tensor, positions_bk: Tensor, sinks: int, recent: int
) -> Tensor:
    """Which of the visible keys of a segment a query reads there: each key in exactly one segment. [b,q,k]."""
    sink_bqk = (positions_bk < sinks)[:, None, :]
    distance_bqk = positions_bq[:, :, None] - positions_bk[:, None, :]  # negative inside an image
    recent_bqk = ~sink_bqk & (distance_bqk < recent) & (recent > 0)
    return seen_bqk & {"sinks": sink_bqk, "recent": recent_bqk, "coded": ~sink_bqk & ~recent_bqk}[kind]


def apply_mask(L_bhqk: Tensor, seen_bqk: Tensor) -> Tensor:
    """Logits with a very negative number wherever the query may not look."""
    return L_bhqk.masked_fill(~seen_bqk[:, None], MASKED)
