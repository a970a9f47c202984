"""Decode kernels in Triton: attention of one new token a row on the cache as it lies in memory.

They run on a CUDA device where Triton is installed. TPA_TRITON=1 (with TRITON_INTERPRET=1) runs them on a CPU under
Triton's interpreter, which is for tests: it takes a thousand times as long. Everywhere else `usable` says no, and the
model computes the same in PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.core.cache import PassThrough

from ...core.fixed_a import FixedA
from ...core.quantize import GROUP
from ...core.spectral import CodedLatent

STORED = ("float32", "bfloat16", "int8", "int4", "spectral")
MODES = ("dense", "contextual", "fixed-a", "fixed-b", "latent", "spectral", "banded")


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Is Triton installed?"""
    return importlib.util.find_spec("triton") is not None


def usable(device: torch.device | str, pair: Any, dtype: torch.dtype) -> bool:
    """Can the kernels read such a layer on this device?"""
    return runs_on(device) and dtype in (torch.float32, torch.bfloat16) and all(map(readable, pair.modes))


def runs_on(device: torch.device | str) -> bool:
    """The current CUDA device (Triton starts nothing on another), Ampere or newer; a CPU where it was asked for."""
    device = torch.device(device)
    if not has_triton():
        return False
    if device.type == "cuda":
        current = torch.cuda.current_device()
        return device.index in (None, current) and capability(current) >= (8, 0)
    asked = os.environ.get("TPA_TRITON") == "1" and os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cpu" and asked


@lru_cache(maxsize=16)
def capability(device: int) -> tuple[int, int]:
    """What a CUDA device can do: (8, 0) is the first with bfloat16 products and 99 kB of shared memory."""
    return torch.cuda.get_device_capability(device)


def readable(mode: Any) -> bool:
    """Head sizes are powers of two, as Gemma's all are (half of one is a side of a matrix product). What is predicted
    from tokens is left to PyTorch.
    """
    d = mode.d
    flat = (
        not isinstance(mode, FixedA) or mode.dtype not in ("int8", "int4") or d >= GROUP
    )  # its R rows are read as one
    predicted = isinstance(mode, CodedLatent) and mode.predictor is not None
    return mode.name in MODES and mode.dtype in STORED and d >= 32 and d & (d - 1) == 0 and flat and not predicted


@dataclass(frozen=True)
class Step:
    """One new token a row: where it stands, and how long each row is with it. int32 [b] each, on the device.

    A row that takes no part asks from position -1 and sees nothing.
    """

    query_b: Tensor
    length_b: Tensor


def serve(Q_bqhd: Tensor, keys: Any) -> bool:
    """Do the kernels attend here? To one new token a row, on what a cache holds."""
    held, at = keys.held, keys.at
    return (
        Q_bqhd.shape[1] == 1
        and not isinstance(held.rings["coded"], PassThrough)
        and usable(Q_bqhd.device, held.pair, Q_bqhd.dtype)
        and bool((at.last_seen_bq == at.positions_bq).all())
    )


def attend(Q_bqhd: Tensor, keys: Any, model: Any) -> Tensor:
    """`decode` of what one layer of a model holds; the new token is already in the cache."""
    at = keys.at
    if "step" not in at.kept:
        at.kept["step"] = step_of(at.positions_bq, keys.lengths_b, Q_bqhd.device)
    longest = max(int(at.positions_bq.max()), int(keys.lengths_b.max())) + 1
    tables = model.rope_table(at.is_global, longest)
    return decode(Q_bqhd, keys.held, at.kept["step"], tables, model.config.query_scale)


def step_of(positions_bq: np.ndarray, lengths_b: np.ndarray, device: torch.device) -> Step:
    """From positions [b,1] of the new tokens and the lengths before them, which the host knows."""
    query_b = positions_bq[:, 0]
    found = np.stack([query_b, np.maximum(lengths_b, query_b + 1)]).astype(np.int32)
    return Step(*torch.from_numpy(found).to(device))


def decode(*args: Any, **more: Any) -> Tensor:
    """See `launch.decode`; Triton is imported at the first call."""
    from .launch import decode

    return decode(*args, **more)


def contextual_factors(X_bkgd: Tensor, rank: int, squarings: int) -> tuple[Tensor, Tensor]:
    """See `factors.contextual_factors`."""
    from .factors import contextual_factors

    return contextual_factors(X_bkgd, rank, squarings)


def best_paths(C_ks: Tensor, widths: tuple[int, ...]) -> Tensor:
    """See `trellis.best_paths`."""
    from .trellis import best_paths

    return best_paths(C_ks, widths)
