"""Queries that have absorbed the basis of the slow pairs of `banded` keys (`core.banded`): what the kernels multiply
coefficients with, made before the launch.

A tile is TILE slots of a ring. Of pair p, 1 and 2 are its two features; at t tokens behind the first slot

    u(t) = B^T R(-t) q = sum_p cos(t theta_p) (q_1 B_1 + q_2 B_2)_p + sin(t theta_p) (q_2 B_1 - q_1 B_2)_p

so that u at the nodes of all tiles is one product of a constant table, as if the text began in the first slot. It does
not: a ring holds the end of a text in two laps, and the first slot of each has a position, by which q is turned before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from tpa_ref.core.banded import NODES, TILE, interpolation, is_fast, nodes

from ...lasting import lasting

FEWEST = 16  # rows of a matrix product
TOGETHER = 8  # rows of so many numbers are read and written fastest


@dataclass(frozen=True)
class Bands:
    """The constants of a layer in one dtype. Fast pairs come first, since theta falls; F: their number, with zeros.

    rebuild: basis [R_f,g,2F] and mean [g,2F] of the fast pairs. B: basis and then mean of the slow pairs [g,p,2,S], S
    from R + 1. weights: between the nodes of a tile [n,TILE]. turns: `turns_of` by number of tiles.
    """

    rebuild: tuple[Tensor, Tensor]
    B_gpxs: Tensor
    weights_nk: Tensor
    theta_p: np.ndarray
    turns: dict[int, Tensor] = field(default_factory=dict)

    def turns_of(self, tiles: int) -> Tensor:
        """cos and sin of the slow pairs at all nodes of so many tiles, [t,2p]. Tables of 2^i tiles are made, and stay:
        a captured graph goes on reading them.
        """
        made = 1 << (tiles - 1).bit_length()
        if made not in self.turns:
            angle_tp = (TILE * np.arange(made)[:, None] + nodes()).reshape(-1, 1) * self.theta_p
            turns_tx = np.stack([np.cos(angle_tp), np.sin(angle_tp)], -1).reshape(len(angle_tp), -1)
            with lasting():
                self.turns[made] = torch.from_numpy(turns_tx).to(self.B_gpxs.device, self.B_gpxs.dtype)
        return self.turns[made][: tiles * NODES]


_known: Any = WeakIdKeyDictionary()  # basis of K -> {dtype: Bands}


def bands_of(mode: Any, dtype: torch.dtype) -> Bands:
    """Of K of a layer, made once: the device waits."""
    known = _known.setdefault(mode.basis, {})
    if dtype not in known:
        with lasting():
            known[dtype] = made(mode, dtype)
    return known[dtype]


def made(mode: Any, dtype: torch.dtype) -> Bands:
    theta_p, R = mode.theta.double().cpu().numpy(), mode.rank
    fast = int(is_fast(theta_p).sum())
    zeros = max(FEWEST, 1 << (fast - 1).bit_length()) - fast
    B_sgxp = torch.cat([mode.basis, mode.mean[None]]).to(dtype).unflatten(-1, (2, -1))
    fast_sgf = pad(B_sgxp[..., :fast], (0, zeros)).flatten(2)
    slow_gpxs = pad(B_sgxp[..., fast:].permute(1, 3, 2, 0), (0, -(R + 1) % TOGETHER))
    weights_nk = torch.from_numpy(interpolation()).to(mode.basis.device, torch.float32)
    rebuild = fast_sgf[: mode.strings[0]].contiguous(), fast_sgf[R].contiguous()
    return Bands(rebuild, slow_gpxs.contiguous(), weights_nk, theta_p[fast:])


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
    turns_tx = bands.turns_of(-(-slots // TILE))
    U_gtz = torch.bmm(turns_tx.expand(g, -1, -1), A_gpzs.reshape(g, 2 * p, math.prod(lbns)))
    return U_gtz.unflatten(-1, lbns)
