"""A weight matrix in 8 bits: whole numbers, and a float16 scale for 32 of them along the axis that is summed over.

So GGUF stores Q8_0; what is stored in fewer bits or in more is rounded to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.core.quantize import HALF_MAX

SHARE = 32  # numbers that share a scale
ROWS = 4096  # that are made numbers, or rounded, at a time


class Int8:
    """Stands where a tensor of weights would: functions of torch are given its numbers, made for the call, and an index
    takes rows. `fast.linear` multiplies with what is stored. dtype: of the numbers.
    """

    def __init__(self, codes_nm: Tensor, scale_ns: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None):
        self.codes_nm, self.scale_ns, self.dtype = codes_nm, scale_ns, dtype
        self.shape = torch.Size(shape or codes_nm.shape)

    @staticmethod
    def fits(shape: tuple[int, ...]) -> bool:
        """Can a matrix of this shape be held so?"""
        return len(shape) == 2 and shape[1] % SHARE == 0

    @classmethod
    def of(cls, x_nm: Tensor, dtype: torch.dtype) -> Int8:
        """The nearest such matrix: the largest of 32 numbers becomes 127."""
        n, m = x_nm.shape
        made = cls(x_nm.new_empty(n, m, dtype=torch.int8), x_nm.new_empty(n, m // SHARE, dtype=torch.float16), dtype)
        for codes, scale, x in zip(*(of.split(ROWS) for of in (made.codes_nm, made.scale_ns, x_nm)), strict=True):
            codes[:], scale[:] = rounded(x)
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is F.embedding:
            return args[1][args[0]]
        return function(*map(wide, args), **(kwargs or {}))

    # ---- as a tensor ----

    @property
    def device(self) -> torch.device:
        return self.codes_nm.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Really held."""
        return self.codes_nm.nbytes + self.scale_ns.nbytes

    def reshape(self, *shape: Any) -> Int8:
        """The same with axes split or joined; the matrix stays as it is."""
        return self._shaped(torch.empty(self.shape, device="meta").reshape(*shape))

    def flatten(self, start: int = 0, end: int = -1) -> Int8:
        return self._shaped(torch.empty(self.shape, device="meta").flatten(start, end))

    def _shaped(self, like: Tensor) -> Int8:
        return Int8(self.codes_nm, self.scale_ns, self.dtype, like.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Tensor:
        """Some rows of a matrix, as numbers."""
        return numbers(self.codes_nm[rows], self.scale_ns[rows], self.dtype)

    def split(self, rows: int) -> Iterator[Tensor]:
        """So many rows at a time, as numbers."""
        return (self[start : start + rows] for start in range(0, len(self), rows))

    def wide(self) -> Tensor:
        """All of it as numbers."""
        return self[:].view(self.shape)


def wide(x: Any) -> Any:
    """Numbers, whatever was stored."""
    return x.wide() if isinstance(x, Int8) else x


def numbers(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [...,m] times scales [...,m / 32], rounded once."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (codes.to(work).unflatten(-1, (-1, SHARE)) * scale.to(work)[..., None]).flatten(-2).to(dtype)


def rounded(x_nm: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows."""
    groups = x_nm.float().unflatten(-1, (-1, SHARE))
    scale_ns = (groups.abs().amax(-1) / 127).clamp(max=HALF_MAX).half()
    step = scale_ns.float()[..., None]
    codes = torch.where(step > 0, groups / step, 0).round().clamp(-127, 127)
    return codes.to(torch.int8).flatten(-2), scale_ns
