"""Attention over what a cache holds, in whatever way is fastest where it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpa_ref.trace import Tracer, wants_whole_arrays

from ..core import masks
from ..core.attention import softmax
from . import decode, kernels, prefill
from .blocks import blocks_of


def attend(Q_bqhd: Tensor, keys: Any, model: Any, trace: Tracer) -> Tensor:
    """Rotated queries over all that they read (`core.cache.Keys`): [b,q,h,d] -> [b,q,h,e]."""
    scale = model.config.query_scale
    if wants_whole_arrays(trace) or Q_bqhd.dtype == torch.float64 or torch.is_grad_enabled():
        return plainly(Q_bqhd, keys, scale, trace)
    if kernels.serve(Q_bqhd, keys):
        return kernels.attend(Q_bqhd, keys, model)
    if Q_bqhd.shape[1] <= decode.FEW_QUERIES and Q_bqhd.device.type == "cpu":
        return decode.attend(Q_bqhd, keys, scale, model.scratch)
    return prefill.attend(Q_bqhd, keys, scale)


def plainly(Q_bqhd: Tensor, keys: Any, scale: float, trace: Tracer) -> Tensor:
    """By the functions of `core`, which can be traced, differentiated and compared with the reference: a block of
    queries at a time against the keys that it can see at all.
    """
    loaded = [segment.pair.load(segment.stored, Q_bqhd.dtype) for segment in keys.segments]
    outputs = []
    for queries, of_segments in blocks_of(keys, wants_whole_arrays(trace)):
        logits, values = [], []
        for here, segment, parts in zip(of_segments, keys.segments, loaded, strict=True):
            parts_k, parts_v = ({part: x[:, here] for part, x in side.items()} for side in parts)
            tokens = segment.tokens.of(here)
            L_bhqk = segment.pair.k.scores(Q_bqhd[:, queries], parts_k, tokens, scale)
            L_bhqk = L_bhqk if L_bhqk.dtype == torch.float64 else L_bhqk.float()
            logits.append(masks.apply_mask(L_bhqk, keys.seen(segment, queries, here)))
            values.append((segment.pair.v, parts_v, tokens))
        L_bhqk = trace("attn.L_bhqk", logits[0] if len(logits) == 1 else torch.cat(logits, -1))
        P_bhqk = trace("attn.P_bhqk", softmax(L_bhqk)).to(Q_bqhd.dtype)
        split_P = P_bhqk.split([L.shape[-1] for L in logits], -1)
        each = [mode.values(P, parts, tokens) for P, (mode, parts, tokens) in zip(split_P, values, strict=True)]
        outputs.append(each[0] if len(each) == 1 else torch.stack(each).sum(0))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
