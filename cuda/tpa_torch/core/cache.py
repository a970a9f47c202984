"""The KV cache on a device. Twin of `tpa_ref.cache`, which explains it; lengths and positions are the same code.

Lengths live on the host, so that asking for them never makes a GPU wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tpa_ref.core import cache as reference
from tpa_ref.core.cache import (
    DENSE,
    Exact,
    LayerFactors,
    Parts,
    Segment,
    Stored,
    cache_bytes,
    completed,
    exact_slots,
    part_dtype,
    reads_words,
    slot_positions,
    stored_shapes,
    token_bytes,
    whole_text,
)
from tpa_ref.core.factorize import Factorization, part_shapes
from tpa_ref.gemma.config import GemmaConfig

from . import quantize

__all__ = [
    "DENSE",
    "Exact",
    "LayerFactors",
    "Segment",
    "cache_bytes",
    "completed",
    "exact_slots",
    "part_dtype",
    "reads_words",
    "slot_positions",
    "stored_shapes",
    "token_bytes",
    "whole_text",
]


@dataclass
class LayerCache(reference.LayerCache):
    """K and V of one layer: for each the stored fields of its parts, [b, slots, ...]."""

    def write(self, new: tuple[Stored, Stored], positions_bq: np.ndarray) -> None:
        """Put each token into slot position mod slots; of a chunk longer than the ring only the newest remain."""
        aligned = bool((positions_bq >= 0).all() and (positions_bq == positions_bq[:1]).all())
        if aligned:  # every row the same, nothing padded: whole slices instead of single entries
            first = max(0, positions_bq.shape[1] - self.slots)
            kept = positions_bq[0, first:]
            start = int(kept[0] % self.slots)
            split = min(len(kept), self.slots - start)  # how many fit before the ring begins anew
            for array, fresh in self._pairs(new):
                array[:, start : start + split] = fresh[:, first : first + split]
                if split < len(kept):
                    array[:, : len(kept) - split] = fresh[:, first + split :]
            return
        newest_b = positions_bq.max(1, keepdims=True)
        row, column = np.nonzero((positions_bq >= 0) & (positions_bq > newest_b - self.slots))
        slot = positions_bq[row, column] % self.slots
        for array, fresh in self._pairs(new):
            row_t, column_t, slot_t = (torch.from_numpy(index).to(array.device) for index in (row, column, slot))
            array[row_t, slot_t] = fresh[row_t, column_t].to(array.dtype)

    def _pairs(self, new: tuple[Stored, Stored]):
        """(held, fresh) of every array, K's then V's."""
        for side, fresh in zip(self.stored, new, strict=True):
            for part, fields in side.items():
                for name, array in fields.items():
                    yield array, fresh[part][name]

    @staticmethod
    def _joined(before: Stored, now: Stored) -> Stored:
        return {
            part: {name: torch.cat([before[part][name], array], 1) for name, array in fields.items()}
            for part, fields in now.items()
        }


def store(parts: Parts, how: Factorization) -> Stored:
    """Quantize every part of new tokens; what comes out is what the cache holds."""
    if how.dtype == "spectral":
        return {part: quantize.quantize_spectral(array, how.widths) for part, array in parts.items()}
    return {part: quantize.quantize(array, part_dtype(part, array.ndim, how.dtype)) for part, array in parts.items()}


def load(stored: Stored, how: Factorization, g: int, d: int, dtype: torch.dtype = torch.float32) -> Parts:
    """The parts back as numbers (in `dtype`): what attention computes with."""
    if how.dtype == "spectral":
        return {part: quantize.dequantize_spectral(fields, how.widths).to(dtype) for part, fields in stored.items()}
    shapes = part_shapes(how.mode, how.rank, g, d)
    return {
        part: quantize.dequantize(fields, part_dtype(part, 2 + len(shapes[part]), how.dtype), shapes[part][-1]).to(
            dtype
        )
        for part, fields in stored.items()
    }


def load_pair(
    held: tuple[Stored, Stored],
    how: LayerFactors,
    g: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    Z_bkz: torch.Tensor | None = None,
) -> tuple[Parts, Parts]:
    """The parts of K and of V back as numbers, those that V shares with K and the words [b,k,2m] included."""
    parts_k, parts_v = (load(side, one, g, d, dtype) for side, one in zip(held, how, strict=True))
    return completed(parts_k, parts_v, how, Z_bkz)


class Cache(reference.Cache):
    """The cache of a whole model on one device: one `LayerCache` a layer and the length of every row of the batch."""

    def __init__(
        self,
        config: GemmaConfig,
        factors: Sequence[LayerFactors],
        batch: int = 1,
        max_len: int = 4096,
        exact: Exact | None = None,
        device: torch.device | str = "cpu",
    ):
        self.device = device
        super().__init__(config, factors, batch, max_len, exact)

    def _zeros(self, shape: tuple[int, ...], kind: np.dtype) -> torch.Tensor:
        """[b, slots, ..., n]. On a CPU one head or rank after the other lies in memory, not one token after the other:
        attention reads [b, ..., slots, n] of keys, values and b's, and [b, n, slots] of a's and coefficients. The
        Triton kernels read whole tokens.
        """
        from ..fast import kernels

        batch, slots, *leading, n = shape
        if kernels.runs_on(self.device):
            return torch.zeros(shape, dtype=quantize.torch_dtype(kind), device=self.device)
        inner = [*leading, slots, n] if leading else [n, slots]
        array = torch.zeros([batch, *inner], dtype=quantize.torch_dtype(kind), device=self.device)
        return array.movedim(-2, 1) if leading else array.mT

    layer_class = LayerCache
