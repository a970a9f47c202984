"""Compiled products of weight matrices with few rows, alone and of a layer (`cpu/matrices.hpp`, `cpu/layer.hpp`).

A few rows only wait for the weights to come from memory, so these are read as they are stored, once.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..int8 import Int8
from . import native
from .native import KINDS, LANES

MOST_ROWS = 4  # rows that still only wait for the weights
DTYPES = {torch.float32: KINDS["float32"], torch.bfloat16: KINDS["bfloat16"]}


class Matrix(ctypes.Structure):
    """[n,m] as it is stored."""

    _fields_ = (("kind", ctypes.c_int64), ("at", ctypes.c_void_p), ("scale", ctypes.c_void_p))


class Layer(ctypes.Structure):
    """The weights of a layer; the fields of `struct Layer`."""

    MATRICES = ("WQ_hdm", "WK_gdm", "WV_gem", "WO_mhe", "W_gate_fm", "W_up_fm", "W_down_mf")
    NORMS = ("attn_norm_m", "q_norm_d", "k_norm_d", "post_attn_norm_m", "mlp_norm_m", "post_mlp_norm_m")
    SIZES = ("kind", "m", "h", "g", "d", "f")
    _fields_ = (
        *((name, Matrix) for name in MATRICES),
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("eps", ctypes.c_double),
    )


def readable(W: Any) -> bool:
    """Can the compiled functions read this matrix, whose last axis is the one that is summed over?"""
    if isinstance(W, Int8):
        return W.device.type == "cpu" and W.codes_nm.is_contiguous() and W.scale_ns.is_contiguous()
    in_memory = isinstance(W, Tensor) and W.device.type == "cpu" and W.is_contiguous()
    return in_memory and W.dtype in DTYPES and W.shape[-1] % LANES == 0


def matrix(W: Tensor | Int8) -> Matrix:
    """A readable matrix; it must outlive what is returned."""
    if isinstance(W, Int8):
        return Matrix(KINDS["int8"], W.codes_nm.data_ptr(), W.scale_ns.data_ptr())
    return Matrix(DTYPES[W.dtype], W.data_ptr(), None)


# ---- one matrix ----


def linear_takes(x: Tensor, W_nm: Any) -> bool:
    """Is this a product of a matrix that can be read with few rows, outside of training?"""
    return (
        0 < x.numel() <= MOST_ROWS * W_nm.shape[-1]
        and x.dtype == W_nm.dtype
        and not torch.is_grad_enabled()
        and readable(W_nm)
        and native.available()
    )


def linear(x: Tensor, W_nm: Tensor | Int8, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.nn.functional.linear`: sums in float32, the result in x's dtype, or in another."""
    n, m = W_nm.shape
    rows = x.reshape(-1, m).float().contiguous()
    y = torch.empty(len(rows), n)
    native.call("tpa_linear", ctypes.byref(matrix(W_nm)), rows, y, len(rows), n, m)
    return y.view(*x.shape[:-1], n).to(dtype or x.dtype)


def widened(W_nm: Int8, first: int, last: int) -> Tensor:
    """Some rows of a readable matrix as numbers."""
    rows = torch.empty(last - first, W_nm.shape[1], dtype=W_nm.dtype)
    codes, scale = W_nm.codes_nm[first:last], W_nm.scale_ns[first:last]
    native.call("tpa_widen", codes, scale, DTYPES[W_nm.dtype], rows, rows.numel())
    return rows


# ---- a layer ----


def layer_of(w: Any, eps: float) -> Layer | None:
    """A layer's weights as the compiled functions read them; None where they cannot."""
    matrices, norms = ([getattr(w, name) for name in names] for names in (Layer.MATRICES, Layer.NORMS))
    (h, d, m), g, f = w.WQ_hdm.shape, w.WK_gdm.shape[0], w.W_gate_fm.shape[0]
    dtype = w.attn_norm_m.dtype
    alike = all(x.dtype == dtype for x in (*matrices, *norms))
    if not (alike and all(map(readable, (*matrices, *norms))) and d % (2 * LANES) == f % LANES == 0):
        return None
    norms_at = [x.data_ptr() for x in norms]
    return Layer(*map(matrix, matrices), *norms_at, DTYPES[dtype], m, h, g, d, f, eps)


def before(w: Layer, x_bqm: Tensor, turns_bqp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x -> Q normed and turned [b,q,h,d], K normed [b,q,g,d], V [b,q,g,d]."""
    b, q, _ = x_bqm.shape
    Q, K, V = (torch.empty((b, q, heads, w.d), dtype=x_bqm.dtype) for heads in (w.h, w.g, w.g))
    turns = torch.view_as_real(turns_bqp.contiguous())
    native.call("tpa_before", ctypes.byref(w), x_bqm, turns, _batch(turns), Q, K, V, b * q, q)
    return Q, K, V


def after(w: Layer, x_bqm: Tensor, O_bqhe: Tensor) -> Tensor:
    """The residual stream before attention, and what attention gives -> the stream behind the layer."""
    y_bqm = torch.empty_like(x_bqm)
    rows = x_bqm.shape[0] * x_bqm.shape[1]
    native.call("tpa_after", ctypes.byref(w), x_bqm, O_bqhe.contiguous(), y_bqm, rows)
    return y_bqm


# ---- RoPE ----


def turn_takes(X_bqsd: Tensor) -> bool:
    """Are these a few heads, or b's, that are turned outside of training?"""
    return (
        0 < X_bqsd.shape[0] * X_bqsd.shape[1] <= MOST_ROWS
        and X_bqsd.dtype in DTYPES
        and X_bqsd.device.type == "cpu"
        and X_bqsd.shape[-1] % (2 * LANES) == 0
        and not torch.is_grad_enabled()
        and native.available()
    )


def turned(X_bqsd: Tensor, turns_bqp: Tensor) -> Tensor:
    """RoPE, by cos + i sin of each position."""
    X_bqsd, turns = X_bqsd.contiguous(), torch.view_as_real(turns_bqp.contiguous())
    (b, q, s, d), out = X_bqsd.shape, torch.empty_like(X_bqsd)
    native.call("tpa_turn", X_bqsd, DTYPES[X_bqsd.dtype], turns, _batch(turns), out, b * q, q, s, d)
    return out


def _batch(turns_bqp2: Tensor) -> int:
    """Numbers from one row of a batch to the next; all may stand alike."""
    return 0 if len(turns_bqp2) == 1 else turns_bqp2.stride(0)
