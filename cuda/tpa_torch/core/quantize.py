"""How a cached number is stored: float32, bfloat16, int8, packed int4. Twin of `tpa_ref.quantize`: the same codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.core import quantize as reference
from tpa_ref.core.quantize import (
    DISTORTION,
    GROUP,
    HALF_MAX,
    MAX_WIDTH,
    PLANES,
    Digits,
    digits,
    levels,
    odd_compander,
    packed_bytes,
    stored_bytes,
    thresholds,
)

__all__ = [
    "DISTORTION",
    "GROUP",
    "MAX_WIDTH",
    "PLANES",
    "Digits",
    "dequantize",
    "dequantize_int4",
    "dequantize_int8",
    "digits",
    "field_shapes",
    "levels",
    "odd_compander",
    "packed_bytes",
    "quantize",
    "quantize_int4",
    "quantize_int8",
    "stored_bytes",
    "thresholds",
]


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


# ---- spectral: each coefficient has its own width, from 0 to 8 bits ----

FEW_TOKENS = 8


@dataclass(frozen=True)
class Piece:
    """Digits of neighbouring coefficients in neighbouring bytes: (rows of bytes >> shift) & mask. first: nobody has
    written there yet.
    """

    rows: slice
    coefficients: slice
    shift: int
    mask: int
    first: bool


@dataclass(frozen=True)
class Packing:
    """parts: (mask, shift, bytes, columns, shifts in the code) of `digits`; runs: (columns, thresholds); pieces: of
    `unpacking`; level = s (t + kappa t^3) of the odd number t = 2 code + 1 - 2^w, with s and kappa rescaled to it,
    [R] each.
    """

    parts: list
    runs: list
    pieces: list[Piece]
    scale_s: Tensor
    kappa_s: Tensor
    offset_s: Tensor


@lru_cache(maxsize=512)
def packing(widths: tuple[int, ...], device: torch.device) -> Packing:
    """What packing and unpacking need of a layer's widths, made once for each device."""
    parts = [
        (
            (1 << part.bits) - 1,
            part.shift,
            _index(part.byte, device),
            _index(part.column, device),
            torch.from_numpy(part.left.astype(np.uint8)).to(device),
        )
        for part in digits(widths)
    ]
    runs = [
        (_index(np.flatnonzero(np.array(widths) == width), device), torch.from_numpy(thresholds(width)).to(device))
        for width in sorted(set(widths))
    ]
    rows = [(*odd_compander(width), 1.0 - (1 << width)) for width in widths]
    scale_s, kappa_s, offset_s = torch.tensor(rows, dtype=torch.float32, device=device).reshape(-1, 3).unbind(-1)
    return Packing(parts, runs, unpacking(widths), scale_s, kappa_s, offset_s)


def _index(numbers: np.ndarray, device: torch.device) -> slice | Tensor:
    """Numbers as an index: a slice where they follow on each other."""
    if int(numbers[-1]) - int(numbers[0]) + 1 == len(numbers):
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers).to(device)


def unpacking(widths: tuple[int, ...]) -> list[Piece]:
    """The pieces in which codes are put together again.

    >>> [(piece.rows, piece.coefficients, piece.shift, piece.mask, piece.first) for piece in unpacking((4, 4, 2))]
    [(slice(0, 1, None), slice(0, 1, None), 0, 15, True), (slice(0, 1, None), slice(1, 2, None), 4, 15, True), \
(slice(1, 2, None), slice(2, 3, None), 0, 3, True)]
    """
    pieces = []
    for part in digits(widths):
        joined = (np.diff(part.column) == 1) & (np.diff(part.left) == 0)
        for run in np.split(np.arange(len(part.column)), np.flatnonzero(~joined) + 1):
            byte, column, left = (int(x[run[0]]) for x in (part.byte, part.column, part.left))
            rows, coefficients = slice(byte, byte + len(run)), slice(column, column + len(run))
            mask = ((1 << part.bits) - 1) << left
            pieces.append(Piece(rows, coefficients, part.shift - left, mask, left == 0))
    return sorted(pieces, key=lambda piece: not piece.first)


@dataclass(frozen=True)
class _AtOnce:
    """What packing of a few tokens needs, all widths and digits in one: thresholds [R,255], infinite where there are
    no more; and for every piece of a code its column, shifts, mask and byte.
    """

    thresholds_st: Tensor
    column: Tensor
    left: Tensor
    mask: Tensor
    shift: Tensor
    byte: Tensor


@lru_cache(maxsize=512)
def _at_once(widths: tuple[int, ...], device: torch.device) -> _AtOnce:
    """Made once for each layer and device."""
    most = (1 << max(widths, default=0)) - 1
    thresholds_st = np.full((len(widths), most), np.inf, np.float32)
    for coefficient, width in enumerate(widths):
        thresholds_st[coefficient, : (1 << width) - 1] = thresholds(width)
    parts = digits(widths)
    joined = [
        np.concatenate([np.zeros(0, np.int64), *(np.broadcast_to(make(part), part.byte.shape) for part in parts)])
        for make in (
            lambda part: part.column,
            lambda part: part.left,
            lambda part: (1 << part.bits) - 1,
            lambda part: part.shift,
            lambda part: part.byte,
        )
    ]
    return _AtOnce(
        torch.from_numpy(thresholds_st).to(device),
        *(torch.from_numpy(array.astype(np.int64)).to(device) for array in joined),
    )


def quantize_spectral(C_bks: Tensor, widths: tuple[int, ...]) -> dict[str, Tensor]:
    """Nearest level of every coefficient, packed: [..., R] of unit variance -> codes uint8 [..., bytes]."""
    if C_bks.shape[:-1].numel() <= FEW_TOKENS:
        return _quantize_few(C_bks, widths)
    how = packing(widths, C_bks.device)
    codes = torch.zeros(C_bks.shape, dtype=torch.uint8, device=C_bks.device)
    for columns, edges in how.runs:
        codes[..., columns] = torch.bucketize(C_bks[..., columns].float().contiguous(), edges).to(torch.uint8)
    packed = codes.new_zeros((*codes.shape[:-1], packed_bytes(widths)))
    for mask, shift, byte, columns, left in how.parts:
        packed[..., byte] |= ((codes[..., columns] >> left) & mask) << shift
    return {"codes": packed}


def _quantize_few(C_bks: Tensor, widths: tuple[int, ...]) -> dict[str, Tensor]:
    """The same in a handful of steps, which is what a single token waits for."""
    how = _at_once(widths, C_bks.device)
    codes = (C_bks.float()[..., None] > how.thresholds_st).sum(-1)
    pieces = ((codes[..., how.column] >> how.left) & how.mask) << how.shift
    packed = codes.new_zeros((*codes.shape[:-1], packed_bytes(widths)))
    return {"codes": packed.index_add_(-1, how.byte, pieces).to(torch.uint8)}


def unpack_spectral(packed: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The inverse of the packing: uint8 [..., bytes] -> the code of each coefficient, uint8 [..., R]."""
    codes = packed.new_zeros((*packed.shape[:-1], len(widths)))
    for mask, shift, byte, columns, left in packing(widths, packed.device).parts:
        codes[..., columns] |= ((packed[..., byte] >> shift) & mask) << left
    return codes


def dequantize_spectral(fields: dict[str, Tensor], widths: tuple[int, ...]) -> Tensor:
    """Codes -> coefficients of unit variance, float32 [..., R]."""
    how = packing(widths, fields["codes"].device)
    t = unpack_spectral(fields["codes"], widths).float().mul_(2).add_(how.offset_s)
    return t.square().mul_(how.kappa_s).add_(1).mul_(t).mul_(how.scale_s)
