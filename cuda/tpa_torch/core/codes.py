"""Spectral codes: coefficients with a width of their own each. Twin of `tpa_ref.core.codes`: the same codes."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tpa_ref.core.codes import MAX_WIDTH, digits, odd_compander, packed_bytes, thresholds

from ..lasting import lasting

__all__ = ["MAX_WIDTH", "odd_compander", "packed_bytes"]

FEW_TOKENS = 8


@dataclass(frozen=True)
class Piece:
    """Digits of neighbouring coefficients in neighbouring bytes: (rows of bytes >> shift) & mask. first: nothing has
    been written there yet.
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
    [R] each. For a few tokens all widths and digits in one: thresholds [R,255], infinite where there are no more, and
    (byte, column, left, mask, shift) of every digit.
    """

    parts: list
    runs: list
    pieces: list[Piece]
    scale_s: Tensor
    kappa_s: Tensor
    offset_s: Tensor
    thresholds_st: Tensor
    every_digit: Tensor


@lru_cache(maxsize=512)
@lasting()
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
    thresholds_st = np.full((len(widths), (1 << max(widths, default=0)) - 1), np.inf, np.float32)
    for coefficient, width in enumerate(widths):
        thresholds_st[coefficient, : (1 << width) - 1] = thresholds(width)
    every = [np.broadcast_arrays(x.byte, x.column, x.left, (1 << x.bits) - 1, x.shift) for x in digits(widths)]
    every_digit = np.concatenate([np.zeros((5, 0), np.int64), *every], 1)
    once = (torch.from_numpy(x).to(device) for x in (thresholds_st, every_digit))
    return Packing(parts, runs, unpacking(widths), scale_s, kappa_s, offset_s, *once)


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


def quantize(C_bks: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Nearest level of every coefficient, packed: [..., R] of unit variance -> codes uint8 [..., bytes]."""
    if C_bks.shape[:-1].numel() <= FEW_TOKENS:
        return _quantize_few(C_bks, widths)
    spec = packing(widths, C_bks.device)
    codes = torch.zeros(C_bks.shape, dtype=torch.uint8, device=C_bks.device)
    for columns, edges in spec.runs:
        codes[..., columns] = torch.bucketize(C_bks[..., columns].float().contiguous(), edges).to(torch.uint8)
    packed = codes.new_zeros((*codes.shape[:-1], packed_bytes(widths)))
    for mask, shift, byte, columns, left in spec.parts:
        packed[..., byte] |= ((codes[..., columns] >> left) & mask) << shift
    return packed


def _quantize_few(C_bks: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The same in a handful of steps, which is what a single token waits for."""
    spec = packing(widths, C_bks.device)
    byte, column, left, mask, shift = spec.every_digit
    codes = (C_bks.float()[..., None] > spec.thresholds_st).sum(-1)
    pieces = ((codes[..., column] >> left) & mask) << shift
    packed = codes.new_zeros((*codes.shape[:-1], packed_bytes(widths)))
    return packed.index_add_(-1, byte, pieces).to(torch.uint8)


def dequantize(packed: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Codes -> coefficients of unit variance: uint8 [..., bytes] -> float32 [..., R]."""
    spec = packing(widths, packed.device)
    codes = packed.new_zeros((*packed.shape[:-1], len(widths)))
    for mask, shift, byte, columns, left in spec.parts:
        codes[..., columns] |= ((packed[..., byte] >> shift) & mask) << left
    t = codes.float().mul_(2).add_(spec.offset_s)
    return t.square().mul_(spec.kappa_s).add_(1).mul_(t).mul_(spec.scale_s)
