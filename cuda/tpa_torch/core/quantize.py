"""How a cached number is stored: as floats, int8 or packed int4. Twin of `tpa_ref.core.quantize`: the same codes."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.core.quantize import GROUP, HALF_MAX, field_shapes

__all__ = ["GROUP", "field_shapes"]


def torch_dtype(kind: np.dtype) -> torch.dtype:
    """The torch dtype of a NumPy one (ml_dtypes' bfloat16 too).

    >>> torch_dtype(np.dtype(np.int8))
    torch.int8
    """
    return getattr(torch, kind.name)


def quantize(x: Tensor, dtype: str) -> dict[str, Tensor]:
    """Encode along the last axis: [..., n] -> the arrays of `field_shapes(n, dtype)`, leading axes kept."""
    if dtype not in ("int8", "int4"):
        return {"x": x.to(getattr(torch, dtype))}
    n, groups = x.shape[-1], _grouped(x.float())
    if dtype == "int8":
        scale = _half(groups.abs().amax(-1) / 127)
        return {"codes": _codes(groups, scale, -127, 127, n), "scale": scale}
    minimum = _half(groups.amin(-1))
    low = minimum.float()
    scale = _half(((groups.amax(-1) - low) / 15).clamp(min=0))
    codes = F.pad(_codes(groups - low[..., None], scale, 0, 15, n), (0, n % 2))
    return {"codes": codes[..., 0::2] | (codes[..., 1::2] << 4), "scale": scale, "minimum": minimum}


def dequantize(fields: dict[str, Tensor], dtype: str, n: int) -> Tensor:
    """The numbers back; whole numbers become float32, floats stay what they are."""
    if "x" in fields:
        return fields["x"]
    codes = fields["codes"]
    if dtype == "int4":
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :n]
    groups = _grouped(codes.float()) * fields["scale"].float()[..., None]
    if dtype == "int4":
        groups = groups + fields["minimum"].float()[..., None]
    return groups.flatten(-2)[..., :n]


def _codes(groups: Tensor, scale: Tensor, least: int, most: int, n: int) -> Tensor:
    """The nearest whole number of scales, [..., n]; 0 where the scale is zero."""
    step = scale.float()[..., None]
    codes = torch.where(step > 0, groups / step, 0).round().clamp(least, most)
    return codes.to(torch.int8 if least < 0 else torch.uint8).flatten(-2)[..., :n]


def _grouped(x: Tensor) -> Tensor:
    """[..., n] -> [..., groups, min(64, n)]; a shorter last group is filled up with its last number."""
    n = x.shape[-1]
    width = min(GROUP, n)
    if missing := -n % width:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
    return x.unflatten(-1, (-1, width))


def _half(x: Tensor) -> Tensor:
    """float16, saturating."""
    return x.clamp(-HALF_MAX, HALF_MAX).half()
