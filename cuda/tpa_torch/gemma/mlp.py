"""The gated MLP of a block. Twin of `tpa_ref.gemma.mlp`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tpa_ref.gemma.weights import LayerWeights

from ..fast.linear import linear


def mlp(a_bqm: Tensor, w: LayerWeights) -> Tensor:
    """Gated MLP: W_down (gelu(W_gate x) * W_up x)."""
    return linear(gelu_tanh(linear(a_bqm, w.W_gate_fm)) * linear(a_bqm, w.W_up_fm), w.W_down_mf)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, which Gemma was trained with."""
    return F.gelu(x, approximate="tanh")
