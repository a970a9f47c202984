"""How a cached number is stored: float32, bfloat16, int8, packed int4. Twin of `tpa_ref.core.quantize`: the same codes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.core import quantize as reference
from tpa_ref.core.quantize import GROUP, HALF_MAX, stored_bytes

__all__ = ["GROUP", "stored_bytes"]


def field_shapes(n: int, dtype: str) -> dict[str, tuple[int, torch.dtype]]:
    """The arrays that store n numbers, as {field: (length of its last axis, dtype)}."""
    return {name: (size, torch_dtype(kind)) for name, (size, kind) in reference.field_shapes(n, dtype).items()}


def torch_dtype(kind: np.dtype) -> torch.dtype:
    """The torch dtype of a NumPy one (ml_dtypes' bfloat16 too).

    >>> torch_dtype(np.dtype(np.int8))
    torch.int8
    """
    return getattr(torch, kind.name)


def quantize(x: Tensor, dtype: str) -> dict[str, Tensor]:
    """Encode along the last axis: [..., n] -> the arrays of `field_shapes(n, dtype)`, leading axes kept."""
    if dtype == "int8":
        return quantize_int8(x)
    if dtype == "int4":
        return quantize_int4(x)
    return {"x": x.to(getattr(torch, dtype))}


def dequantize(fields: dict[str, Tensor], dtype: str, n: int) -> Tensor:
    """The numbers back; whole numbers become float32, floats stay what they are."""
    if dtype == "int8":
        return dequantize_int8(fields, n)
    if dtype == "int4":
        return dequantize_int4(fields, n)
    return fields["x"]


def quantize_int8(x: Tensor) -> dict[str, Tensor]:
    """Symmetric: scale = max|x| / 127 per group, rounded to float16 before it is used."""
    groups = _grouped(x.float())
    scale = _half(groups.abs().amax(-1) / 127)
    step = scale.float()[..., None]
    codes = torch.where(step > 0, groups / step, 0).round().clamp(-127, 127).to(torch.int8)
    return {"codes": _ungrouped(codes, x.shape[-1]), "scale": scale}


def dequantize_int8(fields: dict[str, Tensor], n: int) -> Tensor:
    """scale * code."""
    return _ungrouped(_grouped(fields["codes"].float()) * fields["scale"].float()[..., None], n)


def quantize_int4(x: Tensor) -> dict[str, Tensor]:
    """Asymmetric: 16 steps from the group's minimum to its maximum; number 2i is the low half of byte i."""
    n = x.shape[-1]
    groups = _grouped(x.float(), edge=True)
    minimum = _half(groups.amin(-1))
    low = minimum.float()[..., None]
    scale = _half(((groups.amax(-1) - low[..., 0]) / 15).clamp(min=0))
    step = scale.float()[..., None]
    codes = torch.where(step > 0, (groups - low) / step, 0).round().clamp(0, 15).to(torch.uint8)
    codes = F.pad(_ungrouped(codes, n), (0, n % 2))
    return {"codes": codes[..., 0::2] | (codes[..., 1::2] << 4), "scale": scale, "minimum": minimum}


def dequantize_int4(fields: dict[str, Tensor], n: int) -> Tensor:
    """scale * code + minimum."""
    packed = fields["codes"]
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :n]
    scale, minimum = (fields[name].float()[..., None] for name in ("scale", "minimum"))
    return _ungrouped(_grouped(codes.float()) * scale + minimum, n)


def _grouped(x: Tensor, edge: bool = False) -> Tensor:
    """[..., n] -> [..., groups, min(64, n)]; a shorter last group is filled up with zeros or its last number."""
    n = x.shape[-1]
    width = min(GROUP, n)
    if missing := -n % width:
        filling = x[..., -1:].expand(*x.shape[:-1], missing)
        x = torch.cat([x, filling if edge else torch.zeros_like(filling)], -1)
    return x.unflatten(-1, (-1, width))


def _half(x: Tensor) -> Tensor:
    """float16, saturating."""
    return x.clamp(-HALF_MAX, HALF_MAX).half()


def _ungrouped(groups: Tensor, n: int) -> Tensor:
    return groups.flatten(-2)[..., :n]
