"""Rotary position embedding, half-split: feature i is paired with feature i + d/2. Twin of `tpa_ref.core.rope`."""

import torch
from torch import Tensor


def rope_tables(positions_bk: Tensor, head_dim: int, base: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/d) / scale: [b,k] -> two [b,k,d/2], float64 (float32 is too coarse)."""
    half = head_dim // 2
    pair = torch.arange(half, dtype=torch.float64, device=positions_bk.device)
    angle = positions_bk[..., None] * (base ** (-pair / half) / scale)
    return angle.cos(), angle.sin()


def rotate(x_bkgd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, the linear map R_t of Eq. (3.5), on every head (or rank) of every token; in float32 or better."""
    work = torch.float64 if x_bkgd.dtype == torch.float64 else torch.float32
    cos, sin = (table[:, :, None, :].to(work) for table in (cos, sin))
    first, second = x_bkgd.to(work).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_bkgd.dtype)
