"""Attention of many queries: K and V formed once, as the cache holds them, then fused attention block by block.

With many queries forming K and V costs little beside the products. What a block of queries cannot see at all is left
out, and masks are made for a block only, so that memory grows with the length of the text and not with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention import split_heads

Block = tuple[slice, Sequence[slice]]  # queries, and the keys of each segment that they may see
Formed = tuple[Tensor, Tensor]  # K [b,k,g,d], rotated, and V [b,k,g,e] of a segment


def attend(
    Q_bqhd: Tensor,
    segments: Sequence[Formed],
    blocks: Sequence[Block],
    seen: Callable[[Block], Tensor],
    scale: float,
) -> Tensor:
    """Rotated queries over formed keys and values: [b,q,h,d] -> [b,q,h,e]. seen: the mask [b,q,k] of a block."""
    outputs = []
    for block in blocks:
        queries, keys = block
        K_bgkd, V_bgke = (
            torch.cat([side[:, here] for side, here in zip(sides, keys, strict=True)], 1).transpose(1, 2)
            if len(keys) > 1
            else sides[0][:, keys[0]].transpose(1, 2)
            for sides in zip(*segments, strict=True)
        )
        outputs.append(_fused(Q_bqhd[:, queries], K_bgkd, V_bgke, seen(block), scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _fused(Q_bqhd: Tensor, K_bgkd: Tensor, V_bgke: Tensor, seen_bqk: Tensor, scale: float) -> Tensor:
    """The queries of a KV head are more queries of one head: K and V are not repeated."""
    g, (b, q, k) = K_bgkd.shape[1], seen_bqk.shape
    Q_bgnqd = split_heads(Q_bqhd, g).permute(0, 2, 3, 1, 4)
    n = Q_bgnqd.shape[2]
    seen_b1xk = seen_bqk[:, None, None].expand(b, 1, n, q, k).flatten(2, 3)
    O_bgxe = F.scaled_dot_product_attention(Q_bgnqd.flatten(2, 3), K_bgkd, V_bgke, attn_mask=seen_b1xk, scale=scale)
    return O_bgxe.unflatten(2, (n, q)).permute(0, 3, 1, 2, 4).flatten(2, 3)
