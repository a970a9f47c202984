"""Memory that is used again, and constants that are made once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..lasting import lasting


class Scratch:
    """Memory that is used again, and constants of layers that are made once.

    Every thread has memory of its own, so that several may compute with one model. Constants are the same for all:
    two threads that make one at the same time make the same.
    """

    def __init__(self) -> None:
        self._of_thread: Any = threading.local()
        self._constants: dict[tuple, tuple[Any, Any]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        """A copy of a model, or a pickled one, begins without either."""
        return type(self), ()

    def __call__(self, name: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """An array with nothing in it, valid until this thread's next call with this name."""
        memory = self._of_thread.__dict__
        # What inference mode made cannot be written to outside of it, and views of other memory are slower in it.
        key = name, dtype or like.dtype, like.device, torch.is_inference_mode_enabled()
        size, held = int(torch.Size(shape).numel()), memory.get(key)
        if held is None or held.numel() < size:
            held = memory[key] = torch.empty(size, dtype=key[1], device=like.device)
        return held[:size].view(*shape)

    def constant(self, name: str, source: Tensor, make: Callable[[], Any]) -> Any:
        """What `make` makes of a constant array, made once."""
        key = name, id(source)
        found = self._constants.get(key)
        if found is None:
            with lasting():
                found = source, make()  # the array is held, so that its id stays its own
            self._constants[key] = found
        return found[1]
