"""The way back through a layer: the chain rule, written out, a function for each step of `model.Model.block`.

`compress.calibrate` asks for the gradients of the normed K and V of every layer; only one layer's are held at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..core import attention, masks, rope
from ..core.norm import rms_norm, rms_scale
from ..core.transform import second_moment
from .mlp import gelu_tanh, mlp
from .weights import LayerWeights

einsum = partial(np.einsum, optimize=True)
ROWS = 128  # positions whose probabilities are held at once


def rms_norm_backward(dy: np.ndarray, x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Gradient of x through y = x s (1 + w), s = 1 / rms(x): dx = s (g - x s^2 mean(g x)) with g = dy (1 + w).

    Shapes: dy and x [..., d], w [d] -> [..., d].
    """
    s = rms_scale(x, eps)
    g = dy * (1 + w)
    return s * (g - x * s**2 * (g * x).mean(-1, keepdims=True))


def softmax_backward(dP_bhqk: np.ndarray, P_bhqk: np.ndarray) -> np.ndarray:
    """Gradient of the logits through P = softmax(L): dL = P (dP - sum_k P dP)."""
    return P_bhqk * (dP_bhqk - (P_bhqk * dP_bhqk).sum(-1, keepdims=True))


def gelu_tanh_backward(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Gradient of x through GELU in its tanh approximation.

    >>> gelu_tanh_backward(np.array([1.0]), np.array([0.0])).tolist()
    [0.5]
    """
    c = (2 / np.pi) ** 0.5
    t = np.tanh(c * (x + 0.044715 * x**3))
    return dy * 0.5 * (1 + t + x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))


def mlp_backward(dz_bqm: np.ndarray, a_bqm: np.ndarray, w: LayerWeights) -> np.ndarray:
    """Gradient of the input a through z = W_down (gelu(W_gate a) * W_up a)."""
    gate_bqf, up_bqf = einsum("bqm,fm->bqf", a_bqm, w.W_gate_fm), einsum("bqm,fm->bqf", a_bqm, w.W_up_fm)
    dh_bqf = einsum("bqm,mf->bqf", dz_bqm, w.W_down_mf)
    dgate_bqf = gelu_tanh_backward(dh_bqf * up_bqf, gate_bqf)
    dup_bqf = dh_bqf * gelu_tanh(gate_bqf)
    return einsum("bqf,fm->bqm", dgate_bqf, w.W_gate_fm) + einsum("bqf,fm->bqm", dup_bqf, w.W_up_fm)


def over_queries(P_bhqk: np.ndarray, X_bqhd: np.ndarray, g: int) -> np.ndarray:
    """Sum of p x over the queries and the n query heads of each KV head: [b,h,q,k], [b,q,h,d] -> [b,k,g,d]."""
    b, h, q, k = P_bhqk.shape
    P_bgnkq = P_bhqk.reshape(b, g, h // g, q, k).swapaxes(-1, -2)
    X_bgnqd = attention.split_heads(X_bqhd, g).transpose(0, 2, 3, 1, 4)
    return (P_bgnkq @ X_bgnqd).sum(2).transpose(0, 2, 1, 3)


def block_backward(
    model: Any, dy_bqm: np.ndarray, x_bqm: np.ndarray, layer: int, w: LayerWeights, positions_bq: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of one layer of the dense model, given that of its output: of its input, normed K and V.

    Shapes: dy and x [b,q,m], positions [b,q] -> dx [b,q,m], dK [b,q,g,d], dV [b,q,g,e].
    """
    config = model.config
    eps, scale = config.rms_eps, config.query_scale
    tables = rope.rope_tables(positions_bq, config.head_dim, *config.rope(config.is_global[layer]))

    # forwards again, keeping what the way back needs
    a_bqm = rms_norm(x_bqm, w.attn_norm_m, eps)
    rawQ_bqhd, rawK_bkgd = einsum("bqm,hdm->bqhd", a_bqm, w.WQ_hdm), einsum("bkm,gdm->bkgd", a_bqm, w.WK_gdm)
    Q_bqhd = rope.rotate(rms_norm(rawQ_bqhd, w.q_norm_d, eps), *tables)
    K_bkgd = rope.rotate(rms_norm(rawK_bkgd, w.k_norm_d, eps), *tables)
    V_bkge = einsum("bkm,gem->bkge", a_bqm, w.WV_gem)
    seen_bqk = masks.visible(positions_bq, positions_bq, config.window(layer))
    P_bhqk = attention.softmax(masks.apply_mask(attention.scores_dense(Q_bqhd, K_bkgd, scale), seen_bqk))
    o_bqm = einsum("bqhe,mhe->bqm", attention.values_dense(P_bhqk, V_bkge), w.WO_mhe)

    # backwards: MLP, then attention
    dy_bqm = mlp_block_backward(dy_bqm, x_bqm + rms_norm(o_bqm, w.post_attn_norm_m, eps), w, eps)
    do_bqm = rms_norm_backward(dy_bqm, o_bqm, w.post_attn_norm_m, eps)
    dO_bqhe = einsum("bqm,mhe->bqhe", do_bqm, w.WO_mhe)
    dQ_bqhd, dK_bkgd, dV_bkge = attention_backward(dO_bqhe, Q_bqhd, K_bkgd, V_bkge, P_bhqk, scale)
    cos, sin = tables
    dQ_bqhd, dK_bkgd = rope.rotate(dQ_bqhd, cos, -sin), rope.rotate(dK_bkgd, cos, -sin)  # R^T: turned back

    # backwards: projections
    da_bqm = einsum("bqhd,hdm->bqm", rms_norm_backward(dQ_bqhd, rawQ_bqhd, w.q_norm_d, eps), w.WQ_hdm)
    da_bqm += einsum("bkgd,gdm->bkm", rms_norm_backward(dK_bkgd, rawK_bkgd, w.k_norm_d, eps), w.WK_gdm)
    da_bqm += einsum("bkge,gem->bkm", dV_bkge, w.WV_gem)
    return dy_bqm + rms_norm_backward(da_bqm, x_bqm, w.attn_norm_m, eps), dK_bkgd, dV_bkge


def mlp_block_backward(dz_bqm: np.ndarray, y_bqm: np.ndarray, w: LayerWeights, eps: float) -> np.ndarray:
    """Gradient of y through y + norm(mlp(norm(y)))."""
    c_bqm = rms_norm(y_bqm, w.mlp_norm_m, eps)
    dc_bqm = mlp_backward(rms_norm_backward(dz_bqm, mlp(c_bqm, w), w.post_mlp_norm_m, eps), c_bqm, w)
    return dz_bqm + rms_norm_backward(dc_bqm, y_bqm, w.mlp_norm_m, eps)


def attention_backward(
    dO_bqhe: np.ndarray, Q_bqhd: np.ndarray, K_bkgd: np.ndarray, V_bkge: np.ndarray, P_bhqk: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of the rotated Q and K, and of V, through O = P V, P = softmax(scale Q K^T)."""
    g = K_bkgd.shape[2]
    dP_bhqk = attention.scores_dense(dO_bqhe, V_bkge, 1.0)  # dO . v, as logits are q . k
    dL_bhqk = softmax_backward(dP_bhqk, P_bhqk) * scale
    dQ_bqhd = attention.values_dense(dL_bhqk, K_bkgd)  # sum over k, as values are
    return dQ_bqhd, over_queries(dL_bhqk, Q_bqhd, g), over_queries(P_bhqk, dO_bqhe, g)


def logits_backward(model: Any, x_bqm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gradient of -log p(y) with respect to the last state, one y per position drawn from the model's own p.

    Shapes: x [b,q,m] -> [b,q,m].
    """
    eps = model.config.rms_eps
    head_vm, norm_m = model.weights.head_vm, model.weights.final_norm_m
    dh_bqm = np.empty_like(x_bqm)
    for step in range(0, x_bqm.shape[1], ROWS):
        part = slice(step, step + ROWS)
        h_bqm = rms_norm(x_bqm[:, part], norm_m, eps)
        P_bqv = attention.softmax(model.logits(h_bqm))
        y_bq = draw(P_bqv, rng)
        np.put_along_axis(P_bqv, y_bq[..., None], np.take_along_axis(P_bqv, y_bq[..., None], -1) - 1, -1)
        dh_bqm[:, part] = einsum("bqv,vm->bqm", P_bqv, head_vm)
    return rms_norm_backward(dh_bqm, x_bqm, norm_m, eps)


def draw(P_bqv: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One token a position, by its probability: [b,q,v] -> [b,q]."""
    sums_bqv = np.cumsum(P_bqv, -1, dtype=np.float64)
    level_bq1 = rng.random(P_bqv.shape[:2])[..., None] * sums_bqv[..., -1:]
    return np.minimum((sums_bqv < level_bq1).sum(-1), P_bqv.shape[-1] - 1)


def moments(K_bkgd: np.ndarray, V_bkge: np.ndarray, Z_bkz: np.ndarray | None) -> dict[str, np.ndarray]:
    """Sums over tokens in float64, of x = (K, V): x x^T, x and, with token vectors, x z^T."""
    X_bkgd = np.concatenate([K_bkgd, V_bkge], 2).astype(np.float64)
    sums = {"M": second_moment(X_bkgd), "mean": X_bkgd.sum((0, 1))}
    return sums if Z_bkz is None else sums | {"N": einsum("bkgd,bkz->gdz", X_bkgd, Z_bkz.astype(np.float64))}
