"""Decode kernels in Triton: attention of one new token a row on the cache as it lies in memory.

They run on a CUDA device where Triton is installed. TPA_TRITON=1 (with TRITON_INTERPRET=1) runs them on a CPU under
Triton's interpreter, which is for tests: it takes a thousand times as long. Everywhere else `usable` says no, and the
model computes the same in PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tpa_ref.config import GemmaConfig

from .. import cache as kv
from ..quantize import GROUP

STORED = ("float32", "bfloat16", "int8", "int4", "spectral")


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Is Triton installed?"""
    return importlib.util.find_spec("triton") is not None


def usable(device: torch.device | str, config: GemmaConfig, factors: kv.LayerFactors, dtype: torch.dtype) -> bool:
    """Can the kernels read such a layer on this device?"""
    return (
        runs_on(device) and dtype in (torch.float32, torch.bfloat16) and all(readable(config, how) for how in factors)
    )


def runs_on(device: torch.device | str) -> bool:
    """A CUDA device; a CPU where it was asked for."""
    kind = torch.device(device).type
    asked = os.environ.get("TPA_TRITON") == "1" and os.environ.get("TRITON_INTERPRET") == "1"
    return has_triton() and (kind == "cuda" or (kind == "cpu" and asked))


def readable(config: GemmaConfig, how: Any) -> bool:
    """Head sizes are powers of two, as Gemma's all are (half of one is a side of a matrix product)."""
    d = config.head_dim
    flat = how.mode != "fixed-a" or how.dtype not in ("int8", "int4") or d >= GROUP  # its R rows are read as one
    return how.dtype in STORED and d >= 32 and d & (d - 1) == 0 and flat


def decode(*args: Any, **more: Any) -> Tensor:
    """See `launch.decode`; Triton is imported at the first call."""
    from .launch import decode

    return decode(*args, **more)
