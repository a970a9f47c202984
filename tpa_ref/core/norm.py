"""RMSNorm and GELU, and how Gemma 3's QK-norm folds into TPA factors."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """x / rms(x) * (1 + w) over the last axis. Gemma stores w around zero.

    Shapes: x [..., d], w [d] -> [..., d]; computed in float32 or better, returned in x's dtype.

    >>> rms_norm(np.array([3.0, 4.0]), np.zeros(2)).round(3).tolist()
    [0.849, 1.131]
    """
    x32 = x if x.dtype == np.float64 else x.astype(np.float32)
    return (x32 * rms_scale(x32, eps) * (1 + w)).astype(x.dtype)


def rms_scale(x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """1 / rms(x) over the last axis, kept as an axis of size one: [..., d] -> [..., 1]."""
    return 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)


def fold_into_contextual(
    A_bksg: np.ndarray, B_bksd: np.ndarray, w_d: np.ndarray, eps: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """QK-norm of K given as factors, without forming it anew: the scale goes into a, the gain into b.

    K = (1/R) sum_s a_s (x) b_s is not yet normed; the factors returned give RMSNorm(K) exactly, because the norm
    multiplies row g by a scalar (an entry of a) and column d by 1 + w_d (an entry of b). Not in the paper: Gemma
    norms K before RoPE. A constant A, or coefficients shared by all heads, cannot carry a scalar per head; that
    is why those modes factorize the normed K instead.

    Shapes: A [b,k,s,g], B [b,k,s,d], w [d] -> the same two shapes.
    """
    K_bkgd = np.einsum("bksg,bksd->bkgd", A_bksg, B_bksd) / A_bksg.shape[2]
    scale_bkg = rms_scale(K_bkgd, eps)[..., 0]
    return A_bksg * scale_bkg[:, :, None, :], B_bksd * (1 + w_d)


def fold_into_fixed_b(
    A_bkgs: np.ndarray, B_gsd: np.ndarray, w_d: np.ndarray, eps: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """The same fold for `fixed-b`: 1/rms per token and head into a, 1 + w into the constant B.

    Shapes: A [b,k,g,s], B [g,s,d], w [d] -> the same two shapes.
    """
    scale_bkg1 = rms_scale(np.einsum("bkgs,gsd->bkgd", A_bkgs, B_gsd), eps)
    return A_bkgs * scale_bkg1, B_gsd * (1 + w_d)
