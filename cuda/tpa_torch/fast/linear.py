"""x W^T. A decoding step at published sizes mostly waits for these weights to come from memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .int8 import ROWS, Int8
from .kernels import matrices, native


def linear(x: Tensor, W_nm: Tensor | Int8) -> Tensor:
    """[..., m] -> [..., n].

    Of a bfloat16 matrix and one row, PyTorch's product takes a CPU nearly three times as long as reading the matrix.
    """
    if matrices.linear_takes(x, W_nm):
        return matrices.linear(x, W_nm)
    if isinstance(W_nm, Int8) and not torch.is_grad_enabled():
        return torch.cat([F.linear(x, rows(W_nm, first)) for first in range(0, len(W_nm), ROWS)], -1)
    return F.linear(x, W_nm)  # type: ignore[arg-type]


def at_least_float32(x: Tensor, W_nm: Tensor | Int8) -> Tensor:
    """The same in float32 or better; where the sums are float32, they are not rounded before."""
    if matrices.linear_takes(x, W_nm):
        return matrices.linear(x, W_nm, torch.float32)
    y = linear(x, W_nm)
    return y if y.dtype == torch.float64 else y.float()


def rows(W_nm: Int8, first: int) -> Tensor:
    """A block of rows as numbers, which stays in the processor's cache until it is multiplied."""
    last = min(first + ROWS, len(W_nm))
    if matrices.readable(W_nm) and W_nm.dtype in matrices.DTYPES and native.available():
        return matrices.widened(W_nm, first, last)
    return W_nm[first:last]
