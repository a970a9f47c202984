"""What a mode is, on tensors. Twin of `tpa_ref.core.mode`, which explains it: what touches no array is inherited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpa_ref.core import mode as reference
from tpa_ref.core.mode import Parts, Stored, of_part

from . import quantize
from .attention import scores_dense, values_dense
from .rope import rotate

MODES: dict[str, type[Mode]] = {}  # the modes that can be asked for by name


class Mode(reference.Mode):
    """How one layer caches its K (or its V). A mode's class names this one first, then its NumPy twin."""

    def scores(self, Q_bqhd: Tensor, parts: Parts, tokens: Any, scale: float) -> Tensor:  # type: ignore[override]
        """Logits [b,h,q,k] of rotated queries against cached K."""
        return scores_dense(Q_bqhd, self.rotated_keys(parts, tokens), scale)

    def values(self, P_bhqk: Tensor, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        """Sums [b,q,h,e] of cached V, weighted with probabilities [b,h,q,k]."""
        return values_dense(P_bhqk, self.decode(parts, tokens))  # type: ignore[arg-type]

    def rotated_keys(self, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        """K after RoPE, [b,k,g,d]."""
        K_bkgd: Any = self.decode(parts, tokens)
        return K_bkgd if self.rotated else rotate(K_bkgd, *tokens.tables)

    def store(self, parts: Parts) -> Stored:
        """Quantize every part: what comes out is what a cache holds."""
        return {
            f"{part}.{field}": x
            for part, array in parts.items()
            for field, x in quantize.quantize(array, self.part_dtype(part)).items()
        }

    def load(self, stored: Stored, dtype: torch.dtype) -> Parts:
        """The parts back as numbers in `dtype`: what attention computes with."""
        return {
            part: quantize.dequantize(of_part(stored, part), self.part_dtype(part), shape[-1]).to(dtype)
            for part, shape in self.parts().items()
        }


def register(mode: type[Mode]) -> type[Mode]:
    """Make a mode known by its name: a decorator."""
    MODES[mode.name] = mode
    return mode
