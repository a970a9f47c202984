"""Attention of many queries: K and V formed once, as the cache holds them, then fused attention block by block.

With many queries forming K and V costs little beside the products. What a block of queries cannot see at all is left
out, and masks are made for a block only, so that memory grows with the length of the text and not with its square.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.core.mode import Tokens

from ..core.attention import split_heads
from ..core.cache import Segment
from .blocks import blocks_of


def attend(Q_bqhd: Tensor, keys: Any, scale: float) -> Tensor:
    """Rotated queries over all that they read: [b,q,h,d] -> [b,q,h,e]."""
    sides = list(zip(*(formed(segment, Q_bqhd.dtype) for segment in keys.segments), strict=True))
    outputs = []
    for queries, of_segments in blocks_of(keys):
        K_bgkd, V_bgke = (
            joined([side[:, here] for side, here in zip(of_side, of_segments, strict=True)], 1).transpose(1, 2)
            for of_side in sides
        )
        seen = [keys.seen(segment, queries, here) for segment, here in zip(keys.segments, of_segments, strict=True)]
        outputs.append(fused(Q_bqhd[:, queries], K_bgkd, V_bgke, joined(seen, -1), scale))
    return joined(outputs, 1)


def formed(segment: Segment, dtype: torch.dtype) -> tuple[Any, Any]:
    """K after RoPE and V of a segment, [b,k,g,d] each."""
    parts_k, parts_v = segment.pair.load(segment.stored, dtype)
    Z_bkz = segment.tokens.Z_bkz if segment.pair.reads_tokens else None  # looked up once, for K and for V
    tokens: Any = Tokens(segment.tokens.tables, Z_bkz)
    return segment.pair.k.rotated_keys(parts_k, tokens), segment.pair.v.decode(parts_v, tokens)


def joined(parts: list[Tensor], axis: int) -> Tensor:
    """One after the other; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def fused(Q_bqhd: Tensor, K_bgkd: Tensor, V_bgke: Tensor, seen_bqk: Tensor, scale: float) -> Tensor:
    """The queries of a KV head are more queries of one head: K and V are not repeated."""
    g, (b, q, k) = K_bgkd.shape[1], seen_bqk.shape
    Q_bgnqd = split_heads(Q_bqhd, g).permute(0, 2, 3, 1, 4)
    n = Q_bgnqd.shape[2]
    seen_b1xk = seen_bqk[:, None, None].expand(b, 1, n, q, k).flatten(2, 3)
    O_bgxe = F.scaled_dot_product_attention(Q_bgnqd.flatten(2, 3), K_bgkd, V_bgke, attn_mask=seen_b1xk, scale=scale)
    return O_bgxe.unflatten(2, (n, q)).permute(0, 3, 1, 2, 4).flatten(2, 3)
