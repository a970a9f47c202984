"""The best path of each token through the trellis (`core.codes`) in one launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpa_ref.core.codes import FREE, LEVELS, MAX_WIDTH, SCALES, reach_and_price

from ...lasting import lasting


@triton.jit
def with_more(cost_i, c, inverse, numbers, before, start, end, WIDTH: tl.constexpr):
    """The costs of the best strings by their last window, with the coefficients of one width more."""
    level_i = tl.load(numbers + WIDTH * 256 + tl.arange(0, 256))
    j = tl.arange(0, 256 >> WIDTH)
    for s in range(start, end):
        best_j, from_j = tl.min(tl.reshape(cost_i, (1 << WIDTH, 256 >> WIDTH)), 0, return_indices=True)
        tl.store(before + s * 128 + j, from_j.to(tl.uint8))
        error_i = tl.load(c + s) * inverse - level_i
        best_i = tl.reshape(tl.broadcast_to(best_j[:, None], (256 >> WIDTH, 1 << WIDTH)), (256,))
        cost_i = best_i + error_i * error_i
    return cost_i


@triton.jit
def path_of_token(
    c, places, numbers, before, out, coefficients, WIDTHS: tl.constexpr, FREE: tl.constexpr, BLOCK_R: tl.constexpr
):
    """One token: c [R] -> its first byte and windows, out [1 + R]. before: scratch, uint8 [R,128].

    places: where the coefficients of each width begin and end, and the width of each, int32 [9 + 9 + R]; numbers:
    levels [9,256], scales and what divides by them, by first byte [256], reach [R], price [R], float32.
    """
    token = tl.program_id(0).to(tl.int64)
    c += token * coefficients
    out += token * (1 + coefficients)
    before += token * coefficients * 128
    scales = numbers + 9 * 256
    reach = scales + 2 * 256
    r = tl.arange(0, BLOCK_R)
    size_r = tl.abs(tl.load(c + r, r < coefficients, 0))
    reach_r = tl.load(reach + r, r < coefficients, 0)
    price_r = tl.load(reach + coefficients + r, r < coefficients, 0)
    chosen = 0
    for index in range(0, 256 - FREE, FREE):
        scale = tl.load(scales + index)
        chosen += FREE * (scale < tl.sum(tl.maximum(size_r - scale * reach_r, 0) * price_r, 0)).to(tl.int32)
    inverse = tl.load(scales + 256 + chosen)

    i = tl.arange(0, 256)
    cost_i = tl.where(i // FREE * FREE == chosen, 0.0, float("inf"))
    for step in tl.static_range(WIDTHS):  # widths fall, so those of one width follow on each other
        start, end = tl.load(places + WIDTHS - step), tl.load(places + 2 * WIDTHS + 1 - step)
        cost_i = with_more(cost_i, c, inverse, numbers, before, start, end, WIDTHS - step)
    window = tl.argmin(cost_i, 0)
    tl.debug_barrier()
    for back in range(coefficients):
        s = coefficients - 1 - back
        tl.store(out + 1 + s, window.to(tl.uint8))
        width = tl.load(places + 2 * (WIDTHS + 1) + s)
        last = window >> width
        window = (tl.load(before + s * 128 + last).to(tl.int32) << (8 - width)) + last
    tl.store(out, window.to(tl.uint8))


@lru_cache(maxsize=512)
@lasting()
def constants(widths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """`places` and `numbers` of the kernel."""
    count = [widths.count(width) for width in range(MAX_WIDTH + 1)]
    ends = [sum(count[width:]) for width in range(MAX_WIDTH + 1)]
    starts = [end - n for end, n in zip(ends, count, strict=True)]
    reach_s, price_s = map(torch.from_numpy, reach_and_price(widths))
    numbers = [torch.from_numpy(x.reshape(-1)) for x in (LEVELS, SCALES, 1 / SCALES)]
    places = torch.tensor([*starts, *ends, *widths], dtype=torch.int32)
    return places.to(device), torch.cat([*numbers, reach_s, price_s]).to(device)


TOKENS = 4096  # at a time, since each takes 128 bytes of scratch a coefficient


def best_paths(C_ks: Tensor, widths: tuple[int, ...]) -> Tensor:
    """First byte and windows of each token: float32 [k,s] -> uint8 [k,1+s]; widths fall."""
    k, count = C_ks.shape
    bytes_of: Any = {"dtype": torch.uint8, "device": C_ks.device}
    out, before = torch.empty(k, 1 + count, **bytes_of), torch.empty(min(k, TOKENS), count, 128, **bytes_of)
    shape: Any = {"WIDTHS": MAX_WIDTH, "FREE": FREE, "BLOCK_R": triton.next_power_of_2(count)}
    for C_part, out_part in zip(C_ks.split(TOKENS), out.split(TOKENS), strict=True):
        path_of_token[(len(C_part),)](C_part, *constants(widths, C_ks.device), before, out_part, count, **shape)
    return out
