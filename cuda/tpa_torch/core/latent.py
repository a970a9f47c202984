"""`latent`: one constant basis over all heads and features. Twin of `tpa_ref.core.latent`: its three products."""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_ref.core import latent as reference

from .mode import Mode


class Latent(Mode, reference.Latent):
    """Cached is c = E (x - mean), shared by all heads: one row of R."""

    def coefficients(self, X_bkgd: Tensor, E_sgd: Tensor) -> Tensor:  # type: ignore[override]
        return X_bkgd.flatten(2) @ E_sgd.flatten(1).mT

    def combined(self, C_bks: Tensor, B_sgd: Tensor) -> Tensor:  # type: ignore[override]
        return (C_bks @ B_sgd.flatten(1)).unflatten(-1, B_sgd.shape[1:])

    def weighted(self, P_bhqk: Tensor, C_bku: Tensor, B_uge: Tensor) -> Tensor:  # type: ignore[override]
        Y_bgnqu = torch.einsum("bhqk,bku->bhqu", P_bhqk, C_bku).unflatten(1, (B_uge.shape[1], -1))
        return torch.einsum("bgnqu,uge->bqgne", Y_bgnqu, B_uge).flatten(2, 3)
