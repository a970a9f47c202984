"""The gated MLP of a block."""

from __future__ import annotations

from functools import partial

import numpy as np

from .weights import LayerWeights

einsum = partial(np.einsum, optimize=True)


def mlp(a_bqm: np.ndarray, w: LayerWeights) -> np.ndarray:
    """Gated MLP: W_down (gelu(W_gate x) * W_up x)."""
    gate_bqf = gelu_tanh(einsum("bqm,fm->bqf", a_bqm, w.W_gate_fm))
    return einsum("bqf,mf->bqm", gate_bqf * einsum("bqm,fm->bqf", a_bqm, w.W_up_fm), w.W_down_mf)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of GELU, which Gemma was trained with.

    >>> gelu_tanh(np.array([0.0, 1.0])).round(4).tolist()
    [0.0, 0.8412]
    """
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))
