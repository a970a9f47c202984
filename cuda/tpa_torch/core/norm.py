"""RMSNorm and GELU, and how Gemma 3's QK-norm folds into TPA factors. Twin of `tpa_ref.norm`."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * (1 + w) over the last axis, computed in float32 or better, returned in x's dtype."""
    x32 = x if x.dtype == torch.float64 else x.float()
    return (x32 * rms_scale(x32, eps) * (1 + w.to(x32.dtype))).to(x.dtype)


def rms_scale(x: Tensor, eps: float = 1e-6) -> Tensor:
    """1 / rms(x) over the last axis, kept as an axis of size one."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def fold_into_contextual(A_bksg: Tensor, B_bksd: Tensor, w_d: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """QK-norm of K given as factors: the scale per token and head goes into a, the gain 1 + w into b. Exact."""
    K_bkgd = torch.einsum("bksg,bksd->bkgd", A_bksg, B_bksd) / A_bksg.shape[2]
    scale_bkg = rms_scale(K_bkgd, eps)[..., 0]
    return A_bksg * scale_bkg[:, :, None, :], B_bksd * (1 + w_d)


def fold_into_fixed_b(A_bkgs: Tensor, B_gsd: Tensor, w_d: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The same fold for `fixed-b`: 1/rms per token and head into a, 1 + w into the constant B."""
    scale_bkg1 = rms_scale(torch.einsum("bkgs,gsd->bkgd", A_bkgs, B_gsd), eps)
    return A_bkgs * scale_bkg1, B_gsd * (1 + w_d)
