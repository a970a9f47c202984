"""How K and V of a segment are read tile by tile, mode by mode. A mode without a reader here is formed (`Formed`).

In memory the token axis is the last but one, or the last (see `core.cache.Cache._zeros`). x is (n, q) and y is (g, x),
as in `decode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpa_ref.core.mode import Stored, of_part

from ..core.cache import Segment
from ..core.contextual import Contextual
from ..core.dense import Dense
from ..core.fixed_a import FixedA, absorb, mix
from ..core.fixed_b import FixedB
from ..core.latent import Latent
from ..core.norm import rms_scale
from ..core.pair import Joint
from ..core.spectral import CodedLatent
from .heads import is_heads, tokens_last
from .kernels import native
from .kernels.native import Rows
from .products import dequantized, dot, unpacked, weigh
from .scratch import Scratch


def reader(segment: Segment, dtype: torch.dtype, scratch: Scratch) -> tuple[Side, Side]:
    """The readers of K and of V of a segment, for a model that computes in dtype."""
    rounded, modes = dtype == torch.bfloat16, segment.pair.modes
    # Products are in bfloat16 where all that is held is; a basis is applied in float32.
    plain = all(mode.dtype == "bfloat16" and isinstance(mode, Dense | Contextual | FixedA) for mode in modes)
    work = torch.bfloat16 if rounded and plain else torch.float32
    joint = isinstance(segment.pair, Joint)
    stored = of_part(segment.stored, "k"), of_part(segment.stored, "k" if joint else "v")
    K, V = (side(mode, held, work, scratch, rounded) for mode, held in zip(modes, stored, strict=True))
    V.shared = K if joint else None
    return K, V


def side(mode: Any, held: Stored, work: torch.dtype, scratch: Scratch, rounded: bool) -> Side:
    """The reader of a mode."""
    if is_heads(mode, scratch):
        return Heads(mode, held, work, scratch, rounded, "X" if isinstance(mode, Dense) else "B")
    if isinstance(mode, Contextual):
        return ByRank(mode, held, work, scratch, rounded, "B")
    if isinstance(mode, FixedA):
        return Absorbed(mode, held, work, scratch, rounded, "B")
    if isinstance(mode, FixedB):
        return Rebuilt(mode, held, work, scratch, rounded, "A")
    if isinstance(mode, Latent):
        return Rebuilt(mode, held, work, scratch, rounded, "C")
    return Formed(mode, held, work, scratch, rounded, "")


@dataclass
class Side:
    """K or V of one layer."""

    mode: Any
    held: Stored
    work: torch.dtype  # of the products: bfloat16 where all that is held is
    scratch: Scratch
    rounded: bool  # is the model in bfloat16, so that what a basis makes of codes may be bfloat16?
    part: str
    shared: Any = None  # the side that has the coefficients, where K and V share them

    @property
    def numbers_per_key(self) -> int:
        """How many numbers are made of a token for its score."""
        return 0 if isinstance(self.rows(slice(0, 0)), Rows) else self.mode.rank * self.mode.d

    @property
    def numbers_per_value(self) -> int:
        """The same of a token's value."""
        return self.numbers_per_key

    def ask(self, Q_bgxd: Tensor) -> Tensor:
        """What of the queries does not change from tile to tile."""
        return Q_bgxd

    def scores(self, asked: Tensor, tile: slice, tokens: Any) -> Tensor:
        """Logits [b,g,x,k] of a tile, float32, to be overwritten."""
        raise NotImplementedError

    def values(self, P_bgxk: Tensor, tile: slice, tokens: Any) -> Tensor:
        """The weighted sum of a tile's values, [b,g,x,...], before the constant factors."""
        raise NotImplementedError

    def output(self, Y_bgxu: Tensor, total_bgx1: Tensor) -> Tensor:
        """Values [b,g,x,e] of such sums."""
        return Y_bgxu

    def stored(self, part: str, tile: slice) -> dict[str, Tensor]:
        """A tile of a part in memory's order: [b,k,n] as [b,n,k], [b,k,s,n] as [b,s,k,n]."""
        return {name: tokens_last(array[:, tile]) for name, array in of_part(self.held, part).items()}

    def numbers(self, part: str, tile: slice) -> Tensor:
        """The same as numbers."""
        fields = self.stored(part, tile)
        if isinstance(self.mode, CodedLatent):
            return unpacked(fields["codes"], self.mode.widths, self.scratch)
        array = fields.get("x", fields.get("codes"))
        assert array is not None
        if array.dtype == self.work:
            return array
        if "x" in fields:
            return self.scratch(part, array, array.shape, self.work).copy_(array)
        return dequantized(fields, *self.kind(part), self.scratch, part)

    def rows(self, tile: slice) -> Tensor | Rows:
        """A tile of rows [b,s,k,n], as they are stored where compiled functions read them."""
        fields, (kind, n) = self.stored(self.part, tile), self.kind(self.part)
        return Rows(fields, kind, n, self.rounded) if Rows.takes(fields, kind, n) else self.numbers(self.part, tile)

    def kind(self, part: str) -> tuple[str, int]:
        """(dtype, numbers in a row) of a stored part."""
        return self.mode.part_dtype(part), self.mode.parts()[part][-1]


class Formed(Side):
    """Any mode, by its own `load` and `decode`: correct for all, fast for none."""

    @property
    def numbers_per_key(self) -> int:
        return self.mode.g * self.mode.d

    def parts(self, tile: slice) -> Any:
        return self.mode.load({name: array[:, tile] for name, array in self.held.items()}, torch.float32)

    def scores(self, asked: Tensor, tile: slice, tokens: Any) -> Tensor:
        K_bkgd = self.mode.rotated_keys(self.parts(tile), tokens.of(tile)).float()
        return asked @ K_bkgd.permute(0, 2, 3, 1)

    def values(self, P_bgxk: Tensor, tile: slice, tokens: Any) -> Tensor:
        return P_bgxk @ self.mode.decode(self.parts(tile), tokens.of(tile)).float().transpose(1, 2)


class Heads(Side):
    """One key and one value a KV head: dense, and `fixed-a` of full rank, which is the same cache."""

    @property
    def numbers_per_key(self) -> int:
        as_stored = self.work == torch.bfloat16 or isinstance(self.rows(slice(0, 0)), Rows)
        return 0 if as_stored else self.mode.g * self.mode.d

    def scores(self, asked: Tensor, tile: slice, tokens: Any) -> Tensor:
        K_bgkd = self.rows(tile)
        return dot(asked.flatten(0, 1), K_bgkd.flatten(0, 1), self.scratch).unflatten(0, asked.shape[:2])

    def values(self, P_bgxk: Tensor, tile: slice, tokens: Any) -> Tensor:
        V_bgke = self.rows(tile)
        return weigh(P_bgxk.flatten(0, 1), V_bgke.flatten(0, 1)).unflatten(0, P_bgxk.shape[:2])


class ByRank(Side):
    """`contextual`, Eq. (A.2), (A.3): a product with every b, shared by all heads; a weighs logits or probabilities."""

    def factors(self, tile: slice) -> Iterator[tuple[Tensor, Tensor | Rows]]:
        """a [b,g,k] in float32 and b [b,k,d] of each rank."""
        A = self.numbers("A", tile).float()  # [b,s g,k]
        A = A if A.stride(-1) == 1 else A.contiguous()
        A_bsgk = A.unflatten(1, (self.mode.rank, self.mode.g))
        return zip(A_bsgk.unbind(1), self.rows(tile).unbind(1), strict=True)

    def ask(self, Q_bgxd: Tensor) -> Tensor:
        return Q_bgxd.flatten(1, 2) / self.mode.rank

    def scores(self, asked: Tensor, tile: slice, tokens: Any) -> Tensor:
        L_byk = None
        for A_bgk, B_bkd in self.factors(tile):
            L_byk = dot(asked, B_bkd, self.scratch, A_bgk, L_byk)
        assert L_byk is not None
        return L_byk.unflatten(1, (self.mode.g, -1))

    def values(self, P_bgxk: Tensor, tile: slice, tokens: Any) -> Tensor:
        Y_byd = None
        for A_bgk, B_bke in self.factors(tile):
            of_rank = weigh(P_bgxk.flatten(1, 2), B_bke, A_bgk)
            Y_byd = of_rank if Y_byd is None else Y_byd.add_(of_rank)
        assert Y_byd is not None
        return Y_byd.unflatten(1, (self.mode.g, -1))

    def output(self, Y_bgxu: Tensor, total_bgx1: Tensor) -> Tensor:
        return Y_bgxu / self.mode.rank


class Absorbed(Side):
    """`fixed-a`: the query absorbs A; what is left is multi-query attention with keys of length R d."""

    def basis(self) -> Tensor:
        return self.scratch.constant("A", self.mode.basis, lambda: self.mode.basis.float() / self.mode.rank)

    def ask(self, Q_bgxd: Tensor) -> Tensor:
        """[b,s,g x,d]."""
        Q_bgxsd = absorb(Q_bgxd.transpose(1, 2)[:, :, :, None], self.basis())[:, :, :, 0].transpose(1, 2)
        return Q_bgxsd.flatten(1, 2).transpose(1, 2)

    def scores(self, asked: Tensor, tile: slice, tokens: Any) -> Tensor:
        L_byk = None
        ranks: Any = self.rows(tile).unbind(1)
        for Q_byd, B_bkd in zip(asked.unbind(1), ranks, strict=True):
            L_byk = dot(Q_byd, B_bkd, self.scratch, L_bxk=L_byk)
        assert L_byk is not None
        return L_byk.unflatten(1, (self.mode.g, -1))

    def values(self, P_bgxk: Tensor, tile: slice, tokens: Any) -> Tensor:
        P_byk, B_buke = P_bgxk.flatten(1, 2), self.rows(tile)
        return torch.cat([weigh(P_byk, B_bke) for B_bke in B_buke.unbind(1)], -1).unflatten(1, (self.mode.g, -1))

    def output(self, Y_bgxu: Tensor, total_bgx1: Tensor) -> Tensor:
        Y_bxgnue = Y_bgxu.transpose(1, 2)[:, :, :, None].unflatten(-1, (self.mode.rank, -1))
        return mix(Y_bxgnue, self.basis())[:, :, :, 0].transpose(1, 2)


class Rebuilt(Side):
    """`fixed-b`, `latent` and `spectral`: K is rebuilt and rotated tile by tile, V is summed in coefficients.

    Without compiled functions, features i and i + d/2 lie side by side in the rebuilt K (and in the query), so that a
    rotation is one complex product in place.
    """

    @property
    def predictor(self) -> Tensor | None:
        return getattr(self.mode, "predictor", None)

    @property
    def k_gain(self) -> Tensor | None:
        """1 + w of the norm behind a prediction, its features in the order in which K is rebuilt."""
        if (w := getattr(self.mode, "k_norm", None)) is None:
            return None
        gain = lambda: 1 + (w if self.natively else pairs_together(w)).float()  # noqa: E731
        return self.scratch.constant(f"k_norm, compiled: {self.natively}", w, gain)

    @property
    def per_head(self) -> bool:
        """Has every head coefficients of its own?"""
        return isinstance(self.mode, FixedB)

    @property
    def numbers_per_key(self) -> int:
        z = 0 if self.predictor is None else len(self.predictor)
        return max(self.mode.g * self.mode.d, self.mode.rank, z)

    @property
    def numbers_per_value(self) -> int:
        if self.coded and self.shared is None and native.codes_take(self.stored(self.part, slice(0, 0))["codes"]):
            return 0  # codes are weighed as they are
        return self.numbers_per_key

    @property
    def coded(self) -> bool:
        return isinstance(self.mode, CodedLatent)

    def basis(self) -> tuple[Tensor | None, ...]:
        """basis [g,s,d], mean [g,1,d] and predictor [g,z,d]."""
        mode, W = self.mode, self.predictor
        B_gsd = (mode.basis if self.per_head else mode.basis.transpose(0, 1)).float()
        W_gzd = None if W is None else W.transpose(0, 1).float().contiguous()
        return B_gsd.contiguous(), None if mode.mean is None else mode.mean.float()[:, None], W_gzd

    def for_keys(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same as K is rebuilt with them: side by side, [s,g d] and [z,g d], where the heads share coefficients."""
        dtype = torch.bfloat16 if self.in_bfloat16 else torch.float32
        B_gsd, mean_g1d, W_gzd = (x if x is None or self.natively else pairs_together(x) for x in self.basis())
        assert B_gsd is not None
        if self.per_head:
            return B_gsd.to(dtype), mean_g1d, None
        B_sx, W_zx = (None if x is None else x.transpose(0, 1).flatten(1).contiguous() for x in (B_gsd, W_gzd))
        assert B_sx is not None
        return B_sx.to(dtype), mean_g1d, W_zx

    @property
    def key_constants(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        name = f"K, compiled: {self.natively}, in bfloat16: {self.in_bfloat16}"
        return self.scratch.constant(name, self.mode.basis, self.for_keys)

    def coefficients(self, tile: slice) -> Tensor:
        """[b,g,k,s], or [b,1,k,s] where the heads share them."""
        if self.shared is not None:  # K has just made the same numbers of this tile
            return self.shared.made
        C = self.numbers(self.part, tile)
        dtype = torch.bfloat16 if self.in_bfloat16 else C.dtype
        if C.dtype != dtype or not C.is_contiguous():  # rows as far apart as a whole cache fall on the same cache lines
            C = self.scratch("coefficients", C, C.shape, dtype).copy_(C)
        self.made = C if self.per_head else C.mT[:, None]
        return self.made

    @property
    def in_bfloat16(self) -> bool:
        """Is K rebuilt in bfloat16, as the dense model makes it? Not where a prediction is added to it."""
        return self.rounded and self.predictor is None and self.natively

    @property
    def natively(self) -> bool:
        d, device = self.mode.d, self.mode.basis.device
        return d % (2 * native.LANES) == 0 and device.type == "cpu" and native.available()

    def token_vectors(self, tile: slice, tokens: Any) -> Tensor:
        """z of a tile, [b,k,z]; V reads what K has just looked up."""
        if self.shared is not None:
            return self.shared.looked_up
        self.looked_up = tokens.vectors(tile).float()
        return self.looked_up

    def ask(self, Q_bgxd: Tensor) -> Tensor:
        return Q_bgxd if self.natively else pairs_together(Q_bgxd)

    def rebuilt(self, tile: slice, tokens: Any) -> Tensor:
        """K before its mean and RoPE, [b,k,g,d].

        Matrices are multiplied one by one: in bfloat16 that is twice as fast as in a batch.
        """
        B, _, W_zx = self.key_constants
        C_bgks, g, d = self.coefficients(tile), self.mode.g, self.mode.d
        b, _, k, _ = C_bgks.shape
        if self.per_head:
            K_bgkd = self.scratch("K", B, (b, g, k, d))
            for K_kd, A_ks, B_sd in zip(K_bgkd.flatten(0, 1), C_bgks.flatten(0, 1), [*B] * b, strict=True):
                torch.mm(A_ks, B_sd, out=K_kd)
            return K_bgkd.transpose(1, 2)
        K_bkx = self.scratch("K", B, (b, k, g * d))
        for K_kx, C_ks in zip(K_bkx, C_bgks[:, 0], strict=True):
            torch.mm(C_ks, B, out=K_kx)
        if W_zx is not None:
            for K_kx, Z_kz in zip(K_bkx, self.token_vectors(tile, tokens), strict=True):
                K_kx.addmm_(Z_kz, W_zx)
        K_bkgd = K_bkx.unflatten(-1, (g, d))
        return K_bkgd if self.k_gain is None else K_bkgd.mul_(rms_scale(K_bkgd)).mul_(self.k_gain)

    def scores(self, asked: Tensor, tile: slice, tokens: Any) -> Tensor:
        K_bkgd = self.rebuilt(tile, tokens)
        _, mean_g1d, _ = self.key_constants
        if self.natively:
            return native.dot_rotated(asked, K_bkgd, mean_g1d, tokens.turns_bkp[:, tile])
        if mean_g1d is not None:
            K_bkgd.add_(mean_g1d[:, 0])
        torch.view_as_complex(K_bkgd.unflatten(-1, (-1, 2))).mul_(tokens.turns_bkp[:, tile, None])
        K_xkd = K_bkgd.transpose(1, 2).flatten(0, 1)
        return dot(asked.flatten(0, 1), K_xkd, self.scratch).unflatten(0, asked.shape[:2])

    def values(self, P_bgxk: Tensor, tile: slice, tokens: Any) -> Tensor:
        if self.per_head:
            A_bgku = self.rows(tile)
            return weigh(P_bgxk.flatten(0, 1), A_bgku.flatten(0, 1)).unflatten(0, P_bgxk.shape[:2])
        P_byk = P_bgxk.flatten(1, 2)
        codes_bck = self.stored(self.part, tile)["codes"] if self.coded and self.shared is None else None
        if codes_bck is not None and native.codes_take(codes_bck):
            Y_byu = native.weigh_codes(P_byk, codes_bck, tuple(self.mode.widths), self.rounded)
        else:
            Y_byu = weigh(P_byk, self.coefficients(tile)[:, 0])
        if self.predictor is not None:  # token vectors are coefficients like others
            Y_byu = torch.cat([Y_byu, weigh(P_byk, self.token_vectors(tile, tokens))], -1)
        return Y_byu.unflatten(1, (self.mode.g, -1))

    def values_basis(self) -> tuple[Tensor, Tensor | None]:
        """Basis and predictor in one, [g,u + z,e], and mean [g,1,e]."""
        B_gue, mean_g1e, W_gze = self.basis()
        assert B_gue is not None
        return B_gue if W_gze is None else torch.cat([B_gue, W_gze], 1), mean_g1e

    def output(self, Y_bgxu: Tensor, total_bgx1: Tensor) -> Tensor:
        B_gue, mean_g1e = self.scratch.constant("V", self.mode.basis, self.values_basis)
        rows = {"x": B_gue}
        B = Rows(rows, "float32", self.mode.d) if Rows.takes(rows, "float32", self.mode.d) else B_gue
        O_gye = weigh(Y_bgxu.transpose(0, 1).flatten(1, 2), B)  # a basis is read as if it were u keys
        O_bgxe = O_gye.unflatten(1, (len(Y_bgxu), -1)).transpose(0, 1)
        return O_bgxe if mean_g1e is None else O_bgxe + total_bgx1 * mean_g1e


def pairs_together(X_gsd: Tensor) -> Tensor:
    """Features (0 ... d-1) as 0, d/2, 1, d/2 + 1, ...: [..., d]."""
    return X_gsd.unflatten(-1, (2, -1)).mT.flatten(-2).contiguous()
