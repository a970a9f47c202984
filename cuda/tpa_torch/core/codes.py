"""Spectral codes: the coefficients of a token as one string of bits. Twin of `tpa_ref.core.codes`: the same bytes."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tpa_ref.core import codes as reference
from tpa_ref.core.codes import FREE, LEVELS, SCALES, packed_bytes, places, reach_and_price

from ..lasting import lasting

__all__ = ["FREE", "LEVELS", "SCALES", "packed_bytes", "places", "reach_and_price"]


@lru_cache(maxsize=512)
@lasting()
def constants(widths: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """What packing and unpacking need of a layer's widths, made once for each device: where windows lie and bytes come
    from, and where the levels of each coefficient begin in `numbers`.
    """
    named = dict(zip(("at", "after", "shift"), places(widths), strict=True))
    named |= dict(zip(("column", "width", "right", "left"), reference.fillings(widths), strict=True))
    named |= {"table": 256 * np.array(widths, int)}
    return {name: torch.from_numpy(np.ascontiguousarray(x)).to(device) for name, x in named.items()}


@lru_cache(maxsize=16)
@lasting()
def numbers(device: torch.device) -> Tensor:
    """The levels of every width and window and, behind them, the scales by first byte: float32 [10 * 256]."""
    return torch.from_numpy(np.concatenate([LEVELS.reshape(-1), SCALES])).to(device)


def best_paths(C_bks: Tensor, widths: tuple[int, ...]) -> Tensor:
    """First byte and windows of each token, by the reference (`fast.spectral` is faster): [..., R] -> uint8."""
    if not widths:
        return C_bks.new_zeros((*C_bks.shape[:-1], 1), dtype=torch.uint8)
    return torch.from_numpy(reference.best_paths(C_bks.float().cpu().numpy(), widths)).to(C_bks.device)


def pack(windows_bkr: Tensor, widths: tuple[int, ...]) -> Tensor:
    """First byte and windows of each token -> its bytes: uint8 [..., 1+R] -> uint8 [..., bytes]."""
    if not widths:
        return windows_bkr[..., :0]
    of = constants(widths, windows_bkr.device)
    before, after = windows_bkr[..., of["column"]].int(), windows_bkr[..., of["column"] + 1].int()
    own = after & ((1 << of["width"]) - 1)
    string = (before << of["width"] | own) >> of["right"] << of["left"]
    return torch.cat([windows_bkr[..., :1], (string & 255).to(torch.uint8)], -1)


def quantize(C_bks: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Coefficients of about unit variance -> the bytes of each token: [..., R] -> uint8 [..., bytes]."""
    return pack(best_paths(C_bks, widths), widths)


def dequantize(packed: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Bytes -> coefficients: uint8 [..., bytes] -> float32 [..., R]."""
    if not widths:
        return packed.new_zeros((*packed.shape[:-1], 0), dtype=torch.float32)
    of = constants(widths, packed.device)
    high, low = packed[..., of["at"]].int(), packed[..., of["after"]].int()
    windows = (high << 8 | low) >> of["shift"] & 255
    levels_and_scales = numbers(packed.device)
    return levels_and_scales[of["table"] + windows] * levels_and_scales[LEVELS.size + packed[..., :1].int()]
