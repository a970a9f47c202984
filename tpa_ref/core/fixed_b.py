"""`fixed-b`: a constant basis over the features of every KV head. Cached are R coefficients a head, before RoPE."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .attention import mean_values
from .mode import Mode, Parts, Tokens, register
from .transform import leading, loss, relative_error, spectrum, truncated

einsum = partial(np.einsum, optimize=True)


@register
@dataclass(frozen=True)
class FixedB(Mode):
    """Cached are a_g = E_g (x_g - mean_g), one row of R for each head.

    basis B and encoder E [g,R,d]: without an encoder B has orthonormal rows and encodes as well. mean [g,d], or None.
    """

    basis: Any = field(default=None, repr=False)
    encoder: Any = field(default=None, repr=False)
    mean: Any = field(default=None, repr=False)

    name = "fixed-b"
    constants = ("basis", "encoder", "mean")

    @classmethod
    def exact_rank(cls, g: int, d: int) -> int:
        return d

    @classmethod
    def fit(
        cls, g: int, d: int, rank: int, dtype: str, M_gdgd: np.ndarray, mean_gd: Any = None, F_gdgd: Any = None
    ) -> FixedB:
        if rank == d:
            return cls(g, d, rank, dtype, 0.0, np.broadcast_to(np.eye(d), (g, d, d)).copy())
        if F_gdgd is None:
            return cls(g, d, rank, dtype, *leading_features(M_gdgd, rank)[::-1])
        heads = [slice(head, head + 1) for head in range(g)]
        found = [spectrum(M_gdgd[one, :, one], mean_gd[one], [F_gdgd[one, :, one]]) for one in heads]
        pairs = [truncated(one, rank) for one in found]
        encoder, basis = (np.concatenate([x.swapaxes(0, 1) for x in side]) for side in zip(*pairs, strict=True))
        return cls(g, d, rank, dtype, loss([one.variance_s for one in found], rank), basis, encoder, mean_gd)

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {"A": (self.g, self.rank)}

    def array_shapes(self) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
        basis = (self.g, self.rank, self.d)
        weighted = self.encoder is not None or self.mean is not None
        return {
            "basis": (basis,),
            "encoder": (basis if weighted else None,),
            "mean": ((self.g, self.d) if weighted else None,),
        }

    def encode(self, X_bkgd: np.ndarray, tokens: Tokens) -> Parts:
        encoder = self.basis if self.encoder is None else self.encoder
        X_bkgd = X_bkgd if self.mean is None else X_bkgd - self.mean.astype(X_bkgd.dtype)
        return {"A": einsum("gsd,bkgd->bkgs", encoder.astype(X_bkgd.dtype), X_bkgd)}

    def decode(self, parts: Parts, tokens: Tokens) -> np.ndarray:
        A_bkgs = parts["A"]
        X_bkgd = einsum("bkgs,gsd->bkgd", A_bkgs, self.basis.astype(A_bkgs.dtype))
        return X_bkgd if self.mean is None else X_bkgd + self.mean.astype(A_bkgs.dtype)

    def values(self, P_bhqk: np.ndarray, parts: Parts, tokens: Tokens) -> np.ndarray:
        """V needs no rotation, hence no rebuild: aggregate in R coefficients, apply the basis once per query."""
        O_bqhe = values_fixed_b(P_bhqk, parts["A"], self.basis.astype(P_bhqk.dtype))
        return O_bqhe if self.mean is None else O_bqhe + mean_values(P_bhqk, self.mean.astype(P_bhqk.dtype))


def leading_features(M_gdgd: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Per KV head the leading eigenvectors of E[x_g x_g^T] in R^{d x d}.

    Shapes: M [g,d,g,d] -> B [g,R,d] with orthonormal rows, relative error over all heads.
    """
    M_gdc = einsum("gdgc->gdc", M_gdgd)  # the diagonal blocks: each head with itself
    B_gsd = np.stack([leading(M_dc, rank)[0] for M_dc in M_gdc])
    kept = einsum("gsd,gdc,gsc->", B_gsd, M_gdc, B_gsd)
    return B_gsd, relative_error(kept, einsum("gdd->", M_gdc))


def values_fixed_b(P_bhqk: np.ndarray, A_bkgu: np.ndarray, B_gue: np.ndarray) -> np.ndarray:
    """Shapes: P [b,h,q,k], A [b,k,g,u], B [g,u,e] -> [b,q,h,e]."""
    b, h, q, k = P_bhqk.shape
    g = A_bkgu.shape[2]
    Y_bqgnu = einsum("bgnqk,bkgu->bqgnu", P_bhqk.reshape(b, g, h // g, q, k), A_bkgu)
    return einsum("bqgnu,gue->bqgne", Y_bqgnu, B_gue).reshape(b, q, h, -1)
