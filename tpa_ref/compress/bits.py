"""How many bits for which coefficient: reverse water-filling over the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.codes import DISTORTION, MAX_WIDTH


def allocate_bits(variances: Sequence[np.ndarray], entries: Sequence[float], bits: float) -> list[tuple[int, ...]]:
    """Reverse water-filling: widths 0 ... 8 for every coefficient of every layer, within a budget.

    The w-th bit of coefficient s removes variance_s (DISTORTION[w-1] - DISTORTION[w]) / 2 nats and costs `entries` bits
    of storage, one for each token its layer holds. Bits are granted in the order of damage removed per bit stored;
    since each further bit removes less, greedy is optimal. A token's codes take whole bytes, so what would be padding
    of the last one is filled with that layer's next best bits, beyond the budget.

    variances: one array a layer. entries: how many tokens the cache of each holds. bits: to spend in all.

    >>> allocate_bits([np.array([16.0, 1.0]), np.array([1.0])], entries=[1, 4], bits=5)
    [(5, 3), (0,)]
    """
    sizes = [len(variance_s) for variance_s in variances]
    price = np.repeat(entries, np.array(sizes) * MAX_WIDTH)
    gain = (np.concatenate(variances)[:, None] * (DISTORTION[:-1] - DISTORTION[1:])).ravel() / price
    order = np.argsort(-gain, kind="stable")
    granted = np.zeros(len(gain), bool)
    granted[order[np.cumsum(price[order]) <= bits * (1 + 1e-12)]] = True
    ends = np.cumsum(sizes)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        own = order[(order >= start * MAX_WIDTH) & (order < end * MAX_WIDTH)]
        granted[own[~granted[own]][: -granted[own].sum() % 8]] = True
    width = granted.reshape(-1, MAX_WIDTH).sum(-1)
    return [tuple(part.tolist()) for part in np.split(width, ends[:-1])]


def damage(variances: Sequence[np.ndarray], widths: Sequence[tuple[int, ...]]) -> float:
    """Nats per token that the coding of all layers is predicted to cost: 1/2 sum of variance times distortion. Where
    widths end, the coefficients that follow have none.

    >>> damage([np.array([2.0, 1.0])], [()])
    1.5
    """
    total = 0.0
    for variance_s, given in zip(variances, widths, strict=True):
        width_s = np.zeros(len(variance_s), int)
        width_s[: len(given)] = given
        total += (variance_s * DISTORTION[width_s]).sum() / 2
    return float(total)


def gaussian_bound(variances: Sequence[np.ndarray], entries: Sequence[float], bits: float) -> float:
    """The rate-distortion function: no code of Gaussian coefficients whatsoever does less damage with these bits.

    Water level theta: a coefficient above theta / entries is coded to that error, one below is left out; bits are
    1/2 log2(variance / error) for each token held. theta is found by bisection.

    >>> round(gaussian_bound([np.array([16.0, 1.0])], [1], bits=3), 4)
    0.5
    """
    variance = np.concatenate(variances)
    held = np.repeat(np.array(entries, float), [len(variance_s) for variance_s in variances])
    low, high = 1e-40, float((variance / held).max())
    for _ in range(200):
        theta = (low * high) ** 0.5
        error = np.minimum(variance, theta * held)
        spent = float((held * np.log2(variance / error) / 2).sum())
        low, high = (theta, high) if spent > bits else (low, theta)
    return float(np.minimum(variance, high * held).sum() / 2)
