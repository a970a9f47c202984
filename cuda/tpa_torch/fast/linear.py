"""x W^T. A decoding step at published sizes mostly waits for these weights to come from memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kernels import matrices


def linear(x: Tensor, W_nm: Tensor) -> Tensor:
    """[..., m] -> [..., n].

    Of a bfloat16 matrix and one row, PyTorch's product takes a CPU nearly three times as long as reading the matrix.
    """
    return matrices.linear(x, W_nm) if matrices.linear_takes(x, W_nm) else F.linear(x, W_nm)
