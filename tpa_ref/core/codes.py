"""Spectral codes: the coefficients of a token as one string of bits, read through a window of eight. Not in the paper.

Coefficient s has widths[s] bits of its own, 1 to 8, but its level is looked up by the last eight bits of the string so
far: its own and those just before them.

    scale, free  c_0 (4)  c_1 (3) c_2 (3)
    01100  100   1 0 1 1  0 0 1   0 1 1   ...
                 |______ window _____|        level of c_2 = LEVELS[3, 0b11001011]

So each coefficient chooses among 2^w levels, and which ones those are is told by the bits before: the encoder can steer
towards levels that suit the coefficients to come. The string with the least squared error is the shortest path through
a graph (a trellis), found by Viterbi's algorithm: one forward step a coefficient over the 256 windows, then back along
the best path. At the same number of bits that leaves two thirds of the error of the best levels chosen one by one.

The first byte is a scale of the token's own (gain-shape coding), since real tokens are not alike: a few have
coefficients many times larger than calibration expects, and levels that end would clip them. Its three low bits say
nothing of the scale; the path chooses them, so that the first coefficients have a choice as well.
"""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np

WINDOW = 8  # bits
MAX_WIDTH = WINDOW
# Levels of coefficients of unit variance by width and window, and the mean squared error they leave on Gaussian ones:
# fitted by scripts/train_levels.py.
LEVELS = np.load(Path(__file__).with_name("levels.npy"))  # float32 [9,256]
DISTORTION = np.array([1.0, 0.281, 0.0781, 0.0214, 0.00599, 0.00166, 0.000507, 0.00013, 0.0000423])
FREE = 8  # first bytes of one scale
SCALES = (2.0 ** (np.arange(-8, 24) / 4)).astype(np.float32).repeat(FREE)  # by first byte; quarters of an octave
# How far the levels of a width serve: on Gaussian coefficients, what is clipped beyond and what a step costs balance.
REACH = np.array([0, 0.8, 1.5, 2.1, 2.7, 3.3, 3.8, 4.3, 4.7], np.float32)
BLOCK = 64  # tokens that go through the trellis together


def packed_bytes(widths: tuple[int, ...]) -> int:
    """Bytes of one token: the scale and the string; none where nothing is coded.

    >>> packed_bytes((4, 3, 3)), packed_bytes(())
    (3, 0)
    """
    return 1 + -(-sum(widths) // 8) if widths else 0


# ---- the scale of a token ----


def choose_scales(C_ks: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """The scale of each token as the least of its first bytes, an index into SCALES: [k,s] -> uint8 [k].

    A scale a makes every step a times as wide, which costs a^2 sum_s v_s D(w_s), and coefficients beyond its reach are
    clipped, which costs sum_s v_s (|c_s| - a r_s)+^2. Bits were given so that v_s D(w_s), the damage by one of them, is
    about the same for all: v_s = 1 / D(w_s). Both terms are convex, so the best scale is the smallest at which widening
    costs at least what it saves: a R >= sum_s (r_s / D_s) (|c_s| - a r_s)+.
    """
    reach_s, price_s = reach_and_price(widths)
    C_ks = np.abs(C_ks, dtype=np.float32)
    chosen_k = np.zeros(len(C_ks), np.uint8)
    for scale in SCALES[:-FREE:FREE]:
        chosen_k[scale < (np.maximum(C_ks - scale * reach_s, 0) * price_s).sum(-1)] += FREE
    return chosen_k


def reach_and_price(widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """r_s, and r_s / (R D_s): float32 [R] each."""
    reach_s = REACH[np.array(widths, int)]
    return reach_s, (reach_s / DISTORTION[np.array(widths, int)] / len(widths)).astype(np.float32)


# ---- the path through the trellis ----


def best_path(X_ks: np.ndarray, widths: tuple[int, ...], first_k: np.ndarray) -> np.ndarray:
    """First byte and windows of the string whose levels are nearest to x, in squared error: [k,s] -> uint8 [k,1+s].

    first_k: the least of the first bytes that a token may have, FREE of them.
    """
    k, step_k = len(X_ks), np.arange(len(X_ks))
    cost_ik = np.full((256, k), np.inf, np.float32)  # of the best string that ends in window i
    cost_ik[first_k + np.arange(FREE)[:, None], step_k] = 0
    before = []
    for width, x_k in zip(widths, X_ks.T, strict=True):
        before.append(by_last_bits(cost_ik, width))
        best_jk = before[-1].min(0)  # what is left of the last window are its last 8 - w bits, j
        with np.errstate(over="ignore"):  # of numbers that nothing comes near, every error is infinite
            error_jwk = np.square(x_k - LEVELS[width][:, None]).reshape(len(best_jk), -1, k)
        cost_ik = (best_jk[:, None] + error_jwk).reshape(256, k)
    windows_kr = np.zeros((k, 1 + len(widths)), np.uint8)
    windows_kr[:, -1] = window_k = cost_ik.argmin(0)
    for s in range(len(widths))[::-1]:
        j_k = window_k >> widths[s]
        windows_kr[:, s] = window_k = (before[s][:, j_k, step_k].argmin(0) << (WINDOW - widths[s])) + j_k
    return windows_kr


def best_paths(C_bks: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """First byte and windows of each token: [..., R] -> uint8 [..., 1+R]."""
    C_ks = C_bks.reshape(math.prod(C_bks.shape[:-1]), len(widths)).astype(np.float32)
    windows_kr = np.zeros((len(C_ks), 1 + len(widths)), np.uint8)
    for start in range(0, len(C_ks) if widths else 0, BLOCK):
        at = slice(start, start + BLOCK)
        scales_k = choose_scales(C_ks[at], widths)
        windows_kr[at] = best_path(C_ks[at] * (1 / SCALES)[scales_k, None], widths, scales_k)
    return windows_kr.reshape(*C_bks.shape[:-1], 1 + len(widths))


def by_last_bits(cost_ik: np.ndarray, width: int) -> np.ndarray:
    """[window,k] -> [first w bits of the window, its last 8 - w bits, k]."""
    return cost_ik.reshape(1 << width, -1, cost_ik.shape[-1])


# ---- the string as bytes ----


@lru_cache(maxsize=512)
def places(widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where windows lie: each is (byte[at] << 8 | byte[after]) >> shift, and 255. int [R] each.

    >>> [x.tolist() for x in places((4, 3, 3))]
    [[0, 0, 1], [1, 1, 2], [4, 1, 6]]
    """
    start = np.cumsum(widths)  # the bit at which the window begins; the scale's eight come first
    return start // 8, np.minimum(start // 8 + 1, packed_bytes(widths) - 1), 8 - start % 8


@lru_cache(maxsize=512)
def fillings(widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where bytes behind the scale come from, int [bytes - 1] each: (column, width, right, left).

    Byte n is (window[column] << width | own bits of the next coefficient) >> right << left, where columns count the
    scale as the first window. left: zeros that fill the last byte.
    """
    end = np.cumsum((0, *widths))
    last = 8 * np.arange(1, packed_bytes(widths))  # one behind the last bit of each byte
    column = np.minimum(np.searchsorted(end, last), len(widths)) - 1
    width = np.array(widths)[column]
    over = end[column + 1] - last
    return column, width, np.maximum(over, 0), np.maximum(-over, 0)


def pack(windows_bkr: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """First byte and windows of each token -> its bytes: uint8 [..., 1+R] -> uint8 [..., bytes]."""
    if not widths:
        return windows_bkr[..., :0]
    column, width, right, left = fillings(widths)
    before, own = windows_bkr[..., column].astype(int), windows_bkr[..., column + 1] & ((1 << width) - 1)
    string = ((before << width | own) >> right << left).astype(np.uint8)
    return np.concatenate([windows_bkr[..., :1], string], -1)


def quantize(C_bks: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """Coefficients of about unit variance -> the bytes of each token: [..., R] -> uint8 [..., bytes]."""
    return pack(best_paths(C_bks, widths), widths)


def windows_of(packed: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """The window of every coefficient: uint8 [..., bytes] -> uint8 [..., R]."""
    at, after, shift = places(widths)
    return ((packed[..., at].astype(np.uint16) << 8 | packed[..., after]) >> shift).astype(np.uint8)


def dequantize(packed: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
    """Bytes -> coefficients: uint8 [..., bytes] -> float32 [..., R]."""
    if not widths:
        return np.zeros((*packed.shape[:-1], 0), np.float32)
    return LEVELS[np.array(widths), windows_of(packed, widths)] * SCALES[packed[..., :1]]
