"""How a cached number is stored: float32, bfloat16, int8, or int4 packed two to a byte (and float64 in float64 runs).

int8 and int4 work on groups of 64 numbers along the last axis (the last group may be shorter):
    int8: x = scale * code                    code in -127 ... 127, scale = max|x| / 127
    int4: x = scale * code + minimum          code in 0 ... 15, scale = (max x - min x) / 15
Scales and minima are float16, rounded before they are used, and count as memory like everything else.
"""

import ml_dtypes
import numpy as np

GROUP = 64
HALF_MAX = 65504.0  # largest float16


def field_shapes(n: int, dtype: str) -> dict[str, tuple[int, np.dtype]]:
    """The arrays that store n numbers, as {field: (length of its last axis, dtype)}.

    >>> {field: (size, str(kind)) for field, (size, kind) in field_shapes(100, "int4").items()}
    {'codes': (50, 'uint8'), 'scale': (2, 'float16'), 'minimum': (2, 'float16')}
    """
    half = (-(-n // GROUP), np.dtype(np.float16))
    if dtype == "int8":
        return {"codes": (n, np.dtype(np.int8)), "scale": half}
    if dtype == "int4":
        return {"codes": (-(-n // 2), np.dtype(np.uint8)), "scale": half, "minimum": half}
    return {"x": (n, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))}


def quantize(x: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Encode along the last axis: [..., n] -> the arrays of `field_shapes(n, dtype)`, leading axes kept.

    Of int4, number 2i is the low half of byte i.

    >>> quantize(np.array([1.0, -2.0, 0.5], np.float32), "int8")["codes"].tolist()
    [64, -127, 32]
    >>> [f"{byte:08b}" for byte in quantize(np.array([0.0, 15.0, 5.0], np.float32), "int4")["codes"]]
    ['11110000', '00000101']
    """
    if dtype not in ("int8", "int4"):
        return {"x": x.astype(field_shapes(1, dtype)["x"][1])}
    n, groups = x.shape[-1], _grouped(x.astype(np.float32))
    if dtype == "int8":
        scale = _half(np.abs(groups).max(-1) / np.float32(127))
        return {"codes": _codes(groups, scale, -127, 127, n), "scale": scale}
    minimum = _half(groups.min(-1))
    low = minimum.astype(np.float32)
    scale = _half(np.maximum((groups.max(-1) - low) / np.float32(15), 0))
    codes = _codes(groups - low[..., None], scale, 0, 15, n)
    if n % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], -1)
    return {"codes": codes[..., 0::2] | (codes[..., 1::2] << 4), "scale": scale, "minimum": minimum}


def dequantize(fields: dict[str, np.ndarray], dtype: str, n: int) -> np.ndarray:
    """The numbers back, at least float32: the inverse of `quantize` up to its rounding."""
    if "x" in fields:
        x = fields["x"]
        return x if x.dtype == np.float64 else x.astype(np.float32)
    codes = fields["codes"]
    if dtype == "int4":
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)[..., :n]
    groups = _grouped(codes.astype(np.float32)) * fields["scale"].astype(np.float32)[..., None]
    if dtype == "int4":
        groups = groups + fields["minimum"].astype(np.float32)[..., None]
    return _ungrouped(groups, n)


def _codes(groups: np.ndarray, scale: np.ndarray, least: int, most: int, n: int) -> np.ndarray:
    """The nearest whole number of scales, [..., n]; 0 where the scale is zero."""
    step = scale.astype(np.float32)[..., None]
    codes = np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step > 0))
    return _ungrouped(np.clip(codes, least, most).astype(np.int8 if least < 0 else np.uint8), n)


def _grouped(x: np.ndarray) -> np.ndarray:
    """[..., n] -> [..., groups, min(64, n)]; a shorter last group is filled up with its last number."""
    n = x.shape[-1]
    width = min(GROUP, n)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -n % width)]
    return np.pad(x, padding, mode="edge").reshape(*x.shape[:-1], -1, width)


def _ungrouped(groups: np.ndarray, n: int) -> np.ndarray:
    return groups.reshape(*groups.shape[:-2], -1)[..., :n]


def _half(x: np.ndarray) -> np.ndarray:
    """float16, saturating: a scale beyond its range must not become infinite."""
    return np.clip(x, -HALF_MAX, HALF_MAX).astype(np.float16)
