"""Queries that have absorbed the basis of the slow pairs of `banded` keys (`core.banded`): what the kernels multiply
coefficients with, made before the launch.

A tile is TILE slots of a ring. Of pair p, 1 and 2 are its two features; at t tokens behind the first slot

    u(t) = B^T R(-t) q = sum_p cos(t theta_p) (q_1 B_1 + q_2 B_2)_p + sin(t theta_p) (q_2 B_1 - q_1 B_2)_p

so that u at the nodes of all tiles is one product of a constant table, as if the text began in the first slot. It does
not: a ring holds the end of a text in two laps, and the first slot of each has a position, by which q is turned before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from tpa_ref.core.banded import TILE, interpolation, is_fast, nodes

from ...lasting import lasting

FEWEST = 16  # rows of a matrix product
TOGETHER = 8  # rows of so many numbers are read and written fastest


@dataclass(frozen=True)
class Bands:
    """The constants of a layer; f: F fast pairs, some of them zeros, as first and second features.

    rebuild: basis [R_f,g,2F] and mean [g,2F] of the fast pairs. B: basis and then mean of the slow pairs [g,p,2,S], S
    from R + 1. turns: cos and sin at all nodes [t,2p]. weights: between the nodes of a tile [n,TILE].
    """

    rebuild: tuple[Tensor, Tensor]
    B_gpxs: Tensor
    turns_tx: Tensor
    weights_nk: Tensor

    @property
    def pairs(self) -> int:
        """F."""
        return self.rebuild[1].shape[-1] // 2


_known: Any = WeakIdKeyDictionary()  # basis of K -> {(dtype, tiles): Bands}; a captured graph goes on reading them


def bands_of(mode: Any, dtype: torch.dtype, slots: int) -> Bands:
    """Of K of a layer whose ring has so many slots, made once."""
    known, key = _known.setdefault(mode.basis, {}), (dtype, -(-slots // TILE))
    if key not in known:
        with lasting():
            known[key] = made(mode, *key)
    return known[key]


def made(mode: Any, dtype: torch.dtype, tiles: int) -> Bands:
    """Fast pairs come first: theta falls."""
    theta_p, device = mode.theta.double().cpu().numpy(), mode.basis.device
    fast, R = int(is_fast(theta_p).sum()), mode.rank
    all_sgxp = torch.cat([mode.basis, mode.mean[None]]).unflatten(-1, (2, -1)).to(dtype)
    more = max(FEWEST, 1 << (fast - 1).bit_length()) - fast
    fast_sgf = pad(all_sgxp[..., :fast], (0, more)).flatten(2)
    slow_gpxs = pad(all_sgxp[..., fast:].permute(1, 3, 2, 0), (0, -(R + 1) % TOGETHER))
    angle_tp = (TILE * np.arange(tiles)[:, None] + nodes()).reshape(-1, 1) * theta_p[fast:]
    turns_tpx = torch.from_numpy(np.stack([np.cos(angle_tp), np.sin(angle_tp)], -1))
    return Bands(
        (fast_sgf[: mode.strings[0]].contiguous(), fast_sgf[R].contiguous()),
        slow_gpxs.contiguous(),
        turns_tpx.flatten(1).to(device, dtype),
        torch.from_numpy(interpolation()).to(device, torch.float32),
    )


def at_nodes(
    Q_bhd: Tensor, bands: Bands, length_b: Tensor, slots: int, laps: int, tables: tuple[Tensor, Tensor]
) -> Tensor:
    """Rotated queries at all nodes of this lap and, with laps = 2, of the one before: [g,t,lap,b,n,S]."""
    g, p, _, _ = bands.B_gpxs.shape
    first_b = (length_b - 1).div(slots, rounding_mode="floor") * slots
    first_lb = torch.stack([first_b - lap * slots for lap in range(laps)]).clamp(0, len(tables[0]) - 1)
    half = tables[0].shape[1]
    cos, sin = (table[first_lb][:, :, None, half - p :] for table in tables)
    q1, q2 = (x[..., half - p :] for x in Q_bhd.float().split(half, -1))
    q1, q2 = q1 * cos + q2 * sin, q2 * cos - q1 * sin
    Q_ylbhpx = torch.stack([torch.stack([q1, q2], -1), torch.stack([q2, -q1], -1)]).to(Q_bhd.dtype)
    Q_gpylbnx = Q_ylbhpx.unflatten(3, (g, -1)).permute(3, 5, 0, 1, 2, 4, 6)
    A_gpzs = Q_gpylbnx.flatten(2, 5) @ bands.B_gpxs
    lbns = *Q_gpylbnx.shape[3:6], A_gpzs.shape[-1]
    U_gtz = torch.bmm(bands.turns_tx.expand(g, -1, -1), A_gpzs.reshape(g, 2 * p, math.prod(lbns)))
    return U_gtz.unflatten(-1, lbns)
