"""A layer at decoding: what stands before attention and what stands behind it, each in one compiled call.

At the size of the tiny model the many small steps of `Model.block` take Python several times as long as the processor.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor

from tpa_ref.gemma.weights import LayerWeights
from tpa_ref.trace import Tracer, no_trace

from .kernels import matrices, native


class Layers:
    """The layers of a model as compiled functions read them, made once; where weights are replaced, anew."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[tuple[Any, ...], matrices.Layer | None]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        """A copy of a model has other weights."""
        return type(self), ()

    def take(self, model: Any, x_bqm: Tensor, layer: int, w: LayerWeights, trace: Tracer) -> matrices.Layer | None:
        """The layer, if it is to be computed so: a few rows that nobody looks into, of weights that stay in memory."""
        few = x_bqm.shape[0] * x_bqm.shape[1] <= matrices.MOST_ROWS and x_bqm.dtype in matrices.DTYPES
        if not few or trace is not no_trace or torch.is_grad_enabled() or x_bqm.device.type != "cpu":
            return None
        if model.query_factors[layer] is not None or not isinstance(model.weights.layers, list):
            return None
        found = self._layer(model, layer, w) if native.available() else None
        return found if found is not None and found.kind == matrices.DTYPES[x_bqm.dtype] else None

    def _layer(self, model: Any, layer: int, w: LayerWeights) -> matrices.Layer | None:
        weights, found = tuple(vars(w).values()), self._made.get(layer)
        if found is None or not all(map(is_, found[0], weights)):
            found = self._made[layer] = weights, matrices.layer_of(w, model.config.rms_eps)
        return found[1]


def block(model: Any, w: matrices.Layer, x_bqm: Tensor, layer: int, at: Any, cache: Any) -> Tensor:
    """`Model.block`; at: where the new tokens stand, as this layer sees it."""
    x_bqm = x_bqm.contiguous()
    Q_bqhd, K_bkgd, V_bkge = matrices.before(w, x_bqm, at.new_tokens.turns_bkp)
    O_bqhe = model.read(Q_bqhd, cache.append(layer, K_bkgd, V_bkge, at), no_trace)
    return matrices.after(w, x_bqm, O_bqhe)
