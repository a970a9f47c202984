"""`spectral`: `latent` whose coefficients have a width of their own each. Twin of `tpa_ref.core.spectral`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpa_ref.core import spectral as reference
from tpa_ref.core.mode import Parts, Stored

from . import codes
from .latent import Latent, values_latent


class CodedLatent(Latent, reference.CodedLatent):
    """Coefficient s of unit variance takes widths[s] bits, packed; nothing but codes is stored."""

    def store(self, parts: Parts) -> Stored:
        return {"C.codes": codes.quantize(parts["C"], self.widths)}

    def load(self, stored: Stored, dtype: torch.dtype) -> Parts:
        return {"C": codes.dequantize(stored["C.codes"], self.widths).to(dtype)}

    def encode(self, X_bkgd: Tensor, tokens: Any) -> Parts:  # type: ignore[override]
        predicted = self.predicted(tokens)
        return super().encode(X_bkgd if predicted is None else X_bkgd - predicted.to(X_bkgd.dtype), tokens)

    def decode(self, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        predicted = self.predicted(tokens)
        X_bkgd = super().decode(parts, tokens)
        return X_bkgd if predicted is None else X_bkgd + predicted.to(X_bkgd.dtype)

    def values(self, P_bhqk: Tensor, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        O_bqhe = super().values(P_bhqk, parts, tokens)
        if self.predictor is None:
            return O_bqhe
        return O_bqhe + values_latent(P_bhqk, tokens.Z_bkz.to(P_bhqk.dtype), self.predictor.to(P_bhqk.dtype))

    def predicted(self, tokens: Any) -> Any:
        """What the tokens tell of K or V, W z: [b,k,g,d]; None where nothing is predicted."""
        if self.predictor is None:
            return None
        Z_bkz = tokens.Z_bkz
        return (Z_bkz @ self.predictor.to(Z_bkz.dtype).flatten(1)).unflatten(-1, (self.g, self.d))
