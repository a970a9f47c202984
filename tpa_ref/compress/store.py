"""Where calibration and conversion keep what they have found for each layer: in memory, or (`files.stream`) on disk."""

from __future__ import annotations

from typing import Any

Arrays = dict[str, Any]  # arrays by name, NumPy's or a backend's


class Memory:
    """Arrays by kind and layer.

    >>> store = Memory()
    >>> store.put("states", 0, {"a": 1, "b": 2})
    >>> store.trim("states", 0, 1)
    >>> store.has("states", 0), store.get("states", 0)
    (True, {'a': 1})
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], Arrays] = {}

    def has(self, kind: str, layer: int) -> bool:
        return (kind, layer) in self._held

    def put(self, kind: str, layer: int, arrays: Arrays) -> None:
        self._held[kind, layer] = arrays

    def get(self, kind: str, layer: int) -> Arrays:
        return self._held[kind, layer]

    def trim(self, kind: str, layer: int, count: int) -> None:
        """Only the first `count` arrays will be asked for again; 0: none."""
        kept = list(self._held.pop((kind, layer), {}).items())[:count]
        if kept:
            self._held[kind, layer] = dict(kept)
