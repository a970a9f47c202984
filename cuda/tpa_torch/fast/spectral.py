"""`spectral` and `banded` whose path through the trellis is found compiled on a CPU, and by a kernel on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import banded, codes, spectral
from . import kernels
from .kernels import native


def quantized(C_bks: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The bytes of each token."""
    on_device = kernels.runs_on(C_bks.device)
    if not widths or not (on_device or native.available()):
        return codes.quantize(C_bks, widths)
    C_ks = C_bks.reshape(-1, len(widths)).float().contiguous()
    if on_device:
        made = codes.pack(kernels.best_paths(C_ks, widths), widths)
    else:
        made = native.quantize(C_ks.cpu(), widths).to(C_ks.device)
    return made.reshape(*C_bks.shape[:-1], -1)


class CodedLatent(spectral.CodedLatent):
    """The same codes, sooner."""

    def quantized(self, C_bks: Any, widths: tuple[int, ...]) -> Any:
        return quantized(C_bks, widths)


class BandedLatent(banded.BandedLatent):
    """The same codes, sooner."""

    def quantized(self, C_bks: Any, widths: tuple[int, ...]) -> Any:
        return quantized(C_bks, widths)
