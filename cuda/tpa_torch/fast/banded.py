"""A few queries on banded codes (`core.banded`), in one compiled call; without a compiler K and V are formed.

What does not depend on the text is made once a layer: the absorbed bases as the compiled function reads them
(`cpu/banded.hpp`), and how far a pair turns within a tile and within a stretch of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.core.banded import TILE, band_features, interpolation, is_fast, lagrange, nodes, tiles
from tpa_ref.core.mode import Stored
from tpa_ref.core.pair import sides
from tpa_ref.trace import Tracer, no_trace

from ..core import banded as pairs
from ..core.cache import Segment
from ..core.masks import MASKED
from ..lasting import lasting
from . import prefill
from .heads import tokens_last
from .kernels import banded as compiled
from .kernels import native
from .kernels.banded import TILES
from .scratch import Scratch

FEW_TOKENS = 8  # that are coded one by one
STRETCH = TILE * TILES  # keys between the nodes at which what hardly turns is absorbed
Partial = tuple[Tensor, Tensor, Tensor]


class Banded(pairs.Banded):
    """The same codes, of a few tokens in one compiled call."""

    def encode(self, K_bkgd: Any, V_bkge: Any, tokens: Any, trace: Tracer = no_trace) -> Stored:
        few = K_bkgd.shape[0] * K_bkgd.shape[1] <= FEW_TOKENS and K_bkgd.dtype != torch.float64
        if not (few and K_bkgd.device.type == "cpu" and self.k.d % native.LANES == 0 and native.available()):
            return super().encode(K_bkgd, V_bkge, tokens, trace)
        codes_k, codes_v = compiled.code(self.coder, *(self.k.by_group(X) for X in (K_bkgd, V_bkge)))  # type: ignore[attr-defined]
        return sides({"C.codes": codes_k}, {"C.codes": codes_v})

    @cached_property
    def coder(self) -> Any:
        """K and V as the compiled function codes them."""
        with lasting():
            return compiled.coder(self.modes)

    def __reduce__(self) -> tuple[type, tuple]:
        """A copy, or a pickled one, has arrays of its own, and so another coder."""
        return type(self), self.modes


def read(
    Q_bgxd: Tensor, dtype: torch.dtype, segment: Segment, seen_bqk: Tensor | None, at: Any, scratch: Scratch
) -> Partial:
    """One segment: largest logit, sum of exponentials [b,g,x,1] and weighted sum of values [b,g,x,e]. at: where the
    queries stand (`gemma.positions`).
    """
    codes = [tokens_last(segment.stored[f"{side}.C.codes"]) for side in "kv"]
    if not (native.available() and all(map(readable, codes))):
        return read_formed(Q_bgxd, segment, seen_bqk)
    rounded = dtype == torch.bfloat16 and native.has_bf16_dot()
    layer = constants(segment.pair, rounded, scratch)
    name = "runs", segment.kind, segment.positions_bk.shape
    if name not in at.kept:
        at.kept[name] = Runs.of(segment.positions_bk, layer.theta_p)
    return compiled.attend(layer.bands, codes, at.kept[name], Q_bgxd, seen_bqk, rounded)


def readable(codes_bck: Tensor) -> bool:
    """Do the codes lie as the compiled functions read them, tokens side by side?"""
    return codes_bck.device.type == "cpu" and codes_bck.stride(-1) == 1


def constants(pair: Any, rounded: bool, scratch: Scratch) -> Prepared:
    """The constants of a layer, made once; rounded: what is multiplied in bfloat16."""
    made: Prepared = scratch.constant(
        f"bands, rounded: {rounded}", pair.k.basis, lambda: prepared(pair.k, pair.v, rounded)
    )
    return made


def read_formed(Q_bgxd: Tensor, segment: Segment, seen_bqk: Tensor | None) -> Partial:
    """The same from K and V as the codes say."""
    K_bkgd, V_bkge = prefill.formed(segment, torch.float32)
    L_bgxk = Q_bgxd @ K_bkgd.permute(0, 2, 3, 1)
    if seen_bqk is not None:
        L_bgnqk = L_bgxk.unflatten(2, (-1, seen_bqk.shape[1]))
        L_bgxk = L_bgnqk.masked_fill(~seen_bqk[:, None, None], MASKED).flatten(2, 3)
    largest_bgx1 = L_bgxk.amax(-1, keepdim=True)
    P_bgxk = (L_bgxk - largest_bgx1).exp_()
    return largest_bgx1, P_bgxk.sum(-1, keepdim=True), P_bgxk @ V_bkge.transpose(1, 2)


@dataclass(frozen=True)
class Runs:
    """Keys at consecutive positions, at most a stretch each: [runs,4] of (row, first key, keys, number), where the runs
    of each row begin, and cos and sin of theta times the position of the first key [runs,2,d/2].
    """

    runs: np.ndarray
    first_b: np.ndarray
    turns: Tensor

    @classmethod
    def of(cls, positions_bk: np.ndarray, theta_p: np.ndarray) -> Runs:
        """Of the positions of a segment; no thread waits while another reads a long run."""
        keys = positions_bk.shape[1]
        share = -(-keys // (torch.get_num_threads() * TILE)) * TILE
        most = min(STRETCH, max(TILE, share))
        found: list[tuple[int, int, int, int]] = []
        first_b = [0]
        for row, positions_k in enumerate(positions_bk):
            for at in tiles(positions_k, most):
                found.append((row, at.start, at.stop - at.start, len(found)))
            first_b.append(len(found))
        runs = np.array(found, np.int64)
        angle_rp = positions_bk[runs[:, 0], runs[:, 1], None] * theta_p
        turns = torch.from_numpy(np.stack([np.cos(angle_rp), np.sin(angle_rp)], 1).astype(np.float32))
        return cls(runs, np.array(first_b, np.int64), turns)


@dataclass(frozen=True)
class Prepared:
    """A layer as the compiled function reads it."""

    theta_p: np.ndarray
    bands: Any


def prepared(k: Any, v: Any, rounded: bool) -> Prepared:
    """The constants of a layer; rounded: what is multiplied in bfloat16."""
    theta_p = k.theta.double().numpy()
    fast, _ = band_features(theta_p)
    still_p = theta_p * STRETCH <= 1
    slow_p = ~is_fast(theta_p) & ~still_p
    B_sgd, mean_gd, rank = k.basis.float(), k.mean.float(), k.strings[0]
    K_sgf = B_sgd[:rank][..., fast]
    rebuild = padded(K_sgf.permute(1, 2, 0).flatten(0, 1), 2)
    t_n, T_n = nodes(), nodes() * (STRETCH - 1) / (TILE - 1)
    tile_t = TILE * np.arange(TILES)
    between = np.moveaxis(lagrange(T_n, tile_t[:, None] + t_n), 0, -1)
    arrays = {
        "rebuild": units(rebuild, rounded),
        "fast_mean": mean_gd[:, fast],
        "absorb": columns(B_sgd, mean_gd, rank, slow_p, rounded),
        "absorb_still": columns(B_sgd, mean_gd, rank, still_p, rounded),
        "tile_turns": turns(tile_t, theta_p),
        "fast_turns": torch.from_numpy(turns(np.arange(TILE), theta_p[is_fast(theta_p)]).numpy().transpose(2, 1, 0)),
        "node_turns": turns(t_n, theta_p[slow_p]),
        "still_turns": turns(T_n, theta_p[still_p]),
        "weights": torch.from_numpy(interpolation().astype(np.float32)),
        "values": units(v.basis.float().transpose(0, 1), rounded),
        "value_mean": v.mean.float(),
        "stretch_weights": torch.from_numpy(between.astype(np.float32)),
    }
    sizes = {
        "g": k.g, "groups": k.groups, "d": k.d,
        "fast": int(is_fast(theta_p).sum()), "slow": int(slow_p.sum()), "still": int(still_p.sum()),
        "fast_rank": rank, "key_rank": k.rank, "rank": k.rank + v.rank, "columns": width(rank, k.rank),
        "key_bytes": sum(k.string_bytes), "value_bytes": sum(v.string_bytes),
    }  # fmt: skip
    return Prepared(theta_p, compiled.bands(sizes, arrays, (k, v)))


def width(fast_rank: int, rank: int) -> int:
    """Columns of an absorbed basis: fast coefficients up to an even number, slow ones, the mean, whole registers.

    >>> width(3, 10)
    16
    """
    return -(-(fast_rank + fast_rank % 2 + rank - fast_rank + 1) // 16) * 16


def columns(B_sgd: Tensor, mean_gd: Tensor, fast_rank: int, pairs_p: np.ndarray, rounded: bool) -> Tensor:
    """Basis and mean at the features of some pairs, [g, features, columns], features in whole registers; in bfloat16
    two features share a unit.
    """
    features = np.nonzero(np.tile(pairs_p, 2))[0]
    rank, g = len(B_sgd), len(mean_gd)
    made = B_sgd.new_zeros(g, -(-len(features) // 16) * 16, width(fast_rank, rank))
    B_gfs = B_sgd[..., features].permute(1, 2, 0)
    slow = fast_rank + fast_rank % 2
    made[:, : len(features), :fast_rank] = B_gfs[..., :fast_rank]
    made[:, : len(features), slow : slow + rank - fast_rank] = B_gfs[..., fast_rank:]
    made[:, : len(features), slow + rank - fast_rank] = mean_gd[:, features]
    return made.unflatten(1, (-1, 2)).transpose(2, 3).bfloat16().contiguous() if rounded else made


def units(rows: Tensor, rounded: bool) -> Tensor:
    """Rows of an even length; in bfloat16 two neighbours share a unit."""
    return rows.bfloat16().contiguous() if rounded else rows.contiguous()


def padded(rows: Tensor, multiple: int) -> Tensor:
    """The last axis up to a multiple, with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % multiple))


def turns(t_n: np.ndarray, theta_p: np.ndarray) -> Tensor:
    """cos and sin of theta t, float32 [n,2,p]."""
    angle_np = t_n[:, None] * theta_p
    return torch.from_numpy(np.stack([np.cos(angle_np), np.sin(angle_np)], 1).astype(np.float32))
