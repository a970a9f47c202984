"""`fixed-b`: `latent` of every KV head by itself. Twin of `tpa_ref.core.fixed_b`: its three products."""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_ref.core import fixed_b as reference

from .latent import Latent


class FixedB(Latent, reference.FixedB):
    """Cached are a_g = E_g (x_g - mean_g), one row of R for each head."""

    def coefficients(self, X_bkgd: Tensor, E_gsd: Tensor) -> Tensor:  # type: ignore[override]
        return torch.einsum("gsd,bkgd->bkgs", E_gsd, X_bkgd)

    def combined(self, A_bkgs: Tensor, B_gsd: Tensor) -> Tensor:  # type: ignore[override]
        return torch.einsum("bkgs,gsd->bkgd", A_bkgs, B_gsd)

    def weighted(self, P_bhqk: Tensor, A_bkgu: Tensor, B_gue: Tensor) -> Tensor:  # type: ignore[override]
        Y_bqgnu = torch.einsum("bgnqk,bkgu->bqgnu", P_bhqk.unflatten(1, (A_bkgu.shape[2], -1)), A_bkgu)
        return torch.einsum("bqgnu,gue->bqgne", Y_bqgnu, B_gue).flatten(2, 3)
