"""The KV cache on a device. Twin of `tpa_ref.core.cache`, which explains it; lengths and positions are the same code.

Lengths live on the host, so that asking for them never makes a GPU wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.core import cache as reference
from tpa_ref.core.cache import Exact, Segment
from tpa_ref.core.mode import Stored

from . import masks
from .pair import Pair
from .quantize import torch_dtype


class Keys(reference.Keys):
    """All that a chunk of queries reads in one layer."""

    def seen(  # type: ignore[override]
        self, segment: Segment, queries: slice = slice(None), keys: slice = slice(None)
    ) -> Tensor:
        """Which keys of a segment a block of queries reads there, [b,q,k]."""
        at, exact = self.at, self.held.exact
        host = at.positions_bq[:, queries], segment.positions_bk[:, keys], at.last_seen_bq[:, queries]
        q, k, last = (torch.from_numpy(x).to(at.model.device) for x in host)
        seen_bqk = masks.visible(q, k, self.held.window, last)
        if not (exact.sinks or exact.recent):
            return seen_bqk
        return masks.segment_mask(segment.kind, seen_bqk, q, k, exact.sinks, exact.recent)


class Ring(reference.Ring):
    """The arrays of one stretch of slots: {"k.part.field": [b, slots, ...]}."""

    def read(self, lengths_b: np.ndarray) -> tuple[Stored, np.ndarray]:
        """The filled slots, as views, and the position of the token in each, [b,k], made once for layers alike."""
        filled = min(self.slots, int(lengths_b.max(initial=0)))
        stored = {name: array[:, :filled] for name, array in self.arrays.items()}
        return stored, slot_positions(filled, lengths_b.tobytes(), self.slots)

    def write(self, new: Stored, positions_bq: np.ndarray) -> None:
        """Put each token into slot position mod slots; of a chunk longer than the ring only the newest remain."""
        alike = len(positions_bq) == 1 or (positions_bq == positions_bq[:1]).all()
        if not alike or positions_bq.min(initial=0) < 0:
            return super().write(new, positions_bq)
        # Every row the same, nothing padded: whole slices instead of single entries
        first = max(0, positions_bq.shape[1] - self.slots)
        start, count = int(positions_bq[0, first] % self.slots), positions_bq.shape[1] - first
        split = min(count, self.slots - start)  # how many fit before the ring begins anew
        for name, array in self.arrays.items():
            array[:, start : start + split] = new[name][:, first : first + split]
            if split < count:
                array[:, : count - split] = new[name][:, first + split :]

    @staticmethod
    def joined(before: Stored, now: Stored) -> Stored:
        """Two stretches of tokens side by side."""
        return {name: torch.cat([before[name], array], 1) for name, array in now.items()}


@lru_cache(maxsize=8)
def slot_positions(filled: int, lengths: bytes, slots: int) -> np.ndarray:
    """See `tpa_ref.core.cache.slot_positions`; lengths: the bytes of lengths_b."""
    return reference.slot_positions(filled, np.frombuffer(lengths, np.int64), slots)


class LayerCache(reference.LayerCache):
    """One layer: the coded ring and, where exact tokens are kept, one of sinks and one of the newest tokens."""

    keys_class = Keys


class Cache(reference.Cache):
    """The cache of a whole model on one device.

    whole_tokens: all numbers of a token side by side in memory, as the Triton kernels read them.
    """

    layer_class, ring_class = LayerCache, Ring

    def __init__(
        self,
        pairs: Sequence[Pair],
        windows: Sequence[int | None],
        batch: int = 1,
        max_len: int = 4096,
        exact: Exact | None = None,
        ids: np.dtype | None = None,
        device: torch.device | str = "cpu",
        whole_tokens: bool = False,
        spare: int = 0,
    ):
        self.device, self.whole_tokens = device, whole_tokens
        super().__init__(pairs, windows, batch, max_len, exact, ids, spare)

    def _zeros(self, shape: tuple[int, ...], kind: np.dtype) -> Tensor:
        """[b, slots, ..., n]. On a CPU the tokens of one head or rank are side by side in memory, not the numbers of
        one token: attention reads [b, ..., slots, n] of keys, values, b's, and [b, n, slots] of a's and coefficients.
        """
        batch, slots, *leading, n = shape
        if self.whole_tokens:
            return torch.zeros(shape, dtype=torch_dtype(kind), device=self.device)
        inner = [*leading, slots, n] if leading else [n, slots]
        array = torch.zeros([batch, *inner], dtype=torch_dtype(kind), device=self.device)
        return array.movedim(-2, 1) if leading else array.mT

    def _rows(self, array: Tensor, rows: np.ndarray) -> Tensor:  # type: ignore[override]
        """Laid out in memory as before."""
        order = sorted(range(array.dim()), key=array.stride, reverse=True)
        chosen = array.permute(order)[(slice(None),) * order.index(0) + (torch.from_numpy(rows).to(array.device),)]
        return chosen.permute(np.argsort(order).tolist())


class WholeText(reference.WholeText):
    """Stands in for a cache when a text is read at once."""

    layer_class: Any = LayerCache
