"""`latent`: one constant basis over all heads and features. Cached are R coefficients a token, before RoPE.

RoPE mixes features, so a basis over features cannot be absorbed into the query: K is rebuilt when it is read. That is
the price of a cache that is smaller than the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np

from .attention import mean_values
from .mode import Mode, Parts, Tokens, register
from .transform import leading, loss, spectrum, truncated

einsum = partial(np.einsum, optimize=True)


@register
@dataclass(frozen=True)
class Latent(Mode):
    """Cached is c = E (x - mean), shared by all heads: one row of R.

    basis B and encoder E [R,g,d]: without an encoder B has orthonormal rows and encodes as well. mean [g,d], or None.
    """

    basis: Any = field(default=None, repr=False)
    encoder: Any = field(default=None, repr=False)
    mean: Any = field(default=None, repr=False)

    name = "latent"
    constants: ClassVar[tuple[str, ...]] = ("basis", "encoder", "mean")

    @classmethod
    def exact_rank(cls, g: int, d: int) -> int:
        return g * d

    @classmethod
    def fit(
        cls, g: int, d: int, rank: int, dtype: str, M_gdgd: np.ndarray, mean_gd: Any = None, F_gdgd: Any = None
    ) -> Latent:
        if rank == g * d:
            return cls(g, d, rank, dtype, 0.0, np.eye(g * d).reshape(g * d, g, d))
        if F_gdgd is None:
            U_sx, error = leading(M_gdgd.reshape(g * d, g * d), rank)
            return cls(g, d, rank, dtype, error, U_sx.reshape(rank, g, d))
        found = spectrum(M_gdgd, mean_gd, [F_gdgd])
        encoder, basis = truncated(found, rank)
        return cls(g, d, rank, dtype, loss([found.variance_s], rank), basis, encoder, mean_gd)

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {"C": (self.rank,)}

    def array_shapes(self) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
        basis = (self.rank, self.g, self.d)
        weighted = self.encoder is not None or self.mean is not None
        return {
            "basis": (basis,),
            "encoder": (basis if weighted else None,),
            "mean": ((self.g, self.d) if weighted else None,),
        }

    def encode(self, X_bkgd: np.ndarray, tokens: Tokens) -> Parts:
        encoder = self.basis if self.encoder is None else self.encoder
        X_bkgd = X_bkgd if self.mean is None else X_bkgd - self.mean.astype(X_bkgd.dtype)
        return {"C": einsum("sgd,bkgd->bks", encoder.astype(X_bkgd.dtype), X_bkgd)}

    def decode(self, parts: Parts, tokens: Tokens) -> np.ndarray:
        C_bks = parts["C"]
        X_bkgd = einsum("bks,sgd->bkgd", C_bks, self.basis.astype(C_bks.dtype))
        return X_bkgd if self.mean is None else X_bkgd + self.mean.astype(C_bks.dtype)

    def values(self, P_bhqk: np.ndarray, parts: Parts, tokens: Tokens) -> np.ndarray:
        """V needs no rotation, hence no rebuild: aggregate in R coefficients, apply the basis once per query."""
        O_bqhe = values_latent(P_bhqk, parts["C"], self.basis.astype(P_bhqk.dtype))
        return O_bqhe if self.mean is None else O_bqhe + mean_values(P_bhqk, self.mean.astype(P_bhqk.dtype))


def values_latent(P_bhqk: np.ndarray, C_bku: np.ndarray, B_uge: np.ndarray) -> np.ndarray:
    """Shapes: P [b,h,q,k], C [b,k,u], B [u,g,e] -> [b,q,h,e]."""
    b, h, q, _ = P_bhqk.shape
    g = B_uge.shape[1]
    Y_bgnqu = (P_bhqk @ C_bku[:, None]).reshape(b, g, h // g, q, -1)
    return einsum("bgnqu,uge->bqgne", Y_bgnqu, B_uge).reshape(b, q, h, -1)
