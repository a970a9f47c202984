"""What a mode is, on tensors. Twin of `tpa_ref.core.mode`, which explains it: what touches no array is inherited."""

from __future__ import annotations

from typing import Any, ClassVar

from tpa_ref.core import mode as reference

from . import attention, quantize
from .rope import rotate

MODES: dict[str, type[Mode]] = {}  # the modes that can be asked for by name


class Mode(reference.Mode):
    """How one layer caches its K (or its V). A mode's class names this one first, then its NumPy twin."""

    attention: ClassVar[Any] = attention
    quantize: ClassVar[Any] = quantize

    @staticmethod
    def turned(X_bksd: Any, tokens: Any) -> Any:
        """RoPE, as the tokens of a model do it, or by their tables."""
        return tokens.turn(X_bksd) if hasattr(tokens, "turn") else rotate(X_bksd, *tokens.tables)

    @staticmethod
    def cast(x: Any, dtype: Any) -> Any:
        """An array in another dtype."""
        return x.to(dtype)


def register(mode: type[Mode]) -> None:
    """Make a mode known by its name."""
    MODES[mode.name] = mode
