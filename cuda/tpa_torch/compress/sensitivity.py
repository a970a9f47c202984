"""How much the model feels an error in what it caches. Twin of `tpa_ref.sensitivity`, which writes the way back out;
here autograd goes it, one layer at a time, so that no more than one layer's activations are held.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.compress.sensitivity import ROWS
from tpa_ref.gemma.weights import LayerWeights
from tpa_ref.trace import Watch

from ..core.factorize import second_moment
from ..core.norm import rms_norm


@torch.enable_grad()
def block_backward(
    model: Any, dy_bqm: Tensor, x_bqm: Tensor, layer: int, w: LayerWeights, positions_bq: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one layer of the dense model, given that by its output: by its input, normed K and V.

    Shapes: dy and x [b,q,m]; positions [b,q], or the model's `views` of them -> dx [b,q,m], dK [b,q,g,d], dV [b,q,g,e].
    """
    views = model.views(positions_bq) if isinstance(positions_bq, np.ndarray) else positions_bq
    x_bqm = x_bqm.detach().requires_grad_()
    leaves: dict[str, Tensor] = {}
    watch = Watch({"attn.K_bkgd": leaves.__setitem__, "attn.V_bkge": leaves.__setitem__})
    y_bqm = model.block(x_bqm, layer, w, views, None, watch)
    dx_bqm, dK, dV = torch.autograd.grad(y_bqm, (x_bqm, leaves["attn.K_bkgd"], leaves["attn.V_bkge"]), dy_bqm)
    return dx_bqm, dK, dV


@torch.no_grad()
def logits_backward(model: Any, x_bqm: Tensor, rng: np.random.Generator) -> Tensor:
    """Gradient by the last state of -log p(y), for one y a position drawn from the model's own p. [b,q,m] twice."""
    embed_vm, norm_m, eps = model.weights.embed_vm, model.weights.final_norm_m, model.config.rms_eps
    gradients = []
    for part_bqm in x_bqm.split(ROWS, 1):
        with torch.enable_grad():
            part_bqm = part_bqm.detach().requires_grad_()
            h_bqm = rms_norm(part_bqm, norm_m, eps)
        L_bqv = F.linear(h_bqm.detach(), embed_vm)
        P_bqv = torch.softmax(L_bqv if L_bqv.dtype == torch.float64 else L_bqv.float(), -1)
        y_bq1 = draw(P_bqv, rng)[..., None]
        P_bqv.scatter_add_(-1, y_bq1, torch.full_like(y_bq1, -1, dtype=P_bqv.dtype))
        dh_bqm = F.linear(P_bqv.to(embed_vm.dtype), embed_vm.mT)
        gradients.append(torch.autograd.grad(h_bqm, part_bqm, dh_bqm)[0])
    return torch.cat(gradients, 1)


def draw(P_bqv: Tensor, rng: np.random.Generator) -> Tensor:
    """One token a position, by its probability: [b,q,v] -> [b,q]."""
    wide = torch.float32 if P_bqv.device.type == "mps" else torch.float64
    sums_bqv = P_bqv.to(wide).cumsum(-1)
    level_bq1 = torch.from_numpy(rng.random(tuple(P_bqv.shape[:2]))).to(sums_bqv)[..., None] * sums_bqv[..., -1:]
    return (sums_bqv < level_bq1).sum(-1).clamp(max=P_bqv.shape[-1] - 1)


# ---- layer by layer ----


def begin_backward(model: Any, states: list[Tensor], seed: int) -> list[Tensor]:
    """Gradients by the states behind the last layer, one a window."""
    rng = np.random.default_rng(seed)
    return [logits_backward(model, x_bqm, rng) for x_bqm in states]


def back_through_layer(
    model: Any, layer: int, states: list[Tensor], gradients: list[Tensor]
) -> tuple[list[Tensor], tuple[np.ndarray, np.ndarray]]:
    """(gradients by the states in front of a layer, Fisher matrices of its K and V, [g,d,g,d] each)."""
    block = model.weights.layers[layer]
    views = {length: model.views(np.arange(length)[None]) for length in {x_bqm.shape[1] for x_bqm in states}}
    in_front: list[Tensor] = []
    sums: list[Any] = [0.0, 0.0]
    for x_bqm, dy_bqm in zip(states, gradients, strict=True):
        dx_bqm, *d = block_backward(model, dy_bqm, x_bqm, layer, block, views[x_bqm.shape[1]])
        in_front.append(dx_bqm)
        sums = [total + second_moment(one).cpu().numpy().astype(np.float64) for total, one in zip(sums, d, strict=True)]
    tokens = sum(x_bqm.shape[1] for x_bqm in states)
    return in_front, (sums[0] / tokens, sums[1] / tokens)
