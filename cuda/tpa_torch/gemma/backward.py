"""The way back through a layer. Twin of `tpa_ref.gemma.backward`, which writes it out; here autograd goes it, one layer
at a time, so that no more than one layer's activations are held.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.gemma.backward import ROWS
from tpa_ref.gemma.weights import LayerWeights
from tpa_ref.trace import Watch

from ..core.norm import rms_norm
from ..fast.int8 import wide


@torch.enable_grad()
def block_backward(
    model: Any, dy_bqm: Tensor, x_bqm: Tensor, layer: int, w: LayerWeights, positions_bq: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, normed K and V of one layer: dx [b,q,m], dK [b,q,g,d], dV [b,q,g,e]."""
    at = model.positions(positions_bq)
    x_bqm = x_bqm.detach().requires_grad_()
    leaves: dict[str, Tensor] = {}
    watch = Watch({"attn.K_bkgd": leaves.__setitem__, "attn.V_bkge": leaves.__setitem__})
    y_bqm = model.block(x_bqm, layer, w, at, model.whole_text(*x_bqm.shape[:2]), watch)
    dx_bqm, dK, dV = torch.autograd.grad(y_bqm, (x_bqm, leaves["attn.K_bkgd"], leaves["attn.V_bkge"]), dy_bqm)
    return dx_bqm, dK, dV


@torch.no_grad()
def logits_backward(model: Any, x_bqm: Tensor, rng: np.random.Generator) -> Tensor:
    """Gradient of -log p(y) with respect to the last state, y drawn from the model's own p. [b,q,m] twice."""
    head_vm, norm_m, eps = wide(model.weights.head_vm), model.weights.final_norm_m, model.config.rms_eps
    gradients = []
    for part_bqm in x_bqm.split(ROWS, 1):
        with torch.enable_grad():
            part_bqm = part_bqm.detach().requires_grad_()
            h_bqm = rms_norm(part_bqm, norm_m, eps)
        L_bqv = F.linear(h_bqm.detach(), head_vm)
        P_bqv = torch.softmax(L_bqv if L_bqv.dtype == torch.float64 else L_bqv.float(), -1)
        y_bq1 = draw(P_bqv, rng)[..., None]
        P_bqv.scatter_add_(-1, y_bq1, torch.full_like(y_bq1, -1, dtype=P_bqv.dtype))
        dh_bqm = F.linear(P_bqv.to(head_vm.dtype), head_vm.mT)
        gradients.append(torch.autograd.grad(h_bqm, part_bqm, dh_bqm)[0])
    return torch.cat(gradients, 1)


BLOCK = 512  # tokens whose probabilities are added up first


def draw(P_bqv: Tensor, rng: np.random.Generator) -> Tensor:
    """One token a position, by its probability: [b,q,v] -> [b,q]. First a block of tokens, then a token in it."""
    device = P_bqv.device
    P_bqv = P_bqv if device.type == "cuda" else P_bqv.cpu()  # Apple GPUs know no float64
    P_bqns = F.pad(P_bqv, (0, -P_bqv.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums_bqn = P_bqns.sum(-1).double().cumsum(-1)
    level_bq1 = torch.from_numpy(rng.random(tuple(P_bqv.shape[:2]))).to(sums_bqn)[..., None] * sums_bqn[..., -1:]
    block_bq1 = (sums_bqn < level_bq1).sum(-1, keepdim=True).clamp(max=P_bqns.shape[2] - 1)
    P_bqs = P_bqns.take_along_dim(block_bq1[..., None], 2)[:, :, 0].double()
    inside_bqs = sums_bqn.gather(-1, block_bq1) - P_bqs.sum(-1, keepdim=True) + P_bqs.cumsum(-1)
    y_bq = block_bq1[..., 0] * BLOCK + (inside_bqs < level_bq1).sum(-1).clamp(max=BLOCK - 1)
    return y_bq.clamp(max=P_bqv.shape[-1] - 1).to(device)


def second_moment(X_bkgd: Tensor) -> Tensor:
    """Sum over tokens of x x^T for the flattened heads of each token: [b,k,g,d] -> [g,d,g,d], at least float32."""
    g, d = X_bkgd.shape[2:]
    X_tx = X_bkgd.reshape(-1, g * d)
    X_tx = X_tx if X_tx.dtype.itemsize == 8 else X_tx.float()
    return (X_tx.mT @ X_tx).reshape(g, d, g, d)


def moments(K_bkgd: Tensor, V_bkge: Tensor, Z_bkz: Tensor | None) -> dict[str, Tensor]:
    """Sums over tokens of x = (K, V): x x^T, x, and x z^T, at least in float32."""
    X_bkgd = torch.cat([K_bkgd, V_bkge], 2)
    X_bkgd = X_bkgd if X_bkgd.dtype == torch.float64 else X_bkgd.float()
    sums = {"M": second_moment(X_bkgd), "mean": X_bkgd.sum((0, 1))}
    if Z_bkz is None:
        return sums
    X_tx, Z_tz = X_bkgd.flatten(0, 1).flatten(1), Z_bkz.flatten(0, 1).to(X_bkgd.dtype)
    return sums | {"N": (X_tx.mT @ Z_tz).unflatten(0, X_bkgd.shape[2:])}
