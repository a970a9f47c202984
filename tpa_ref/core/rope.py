"""Rotary position embedding, half-split: feature i pairs with feature i + d/2, rotated by +position * frequency_i.

Gemma 3 has two kinds of layers and two tables: local layers use base 10,000, global ones base 1,000,000, and from
4B up the global frequencies are divided by 8 (linear scaling). Tables are built per kind and passed in.
"""

import numpy as np


def rope_tables(
    positions_bk: np.ndarray, head_dim: int, base: float, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position * base^(-2i/d) / scale, i = 0 ... d/2 - 1, in float64: float32 is too coarse at 100,000.

    Shapes: positions [b,k] -> two arrays [b,k,d/2].

    >>> cos, sin = rope_tables(np.array([[0, 1]]), head_dim=4, base=10_000)
    >>> sin[0].round(4).tolist()
    [[0.0, 0.0], [0.8415, 0.01]]
    """
    angle = positions_bk[..., None] * frequencies(head_dim, base, scale)
    return np.cos(angle), np.sin(angle)


def frequencies(head_dim: int, base: float, scale: float = 1.0) -> np.ndarray:
    """theta of each pair, in radians a token: base^(-2i/d) / scale, [d/2].

    >>> frequencies(4, 100).tolist()
    [1.0, 0.1]
    """
    half = head_dim // 2
    return base ** (-np.arange(half) / half) / scale


def rotate(x_bkgd: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE, the linear map R_t of Eq. (3.5), on every head (or rank) of every token. Theorem 3.1: it acts on B alone.

    RoPE(A^T B) = A^T RoPE(B), since it mixes columns of K (features) and A mixes rows (heads).

    Shapes: x [b,k,g,d] (g may be any axis: heads or ranks), cos and sin [b,k,d/2] -> [b,k,g,d] in x's dtype.

    >>> cos, sin = rope_tables(np.array([[1]]), head_dim=2, base=10_000)
    >>> rotate(np.array([[[[1.0, 0.0]]]]), cos, sin).round(4).ravel().tolist()
    [0.5403, 0.8415]
    """
    cos, sin = (table[:, :, None, :].astype(x_bkgd.dtype) for table in (cos, sin))
    first, second = np.split(x_bkgd, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
