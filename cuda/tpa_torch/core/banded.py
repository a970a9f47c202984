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
    """K, or V behind K: coefficients in strings, each of what is left when all before it are decoded."""

    codes: ClassVar[Any] = codes

    @staticmethod
    def joined(parts: list[Tensor]) -> Tensor:  # type: ignore[override]
        return torch.cat(parts, -1)


class Banded(Pair, reference.Banded):
    """K in two bands, and V behind them: what V repeats of K is coded once."""
