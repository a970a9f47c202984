"""Spectral codes: coefficients of unit variance with a width of their own each, 0 to 8 bits, and constant levels.

No scales are stored. Codes are cut into digits and packed so that no bit is lost and unpacking is a shift and a mask of
whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def quantize(C_bks: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """Nearest level of every coefficient, packed: [..., R] of unit variance -> codes uint8 [..., bytes]."""
    codes = np.zeros(C_bks.shape, np.uint8)
    for width in sorted(set(widths)):
        columns = np.flatnonzero(np.array(widths) == width)
        codes[..., columns] = np.searchsorted(thresholds(width), C_bks[..., columns].astype(np.float32))
    packed = np.zeros((*codes.shape[:-1], packed_bytes(widths)), np.uint8)
    for part in digits(widths):
        digit = (codes[..., part.column] >> part.left.astype(np.uint8)) & np.uint8((1 << part.bits) - 1)
        packed[..., part.byte] |= digit << np.uint8(part.shift)
    return packed


def unpack(packed: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """The inverse of the packing: uint8 [..., bytes] -> the code of each coefficient, uint8 [..., R]."""
    codes = np.zeros((*packed.shape[:-1], len(widths)), np.uint8)
    for part in digits(widths):
        digit = (packed[..., part.byte] >> np.uint8(part.shift)) & np.uint8((1 << part.bits) - 1)
        codes[..., part.column] |= digit << part.left.astype(np.uint8)
    return codes


def dequantize(packed: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """Codes -> coefficients of unit variance, float32 [..., R]."""
    codes = unpack(packed, widths)
    C_bks = np.zeros(codes.shape, np.float32)
    for width in sorted(set(widths)):
        columns = np.flatnonzero(np.array(widths) == width)
        C_bks[..., columns] = levels(width)[codes[..., columns]]
    return C_bks
