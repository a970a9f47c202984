"""What the text itself tells of K and V, so that no bit need be spent on it. Not in the paper.

Whoever reads the cache also knows the tokens: two bytes each, once for all layers. K (before RoPE) and V of a token
follow in good part from the token and from the one before it, so both are predicted from

    z_t = [e(t), e(t-1)],        e = row of the embedding table, brought to rms 1,

linearly in every layer, and only what the prediction leaves is coded (`spectral`). To a coder this is side information
at the decoder; to the cache, 2 m coefficients that need no memory because they are looked up:

    K^ = mean + B_K c + W_K z,        V^ = mean + B_V c + W_V z.

The maps W are ridge regressions on the calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..core.norm import rms_scale
from ..gemma.config import GemmaConfig

EPS = 1e-6
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # in units of the variance of an entry of e, which is 1
AFFORDABLE = 512  # hidden size up to which the maps are small beside the model, and conversion makes them by itself


def numbered(tokens_bq: np.ndarray, known_bq: np.ndarray) -> np.ndarray:
    """How token ids are kept: from 1 on, 0 where there is no word (padding, a place of an image).

    >>> numbered(np.array([[5, 0]]), np.array([[True, False]])).tolist()
    [[6, 0]]
    """
    return np.where(known_bq, tokens_bq + 1, 0)


def with_previous(text_bt: np.ndarray, positions_bk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the tokens at some positions and of those before them; 0 for what is not there.

    Shapes: text [b,t] by position, positions [b,k] (-1: none) -> two arrays [b,k].

    >>> [x.tolist() for x in with_previous(np.array([[7, 8, 9]]), np.array([[2, 0, -1]]))]
    [[[9, 7, 0]], [[8, 0, 0]]]
    """
    own_bk, previous_bk = (
        np.where(at_bk >= 0, np.take_along_axis(text_bt, np.maximum(at_bk, 0), 1), 0)
        for at_bk in (positions_bk, positions_bk - 1)
    )
    return own_bk, previous_bk


def unit_rows(x_bkm: np.ndarray) -> np.ndarray:
    """e: rows of rms 1."""
    return x_bkm * rms_scale(x_bkm, EPS)


def window_words(x_bqm: np.ndarray) -> np.ndarray:
    """z of a text that begins at position 0, from the embedded tokens: [b,q,m] -> [b,q,2m]."""
    e_bqm = unit_rows(x_bqm)
    return np.concatenate([e_bqm, np.pad(e_bqm, ((0, 0), (1, 0), (0, 0)))[:, :-1]], -1)


# ---- the maps, from moments ----


@dataclass(frozen=True)
class WordMoments:
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


def word_moments(texts: list[np.ndarray]) -> WordMoments:
    """From z of each window, [1,q,2m]."""
    tokens = sum(Z_bqz.shape[1] for Z_bqz in texts)
    sums = [Z_bqz[0].sum(0, dtype=np.float64) for Z_bqz in texts]
    products = [(Z_bqz[0].T @ Z_bqz[0]).astype(np.float64) for Z_bqz in texts]
    return WordMoments(np.sum(sums, 0) / tokens, np.sum(products, 0) / tokens, tokens)


def fit(N_xz: np.ndarray, F_xx: np.ndarray, words: WordMoments, damage: float) -> tuple[np.ndarray, float] | None:
    """The ridge regression W = N (S + lambda)^-1 whose residuals are expected to do the least damage on other text.

    N: covariance of x (K and V of a layer, flattened) with z; F: what an error costs; damage: tr(F Cov x) without any
    prediction. Residuals of the text that was fitted are too small by the numbers spent on it, which are
    df = tr(S / (S + lambda)); generalised cross-validation divides by (1 - df/n)^2 for n tokens. None: no prediction is
    better.

    Returns W [x,z] and the factor 1 / (1 - df/n)^2.
    """
    values_s, U_zs = words.axes
    T_xs = N_xz @ U_zs
    gain_s = ((F_xx @ T_xs) * T_xs).sum(0)  # what each axis of z explains, per squared weight
    best, least = None, damage
    for ridge in RIDGES:
        shrunk_s = 1 / (values_s + ridge)
        free = (values_s * shrunk_s).sum() / words.tokens
        if free > 0.5:
            continue
        inflation = 1 / (1 - free) ** 2
        left = inflation * (damage - (gain_s * shrunk_s * (2 - values_s * shrunk_s)).sum())
        if left < least:
            best, least = ((T_xs * shrunk_s) @ U_zs.T, inflation), left
    return best


def without_words(
    M_gdgd: np.ndarray, mean_gd: np.ndarray, F: Sequence[np.ndarray | None], N_gdz: np.ndarray, words: WordMoments
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Second moment and mean of x - W z, and W^T [z,g,d]; what came in, and None, where no prediction helps.

    Shapes as in `spectral.spectrum`; N [g,d,z] = E[x z^T].
    """
    g, d = mean_gd.shape
    mean_x = mean_gd.reshape(-1)
    C_xx = M_gdgd.reshape(g * d, g * d) - np.outer(mean_x, mean_x)
    N_xz = N_gdz.reshape(g * d, -1) - np.outer(mean_x, words.mean_z)
    F_xx, n = np.zeros_like(C_xx), g * d // len(F)
    for index, F_gdgd in enumerate(F):
        at = slice(index * n, (index + 1) * n)
        F_xx[at, at] = np.eye(n) / np.trace(C_xx[at, at]) if F_gdgd is None else F_gdgd.reshape(n, n)
    found = fit(N_xz, F_xx, words, float((F_xx * C_xx).sum()))
    if found is None:
        return M_gdgd, mean_gd, None
    W_xz, inflation = found
    explained_xx = W_xz @ N_xz.T
    C_xx = inflation * (C_xx - explained_xx - explained_xx.T + W_xz @ words.covariance @ W_xz.T)
    mean_x = mean_x - W_xz @ words.mean_z
    M_xx = C_xx + np.outer(mean_x, mean_x)
    return M_xx.reshape(g, d, g, d), mean_x.reshape(g, d), np.ascontiguousarray(W_xz.T).reshape(-1, g, d)


def affordable(config: GemmaConfig) -> bool:
    """Are the maps of all layers, 2 m times 2 g d numbers each, small beside the model? And is all of a text words? The
    places of an image have none, so what is left of them is larger than the bits are made for.
    """
    return config.hidden_size <= AFFORDABLE and config.vision is None


def wanted(predict: bool | None, config: GemmaConfig) -> bool:
    """Whether to predict from words: as asked, else where it is affordable."""
    return affordable(config) if predict is None else predict


def token_bytes(vocab_size: int) -> int:
    """Bytes that the number of one token takes in a cache.

    >>> token_bytes(4096), token_bytes(262_144)
    (2, 4)
    """
    return number_dtype(vocab_size).itemsize


def number_dtype(vocab_size: int) -> np.dtype[Any]:
    """What holds the numbers 0 ... vocab_size."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.int32)
