"""Token vectors: what K and V are predicted from, where they are (`compress.token_prediction`).

    z_t = [e(t), e(t-1)],        e = row of the embedding table, brought to rms 1.

The decoder has the token ids, so z need not be stored: a cache keeps the ids, numbered from 1; 0 is no token at all
(padding, a place of an image).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.norm import rms_scale

EPS = 1e-6


def numbered(tokens_bq: np.ndarray, known_bq: np.ndarray) -> np.ndarray:
    """How token ids are kept: from 1 on, 0 where there is no token (padding, a place of an image).

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


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """What holds the numbers 0 ... vocab_size."""
    return np.dtype(np.uint16 if vocab_size < 2**16 else np.int32)
