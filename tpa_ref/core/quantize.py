"""How a cached number is stored: float32, bfloat16, int8, or int4 packed two to a byte (and float64 in float64 runs).

int8 and int4 work on groups of 64 numbers along the last axis (the last group may be shorter):
    int8: x = scale * code                    code in -127 ... 127
    int4: x = scale * code + minimum          code in 0 ... 15
Scales and minima are float16 and count as memory like everything else.

Coefficients of a spectral basis (see `spectral`) have unit variance and a width of their own each, 0 to 8 bits, with
constant levels: no scales are stored at all.
"""

from __future__ import annotations

from dataclasses import dataclass

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


# ---- spectral: each coefficient has its own width, from 0 to 8 bits ----

# A coefficient of unit variance becomes one of 2^w levels s t (1 + kappa t^2), t evenly spaced in [-1, 1]: close where
# coefficients are frequent, wide in the tails. (s, kappa) minimise the mean squared error of a unit Gaussian mixed with
# a Student t of 10 degrees, since measured coefficients have a kurtosis a little above 3; the error itself is beside.
COMPANDER = {
    1: (0.786, 0.0),
    2: (1.340, 0.156),
    3: (1.669, 0.386),
    4: (1.848, 0.677),
    5: (1.972, 1.010),
    6: (2.079, 1.377),
    7: (2.182, 1.767),
    8: (2.284, 2.187),
}
DISTORTION = np.array([1.0, 0.382768, 0.130040, 0.040534, 0.012157, 0.003604, 0.001058, 0.000308, 0.000089])
MAX_WIDTH = 8
PLANES = (8, 4, 2, 1)  # a width is a sum of these: 7 = 4 + 2 + 1


def levels(width: int) -> np.ndarray:
    """The 2^w levels of a coefficient of unit variance, ascending, float32.

    >>> [round(float(x), 3) for x in levels(2)]
    [-1.549, -0.454, 0.454, 1.549]
    """
    scale, kappa = (np.float32(x) for x in odd_compander(width))
    t = 2 * np.arange(1 << width, dtype=np.float32) - np.float32((1 << width) - 1)
    return (t * t * kappa + np.float32(1)) * t * scale


def odd_compander(width: int) -> tuple[float, float]:
    """(s, kappa) for a t that runs over the odd numbers 2 code + 1 - 2^w instead of from -1 to 1."""
    scale, kappa = COMPANDER[width]
    most = (1 << width) - 1
    return scale / most, kappa / most**2


def thresholds(width: int) -> np.ndarray:
    """Halfway between neighbouring levels: where the nearest one changes, float32 [2^w - 1]."""
    at = levels(width)
    return (at[1:] + at[:-1]) / np.float32(2)


@dataclass(frozen=True)
class Digits:
    """Some digits of codes that lie at the same place of different bytes.

    byte[i] >> shift & (2^bits - 1) are the bits of coefficient column[i] from bit left[i] on.
    """

    bits: int
    shift: int
    byte: np.ndarray
    column: np.ndarray
    left: np.ndarray


def digits(widths: tuple[int, ...]) -> list[Digits]:
    """Where every bit of the codes lies. A code is cut into digits of 8, 4, 2 and 1 bits: 7 = 4 + 2 + 1.

    The digits of a plane (all of one size) fill whole bytes, the first of them the low bits, so that unpacking is a
    shift and a mask of whole rows. What is left of the planes shares the last bytes, larger digits first: none is cut
    by the end of a byte, and nothing is padded but the last one.

    >>> [(part.bits, part.shift, part.byte.tolist(), part.column.tolist()) for part in digits((4, 4, 3, 2))]
    [(4, 0, [0], [0]), (4, 4, [0], [1]), (2, 0, [1], [2]), (2, 2, [1], [3]), (1, 4, [1], [2])]
    """
    width_s = np.array(widths, int)
    left_s = np.zeros_like(width_s)  # bits that larger digits have taken
    found: list[Digits] = []
    rest: list[tuple[int, int, int]] = []  # digits that fill no byte: their size, whose they are, and `left`
    byte = 0
    for bits in PLANES:
        columns, in_byte = np.flatnonzero(width_s & bits), 8 // bits
        rows = len(columns) // in_byte
        for slot in range(in_byte if rows else 0):
            here = columns[slot * rows : (slot + 1) * rows]
            found.append(Digits(bits, slot * bits, byte + np.arange(rows), here, left_s[here]))
        rest += [(bits, int(column), int(left_s[column])) for column in columns[rows * in_byte :]]
        byte += rows
        left_s[columns] += bits
    at = 8 * byte
    for bits, column, left in rest:
        found.append(Digits(bits, at % 8, np.array([at // 8]), np.array([column]), np.array([left])))
        at += bits
    return found


def packed_bytes(widths: tuple[int, ...]) -> int:
    """Bytes of one token's codes.

    >>> packed_bytes((4, 3, 2)), packed_bytes(())
    (2, 0)
    """
    return -(-sum(widths) // 8)


def quantize_spectral(C_bks: np.ndarray, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Nearest level of every coefficient, packed: [..., R] of unit variance -> codes uint8 [..., bytes]."""
    codes = np.zeros(C_bks.shape, np.uint8)
    for width in sorted(set(widths)):
        columns = np.flatnonzero(np.array(widths) == width)
        codes[..., columns] = np.searchsorted(thresholds(width), C_bks[..., columns].astype(np.float32))
    packed = np.zeros((*codes.shape[:-1], packed_bytes(widths)), np.uint8)
    for part in digits(widths):
        digit = (codes[..., part.column] >> part.left.astype(np.uint8)) & np.uint8((1 << part.bits) - 1)
        packed[..., part.byte] |= digit << np.uint8(part.shift)
    return {"codes": packed}


def unpack_spectral(packed: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """The inverse of the packing: uint8 [..., bytes] -> the code of each coefficient, uint8 [..., R]."""
    codes = np.zeros((*packed.shape[:-1], len(widths)), np.uint8)
    for part in digits(widths):
        digit = (packed[..., part.byte] >> np.uint8(part.shift)) & np.uint8((1 << part.bits) - 1)
        codes[..., part.column] |= digit << part.left.astype(np.uint8)
    return codes


def dequantize_spectral(fields: dict[str, np.ndarray], widths: tuple[int, ...]) -> np.ndarray:
    """Codes -> coefficients of unit variance, float32 [..., R]."""
    codes = unpack_spectral(fields["codes"], widths)
    C_bks = np.zeros(codes.shape, np.float32)
    for width in sorted(set(widths)):
        columns = np.flatnonzero(np.array(widths) == width)
        C_bks[..., columns] = levels(width)[codes[..., columns]]
    return C_bks
