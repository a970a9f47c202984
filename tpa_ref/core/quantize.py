"""How a cached number is stored: float32, bfloat16, int8, or int4 packed two to a byte (and float64 in float64 runs).

int8 and int4 work on groups of 64 numbers along the last axis (the last group may be shorter):
    int8: x = scale * code                    code in -127 ... 127
    int4: x = scale * code + minimum          code in 0 ... 15
Scales and minima are float16 and count as memory like everything else.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

GROUP = 64
HALF_MAX = 65504.0  # largest float16


def field_shapes(n: int, dtype: str) -> dict[str, tuple[int, np.dtype]]:
    """The arrays that store n numbers, as {field: (length of its last axis, dtype)}.

    >>> {field: (size, str(kind)) for field, (size, kind) in field_shapes(100, "int4").items()}
    {'codes': (50, 'uint8'), 'scale': (2, 'float16'), 'minimum': (2, 'float16')}
    """
    groups = -(-n // GROUP)
    half = np.dtype(np.float16)
    if dtype == "int8":
        return {"codes": (n, np.dtype(np.int8)), "scale": (groups, half)}
    if dtype == "int4":
        return {"codes": (-(-n // 2), np.dtype(np.uint8)), "scale": (groups, half), "minimum": (groups, half)}
    return {"x": (n, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))}


def stored_bytes(n: int, dtype: str) -> int:
    """Bytes that n numbers take, scales included.

    >>> stored_bytes(256, "bfloat16"), stored_bytes(256, "int8"), stored_bytes(256, "int4")
    (512, 264, 144)
    """
    return sum(size * kind.itemsize for size, kind in field_shapes(n, dtype).values())


def quantize(x: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Encode along the last axis: [..., n] -> the arrays of `field_shapes(n, dtype)`, leading axes kept."""
    if dtype == "int8":
        return quantize_int8(x)
    if dtype == "int4":
        return quantize_int4(x)
    return {"x": x.astype(field_shapes(1, dtype)["x"][1])}


def dequantize(fields: dict[str, np.ndarray], dtype: str, n: int) -> np.ndarray:
    """The numbers back, at least float32: the inverse of `quantize` up to its rounding."""
    if dtype == "int8":
        return dequantize_int8(fields, n)
    if dtype == "int4":
        return dequantize_int4(fields, n)
    x = fields["x"]
    return x if x.dtype == np.float64 else x.astype(np.float32)


def quantize_int8(x: np.ndarray) -> dict[str, np.ndarray]:
    """Symmetric: scale = max|x| / 127 per group, rounded to float16 before it is used.

    >>> quantize_int8(np.array([1.0, -2.0, 0.5], np.float32))["codes"].tolist()
    [64, -127, 32]
    """
    groups = _grouped(x.astype(np.float32))
    scale = _half(np.abs(groups).max(-1) / np.float32(127))
    step = scale.astype(np.float32)[..., None]
    codes = np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step > 0))
    codes = np.clip(codes, -127, 127).astype(np.int8)
    return {"codes": _ungrouped(codes, x.shape[-1]), "scale": scale}


def dequantize_int8(fields: dict[str, np.ndarray], n: int) -> np.ndarray:
    """scale * code: codes [..., n], scale [..., ceil(n/64)] -> float32 [..., n]."""
    codes = _grouped(fields["codes"].astype(np.float32))
    return _ungrouped(codes * fields["scale"].astype(np.float32)[..., None], n)


def quantize_int4(x: np.ndarray) -> dict[str, np.ndarray]:
    """Asymmetric: 16 steps from the group's minimum to its maximum; number 2i is the low half of byte i.

    >>> fields = quantize_int4(np.array([0.0, 15.0, 5.0], np.float32))
    >>> [f"{byte:08b}" for byte in fields["codes"]]
    ['11110000', '00000101']
    """
    n = x.shape[-1]
    groups = _grouped(x.astype(np.float32), fill="edge")
    minimum = _half(groups.min(-1))
    low = minimum.astype(np.float32)[..., None]
    scale = _half(np.maximum((groups.max(-1) - low[..., 0]) / np.float32(15), 0))
    step = scale.astype(np.float32)[..., None]
    codes = np.rint(np.divide(groups - low, step, out=np.zeros_like(groups), where=step > 0))
    codes = _ungrouped(np.clip(codes, 0, 15).astype(np.uint8), n)
    if n % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], -1)
    return {"codes": codes[..., 0::2] | (codes[..., 1::2] << 4), "scale": scale, "minimum": minimum}


def dequantize_int4(fields: dict[str, np.ndarray], n: int) -> np.ndarray:
    """scale * code + minimum: codes uint8 [..., ceil(n/2)] -> float32 [..., n]."""
    packed = fields["codes"]
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)[..., :n]
    scale, minimum = (fields[name].astype(np.float32)[..., None] for name in ("scale", "minimum"))
    return _ungrouped(_grouped(codes.astype(np.float32)) * scale + minimum, n)


def _grouped(x: np.ndarray, fill: str = "constant") -> np.ndarray:
    """[..., n] -> [..., groups, min(64, n)]; a shorter last group is filled up with zeros or its last number."""
    n = x.shape[-1]
    width = min(GROUP, n)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -n % width)]
    return np.pad(x, padding, mode=fill).reshape(*x.shape[:-1], -1, width)  # type: ignore[call-overload]


def _half(x: np.ndarray) -> np.ndarray:
    """float16, saturating: a scale beyond its range must not become infinite."""
    return np.clip(x, -HALF_MAX, HALF_MAX).astype(np.float16)


def _ungrouped(groups: np.ndarray, n: int) -> np.ndarray:
    return groups.reshape(*groups.shape[:-2], -1)[..., :n]
