"""Attention of a few queries over a long cache, as fast as a CPU reads it. The equations are those of `attention`.

One pass over tiles of keys. Compiled functions (`kernels/native.py`) read a tile as it lies; without them, or if K is
rebuilt, it is made numbers in memory that stays in the processor's cache and is used again for the next one. Every tile
has a softmax with a maximum of its own; at the end the tiles of all segments are merged by their maxima: nothing
overflows.

The queries of a KV head are the rows of one matrix: x is (n, q), the query heads of a KV head times the queries. How
PyTorch is asked for a product of few rows decides its speed (measured on AVX-512): keys times queries is up to three
times as fast as queries times keys, and the weighted sum of values wants at least four rows.
`benchmarks/decode_attention.py` shows what comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import quantize
from ..core.attention import absorb, mix, split_heads
from ..core.cache import Stored, part_dtype
from ..core.factorize import Factorization, part_shapes
from ..core.masks import MASKED
from .kernels import native
from .kernels.native import Rows

TILE_NUMBERS = 1 << 21  # logits, or numbers of K or V, made at a time: 8 MB of float32
MOST_MADE = 4096  # keys of a tile of which numbers are made, and of one that is read as it lies
MOST_READ = 1 << 16
FEW_QUERIES = 8  # from here on K and V are better formed whole
FEW_ROWS = 8
Partial = tuple[Tensor, Tensor, Tensor]  # largest logit and sum of exp [b,g,x,1], weighted sum of values [b,g,x,e]


@dataclass(frozen=True)
class Keys:
    """A segment of a cache as its queries read it.

    held and how: K's and V's; turns [1 or b,k,d/2]: cos + i sin of the keys' positions; seen [b,q,k], None: all of it;
    words: z [b,k,2m] of a slice of the keys, where something is predicted from it.
    """

    held: tuple[Stored, Stored]
    how: tuple[Factorization, Factorization]
    turns_bkp: Tensor
    seen_bqk: Tensor | None
    words: Callable[[slice], Tensor] | None = None


class Scratch:
    """Memory that is used again, and constants of layers that are made once."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._constants: dict[tuple, tuple[Any, Any]] = {}

    def __call__(self, name: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """An array with nothing in it, valid until the next call with this name."""
        key = name, dtype or like.dtype, like.device
        size = int(torch.Size(shape).numel())
        if key not in self._memory or self._memory[key].numel() < size:
            self._memory[key] = torch.empty(size, dtype=key[1], device=like.device)
        return self._memory[key][:size].view(*shape)

    def constant(self, name: str, source: Tensor, make: Callable[[], Any]) -> Any:
        """What `make` makes of a constant array, made once."""
        key = name, id(source)
        if key not in self._constants:
            self._constants[key] = source, make()  # the array is held, so that its id stays its own
        return self._constants[key][1]


def attend(Q_bqhd: Tensor, segments: Sequence[Keys], g: int, scale: float, scratch: Scratch) -> Tensor:
    """Rotated queries over all keys of all segments, in float32: [b,q,h,d] -> [b,q,h,e] in the queries' dtype."""
    q = Q_bqhd.shape[1]
    Q_bgxd = split_heads(Q_bqhd, g).permute(0, 2, 3, 1, 4).flatten(2, 3).float() * scale
    partials = [_segment(Q_bgxd, Q_bqhd.dtype, keys, q, scratch) for keys in segments if keys.turns_bkp.shape[1]]
    _, total_bgx1, O_bgxe = _merged(partials)
    O_bgnqe = (O_bgxe / total_bgx1).unflatten(2, (-1, q))
    return O_bgnqe.permute(0, 3, 1, 2, 4).flatten(2, 3).to(Q_bqhd.dtype)


def _segment(Q_bgxd: Tensor, dtype: torch.dtype, keys: Keys, q: int, scratch: Scratch) -> Partial:
    b, g, _, d = Q_bgxd.shape
    work = torch.bfloat16 if dtype == torch.bfloat16 and _in_bfloat16(keys) else torch.float32
    K, V = (_side(held, how, g, d, work, scratch) for held, how in _sides(keys))
    for side in (K, V):
        side.words, side.rounded = keys.words, dtype == torch.bfloat16
    V.shared = K if V.how.dtype == "shared" else None
    asked = K.ask(Q_bgxd)
    partials = []
    made = max(K.numbers_per_key, V.numbers_per_value)
    logits = Q_bgxd[0, ..., 0].numel()
    for tile in _tiles(keys.turns_bkp.shape[1], b * max(made, logits), MOST_MADE if made else MOST_READ):
        L_bgxk = K.scores(asked, tile, keys.turns_bkp)
        if keys.seen_bqk is not None:
            unseen_bqk = ~keys.seen_bqk[:, :, tile]
            L_bgxk.unflatten(2, (-1, q)).masked_fill_(unseen_bqk[:, None, None], MASKED)
        P_bgxk, largest_bgx1, total_bgx1 = _exponentials(L_bgxk)
        partials.append((largest_bgx1, total_bgx1, V.values(P_bgxk, tile)))
    largest_bgx1, total_bgx1, Y_bgxu = _merged(partials)
    return largest_bgx1, total_bgx1, V.output(Y_bgxu, total_bgx1)


def _in_bfloat16(keys: Keys) -> bool:
    """Is it a bfloat16 cache that is multiplied as it is? A basis is applied in float32."""
    return all(how.dtype == "bfloat16" and how.mode in ("dense", "contextual", "fixed-a") for _, how in _sides(keys))


def _sides(keys: Keys) -> Iterator[tuple[Stored, Factorization]]:
    return zip(keys.held, keys.how, strict=True)


def _tiles(keys: int, numbers_per_key: int, most: int) -> Iterator[slice]:
    """Stretches of at most so many keys, of which no more numbers are made than stay in the processor's cache."""
    size = min(most, max(64, TILE_NUMBERS // numbers_per_key))
    return (slice(start, min(keys, start + size)) for start in range(0, keys, size))


def _exponentials(L_bgxk: Tensor) -> Partial:
    """exp(L - largest logit) in place of L, the largest logit, the sum over k."""
    if L_bgxk.device.type == "cpu" and L_bgxk.is_contiguous() and native.available():
        return L_bgxk, *native.exponentials(L_bgxk)
    largest_bgx1 = L_bgxk.amax(-1, keepdim=True)
    P_bgxk = L_bgxk.sub_(largest_bgx1).exp_()
    return P_bgxk, largest_bgx1, P_bgxk.sum(-1, keepdim=True)


def _merged(partials: list[Partial]) -> Partial:
    """Sums of several stretches of keys as one: each is scaled from its own maximum to that of all."""
    if len(partials) == 1:
        return partials[0]
    largest, total, Y = (torch.stack(parts) for parts in zip(*partials, strict=True))
    highest = largest.amax(0)
    weight = (largest - highest).exp_()
    return highest, (weight * total).sum(0), (weight * Y).sum(0)


# ---- products of few rows ----


def _dot(
    Q_bxd: Tensor, K_bkd: Tensor | Rows, scratch: Scratch, A_bgk: Tensor | None = None, L_bxk: Tensor | None = None
) -> Tensor:
    """[b,x,d] . [b,k,d] -> [b,x,k] in float32, valid until the next call.

    With A, each key weighs so much for the queries of a KV head; with L, the product is added to it.
    """
    if isinstance(K_bkd, Rows):
        out_bxk = scratch("L", Q_bxd, (*Q_bxd.shape[:2], K_bkd.shape[1]), torch.float32)
        return native.dot(Q_bxd, K_bkd, out_bxk, A_bgk, add=L_bxk is not None)
    P_bxk = _keys_times_queries(Q_bxd, K_bkd)
    if A_bgk is None:
        return P_bxk if L_bxk is None else L_bxk.add_(P_bxk)
    P_bgxk = P_bxk.unflatten(1, (A_bgk.shape[1], -1)).mul_(A_bgk[:, :, None])
    return P_bxk if L_bxk is None else L_bxk.add_(P_bgxk.flatten(1, 2))


def _keys_times_queries(Q_bxd: Tensor, K_bkd: Tensor) -> Tensor:
    if K_bkd.dtype == torch.bfloat16:
        return _product(Q_bxd.to(K_bkd.dtype), K_bkd.mT).float()
    if Q_bxd.shape[1] > FEW_ROWS:
        return torch.bmm(Q_bxd, K_bkd.mT)
    return torch.bmm(K_bkd, Q_bxd.mT).mT.contiguous()


def _weigh(P_bxk: Tensor, V_bke: Tensor | Rows, A_bgk: Tensor | None = None) -> Tensor:
    """[b,x,k] . [b,k,e] -> [b,x,e] in float32; with A, by the KV head of a query."""
    if isinstance(V_bke, Rows):
        return native.weigh(P_bxk, V_bke, A_bgk)
    if A_bgk is not None:
        P_bxk = (P_bxk.unflatten(1, (A_bgk.shape[1], -1)) * A_bgk[:, :, None]).flatten(1, 2)
    if V_bke.dtype == torch.bfloat16:
        return _product(P_bxk.to(V_bke.dtype), V_bke).float()
    x = P_bxk.shape[1]
    if x >= 4:
        return torch.bmm(P_bxk, V_bke)
    return torch.bmm(F.pad(P_bxk, (0, 0, 0, 4 - x)), V_bke)[:, :x]


def _product(X_bxy: Tensor, Y_byz: Tensor) -> Tensor:
    """In bfloat16 one matrix is multiplied up to twice as fast alone as in a batch of one."""
    return torch.mm(X_bxy[0], Y_byz[0])[None] if len(X_bxy) == 1 else torch.bmm(X_bxy, Y_byz)


# ---- what one cached side does, mode by mode ----


def _side(held: Stored, how: Factorization, g: int, d: int, work: torch.dtype, scratch: Scratch) -> _Side:
    if how.mode == "dense":
        return _Heads(held, how, g, d, work, scratch, "X")
    if how.mode == "contextual":
        return _Contextual(held, how, g, d, work, scratch, "B")
    if how.mode == "fixed-a":
        exact = (
            how.rank == g and how.basis.ndim == 2 and scratch.constant("exact", how.basis, lambda: _picks_heads(how))
        )
        return (_Heads if exact else _FixedA)(held, how, g, d, work, scratch, "B")
    return _Basis(held, how, g, d, work, scratch, "A" if how.mode == "fixed-b" else "C")


def _picks_heads(how: Factorization) -> bool:
    """Is this `fixed-a` of full rank the dense cache?"""
    return torch.equal(how.basis, how.rank * torch.eye(how.rank, dtype=how.basis.dtype, device=how.basis.device))


@dataclass
class _Side:
    """K or V of one layer. In memory tokens lie behind all other axes but the last (see `cache.Cache`)."""

    held: Stored
    how: Factorization
    g: int
    d: int
    work: torch.dtype  # of the products: bfloat16 where nothing else is held
    scratch: Scratch
    part: str
    words: Callable[[slice], Tensor] | None = None
    shared: Any = None  # the side whose coefficients these are, too
    rounded: bool = False  # is the model in bfloat16, so that what a basis makes of codes may be, too?

    @property
    def numbers_per_key(self) -> int:
        """How many numbers are made of a token for its score."""
        return 0 if isinstance(self.rows(slice(0, 0)), Rows) else self.how.rank * self.d

    @property
    def numbers_per_value(self) -> int:
        """The same of a token's value."""
        return self.numbers_per_key

    def ask(self, Q_bgxd: Tensor) -> Tensor:
        """What of the queries does not change from tile to tile."""
        return Q_bgxd

    def scores(self, asked: Tensor, tile: slice, turns_bkp: Tensor) -> Tensor:
        """Logits [b,g,x,k] of a tile, float32, to be overwritten."""
        raise NotImplementedError

    def values(self, P_bgxk: Tensor, tile: slice) -> Tensor:
        """The weighted sum of a tile's values, [b,g,x,...], before the constant factors."""
        raise NotImplementedError

    def output(self, Y_bgxu: Tensor, total_bgx1: Tensor) -> Tensor:
        """Values [b,g,x,e] of such sums."""
        return Y_bgxu

    def stored(self, part: str, tile: slice) -> dict[str, Tensor]:
        """A tile of a part as it lies in memory: [b,k,n] as [b,n,k], [b,k,s,n] as [b,s,k,n]."""
        return {name: _tokens_last(array[:, tile]) for name, array in self.held[part].items()}

    def numbers(self, part: str, tile: slice) -> Tensor:
        """The same as numbers."""
        fields = self.stored(part, tile)
        if self.how.dtype == "spectral":
            return _unpacked(fields["codes"], self.how.widths, self.scratch)
        array = fields.get("x", fields.get("codes"))
        assert array is not None
        if array.dtype == self.work:
            return array
        if "x" in fields:
            return self.scratch(part, array, array.shape, self.work).copy_(array)
        return _dequantized(fields, *self._kind(part, array), self.scratch, part)

    def rows(self, tile: slice) -> Tensor | Rows:
        """A tile of rows [b,s,k,n], as they are stored where compiled functions read them."""
        fields = self.stored(self.part, tile)
        array = fields.get("x", fields.get("codes"))
        assert array is not None
        kind, n = self._kind(self.part, array)
        if Rows.takes(fields, kind, n):
            return Rows(fields, kind, n, self.rounded)
        return self.numbers(self.part, tile)

    def _kind(self, part: str, array: Tensor) -> tuple[str, int]:
        """(dtype, numbers in a row) of a stored part."""
        return (
            part_dtype(part, array.ndim, self.how.dtype),
            part_shapes(self.how.mode, self.how.rank, self.g, self.d)[part][-1],
        )


def _tokens_last(array: Tensor) -> Tensor:
    return array.mT if array.ndim == 3 else array.transpose(1, 2)


def _dequantized(fields: dict[str, Tensor], kind: str, n: int, scratch: Scratch, name: str) -> Tensor:
    """int8 or int4 with tokens last -> float32, with n numbers along the axis that is grouped."""
    codes, scale = fields["codes"], fields["scale"]
    axis = -2 if codes.ndim == 3 else -1
    shape = list(codes.shape)
    shape[axis] = codes.shape[axis] * (2 if kind == "int4" else 1)
    numbers = scratch(name, codes, shape, torch.float32)
    if kind == "int8":
        numbers.copy_(codes)
    else:
        low, high = numbers.unflatten(axis, (-1, 2)).unbind(-1 if axis == -1 else -2)
        low.copy_(codes & 15)
        high.copy_(codes >> 4)
        numbers = numbers.narrow(axis, 0, n)
    for group in range(scale.shape[axis]):
        start = group * quantize.GROUP
        here = numbers.narrow(axis, start, min(quantize.GROUP, n - start))
        here.mul_(scale.narrow(axis, group, 1).float())
        if kind == "int4":
            here.add_(fields["minimum"].narrow(axis, group, 1).float())
    return numbers


class _Heads(_Side):
    """One key and one value a KV head: dense, and `fixed-a` of full rank, which is the same cache."""

    @property
    def numbers_per_key(self) -> int:
        return 0 if self.work == torch.bfloat16 or isinstance(self.rows(slice(0, 0)), Rows) else self.g * self.d

    def scores(self, asked: Tensor, tile: slice, turns_bkp: Tensor) -> Tensor:
        K_bgkd = self.rows(tile)
        return _dot(asked.flatten(0, 1), K_bgkd.flatten(0, 1), self.scratch).unflatten(0, asked.shape[:2])

    def values(self, P_bgxk: Tensor, tile: slice) -> Tensor:
        V_bgke = self.rows(tile)
        return _weigh(P_bgxk.flatten(0, 1), V_bgke.flatten(0, 1)).unflatten(0, P_bgxk.shape[:2])


class _Contextual(_Side):
    """Eq. (A.2), (A.3): a product with every b, shared by all heads; a weighs the logits or the probabilities."""

    def factors(self, tile: slice) -> Iterator[tuple[Tensor, Tensor | Rows]]:
        """a [b,g,k] in float32 and b [b,k,d] of each rank."""
        A_bxk = self.numbers("A", tile).float()
        A_bsgk = (A_bxk if A_bxk.stride(-1) == 1 else A_bxk.contiguous()).unflatten(1, (self.how.rank, self.g))
        return zip(A_bsgk.unbind(1), self.rows(tile).unbind(1), strict=True)

    def ask(self, Q_bgxd: Tensor) -> Tensor:
        return Q_bgxd.flatten(1, 2) / self.how.rank

    def scores(self, asked: Tensor, tile: slice, turns_bkp: Tensor) -> Tensor:
        L_byk = None
        for A_bgk, B_bkd in self.factors(tile):
            L_byk = _dot(asked, B_bkd, self.scratch, A_bgk, L_byk)
        assert L_byk is not None
        return L_byk.unflatten(1, (self.g, -1))

    def values(self, P_bgxk: Tensor, tile: slice) -> Tensor:
        Y_byd = None
        for A_bgk, B_bke in self.factors(tile):
            of_rank = _weigh(P_bgxk.flatten(1, 2), B_bke, A_bgk)
            Y_byd = of_rank if Y_byd is None else Y_byd.add_(of_rank)
        assert Y_byd is not None
        return Y_byd.unflatten(1, (self.g, -1))

    def output(self, Y_bgxu: Tensor, total_bgx1: Tensor) -> Tensor:
        return Y_bgxu / self.how.rank


class _FixedA(_Side):
    """The query absorbs A: what is left is multi-query attention with keys of length R d."""

    def _basis(self) -> Tensor:
        return self.scratch.constant("A", self.how.basis, lambda: self.how.basis.float() / self.how.rank)

    def ask(self, Q_bgxd: Tensor) -> Tensor:
        """[b,s,g x,d]."""
        Q_bgxsd = absorb(Q_bgxd.transpose(1, 2)[:, :, :, None], self._basis())[:, :, :, 0].transpose(1, 2)
        return Q_bgxsd.flatten(1, 2).transpose(1, 2)

    def scores(self, asked: Tensor, tile: slice, turns_bkp: Tensor) -> Tensor:
        L_byk = None
        ranks: Any = self.rows(tile).unbind(1)
        for Q_byd, B_bkd in zip(asked.unbind(1), ranks, strict=True):
            L_byk = _dot(Q_byd, B_bkd, self.scratch, L_bxk=L_byk)
        assert L_byk is not None
        return L_byk.unflatten(1, (self.g, -1))

    def values(self, P_bgxk: Tensor, tile: slice) -> Tensor:
        P_byk, B_buke = P_bgxk.flatten(1, 2), self.rows(tile)
        return torch.cat([_weigh(P_byk, B_bke) for B_bke in B_buke.unbind(1)], -1).unflatten(1, (self.g, -1))

    def output(self, Y_bgxu: Tensor, total_bgx1: Tensor) -> Tensor:
        Y_bxgnue = Y_bgxu.transpose(1, 2)[:, :, :, None].unflatten(-1, (self.how.rank, -1))
        return mix(Y_bxgnue, self._basis())[:, :, :, 0].transpose(1, 2)


class _Basis(_Side):
    """`fixed-b` and `latent`: K is rebuilt and rotated tile by tile, V is summed in coefficients.

    Without compiled functions, features i and i + d/2 lie side by side in the rebuilt K (and in the query), so that a
    rotation is one complex product in place. Scales of spectral levels are part of the basis.
    """

    @property
    def numbers_per_key(self) -> int:
        words = 0 if self.how.predictor is None else len(self.how.predictor)
        return max(self.g * self.d, self.how.rank, words)

    @property
    def numbers_per_value(self) -> int:
        if self.how.dtype == "spectral" and native.codes_take(self.stored(self.part, slice(0, 0))["codes"]):
            return 0  # codes are weighed as they are
        return self.numbers_per_key

    def _basis(self) -> tuple[Tensor | None, ...]:
        """basis [g,s,d], mean [g,1,d] and predictor [g,z,d]."""
        how = self.how
        B_gsd = (how.basis if how.mode == "fixed-b" else how.basis.transpose(0, 1)).float()
        widths = (self.shared or self).how.widths
        if widths:
            B_gsd = B_gsd * quantize.packing(tuple(widths), B_gsd.device).scale_s[:, None]
        W_gzd = None if how.predictor is None else how.predictor.transpose(0, 1).float().contiguous()
        return B_gsd.contiguous(), None if how.mean is None else how.mean.float()[:, None], W_gzd

    def _for_keys(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same as K is rebuilt with them: side by side, [s,g d] and [z,g d], where the heads share coefficients."""
        dtype = torch.bfloat16 if self._in_bfloat16 else torch.float32
        B_gsd, mean_g1d, W_gzd = (x if x is None or self._natively else _pairs_together(x) for x in self._basis())
        assert B_gsd is not None
        if self.how.mode == "fixed-b":
            return B_gsd.to(dtype), mean_g1d, None
        B_sx, W_zx = (None if x is None else x.transpose(0, 1).flatten(1).contiguous() for x in (B_gsd, W_gzd))
        assert B_sx is not None
        return B_sx.to(dtype), mean_g1d, W_zx

    @property
    def _key_constants(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        name = f"K, compiled: {self._natively}, in bfloat16: {self._in_bfloat16}"
        return self.scratch.constant(name, self.how.basis, self._for_keys)

    def coefficients(self, tile: slice) -> Tensor:
        """[b,g,k,s], or [b,1,k,s] where the heads share them."""
        if self.shared is not None:  # K has just made the same numbers of this tile
            return self.shared.made
        C = self.numbers(self.part, tile)
        dtype = torch.bfloat16 if self._in_bfloat16 else C.dtype
        if C.dtype != dtype or not C.is_contiguous():  # rows as far apart as a whole cache fall on the same cache lines
            C = self.scratch("coefficients", C, C.shape, dtype).copy_(C)
        self.made = C if self.how.mode == "fixed-b" else C.mT[:, None]
        return self.made

    @property
    def _in_bfloat16(self) -> bool:
        """Is K rebuilt in bfloat16, as the dense model makes it? Not where the words are added to it."""
        return self.rounded and self.how.predictor is None and self._natively

    def words_of(self, tile: slice) -> Tensor:
        """z of a tile, [b,k,z]; V reads what K has just looked up."""
        if self.shared is not None:
            return self.shared.looked_up
        assert self.words is not None
        self.looked_up = self.words(tile).float()
        return self.looked_up

    def ask(self, Q_bgxd: Tensor) -> Tensor:
        return Q_bgxd if self._natively else _pairs_together(Q_bgxd)

    @property
    def _natively(self) -> bool:
        return self.d % (2 * native.LANES) == 0 and self.how.basis.device.type == "cpu" and native.available()

    def rebuilt(self, tile: slice) -> Tensor:
        """K before its mean and RoPE, [b,k,g,d].

        Matrices are multiplied one by one: in bfloat16 that is twice as fast as in a batch.
        """
        B, _, W_zx = self._key_constants
        C_bgks = self.coefficients(tile)
        b, _, k, _ = C_bgks.shape
        if self.how.mode == "fixed-b":
            K_bgkd = self.scratch("K", B, (b, self.g, k, self.d))
            for K_kd, A_ks, B_sd in zip(K_bgkd.flatten(0, 1), C_bgks.flatten(0, 1), [*B] * b, strict=True):
                torch.mm(A_ks, B_sd, out=K_kd)
            return K_bgkd.transpose(1, 2)
        K_bkx = self.scratch("K", B, (b, k, self.g * self.d))
        for K_kx, C_ks in zip(K_bkx, C_bgks[:, 0], strict=True):
            torch.mm(C_ks, B, out=K_kx)
        if W_zx is not None:
            for K_kx, Z_kz in zip(K_bkx, self.words_of(tile), strict=True):
                K_kx.addmm_(Z_kz, W_zx)
        return K_bkx.unflatten(-1, (self.g, self.d))

    def scores(self, asked: Tensor, tile: slice, turns_bkp: Tensor) -> Tensor:
        K_bkgd = self.rebuilt(tile)
        _, mean_g1d, _ = self._key_constants
        if self._natively:
            return native.dot_rotated(asked, K_bkgd, mean_g1d, turns_bkp[:, tile])
        if mean_g1d is not None:
            K_bkgd.add_(mean_g1d[:, 0])
        torch.view_as_complex(K_bkgd.unflatten(-1, (-1, 2))).mul_(turns_bkp[:, tile, None])
        K_xkd = K_bkgd.transpose(1, 2).flatten(0, 1)
        return _dot(asked.flatten(0, 1), K_xkd, self.scratch).unflatten(0, asked.shape[:2])

    def values(self, P_bgxk: Tensor, tile: slice) -> Tensor:
        if self.how.mode == "fixed-b":
            A_bgku = self.rows(tile)
            return _weigh(P_bgxk.flatten(0, 1), A_bgku.flatten(0, 1)).unflatten(0, P_bgxk.shape[:2])
        P_byk = P_bgxk.flatten(1, 2)
        codes_bck = self.stored(self.part, tile)["codes"] if self.how.dtype == "spectral" else None
        if codes_bck is not None and native.codes_take(codes_bck):
            Y_byu = native.weigh_codes(P_byk, codes_bck, tuple(self.how.widths), self.rounded)
        else:
            Y_byu = _weigh(P_byk, self.coefficients(tile)[:, 0])
        if self.how.predictor is not None:  # words are coefficients like others
            Y_byu = torch.cat([Y_byu, _weigh(P_byk, self.words_of(tile))], -1)
        return Y_byu.unflatten(1, (self.g, -1))

    def _values_basis(self) -> tuple[Tensor, Tensor | None]:
        """Basis and predictor in one, [g,u + z,e], and mean [g,1,e]."""
        B_gue, mean_g1e, W_gze = self._basis()
        assert B_gue is not None
        return B_gue if W_gze is None else torch.cat([B_gue, W_gze], 1), mean_g1e

    def output(self, Y_bgxu: Tensor, total_bgx1: Tensor) -> Tensor:
        B_gue, mean_g1e = self.scratch.constant("V", self.how.basis, self._values_basis)
        rows = {"x": B_gue}
        B: Tensor | Rows = Rows(rows, "float32", self.d) if Rows.takes(rows, "float32", self.d) else B_gue
        O_gye = _weigh(Y_bgxu.transpose(0, 1).flatten(1, 2), B)  # a basis is read as if it were u keys
        O_bgxe = O_gye.unflatten(1, (len(Y_bgxu), -1)).transpose(0, 1)
        return O_bgxe if mean_g1e is None else O_bgxe + total_bgx1 * mean_g1e


def _pairs_together(X_gsd: Tensor) -> Tensor:
    """Features (0 ... d-1) as 0, d/2, 1, d/2 + 1, ...: [..., d]."""
    return X_gsd.unflatten(-1, (2, -1)).mT.flatten(-2).contiguous()


# ---- spectral codes, unpacked in rows of keys ----


def _unpacked(codes_bck: Tensor, widths: tuple[int, ...], scratch: Scratch) -> Tensor:
    """Packed codes [b,bytes,k] -> t (1 + kappa t^2) [b,s,k] in float32: the levels without their scales."""
    b, _, k = codes_bck.shape
    shape = b, len(widths), k
    if native.codes_take(codes_bck):
        return native.levels(codes_bck, tuple(widths), scratch("levels", codes_bck, shape, torch.float32))
    how = quantize.packing(tuple(widths), codes_bck.device)
    codes_bsk = scratch("codes", codes_bck, shape)
    for piece in how.pieces:
        digits = codes_bck[:, piece.rows]
        here = codes_bsk[:, piece.coefficients]
        target = here if piece.first else scratch("digits", codes_bck, here.shape)
        if piece.shift >= 0:
            torch.bitwise_right_shift(digits, piece.shift, out=target)
        else:
            torch.bitwise_left_shift(digits, -piece.shift, out=target)
        target.bitwise_and_(piece.mask)
        if not piece.first:
            here.bitwise_or_(target)
    t_bsk = scratch("levels", codes_bck, shape, torch.float32).copy_(codes_bsk)
    t_bsk.mul_(2).add_(how.offset_s[:, None])
    curve_bsk = torch.mul(t_bsk, t_bsk, out=scratch("curve", t_bsk, shape))
    curve_bsk.mul_(how.kappa_s[:, None]).add_(1)
    return t_bsk.mul_(curve_bsk)
