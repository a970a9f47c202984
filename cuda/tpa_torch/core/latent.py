"""`latent`: one constant basis over all heads and features. Twin of `tpa_ref.core.latent`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpa_ref.core import latent as reference
from tpa_ref.core.mode import Parts

from .attention import mean_values
from .mode import Mode, register


@register
class Latent(Mode, reference.Latent):
    """Cached is c = E (x - mean), shared by all heads: one row of R."""

    def encode(self, X_bkgd: Tensor, tokens: Any) -> Parts:  # type: ignore[override]
        encoder = self.basis if self.encoder is None else self.encoder
        X_bkgd = X_bkgd if self.mean is None else X_bkgd - self.mean.to(X_bkgd.dtype)
        return {"C": X_bkgd.flatten(2) @ encoder.to(X_bkgd.dtype).flatten(1).mT}

    def decode(self, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        C_bks = parts["C"]
        X_bkgd = (C_bks @ self.basis.to(C_bks.dtype).flatten(1)).unflatten(-1, (self.g, self.d))
        return X_bkgd if self.mean is None else X_bkgd + self.mean.to(C_bks.dtype)

    def values(self, P_bhqk: Tensor, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        O_bqhe = values_latent(P_bhqk, parts["C"], self.basis.to(P_bhqk.dtype))
        return O_bqhe if self.mean is None else O_bqhe + mean_values(P_bhqk, self.mean.to(P_bhqk.dtype))


def values_latent(P_bhqk: Tensor, C_bku: Tensor, B_uge: Tensor) -> Tensor:
    """V needs no rotation, hence no rebuild: aggregate in R coefficients, apply the basis once per query."""
    Y_bgnqu = torch.einsum("bhqk,bku->bhqu", P_bhqk, C_bku).unflatten(1, (B_uge.shape[1], -1))
    return torch.einsum("bgnqu,uge->bqgne", Y_bgnqu, B_uge).flatten(2, 3)
