"""`latent`: one constant basis over all heads and features. Cached are R coefficients a token, before RoPE.

RoPE mixes features, so a basis over features cannot be absorbed into the query: K is rebuilt when it is read. That is
the price of a cache that is smaller than the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .attention import einsum, mean_values
from .mode import Mode, Parts, Tokens
from .transform import leading, loss, spectrum, truncated


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

    @property
    def basis_shape(self) -> tuple[int, ...]:
        return self.rank, self.g, self.d

    def array_shapes(self) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
        basis, weighted = self.basis_shape, self.encoder is not None or self.mean is not None
        others = {"encoder": basis, "mean": (self.g, self.d)}
        return {"basis": (basis,)} | {name: (shape if weighted else None,) for name, shape in others.items()}

    def encode(self, X_bkgd: np.ndarray, tokens: Tokens) -> Parts:
        (part,) = self.parts()
        encoder = self.basis if self.encoder is None else self.encoder
        X_bkgd = X_bkgd if self.mean is None else X_bkgd - self.cast(self.mean, X_bkgd.dtype)
        return {part: self.coefficients(X_bkgd, self.cast(encoder, X_bkgd.dtype))}

    def decode(self, parts: Parts, tokens: Tokens) -> np.ndarray:
        (C,) = parts.values()
        X_bkgd = self.combined(C, self.cast(self.basis, C.dtype))
        return X_bkgd if self.mean is None else X_bkgd + self.cast(self.mean, C.dtype)

    def values(self, P_bhqk: np.ndarray, parts: Parts, tokens: Tokens) -> np.ndarray:
        """V needs no rotation, hence no rebuild: sum in R coefficients, apply the basis once per query."""
        (C,), dtype = parts.values(), P_bhqk.dtype
        O_bqhe = self.weighted(P_bhqk, C, self.cast(self.basis, dtype))
        return O_bqhe if self.mean is None else O_bqhe + mean_values(P_bhqk, self.cast(self.mean, dtype))

    # ---- the three products, of all heads together ----

    def coefficients(self, X_bkgd: np.ndarray, E_sgd: np.ndarray) -> np.ndarray:
        """C [b,k,s]."""
        return einsum("sgd,bkgd->bks", E_sgd, X_bkgd)

    def combined(self, C_bks: np.ndarray, B_sgd: np.ndarray) -> np.ndarray:
        """X [b,k,g,d] of its coefficients."""
        return einsum("bks,sgd->bkgd", C_bks, B_sgd)

    def weighted(self, P_bhqk: np.ndarray, C_bku: np.ndarray, B_uge: np.ndarray) -> np.ndarray:
        """The same, summed over the keys with probabilities: [b,q,h,e]."""
        b, h, q, _ = P_bhqk.shape
        g = B_uge.shape[1]
        Y_bgnqu = (P_bhqk @ C_bku[:, None]).reshape(b, g, h // g, q, -1)
        return einsum("bgnqu,uge->bqgne", Y_bgnqu, B_uge).reshape(b, q, h, -1)
