"""Named intermediates, recorded the same way by both backends, and the first stage where two runs differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Tracer = Callable[[str, Any], Any]


def no_trace(name: str, array: Any) -> Any:
    """The default tracer: records nothing and hands the array back."""
    return array


class Trace:
    """Records every array it is called with, in order.

    >>> trace = Trace()
    >>> trace("attn.scale", 0.5), trace.stages
    (0.5, {'attn.scale': 0.5})
    """

    def __init__(self) -> None:
        self.stages: dict[str, Any] = {}

    def __call__(self, name: str, array: Any) -> Any:
        self.stages[name] = array
        return array


class Watch:
    """Calls a function for each of a few named arrays and records nothing. Unlike other tracers it does not ask for
    arrays in one piece, so a backend may still work in blocks.

    >>> Watch({"x": print})("x", 1)
    x 1
    1
    """

    def __init__(self, wanted: Mapping[str, Callable[[str, Any], None]]):
        self.wanted = wanted

    def __call__(self, name: str, array: Any) -> Any:
        if name in self.wanted:
            self.wanted[name](name, array)
        return array


def wants_whole_arrays(trace: Tracer) -> bool:
    """Must arrays be made in one piece for this tracer?"""
    return trace is not no_trace and not isinstance(trace, Watch)


def scoped(trace: Tracer, prefix: str) -> Tracer:
    """The same tracer with `prefix.` in front of each name, for instance one per layer. A `Watch` stays one.

    >>> scoped(Watch({"layers.1.x": print}), "layers.1")("x", 2)
    layers.1.x 2
    2
    """
    if trace is no_trace:
        return no_trace

    def within(name: str, array: Any) -> Any:
        return trace(f"{prefix}.{name}", array)

    if isinstance(trace, Watch):
        here = [name.removeprefix(f"{prefix}.") for name in trace.wanted if name.startswith(f"{prefix}.")]
        return Watch(dict.fromkeys(here, within))
    return within


def compare(
    reference: Mapping[str, Any], other: Mapping[str, Any], tolerance: float = 1e-5, show: Callable = print
) -> str | None:
    """Print one line a stage, [OK], [DIFF], [SHAPE] or [MISSING], and return the first stage that is not OK.

    The error of a stage is its largest absolute difference over the largest magnitude in the reference.
    `reference` and `other` are the `stages` of two traces; torch tensors are fine.

    >>> compare({"x": np.ones(2)}, {"x": np.array([1.0, 1.5])})
    [DIFF]    x  max 5.0e-01  mean 2.5e-01
    'x'
    """
    different = []
    for name, expected in reference.items():
        verdict, detail = _verdict(expected, other[name], tolerance) if name in other else ("[MISSING]", "")
        show(f"{verdict:<9} {name}  {detail}".rstrip())
        if verdict != "[OK]":
            different.append(name)
    return different[0] if different else None


def _verdict(expected: Any, found: Any, tolerance: float) -> tuple[str, str]:
    a, b = _comparable(expected), _comparable(found)
    if a.shape != b.shape:
        return "[SHAPE]", f"{a.shape} and {b.shape}"
    with np.errstate(invalid="ignore"):  # infinite over infinite is NaN, which is never OK
        error = np.abs(a - b) / max(float(np.abs(a).max(initial=0.0)), 1e-30)
    largest, mean = error.max(initial=0.0), error.mean() if error.size else 0
    return "[OK]" if largest <= tolerance else "[DIFF]", f"max {largest:.1e}  mean {mean:.1e}"


def _comparable(array: Any) -> np.ndarray:
    """In float64, masked logits as 0: beside their magnitude no other difference would show."""
    if hasattr(array, "detach"):
        array = array.detach().cpu().double().numpy()
    x = np.asarray(array, dtype=np.float64)
    return np.where(x < -1e37, 0, x)
