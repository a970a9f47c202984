#!/usr/bin/env python3
"""Fit the levels of the trellis codes: tpa_ref/core/levels.npy. Three minutes on one core; prints DISTORTION.

For each width Lloyd's algorithm runs on Gaussian numbers: the best path with the levels as they are, then every level
becomes the mean of the numbers that chose it. It begins with Gaussian quantiles in random order for narrow codes, where
bits of the past matter most, and for wide ones with levels that the own bits choose coarsely and those before finely.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tpa_ref.atomic import replacing
from tpa_ref.core import codes

ROUNDS, TRIES, WIDE, SPREAD = (
    30,
    6,
    6,
    3**0.5,
)  # the best quantizer's levels are as dense as the cube root of the density


def first_levels(width: int, rng: np.random.Generator) -> np.ndarray:
    """Where the fit begins, float32 [256]."""
    spread = SPREAD if width >= WIDE else rng.choice([1.0, 1.2])
    at = spread * np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)
    if width < WIDE:
        return rng.permutation(at)
    window = np.arange(256)
    before = rng.permutation(256 >> width)[window >> width]
    return at[(window % (1 << width)) * (256 >> width) + before]


def error_and_sums(levels: np.ndarray, width: int, X_ks: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean squared error, and sum and count of the numbers of each window."""
    codes.LEVELS[width] = levels
    widths = (width,) * X_ks.shape[1]
    parts = [X_ks[at : at + codes.BLOCK] for at in range(0, len(X_ks), codes.BLOCK)]
    windows_ks = np.concatenate([codes.best_path(x, widths, np.zeros(len(x), int))[:, 1:] for x in parts])
    inner = windows_ks[:, 8:], X_ks[:, 8:]  # the first ones have no choice yet
    sums, counts = (np.bincount(inner[0].ravel(), weight, 256) for weight in (inner[1].ravel(), None))
    return float(np.square(levels[inner[0]] - inner[1]).mean()), sums, counts


def fitted(width: int) -> tuple[np.ndarray, float]:
    """The best levels of several tries, and their error on new numbers."""
    best, least = np.zeros(256, np.float32), np.inf
    for seed in range(TRIES if width < codes.MAX_WIDTH else 1):
        rng = np.random.default_rng(seed)
        levels = first_levels(width, rng)
        for _ in range(ROUNDS):
            _, sums, counts = error_and_sums(levels, width, rng.standard_normal((192, 256)).astype(np.float32))
            levels = np.where(counts > 3, sums / np.maximum(counts, 1), levels).astype(np.float32)
        error, _, _ = error_and_sums(levels, width, np.random.default_rng(99).standard_normal((960, 256)).astype("f4"))
        best, least = (levels, error) if error < least else (best, least)
    return best, least


def main() -> None:
    found = [fitted(width) for width in range(1, codes.MAX_WIDTH + 1)]
    print("DISTORTION", [1.0, *(float(f"{error:.3g}") for _, error in found)])
    levels = np.stack([np.zeros(256, np.float32), *(at for at, _ in found)])
    with replacing(Path(codes.__file__).with_name("levels.npy")) as file:
        np.save(file, levels)


if __name__ == "__main__":
    main()
