"""Memory that is used again, and constants that are made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Scratch:
    """Memory that is used again, and constants of layers that are made once."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._constants: dict[tuple, tuple[Any, Any]] = {}

    def __call__(self, name: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """An array with nothing in it, valid until the next call with this name."""
        key = name, dtype or like.dtype, like.device
        size = int(torch.Size(shape).numel())
        if key not in self._memory or self._memory[key].numel() < size:
            self._memory[key] = torch.empty(size, dtype=key[1], device=like.device)
        return self._memory[key][:size].view(*shape)

    def constant(self, name: str, source: Tensor, make: Callable[[], Any]) -> Any:
        """What `make` makes of a constant array, made once."""
        key = name, id(source)
        if key not in self._constants:
            self._constants[key] = source, make()  # the array is held, so that its id stays its own
        return self._constants[key][1]
