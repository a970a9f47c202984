"""Predicting K and V from the tokens, so that only the residual is coded. Not in the paper.

The decoder has the token ids: two bytes each, once for all layers. K (before RoPE) and V of a token follow in good part
from the token and from the one before it, so both are predicted from the token vectors

    z_t = [e(t), e(t-1)],        e = row of the embedding table, brought to rms 1,

linearly in every layer. To a coder this is side information at the decoder; to the cache, 2 m coefficients that need no
memory because they are looked up:

    K^ = mean + B_K c + W_K z,        V^ = mean + B_V c + W_V z.

The maps W are ridge regressions on the calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..gemma.config import GemmaConfig
from ..gemma.token_vectors import EPS
from .config import Choice, Spectral, TPAConfig

RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # in units of the variance of an entry of e, which is 1
AFFORDABLE = 640  # hidden size up to which conversion makes the maps by itself: reading K takes 2 m coefficients more
AFFORDABLE_ONCE = 1152  # and up to which the first layer's are looked up, which read twice as much as its own weights


# ---- the maps, from moments ----


@dataclass(frozen=True)
class TokenMoments:
    """E[z] and E[z z^T] of the calibration text, the same for every layer, and of how many tokens."""

    mean_z: np.ndarray
    S_zz: np.ndarray
    tokens: int

    @cached_property
    def covariance(self) -> np.ndarray:
        """Cov(z), [z,z]."""
        return self.S_zz - np.outer(self.mean_z, self.mean_z)

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues and eigenvectors of the covariance."""
        values, U_zs = np.linalg.eigh(self.covariance)
        return np.maximum(values, 0), U_zs


def fit(N_xz: np.ndarray, F_xx: np.ndarray, tokens: TokenMoments, damage: float) -> tuple[np.ndarray, float] | None:
    """The ridge regression W = N (S + lambda)^-1 whose residuals are expected to do the least damage on other text.

    N: covariance of x (K and V of a layer, flattened) with z; F: what an error costs; damage: tr(F Cov x) without any
    prediction. Residuals of the text that was fitted are too small by the numbers spent on it, which are
    df = tr(S / (S + lambda)); generalised cross-validation divides by (1 - df/n)^2 for n tokens. None: no prediction is
    better.

    Returns W [x,z] and the factor 1 / (1 - df/n)^2.
    """
    values_s, U_zs = tokens.axes
    T_xs = N_xz @ U_zs
    gain_s = ((F_xx @ T_xs) * T_xs).sum(0)  # what each axis of z explains, per squared weight
    best, least = None, damage
    for ridge in RIDGES:
        shrunk_s = 1 / (values_s + ridge)
        free = (values_s * shrunk_s).sum() / tokens.tokens
        if free > 0.5:
            continue
        inflation = 1 / (1 - free) ** 2
        left = inflation * (damage - (gain_s * shrunk_s * (2 - values_s * shrunk_s)).sum())
        if left < least:
            best, least = ((T_xs * shrunk_s) @ U_zs.T, inflation), left
    return best


def without_tokens(
    M_gdgd: np.ndarray, mean_gd: np.ndarray, F: Sequence[np.ndarray | None], N_gdz: np.ndarray, tokens: TokenMoments
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Second moment and mean of x - W z, and W^T [z,g,d]; what came in, and None, where no prediction helps.

    Shapes as in `transform.spectrum`; N [g,d,z] = E[x z^T].
    """
    g, d = mean_gd.shape
    mean_x = mean_gd.reshape(-1)
    C_xx = M_gdgd.reshape(g * d, g * d) - np.outer(mean_x, mean_x)
    N_xz = N_gdz.reshape(g * d, -1) - np.outer(mean_x, tokens.mean_z)
    F_xx, n = np.zeros_like(C_xx), g * d // len(F)
    for index, F_gdgd in enumerate(F):
        at = slice(index * n, (index + 1) * n)
        F_xx[at, at] = np.eye(n) / np.trace(C_xx[at, at]) if F_gdgd is None else F_gdgd.reshape(n, n)
    found = fit(N_xz, F_xx, tokens, float((F_xx * C_xx).sum()))
    if found is None:
        return M_gdgd, mean_gd, None
    W_xz, inflation = found
    explained_xx = W_xz @ N_xz.T
    C_xx = inflation * (C_xx - explained_xx - explained_xx.T + W_xz @ tokens.covariance @ W_xz.T)
    mean_x = mean_x - W_xz @ tokens.mean_z
    M_xx = C_xx + np.outer(mean_x, mean_x)
    return M_xx.reshape(g, d, g, d), mean_x.reshape(g, d), np.ascontiguousarray(W_xz.T).reshape(-1, g, d)


def affordable(config: GemmaConfig) -> bool:
    """Are the maps of all layers, 2 m times 2 g d numbers each, small beside the model? And is every position a token?
    The positions of an image are not, so their residuals are larger than the bits are made for.
    """
    return config.hidden_size <= AFFORDABLE and config.vision is None


def knows(layer: int, tpa: TPAConfig, config: GemmaConfig, choice: Choice | None) -> bool:
    """Are K and V of a layer taken from the token, instead of being coded? Those of the first layer are functions of it
    alone, where every position is a token, and cost nothing but its id.
    """
    free = isinstance(choice, Spectral) and choice.joint and not choice.widths and tpa.predict is not False
    small = config.hidden_size <= AFFORDABLE_ONCE and config.vision is None and config.rms_eps == EPS
    return layer == 0 and free and small


def wanted(predict: bool | None, config: GemmaConfig) -> bool:
    """Whether to predict from tokens: as asked, else where it is affordable."""
    return affordable(config) if predict is None else predict
