"""The compiled functions that code tokens in bands (`cpu/coding.hpp`) and attend on them (`cpu/banded.hpp`)."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...core import codes
from ...lasting import lasting
from . import native

TILES = 16  # of a stretch


class Bands(ctypes.Structure):
    """The fields of `struct Bands`; `held` are the arrays that they point to."""

    SIZES = (
        "g", "groups", "d", "fast", "slow", "still", "fast_rank", "key_rank", "rank", "key_bytes", "value_bytes",
    )  # fmt: skip
    ARRAYS = (
        "rebuild", "fast_mean", "absorb", "absorb_still", "tile_turns", "fast_turns", "node_turns", "still_turns",
        "weights", "stretch_weights", "values", "value_mean",
    )  # fmt: skip
    _fields_ = (
        *((name, ctypes.c_int64) for name in SIZES),
        ("of", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ARRAYS),
        ("columns", ctypes.c_int64),
    )
    held: Any = None
    scale_rows: tuple[int, ...] = ()


class Tables(ctypes.Structure):
    """The fields of `struct Tables`."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("exact", "whole", "steps", "rounded"))
    held: Any = None


def bands(sizes: dict[str, int], arrays: dict[str, Tensor], modes: Any) -> Bands:
    """A layer as the compiled function reads it."""
    found, starts = [], []
    for mode in modes:
        start = 0
        for widths, size in zip(mode.widths_of_strings, mode.string_bytes, strict=True):
            found.append(native.coefficients(widths, start))
            starts.append(start)
            start += size
    held = {name: x.contiguous() for name, x in arrays.items()}
    held["of"] = torch.cat(found)
    made = Bands(**sizes, **{name: x.data_ptr() for name, x in held.items()})
    made.held, made.scale_rows = held, tuple(starts)
    return made


class Segment(ctypes.Structure):
    """The fields of `struct Segment`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("key_batch", "key_row", "value_batch", "value_row")),
        ("scale_rows", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("scales", "turns", "seen")),
        *((name, ctypes.c_int64) for name in ("queries", "count")),
    )


def segment(layer: Bands, codes_bck: list[Tensor], turns: Tensor | None = None, seen: Tensor | None = None) -> Segment:
    """Where the codes of K and V lie; seen [b,q,k]. What it points to must outlive it."""
    (keys, values), scales = codes_bck, native.scales_of_codes()[0]
    strides = keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)
    return Segment(
        keys.data_ptr(), values.data_ptr(), *strides, layer.scale_rows, scales.data_ptr(),
        None if turns is None else turns.data_ptr(), None if seen is None else seen.data_ptr(),
        1 if seen is None else seen.shape[1], keys.shape[-1],
    )  # fmt: skip


class Trellis(ctypes.Structure):
    """The fields of `struct Trellis`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("width", "tables", "scale", "inverse", "reach", "price")),
        ("coefficients", ctypes.c_int64),
        ("free", ctypes.c_int64),
    )


class String(ctypes.Structure):
    """The fields of `struct String`."""

    _fields_ = (("trellis", Trellis), ("bytes", ctypes.c_int64))


class Side(ctypes.Structure):
    """The fields of `struct Side`; `held` are the arrays that they point to."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("strings", "before", "rank", "numbers", "bytes")),
        ("of", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("mean", "encoder", "basis")),
    )


def coder(modes: Any) -> tuple[Any, Any]:
    """K and V as the compiled function codes them: an array of two sides, and what they point to."""
    levels, (scale, inverse) = native.levels_of_codes()[0], native.scales_of_codes()
    held: list[Any] = []
    sides = []
    for mode in modes:
        strings = (String * len(mode.strings))()
        for string, widths, size in zip(strings, mode.widths_of_strings, mode.string_bytes, strict=True):
            width, reach, price = native.trellis(widths) if widths else (levels,) * 3
            arrays = width, levels, scale, inverse, reach, price
            string.trellis = Trellis(*(x.data_ptr() for x in arrays), len(widths), codes.FREE)
            string.bytes = size
            held.append(arrays)
        by_group = mode.mean, *(x.unflatten(1, (mode.groups, -1)).transpose(0, 1) for x in (mode.encoder, mode.basis))
        constants = [x.float().contiguous() for x in by_group]
        numbers = mode.g // mode.groups * mode.d
        sizes = len(strings), mode.before, mode.rank, numbers, sum(mode.string_bytes)
        sides.append(Side(*sizes, ctypes.addressof(strings), *(x.data_ptr() for x in constants)))
        held += [strings, constants]
    return (Side * 2)(*sides), held


def code(found: tuple[Any, Any], K_bkjx: Tensor, V_bkjx: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of K and of V of a few tokens, [b,k,j bytes] each, by groups of heads."""
    sides, _ = found
    K, V = (x.float().contiguous() for x in (K_bkjx, V_bkjx))
    b, k, groups, _ = K.shape
    made = [torch.empty(b, k, groups * side.bytes, dtype=torch.uint8) for side in sides]
    native.call("tpa_code_banded", ctypes.addressof(sides), K, V, *made, b * k, groups)
    return made[0], made[1]


@lru_cache(maxsize=1)
@lasting()
def tables() -> Tables:
    """The levels of every width and window: in float32, as 16-bit numbers of steps, in bfloat16. Of 16 bits all low
    bytes of a width come before its high ones.
    """
    exact, rounded = native.levels_of_codes()
    steps = exact.abs().amax(1) / 32767
    whole = (exact / steps.clamp(min=1e-30)[:, None]).round().to(torch.int16)
    whole, rounded = (x.view(torch.uint8).unflatten(-1, (-1, 2)).mT.contiguous() for x in (whole, rounded))
    made = Tables(exact.data_ptr(), whole.data_ptr(), steps.data_ptr(), rounded.data_ptr())
    made.held = exact, whole, steps, rounded
    return made


def attend(
    layer: Bands, codes_bck: list[Tensor], runs: Any, Q_bgxd: Tensor, seen_bqk: Tensor | None, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit and sum of exponentials [b,g,x,1], and weighted sum of values [b,g,x,e]."""
    seen = None if seen_bqk is None else seen_bqk.expand(len(Q_bgxd), -1, -1).contiguous().view(torch.uint8)
    where = segment(layer, codes_bck, runs.turns, seen)
    Q_bgxd = Q_bgxd.contiguous()
    largest, total = Q_bgxd.new_empty(2, *Q_bgxd.shape[:3], 1)
    out = torch.empty_like(Q_bgxd)
    batch, _, x, _ = Q_bgxd.shape
    native.call(
        "tpa_attend_banded", ctypes.addressof(layer), ctypes.addressof(where), ctypes.addressof(tables()),
        runs.runs.ctypes.data, runs.first_b.ctypes.data, Q_bgxd, largest, total, out, batch, x, int(rounded),
    )  # fmt: skip
    return largest, total, out
