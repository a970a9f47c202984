"""`banded`: K in two bands and V behind them. Twin of `tpa_ref.core.banded`, which explains it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tpa_ref.core import banded as reference

from . import codes
from .latent import Latent
from .pair import Pair


class BandedLatent(Latent, reference.BandedLatent):
    """K, or V behind K: R coefficients of a group of heads, in strings, each of what is left when all before it are
    decoded.
    """

    codes: ClassVar[Any] = codes

    def coefficients(self, X_bkgd: Tensor, E_sgd: Tensor) -> Tensor:  # type: ignore[override]
        return torch.einsum("sjx,bkjx->bkjs", self.by_group(E_sgd), self.by_group(X_bkgd))

    def combined(self, C_bkjs: Tensor, B_sgd: Tensor) -> Tensor:  # type: ignore[override]
        X_bkjx = torch.einsum("bkjs,sjx->bkjx", C_bkjs, self.by_group(B_sgd))
        return X_bkjx.reshape(*X_bkjx.shape[:2], self.g, self.d)

    def weighted(self, P_bhqk: Tensor, C_bkju: Tensor, B_uge: Tensor) -> Tensor:  # type: ignore[override]
        Y_bjnqu = torch.einsum("bjnqk,bkju->bjnqu", P_bhqk.unflatten(1, (self.groups, -1)), C_bkju)
        Y_bgnqu = Y_bjnqu.flatten(1, 2).unflatten(1, (self.g, -1))
        return torch.einsum("bgnqu,uge->bqgne", Y_bgnqu, B_uge).flatten(2, 3)

    @staticmethod
    def joined(parts: list[Tensor]) -> Tensor:  # type: ignore[override]
        return torch.cat(parts, -1)


class Banded(Pair, reference.Banded):
    """K in two bands, and V behind them: what V repeats of K is coded once."""
