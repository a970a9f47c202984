"""Caches that hold a key and a value a KV head, which a compiled function reads in one go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpa_ref.core.mode import Stored

from ..core.dense import Dense
from ..core.fixed_a import FixedA
from .kernels.native import Rows
from .scratch import Scratch


def heads(pair: Any, stored: Stored, dtype: torch.dtype, scratch: Scratch) -> tuple[Rows, Rows] | None:
    """K and V [b g,k,d] where they are heads, stored alike, that compiled functions can read."""
    K, V = pair.modes
    fields: dict[str, dict[str, Tensor]] = {"k": {}, "v": {}}
    if K.dtype != V.dtype or not (is_heads(K, scratch) and is_heads(V, scratch)):
        return None
    for name, array in stored.items():
        side, _, field = name.split(".")
        fields[side][field] = tokens_last(array).flatten(0, 1)
    rounded = dtype == torch.bfloat16
    rows = [Rows(of_side, K.dtype, K.d, rounded) for of_side in fields.values()]
    return (rows[0], rows[1]) if all(Rows.takes(x.fields, x.kind, x.n) for x in rows) else None


def is_heads(mode: Any, scratch: Scratch) -> bool:
    """Does this mode keep one key or value a KV head: dense, or `fixed-a` of full rank, which is the same cache?"""
    if not isinstance(mode, FixedA):
        return isinstance(mode, Dense)
    exact = mode.rank == mode.g and mode.basis.ndim == 2
    return exact and scratch.constant("exact", mode.basis, lambda: picks_heads(mode))


def picks_heads(mode: FixedA) -> bool:
    """Is this `fixed-a` of full rank the dense cache?"""
    return torch.equal(mode.basis, mode.rank * torch.eye(mode.rank, dtype=mode.basis.dtype, device=mode.basis.device))


def tokens_last(array: Tensor) -> Tensor:
    """[b,k,n] -> [b,n,k]; [b,k,s,n] -> [b,s,k,n]."""
    return array.mT if array.ndim == 3 else array.transpose(1, 2)
