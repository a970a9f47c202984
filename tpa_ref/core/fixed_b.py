"""`fixed-b`: `latent` of every KV head by itself. Cached are R coefficients a head, before RoPE."""

from __future__ import annotations

from typing import Any

import numpy as np

from .attention import einsum
from .latent import Latent
from .transform import leading, loss, relative_error, spectrum, truncated


class FixedB(Latent):
    """Cached are a_g = E_g (x_g - mean_g), one row of R for each head. Basis B and encoder E are [g,R,d]."""

    name = "fixed-b"

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

    @property
    def basis_shape(self) -> tuple[int, ...]:
        return self.g, self.rank, self.d

    def coefficients(self, X_bkgd: np.ndarray, E_gsd: np.ndarray) -> np.ndarray:
        """A [b,k,g,s]."""
        return einsum("gsd,bkgd->bkgs", E_gsd, X_bkgd)

    def combined(self, A_bkgs: np.ndarray, B_gsd: np.ndarray) -> np.ndarray:
        return einsum("bkgs,gsd->bkgd", A_bkgs, B_gsd)

    def weighted(self, P_bhqk: np.ndarray, A_bkgu: np.ndarray, B_gue: np.ndarray) -> np.ndarray:
        b, h, q, k = P_bhqk.shape
        g = A_bkgu.shape[2]
        Y_bqgnu = einsum("bgnqk,bkgu->bqgnu", P_bhqk.reshape(b, g, h // g, q, k), A_bkgu)
        return einsum("bqgnu,gue->bqgne", Y_bqgnu, B_gue).reshape(b, q, h, -1)


def leading_features(M_gdgd: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Per KV head the leading eigenvectors of E[x_g x_g^T] in R^{d x d}.

    Shapes: M [g,d,g,d] -> B [g,R,d] with orthonormal rows, relative error over all heads.
    """
    M_gdc = einsum("gdgc->gdc", M_gdgd)  # the diagonal blocks: each head with itself
    B_gsd = np.stack([leading(M_dc, rank)[0] for M_dc in M_gdc])
    kept = einsum("gsd,gdc,gsc->", B_gsd, M_gdc, B_gsd)
    return B_gsd, relative_error(kept, einsum("gdd->", M_gdc))
