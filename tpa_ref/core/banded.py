"""`banded`: a spectral cache whose keys need not be rebuilt. Not in the paper.

RoPE mixes the two features of a pair, by an angle that grows with the position, so a query cannot absorb a basis over
features once for all keys. Within a tile of 64 keys it nearly can: the slow pairs, whose frequency theta is below 1/64,
turn by less than one radian from one end of the tile to the other. Therefore K is coded in two bands, and V behind them
(`transform.successive`):

    fast K     c_f = E_f (K - mean)                       of the fast pairs alone
    slow K     c_s = E_s (K - mean - B_f c^_f)            what is left when c^_f is decoded
    V          c_v = E_v (V - mean - W (c^_f, c^_s))      what is left of V when K is decoded

Each is a string of codes of its own. Several heads are coded as one vector, up to 256 numbers of K, and beyond that in
groups j: what a key costs then grows with the number of heads, not with its square. A fast pair is rebuilt from c^_f,
which is short, and turned as always. Of slow pairs nothing is rebuilt (`scores`): the absorbed query, as a function of
the position, is a smooth curve, known from four points.

    q . R(t) B c = (B^T R(-t) q) . c = u(t) . c,       u(t) ~ sum_n l_n(t) u(t_n)       (Lagrange, Chebyshev nodes t_n)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ..trace import Tracer, no_trace
from .attention import einsum
from .mode import Parts, Stored, Tokens
from .pair import Pair, sides
from .rope import rotate
from .spectral import CodedLatent

TILE = 64  # keys whose slow pairs are read at once
NODES = 4  # positions of a tile at which the query absorbs the basis
STRINGS = 3  # of codes: fast K, slow K, V
TOGETHER = 256  # numbers of K that are coded as one vector at most: one head of most Gemmas


def is_fast(theta_p: Any) -> Any:
    """Which pairs turn by more than a radian within a tile. theta [d/2]: radians a token.

    >>> is_fast(np.array([1.0, 1 / 63, 1 / 65])).tolist()
    [True, True, False]
    """
    return theta_p * TILE > 1


def band_features(theta_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features of the fast pairs, of the slow ones), as indices into a head; pair p has features p and p + d/2.

    >>> [x.tolist() for x in band_features(np.array([1.0, 0.001]))]
    [[0, 2], [1, 3]]
    """
    fast_d = np.tile(is_fast(theta_p), 2)
    return np.nonzero(fast_d)[0], np.nonzero(~fast_d)[0]


def groups_of_heads(g: int, d: int) -> int:
    """How many groups of KV heads are coded apart: as few as have at most 256 numbers each, if not a head has more.

    >>> groups_of_heads(4, 32), groups_of_heads(4, 256), groups_of_heads(16, 128)
    (1, 4, 8)
    """
    return min((j for j in range(1, g + 1) if g % j == 0 and g // j * d <= TOGETHER), default=g)


@dataclass(frozen=True)
class BandedLatent(CodedLatent):
    """K, or V behind K: R coefficients of a group of heads, in strings, each of what is left when all before it are
    decoded.

    basis [before + R,g,d]: its first rows are those of coefficients that another side holds (V: all of K's). encoder
    [R,g,d]. Row s of both is that of coefficient s of every group; all have the same widths. strings: how many
    coefficients each string has. theta: RoPE's frequencies [d/2], for K.
    """

    strings: tuple[int, ...] = field(default=(), repr=False)
    before: int = 0
    theta: Any = None
    groups: int = 1

    name = "banded"
    constants = ("basis", "encoder", "mean", "theta")

    def array_shapes(self) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
        own = self.rank, self.g, self.d
        basis = self.before + self.rank, self.g, self.d
        return {"basis": (basis,), "encoder": (own,), "mean": (own[1:],), "theta": (None, (self.d // 2,))}

    @property
    def widths_of_strings(self) -> list[tuple[int, ...]]:
        """The widths of each string of a group."""
        ends = np.cumsum(self.strings)
        return [self.widths[end - count : end] for end, count in zip(ends, self.strings, strict=True)]

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"C.codes": ((self.groups * sum(self.string_bytes),), np.dtype(np.uint8))}

    def coded(self, X_bkgd: Any, before_bkjs: Any = None) -> tuple[Any, Any]:
        """String after string: (bytes [b,k,j bytes], all coefficients as they are decoded [b,k,j,before + R])."""
        kind, rank = self.mean.dtype, 0  # in full precision: weak coefficients are differences of large numbers
        left_bkgd, found, strings = self.cast(X_bkgd, kind) - self.mean, [], []
        if before_bkjs is not None:
            found.append(self.cast(before_bkjs, kind))
            left_bkgd = left_bkgd - self.combined(found[0], self.basis[: self.before])
        for widths in self.widths_of_strings:
            own = slice(rank, rank + len(widths))
            string, decoded_bkjs = self.coded_string(self.coefficients(left_bkgd, self.encoder[own]), widths)
            C_bkjs = self.cast(decoded_bkjs, kind)
            rank = own.stop
            if rank < self.rank:
                left_bkgd = left_bkgd - self.combined(C_bkjs, self.basis[self.before :][own])
            strings.append(string)
            found.append(C_bkjs)
        codes_bkjx = self.joined(strings)
        return codes_bkjx.reshape(*codes_bkjx.shape[:2], -1), self.joined(found)

    def coded_string(self, C_bkjs: Any, widths: tuple[int, ...]) -> tuple[Any, Any]:
        """(bytes of a string, its coefficients as they are decoded)."""
        string = self.quantized(C_bkjs, widths)
        return string, self.codes.dequantize(string, widths)

    def load(self, stored: Stored, dtype: Any) -> Parts:
        """Its own coefficients."""
        packed, sizes = stored["C.codes"], self.string_bytes
        packed_bkjx = packed.reshape(*packed.shape[:2], self.groups, sum(sizes))
        strings = zip(np.cumsum(sizes), sizes, self.widths_of_strings, strict=True)
        found = [self.codes.dequantize(packed_bkjx[..., end - size : end], widths) for end, size, widths in strings]
        return {"C": self.cast(self.joined(found), dtype)}

    # ---- the three products, of each group of heads by itself ----

    def by_group(self, X_xgd: Any) -> Any:
        """[...,g,d] as groups of heads and all numbers of each, [...,j,x]."""
        *leading, g, d = X_xgd.shape
        return X_xgd.reshape(*leading, self.groups, g // self.groups * d)

    def coefficients(self, X_bkgd: np.ndarray, E_sgd: np.ndarray) -> np.ndarray:
        """C [b,k,j,s]."""
        return einsum("sjx,bkjx->bkjs", self.by_group(E_sgd), self.by_group(X_bkgd))

    def combined(self, C_bkjs: np.ndarray, B_sgd: np.ndarray) -> np.ndarray:
        """X [b,k,g,d] of its coefficients."""
        return einsum("bkjs,sjx->bkjx", C_bkjs, self.by_group(B_sgd)).reshape(*C_bkjs.shape[:2], self.g, self.d)

    def weighted(self, P_bhqk: np.ndarray, C_bkju: np.ndarray, B_uge: np.ndarray) -> np.ndarray:
        """The same, summed over the keys with probabilities: [b,q,h,e]."""
        b, h, q, k = P_bhqk.shape
        Y_bjnqu = einsum("bjnqk,bkju->bjnqu", P_bhqk.reshape(b, self.groups, -1, q, k), C_bkju)
        Y_bgnqu = Y_bjnqu.reshape(b, self.g, h // self.g, q, -1)
        return einsum("bgnqu,uge->bqgne", Y_bgnqu, B_uge).reshape(b, q, h, -1)

    @staticmethod
    def joined(parts: list[Any]) -> Any:
        """Side by side along the last axis."""
        return np.concatenate(parts, -1)


class Banded(Pair):
    """K in two bands, and V behind them: what V repeats of K is coded once."""

    def encode(self, K_bkgd: np.ndarray, V_bkge: np.ndarray, tokens: Tokens, trace: Tracer = no_trace) -> Stored:
        codes_k, C_bkjs = self.k.coded(K_bkgd)  # type: ignore[attr-defined]
        codes_v, _ = self.v.coded(V_bkge, C_bkjs)  # type: ignore[attr-defined]
        return sides({"C.codes": codes_k}, {"C.codes": codes_v})

    def load(self, stored: Stored, dtype: Any) -> tuple[Parts, Parts]:
        parts_k, parts_v = super().load(stored, dtype)
        return parts_k, {"C": self.k.joined([parts_k["C"], parts_v["C"]])}  # type: ignore[attr-defined]


# ---- reading K tile by tile, as the fast backends do; `Mode.scores`, which turns every key, is the same but for the
# ---- interpolation


def nodes() -> np.ndarray:
    """Positions from the first key of a tile at which the query absorbs the basis: Chebyshev nodes, [n].

    >>> nodes().round(1).tolist()
    [60.6, 43.6, 19.4, 2.4]
    """
    n = np.arange(NODES)
    return (TILE - 1) / 2 * (1 + np.cos((2 * n + 1) * np.pi / (2 * NODES)))


def interpolation() -> np.ndarray:
    """Lagrange's polynomials: how much of the value at each node a key of a tile takes, [n,TILE].

    Of e^{i theta t} with theta TILE <= 1 the error is at most (1/2)^4 / (2^3 4!) = .0003: that of Chebyshev nodes.

    >>> curve = np.exp(1j / TILE * nodes()) @ interpolation()
    >>> bool(np.abs(curve - np.exp(1j / TILE * np.arange(TILE))).max() < 0.0004)
    True
    """
    return lagrange(nodes(), np.arange(TILE))


def lagrange(t_n: np.ndarray, t_x: np.ndarray) -> np.ndarray:
    """Lagrange's polynomials of some nodes: how much of the value at each a position takes, [n,x].

    >>> lagrange(np.array([0.0, 1.0]), np.array([0.25])).tolist()
    [[0.75], [0.25]]
    """
    others = [np.delete(t_n, n) for n in range(len(t_n))]
    return np.stack([np.prod((t_x[..., None] - t) / (t_n[n] - t), -1) for n, t in enumerate(others)])


def tiles(positions_k: np.ndarray, most: int = TILE) -> list[slice]:
    """Stretches of at most so many keys at consecutive positions.

    >>> tiles(np.array([7, 8, 3, 4]))
    [slice(0, 2, None), slice(2, 4, None)]
    """
    breaks = np.nonzero(np.diff(positions_k) != 1)[0] + 1
    starts = [0, *breaks.tolist(), len(positions_k)]
    return [slice(at, min(at + most, end)) for start, end in pairwise(starts) for at in range(start, end, most)]


def scores(
    Q_bqhd: np.ndarray, C_bkjs: np.ndarray, mode: BandedLatent, positions_bk: np.ndarray, scale: float
) -> np.ndarray:
    """Logits [b,h,q,k] of rotated queries against coefficients of K, without forming the slow pairs of K."""
    b, q, h, _ = Q_bqhd.shape
    L_bhqk = np.zeros((b, h, q, C_bkjs.shape[1]), Q_bqhd.dtype)
    for row in range(b):
        for tile in tiles(positions_bk[row]):
            first = positions_bk[row, tile.start]
            L_bhqk[row, :, :, tile] = tile_scores(Q_bqhd[row], C_bkjs[row, tile], mode, first) * scale
    return L_bhqk


def tile_scores(Q_qhd: np.ndarray, C_kjs: np.ndarray, mode: BandedLatent, first: int) -> np.ndarray:
    """Logits [h,q,k] of one tile, whose first key stands at position `first`."""
    fast, slow = band_features(mode.theta)
    (q, h, _), g, R_f = Q_qhd.shape, mode.g, mode.strings[0]
    # the query as the tile's first key sees it: all that follows is the same for every tile
    Q_qgnd = turned_by(Q_qhd, -first, mode.theta).reshape(q, g, h // g, -1)
    # fast pairs: rebuilt from few coefficients, and turned
    K_kjx = einsum("kjs,sjx->kjx", C_kjs[..., :R_f], mode.by_group(mode.basis[:R_f][..., fast]))
    K_kgf = K_kjx.reshape(len(C_kjs), g, -1) + mode.mean[:, fast]
    K_kgf = turned_by(K_kgf, np.arange(len(C_kjs)), mode.theta[is_fast(mode.theta)])
    L_gnqk = einsum("qgnf,kgf->gnqk", Q_qgnd[..., fast], K_kgf)
    # slow pairs: absorbed at the nodes, interpolated between them
    for t, weight_k in zip(nodes(), interpolation(), strict=True):
        Q_qgnf = turned_by(Q_qgnd[..., slow], -t, mode.theta[~is_fast(mode.theta)])
        U_qgns = einsum("qgnf,sgf->qgns", Q_qgnf, mode.basis[..., slow])
        mean_qgn = einsum("qgnf,gf->qgn", Q_qgnf, mode.mean[:, slow])
        U_qjxs = U_qgns.reshape(q, mode.groups, h // mode.groups, mode.rank)
        at_node_jxqk = einsum("qjxs,kjs->jxqk", U_qjxs, C_kjs)
        at_node_gnqk = at_node_jxqk.reshape(L_gnqk.shape) + mean_qgn.transpose(1, 2, 0)[..., None]
        L_gnqk += at_node_gnqk * weight_k[: len(C_kjs)]
    return L_gnqk.reshape(h, q, -1)


def turned_by(X_xgd: np.ndarray, t: Any, theta_p: np.ndarray) -> np.ndarray:
    """RoPE by t tokens, one number or one for each row of X [x,...,d]."""
    rows = X_xgd.reshape(1, len(X_xgd), -1, X_xgd.shape[-1])
    angle_1xp = (np.broadcast_to(t, len(X_xgd))[:, None] * theta_p)[None]
    return rotate(rows, np.cos(angle_1xp), np.sin(angle_1xp)).reshape(X_xgd.shape)
