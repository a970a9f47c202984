"""`fixed-b`: a constant basis over the features of every KV head. Twin of `tpa_ref.core.fixed_b`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpa_ref.core import fixed_b as reference
from tpa_ref.core.mode import Parts

from .attention import mean_values
from .mode import Mode, register


@register
class FixedB(Mode, reference.FixedB):
    """Cached are a_g = E_g (x_g - mean_g), one row of R for each head."""

    def encode(self, X_bkgd: Tensor, tokens: Any) -> Parts:  # type: ignore[override]
        encoder = self.basis if self.encoder is None else self.encoder
        X_bkgd = X_bkgd if self.mean is None else X_bkgd - self.mean.to(X_bkgd.dtype)
        return {"A": torch.einsum("gsd,bkgd->bkgs", encoder.to(X_bkgd.dtype), X_bkgd)}

    def decode(self, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        A_bkgs = parts["A"]
        X_bkgd = torch.einsum("bkgs,gsd->bkgd", A_bkgs, self.basis.to(A_bkgs.dtype))
        return X_bkgd if self.mean is None else X_bkgd + self.mean.to(A_bkgs.dtype)

    def values(self, P_bhqk: Tensor, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        O_bqhe = values_fixed_b(P_bhqk, parts["A"], self.basis.to(P_bhqk.dtype))
        return O_bqhe if self.mean is None else O_bqhe + mean_values(P_bhqk, self.mean.to(P_bhqk.dtype))


def values_fixed_b(P_bhqk: Tensor, A_bkgu: Tensor, B_gue: Tensor) -> Tensor:
    """V needs no rotation, hence no rebuild: aggregate in R coefficients, apply the basis once per query."""
    Y_bqgnu = torch.einsum("bgnqk,bkgu->bqgnu", P_bhqk.unflatten(1, (A_bkgu.shape[2], -1)), A_bkgu)
    return torch.einsum("bqgnu,gue->bqgne", Y_bqgnu, B_gue).flatten(2, 3)
