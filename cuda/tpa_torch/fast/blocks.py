"""Blocks of queries, and the keys that they can see at all: logits stay small enough for a processor's cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..core.cache import Segment

QUERY_BLOCK = 128
Block = tuple[slice, list[slice]]  # queries, and the keys of each segment that they may see


def query_blocks(
    positions_bq: np.ndarray,
    positions_bk: np.ndarray,
    window: int | None,
    whole: bool,
    last_bq: np.ndarray | None = None,
) -> list[tuple[slice, slice]]:
    """(queries, keys) of each block of queries: the stretch of keys outside of which none of them sees anything.

    A window layer never makes a q x k matrix of a long text. `whole`: one block, for a trace of everything.
    """
    q, k = positions_bq.shape[1], positions_bk.shape[1]
    if whole or q <= QUERY_BLOCK:
        return [(slice(0, q), slice(0, k))]
    blocks = []
    for start in range(0, q, QUERY_BLOCK):
        queries = slice(start, min(q, start + QUERY_BLOCK))
        asked, last = (x[:, queries] for x in (positions_bq, positions_bq if last_bq is None else last_bq))
        oldest = 0 if window is None else max(0, int(asked.min()) - window + 1)
        seen = np.nonzero(((positions_bk >= oldest) & (positions_bk <= last.max())).any(0))[0]
        blocks.append((queries, slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 1)))
    return blocks


def blocks_of(keys: Any, whole: bool = False) -> list[Block]:
    """Blocks of queries, with the keys of each segment that they may see."""
    at, window = keys.at, keys.held.window
    found = [query_blocks(at.positions_bq, s.positions_bk, window, whole, at.last_seen_bq) for s in keys.segments]
    return [(block[0][0], [here for _, here in block]) for block in zip(*found, strict=True)]


def unless_all(keys: Any, segment: Segment) -> Tensor | None:
    """Which keys of a segment the queries see, made once for all layers of a kind; None where everything is seen."""
    name = "seen", segment.kind, keys.held.exact
    if name not in keys.at.kept:
        seen_bqk = keys.seen(segment)
        keys.at.kept[name] = None if bool(seen_bqk.all()) else seen_bqk
    return keys.at.kept[name]
