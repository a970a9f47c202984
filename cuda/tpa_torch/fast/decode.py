"""Attention of a few queries over a long cache, as fast as a CPU reads it. The equations are those of `core`.

One pass over tiles of keys. Compiled functions (`kernels/native.py`) read the cache in its stored format; without them,
or if K is rebuilt, a tile is dequantized into memory that stays in the processor's cache and is reused for the next
one. Every tile has a softmax with a maximum of its own; at the end the tiles of all segments are merged by their
maxima: nothing overflows.

The queries of a KV head are the rows of one matrix: x is (n, q), the query heads of a KV head times the queries, and y
is (g, x), where all heads share one key. `benchmarks/decode_attention.py` shows what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.attention import split_heads
from ..core.banded import Banded
from ..core.cache import Segment
from ..core.masks import MASKED
from . import banded
from .blocks import unless_all
from .heads import heads
from .kernels import native
from .readers import reader
from .scratch import Scratch

TILE_NUMBERS = 1 << 21  # logits, or numbers of K or V, made at a time: 8 MB of float32
MOST_MADE = 4096  # keys of a tile that is dequantized or rebuilt
MOST_READ = 1 << 16  # keys of a tile that is read as it is stored
FEW_QUERIES = 8  # with more, K and V are better formed whole
Partial = tuple[Tensor, Tensor, Tensor]  # largest logit and sum of exp [b,g,x,1], weighted sum of values [b,g,x,e]


def attend(Q_bqhd: Tensor, keys: Any, scale: float, scratch: Scratch) -> Tensor:
    """Rotated queries over all keys of all segments, in float32: [b,q,h,d] -> [b,q,h,e] in the queries' dtype."""
    (b, q, h, d), g = Q_bqhd.shape, keys.segments[0].pair.k.g
    if q == 1:  # the order in memory is the same
        Q_bgxd = Q_bqhd.reshape(b, g, h // g, d).float() * scale
    else:
        Q_bgxd = split_heads(Q_bqhd, g).permute(0, 2, 3, 1, 4).flatten(2, 3).float() * scale
    partials = [
        banded.read(Q_bgxd, Q_bqhd.dtype, segment, unless_all(keys, segment), keys.at, scratch)
        if isinstance(segment.pair, Banded)
        else read_segment(Q_bgxd, Q_bqhd.dtype, segment, unless_all(keys, segment), q, scratch)
        for segment in keys.segments
        if segment.positions_bk.shape[1]
    ]
    _, total_bgx1, O_bgxe = merged(partials)
    O_bgxe = O_bgxe / total_bgx1
    if q == 1:
        return O_bgxe.reshape(b, 1, h, -1).to(Q_bqhd.dtype)
    O_bgnqe = O_bgxe.unflatten(2, (-1, q))
    return O_bgnqe.permute(0, 3, 1, 2, 4).flatten(2, 3).to(Q_bqhd.dtype)


def read_segment(
    Q_bgxd: Tensor, dtype: torch.dtype, segment: Segment, seen_bqk: Tensor | None, q: int, scratch: Scratch
) -> Partial:
    """One segment, tile by tile, or in one go. seen [b,q,k], None: all of it."""
    few = seen_bqk is None and Q_bgxd.shape[2] <= FEW_QUERIES
    if few and (rows := heads(segment.pair, segment.stored, dtype, scratch)) is not None:
        largest, total, Y = (x.unflatten(0, Q_bgxd.shape[:2]) for x in native.attend(Q_bgxd.flatten(0, 1), *rows))
        return largest, total, Y
    K, V = reader(segment, dtype, scratch)
    asked, tokens = K.ask(Q_bgxd), segment.tokens
    partials = []
    made = max(K.numbers_per_key, V.numbers_per_value)
    numbers, most = len(Q_bgxd) * max(made, Q_bgxd[0, ..., 0].numel()), MOST_MADE if made else MOST_READ
    for tile in tiles(segment.positions_bk.shape[1], numbers, most):
        L_bgxk = K.scores(asked, tile, tokens)
        if seen_bqk is not None:
            unseen_bqk = ~seen_bqk[:, :, tile]
            L_bgxk.unflatten(2, (-1, q)).masked_fill_(unseen_bqk[:, None, None], MASKED)
        P_bgxk, largest_bgx1, total_bgx1 = exponentials(L_bgxk)
        partials.append((largest_bgx1, total_bgx1, V.values(P_bgxk, tile, tokens)))
    largest_bgx1, total_bgx1, Y_bgxu = merged(partials)
    return largest_bgx1, total_bgx1, V.output(Y_bgxu, total_bgx1)


def tiles(keys: int, numbers_per_key: int, most: int) -> Iterator[slice]:
    """Stretches of at most so many keys, of which no more numbers are made than stay in the processor's cache."""
    size = min(most, max(64, TILE_NUMBERS // numbers_per_key))
    return (slice(start, min(keys, start + size)) for start in range(0, keys, size))


def exponentials(L_bgxk: Tensor) -> Partial:
    """exp(L - largest logit) in place of L, the largest logit, the sum over k."""
    if L_bgxk.device.type == "cpu" and L_bgxk.is_contiguous() and native.available():
        return L_bgxk, *native.exponentials(L_bgxk)
    largest_bgx1 = L_bgxk.amax(-1, keepdim=True)
    P_bgxk = L_bgxk.sub_(largest_bgx1).exp_()
    return P_bgxk, largest_bgx1, P_bgxk.sum(-1, keepdim=True)


def merged(partials: list[Partial]) -> Partial:
    """Sums of several stretches of keys as one: each is scaled from its own maximum to that of all."""
    if len(partials) == 1:
        return partials[0]
    largest, total, Y = (torch.stack(parts) for parts in zip(*partials, strict=True))
    highest = largest.amax(0)
    weight = (largest - highest).exp_()
    return highest, (weight * total).sum(0), (weight * Y).sum(0)
