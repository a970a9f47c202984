"""Attention on the codes, as an attention function of `transformers`: K and V are not formed for a new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from tpa_ref.trace import no_trace

from ..core.rope import rotate
from ..fast import attend

NAME = "tpa"
LIKE = ("sdpa", NAME)  # what it takes the place of: models that attend in another way go on doing so


@torch.compiler.disable
def tpa_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """Rotated queries [b,h,q,d] -> [b,q,h,d]. A key that a `TPACache` returned leads to the codes; with any other, or
    with many queries, this is their own `sdpa`.
    """
    keys = getattr(key, "tpa", None)
    if keys is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    held, place, shift = keys
    Q_bqhd = query.transpose(1, 2)
    if shift is not None:  # their positions are not ours
        Q_bqhd = rotate(Q_bqhd, shift.real, -shift.imag)
    with torch.no_grad():
        return attend.attend(Q_bqhd, held, place, no_trace), None


AttentionInterface.register(NAME, tpa_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
