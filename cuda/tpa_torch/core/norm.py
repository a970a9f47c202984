"""RMSNorm as Gemma has it. Twin of `tpa_ref.core.norm`."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * (1 + w) over the last axis, computed in float32 or better, returned in x's dtype."""
    x32 = x if x.dtype == torch.float64 else x.float()
    return (x32 * rms_scale(x32, eps) * (1 + w.to(x32.dtype))).to(x.dtype)


def rms_scale(x: Tensor, eps: float = 1e-6) -> Tensor:
    """1 / rms(x) over the last axis, kept as an axis of size one."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
