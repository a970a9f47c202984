"""The transform behind the spectral cache: the coordinates in which an error's damage is simplest. Not in the paper.

1. How much does an error n in a cached vector x hurt? For small n the KL divergence of the model's predictions is a
   quadratic form, KL = 1/2 n^T F n, with the Fisher matrix F = E[grad grad^T] of the log-likelihood
   (`compress.calibrate`).
2. In which coordinates is that simplest? In c = U^T F^(1/2) (x - mean), where U are the eigenvectors of
   F^(1/2) Cov F^(1/2): there coefficients are uncorrelated, their variances are lambda_s, and an error of variance D in
   any of them costs D/2 nats, in whatever layer (the Karhunen-Loeve transform in the metric of the damage).
3. How many bits does each deserve? Those that remove most damage for each stored byte (`compress.bits`).
4. And if some numbers of x are to be decoded by themselves, for speed (`banded`)? Then they come first, and the others
   are what is left of them when the first are known: a triangular transform, which codes as well (`successive`).

x is K and V of a token side by side, all heads of both. F has no block between K and V: as measured, one adds nothing.
Coefficients are divided by their standard deviation, so one table of levels per width serves all of them. Below are the
plain tools as well: leading eigenvectors, second moments of data and of weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHRINKAGE = 0.2
FLOOR = 1e-4  # least eigenvalue of F (and variance), as a share of the mean: a few tokens cannot prove that one is zero


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
    """The transform of x = (K, V), or of one of them, from its second moment, its mean and what errors in it cost.

    F: one Fisher matrix for each of the equal blocks of heads, K's and V's. None (nothing is known of the damage):
    every direction of the block counts the same, and losing all of them costs 1/2 nat.

    Shapes: M [g,d,g,d] = E[x x^T], mean [g,d], F [g/blocks,d,g/blocks,d] each -> encoder and basis [g d, g, d],
    variance [g d].
    """
    g, d = mean_gd.shape
    C_xx, F_xx = covariance(M_gdgd, mean_gd, F)
    blocks = np.arange(g * d).reshape(len(F), -1)
    roots = [symmetric_root(F_xx[np.ix_(block, block)]) for block in blocks]
    root_xx, inverse_xx = (block_diagonal(each) for each in zip(*roots, strict=True))
    encoder_sx, basis_sx, variance_s = decorrelated(C_xx, root_xx, inverse_xx)
    return Spectrum(encoder_sx.reshape(-1, g, d), basis_sx.reshape(-1, g, d), mean_gd, variance_s)


def covariance(
    M_gdgd: np.ndarray, mean_gd: np.ndarray, F: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Cov x and F, [x,x] each, in float64: no variance is quite zero, and F has no entries between its blocks."""
    g, d = mean_gd.shape
    mean_x = mean_gd.reshape(-1).astype(np.float64)
    C_xx = M_gdgd.reshape(g * d, g * d).astype(np.float64) - np.outer(mean_x, mean_x)
    n, of_blocks = g * d // len(F), []
    for index, F_gdgd in enumerate(F):
        at = slice(index * n, (index + 1) * n)
        C_xx[at, at] += FLOOR * max(np.trace(C_xx[at, at]) / n, 1e-30) * np.eye(n)
        of_blocks.append(np.eye(n) / np.trace(C_xx[at, at]) if F_gdgd is None else F_gdgd.reshape(n, n))
    return C_xx, block_diagonal(of_blocks)


def block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Square matrices along the diagonal of one.

    >>> block_diagonal([np.ones((1, 1)), 2 * np.ones((1, 1))]).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    n = sum(map(len, blocks))
    whole, start = np.zeros((n, n)), 0
    for block in blocks:
        whole[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return whole


def decorrelated(
    C_xx: np.ndarray, root_xx: np.ndarray, inverse_xx: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(encoder, basis [s,x], variances) of the coordinates in which x is uncorrelated and its damage is the sum of
    squares; root, inverse: F^(1/2), F^(-1/2).
    """
    values, U_xs = np.linalg.eigh(root_xx @ C_xx @ root_xx)
    variance_s = np.maximum(values[::-1], 1e-12 * max(values[-1], 1e-30))
    U_sx = fix_signs(U_xs[:, ::-1].T)
    deviation_s1 = np.sqrt(variance_s)[:, None]
    return U_sx @ root_xx / deviation_s1, U_sx @ inverse_xx * deviation_s1, variance_s


def successive(
    M_gdgd: np.ndarray,
    mean_gd: np.ndarray,
    F: Sequence[np.ndarray | None],
    blocks: Sequence[np.ndarray],
    distortions: Sequence[np.ndarray],
) -> Spectrum:
    """The same, block after block of the numbers of x, so that each can be decoded without those behind it.

    1. Say so much of x is left: y, at first x - mean. Errors of earlier blocks are made, and the numbers R that are
       still to come can mend some of what they cost: best are y_R + F_RR^-1 F_RA y_A in their place (A: all earlier).
       An error that will be mended so costs only F_jj - F_jL F_LL^-1 F_Lj (L: all later numbers).
    2. Coefficients c of block j are what `spectrum` makes of these; of their unit variance codes leave an error D.
    3. What is decoded, c^, tells of all later numbers as well: their best prediction is P c^ with P = Cov(y, c). So
       the basis is triangular, and left is y - B^T c^.

    blocks: indices into x, flattened. distortions: D [s] of each block but the last; coefficients without bits have 1.
    Shapes as in `spectrum`; coefficients come block by block.
    """
    g, d = mean_gd.shape
    C_yy, F_xx = covariance(M_gdgd, mean_gd, F)
    encoder_sx, basis_sx, variances = np.zeros_like(C_yy), np.zeros_like(C_yy), []
    order, start = np.concatenate(blocks), 0
    for block, D_s in zip(blocks, [*distortions, np.zeros(0)], strict=True):
        before, end = order[:start], start + len(block)
        rest, later = order[start:], order[end:]
        mend_xy = np.eye(len(order))[block]  # y -> what block j should be
        mend_xy[:, before] = mending(F_xx, rest, before)[: len(block)]
        mended_xx = F_xx[np.ix_(block, later)] @ mending(F_xx, later, block)
        roots = symmetric_root(F_xx[np.ix_(block, block)] - mended_xx)
        E_sx, B_sx, variance_s = decorrelated(mend_xy @ C_yy @ mend_xy.T, *roots)
        at, start = slice(start, end), end
        encoder_sx[at], basis_sx[at, block] = E_sx @ mend_xy, B_sx
        variances.append(variance_s)
        if len(later):
            P_ys = C_yy @ encoder_sx[at].T
            basis_sx[at, later] = P_ys[later].T
            lost_yy = (P_ys * (1 - D_s)) @ basis_sx[at]
            C_yy = C_yy - lost_yy - lost_yy.T + (basis_sx[at].T * (1 - D_s)) @ basis_sx[at]
    return Spectrum(encoder_sx.reshape(-1, g, d), basis_sx.reshape(-1, g, d), mean_gd, np.concatenate(variances))


def mending(F_xx: np.ndarray, rest: np.ndarray, made: np.ndarray) -> np.ndarray:
    """What the numbers `rest` should add so that errors which were made cost least: F_rr^-1 F_rm, [rest, made]."""
    floor = max(FLOOR * np.trace(F_xx) / len(F_xx), 1e-30)  # as `symmetric_root` has it
    return np.linalg.solve(F_xx[np.ix_(rest, rest)] + floor * np.eye(len(rest)), F_xx[np.ix_(rest, made)])


def shrunk(F_gdgd: np.ndarray) -> np.ndarray:
    """F drawn towards a multiple of the identity: F' = (1 - s) F + s tr(F)/n 1 with s = SHRINKAGE.

    Half of F comes from one token in a hundred, so its directions of little damage are less sure than they look.

    >>> shrunk(np.diag([1.0, 0.0]).reshape(1, 2, 1, 2)).reshape(2, 2).tolist()
    [[0.9, 0.0], [0.0, 0.1]]
    """
    n = F_gdgd.shape[0] * F_gdgd.shape[1]
    F_xx = F_gdgd.reshape(n, n)
    return ((1 - SHRINKAGE) * F_xx + SHRINKAGE * np.trace(F_xx) / n * np.eye(n)).reshape(F_gdgd.shape)


def symmetric_root(F_xx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F^(1/2), F^(-1/2)) of a symmetric matrix whose eigenvalues are brought to a floor.

    >>> root, inverse = symmetric_root(np.diag([4.0, 9.0]))
    >>> root.round(6).tolist(), inverse.round(6).tolist()
    ([[2.0, 0.0], [0.0, 3.0]], [[0.5, 0.0], [0.0, 0.333333]])
    """
    values, U = np.linalg.eigh((F_xx + F_xx.T) / 2)
    root = np.sqrt(np.maximum(values, max(FLOOR * values.mean(), 1e-30)))
    return (U * root) @ U.T, (U / root) @ U.T


def truncated(found: Spectrum, rank: int) -> tuple[Any, Any]:
    """(encoder, basis) of the `rank` strongest coefficients, [R,g,d] each, on the scale of their damage: an equal error
    in any of them costs the same.
    """
    deviation_s11 = np.sqrt(found.variance_s)[:rank, None, None]
    return found.encoder_sgd[:rank] * deviation_s11, found.basis_sgd[:rank] / deviation_s11


def loss(variances: Sequence[np.ndarray], rank: int) -> float:
    """The share of the damage that coefficients from a rank on carry, as a relative norm.

    >>> loss([np.array([3.0, 1.0])], rank=1)
    0.5
    """
    lost, total = (sum(variance_s[start:].sum() for variance_s in variances) for start in (rank, 0))
    return float(np.sqrt(lost / total)) if total > 0 else 0.0


def leading(M: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """(leading eigenvectors as rows, largest entry positive; relative error of leaving out the others)."""
    values, U = np.linalg.eigh((M + M.T).astype(np.float64) / 2)
    return fix_signs(U[:, ::-1][:, :rank].T), relative_error(values[::-1][:rank].sum(), values.sum())


def fix_signs(U_sx: np.ndarray) -> np.ndarray:
    """Rows with their largest entry made positive: eigenvectors have no sign (complex ones no phase), but both backends
    choose one.
    """
    largest = np.take_along_axis(U_sx, np.abs(U_sx).argmax(-1, keepdims=True), -1)
    return U_sx * (np.abs(largest) / largest if np.iscomplexobj(U_sx) else np.where(largest < 0, -1, 1))


def relative_error(kept: float, total: float) -> float:
    """What is left out, as a relative norm: sqrt(1 - kept / total)."""
    return float(np.sqrt(max(0.0, 1 - kept / total))) if total > 0 else 0.0


def second_moment(X_bkgd: np.ndarray) -> np.ndarray:
    """Sum over tokens of x x^T for the flattened heads of each token: [b,k,g,d] -> [g,d,g,d]."""
    g, d = X_bkgd.shape[2:]
    X_tx = X_bkgd.reshape(-1, g * d).astype(np.float64)
    return (X_tx.T @ X_tx).reshape(g, d, g, d)


def moment_from_weights(W_gdm: np.ndarray, input_norm_m: np.ndarray, k_norm_d: np.ndarray | None = None) -> np.ndarray:
    """Second moment of K (or V) from the weights alone: the input after its norm is taken as white noise times 1 + w.

    For K give `k_norm_d`: every head is brought to rms 1 and multiplied with 1 + w_d, as QK-norm does on average.

    Shapes: W [g,d,m], input norm [m], k norm [d] or None -> [g,d,g,d].
    """
    W_gdm = W_gdm.astype(np.float64) * (1 + input_norm_m.astype(np.float64))
    if k_norm_d is not None:
        rms_g = np.sqrt(np.square(W_gdm).sum(-1).mean(-1))
        W_gdm = W_gdm / np.maximum(rms_g, 1e-30)[:, None, None] * (1 + k_norm_d.astype(np.float64))[:, None]
    return np.einsum("gdm,jcm->gdjc", W_gdm, W_gdm, optimize=True)


def truncate_query_heads(WQ_hdm: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Head-mixing rank of Q: W_Q = sum_r a_r (x) B_r with a_r in R^h (`fixed-a` on the query heads, by SVD of W_Q).

    Shapes: W_Q [h,d,m], R -> A [R,h], W [R,d,m] (W_Q = einsum("rh,rdm->hdm", A, W)), relative error.
    """
    W_hx = WQ_hdm.reshape(len(WQ_hdm), -1).astype(np.float64)
    A_rh, error = leading(W_hx @ W_hx.T, rank)
    return A_rh, (A_rh @ W_hx).reshape(rank, *WQ_hdm.shape[1:]), error
