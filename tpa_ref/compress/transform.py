"""The spectral cache: transform coding of K and V, with bits where the model feels them. Not in the paper.

Three steps, each a classic, make one decision of rank and precision:

1. How much does an error n in a cached vector x hurt? For small n the KL divergence of the model's predictions is a
   quadratic form, KL = 1/2 n^T F n, with the Fisher matrix F = E[grad grad^T] of the log-likelihood (`sensitivity`).
2. In which coordinates is that simplest? In c = U^T F^(1/2) (x - mean), where U are the eigenvectors of
   F^(1/2) Cov F^(1/2): there coefficients are uncorrelated, their variances are lambda_s, and an error of variance D in
   any of them costs D/2 nats, in whatever layer (the Karhunen-Loeve transform in the metric of the damage).
3. How many bits does each deserve? Bit after bit goes where it removes most damage for each stored byte, which is
   reverse water-filling: coefficients below the water level get none and are not stored.

x is K and V of a token side by side, all heads of both: what V repeats of K is coded once. F has no block between K and
V, which measurably adds nothing. What the token itself tells of x (`words`) is taken out before.

Coefficients are divided by their standard deviation, which the constant factors take up, so one table of levels per
width serves all of them and nothing but codes is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..core.factorize import steady_signs
from ..core.quantize import DISTORTION, MAX_WIDTH

einsum = partial(np.einsum, optimize=True)
FLOOR = (
    1e-4  # share of the mean sensitivity that every direction has at least: few tokens cannot prove that one has none
)


@dataclass(frozen=True)
class Spectrum:
    """K and V of one layer (or one of them) in the coordinates of the damage, strongest coefficient first.

    Coefficients of a token: c = encoder (x - mean - W z), of unit variance; back: x = mean + basis^T c + W z.
    variance_s / 2 is what the model loses, in nats per token, when coefficient s is not stored. predictor: W^T or None.
    """

    encoder_sgd: Any
    basis_sgd: Any
    mean_gd: Any
    variance_s: np.ndarray
    predictor_zgd: Any = None


def spectrum(M_gdgd: np.ndarray, mean_gd: np.ndarray, F: Sequence[np.ndarray | None]) -> Spectrum:
    """The transform of x = (K, V), or of one of them, from its second moment, its mean and its sensitivity.

    F: one Fisher matrix for each of the equal blocks of heads, K's and V's. None (nothing is known of the damage):
    every direction of the block counts the same, and losing all of them costs 1/2 nat.

    Shapes: M [g,d,g,d] = E[x x^T], mean [g,d], F [g/blocks,d,g/blocks,d] each -> encoder and basis [g d, g, d],
    variance [g d].
    """
    g, d = mean_gd.shape
    mean_x = mean_gd.reshape(-1).astype(np.float64)
    C_xx = M_gdgd.reshape(g * d, g * d).astype(np.float64) - np.outer(mean_x, mean_x)
    root_xx, inverse_xx = np.zeros_like(C_xx), np.zeros_like(C_xx)
    n = g * d // len(F)
    for index, F_gdgd in enumerate(F):
        at = slice(index * n, (index + 1) * n)
        C_xx[at, at] += FLOOR * max(np.trace(C_xx[at, at]) / n, 1e-30) * np.eye(n)
        F_xx = np.eye(n) / np.trace(C_xx[at, at]) if F_gdgd is None else F_gdgd.reshape(n, n).astype(np.float64)
        root_xx[at, at], inverse_xx[at, at] = symmetric_root(F_xx)
    values, U_xs = np.linalg.eigh(root_xx @ C_xx @ root_xx)
    variance_s = np.maximum(values[::-1], 1e-12 * max(values[-1], 1e-30))
    U_sx = steady_signs(U_xs[:, ::-1].T)
    deviation_s1 = np.sqrt(variance_s)[:, None]
    encoder_sx, basis_sx = U_sx @ root_xx / deviation_s1, U_sx @ inverse_xx * deviation_s1
    return Spectrum(encoder_sx.reshape(-1, g, d), basis_sx.reshape(-1, g, d), mean_gd, variance_s)


def symmetric_root(F_xx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F^(1/2), F^(-1/2)) of a symmetric matrix whose eigenvalues are brought to a floor.

    >>> root, inverse = symmetric_root(np.diag([4.0, 9.0]))
    >>> root.round(6).tolist(), inverse.round(6).tolist()
    ([[2.0, 0.0], [0.0, 3.0]], [[0.5, 0.0], [0.0, 0.333333]])
    """
    values, U = np.linalg.eigh((F_xx + F_xx.T) / 2)
    root = np.sqrt(np.maximum(values, max(FLOOR * values.mean(), 1e-30)))
    return (U * root) @ U.T, (U / root) @ U.T


def truncate_weighted(
    mode: str, rank: int, M_gdgd: np.ndarray, mean_gd: np.ndarray, F_gdgd: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """The basis of `latent` or `fixed-b` that loses least damage instead of least energy, with its encoder.

    Coefficients keep the scale of their damage, so an equal error in any of them costs the same. For `fixed-b` every KV
    head has a transform of its own, from its diagonal blocks of M and F.

    Shapes: M, mean, F as in `spectrum` -> encoder and basis [R,g,d] (`latent`) or [g,R,d] (`fixed-b`); the share of
    the damage that is left out, as a relative norm.
    """
    g = mean_gd.shape[0]
    if mode == "latent":
        found = [spectrum(M_gdgd, mean_gd, [F_gdgd])]
    else:
        found = [
            spectrum(
                M_gdgd[one, :, one],
                mean_gd[one],
                [None if F_gdgd is None else F_gdgd[one, :, one]],
            )
            for one in (slice(head, head + 1) for head in range(g))
        ]
    encoders, bases = [], []
    for one in found:
        deviation_s11 = np.sqrt(one.variance_s)[:rank, None, None]
        encoders.append(one.encoder_sgd[:rank] * deviation_s11)
        bases.append(one.basis_sgd[:rank] / deviation_s11)
    error = loss([one.variance_s for one in found], rank)
    if mode == "latent":
        return encoders[0], bases[0], error
    return (
        np.concatenate([x.swapaxes(0, 1) for x in encoders]),
        np.concatenate([x.swapaxes(0, 1) for x in bases]),
        error,
    )


def loss(variances: Sequence[np.ndarray], rank: int) -> float:
    """The share of the damage that coefficients from a rank on carry, as a relative norm.

    >>> loss([np.array([3.0, 1.0])], rank=1)
    0.5
    """
    lost, total = (sum(variance_s[start:].sum() for variance_s in variances) for start in (rank, 0))
    return float(np.sqrt(lost / total)) if total > 0 else 0.0


# ---- how many bits for which coefficient ----


def allocate(variances: Sequence[np.ndarray], entries: Sequence[float], bits: float) -> list[tuple[int, ...]]:
    """Reverse water-filling: widths 0 ... 8 for every coefficient of every layer, within a budget.

    The w-th bit of coefficient s removes variance_s (DISTORTION[w-1] - DISTORTION[w]) / 2 nats and costs `entries` bits
    of storage, one for each token its layer holds. Bits are granted in the order of damage removed per bit stored;
    since each further bit removes less, greedy is optimal. A token's codes take whole bytes, so what would be padding
    of the last one is filled with that layer's next best bits, beyond the budget.

    variances: one array a layer. entries: how many tokens the cache of each holds. bits: to spend in all.

    >>> allocate([np.array([16.0, 1.0]), np.array([1.0])], entries=[1, 4], bits=5)
    [(5, 3), (0,)]
    """
    steps_w = DISTORTION[:-1] - DISTORTION[1:]
    gain = np.concatenate(
        [(variance[:, None] * steps_w / held).ravel() for variance, held in zip(variances, entries, strict=True)]
    )
    price = np.concatenate(
        [np.full(len(variance) * MAX_WIDTH, held) for variance, held in zip(variances, entries, strict=True)]
    )
    order = np.argsort(-gain, kind="stable")
    granted = np.zeros(len(gain), bool)
    granted[order[np.cumsum(price[order]) <= bits * (1 + 1e-12)]] = True
    ends = np.cumsum([len(variance) for variance in variances])
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        own = order[(order >= start * MAX_WIDTH) & (order < end * MAX_WIDTH)]
        granted[own[~granted[own]][: -granted[own].sum() % 8]] = True
    width = granted.reshape(-1, MAX_WIDTH).sum(-1)
    return [tuple(part.tolist()) for part in np.split(width, ends[:-1])]


def damage(variances: Sequence[np.ndarray], widths: Sequence[tuple[int, ...]]) -> float:
    """Nats per token that the coding of all layers is predicted to cost: 1/2 sum of variance times distortion.

    >>> damage([np.array([2.0])], [(0,)])
    1.0
    """
    return float(
        sum((variance * DISTORTION[list(width)]).sum() / 2 for variance, width in zip(variances, widths, strict=True))
    )


def gaussian_bound(variances: Sequence[np.ndarray], entries: Sequence[float], bits: float) -> float:
    """The rate-distortion function: no code of Gaussian coefficients whatsoever does less damage with these bits.

    Water level theta: a coefficient above theta / entries is coded to that error, one below is left out; bits are
    1/2 log2(variance / error) for each token held. theta is found by bisection.

    >>> round(gaussian_bound([np.array([16.0, 1.0])], [1], bits=3), 4)
    0.5
    """
    variance = np.concatenate(variances)
    held = np.concatenate([np.full(len(v), float(n)) for v, n in zip(variances, entries, strict=True)])
    low, high = 1e-40, float((variance / held).max())
    for _ in range(200):
        theta = (low * high) ** 0.5
        error = np.minimum(variance, theta * held)
        spent = float((held * np.log2(variance / error) / 2).sum())
        low, high = (theta, high) if spent > bits else (low, theta)
    return float(np.minimum(variance, high * held).sum() / 2)
