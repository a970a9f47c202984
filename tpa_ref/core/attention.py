"""Attention on dense K and V, the oracle of every mode, and the paper's Algorithm 1, where all three are factors.

Shapes: Q [b,q,h,d]; logits and probabilities [b,h,q,k]; output [b,q,h,e]. Query head h belongs to KV head
g = h // n, so h splits into (g, n). `scale` is Gemma's query scale. What a mode does instead is in its own file;
Gemma's queries are dense, so the query factors A_Q, B_Q appear only here.
"""

from functools import partial

import numpy as np

einsum = partial(np.einsum, optimize=True)


def softmax(L_bhqk: np.ndarray) -> np.ndarray:
    """exp(L) / sum exp(L) over k, shifted by the maximum so that nothing overflows.

    >>> softmax(np.array([0.0, np.log(3.0)])).round(2).tolist()
    [0.25, 0.75]
    """
    exp = np.exp(L_bhqk - L_bhqk.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def split_heads(Q_bqhd: np.ndarray, g: int) -> np.ndarray:
    """[b,q,h,d] -> [b,q,g,n,d]: the n query heads of each KV head."""
    b, q, h, d = Q_bqhd.shape
    return Q_bqhd.reshape(b, q, g, h // g, d)


def join_heads(L_bgnqk: np.ndarray) -> np.ndarray:
    """[b,g,n,q,k] -> [b,h,q,k]."""
    b, g, n, q, k = L_bgnqk.shape
    return L_bgnqk.reshape(b, g * n, q, k)


def scores_dense(Q_bqhd: np.ndarray, K_bkgd: np.ndarray, scale: float) -> np.ndarray:
    """q . k for every query head and its KV head: grouped-query attention, sum_d Q[bqgnd] K[bkgd].

    Written as a product of matrices, which NumPy gives to BLAS; an einsum with batch axes is a hundred times slower.
    """
    Q_bgnqd = split_heads(Q_bqhd, K_bkgd.shape[2]).transpose(0, 2, 3, 1, 4)
    K_bgdk = K_bkgd.transpose(0, 2, 3, 1)
    return join_heads(Q_bgnqd @ K_bgdk[:, :, None]) * scale


def values_dense(P_bhqk: np.ndarray, V_bkge: np.ndarray) -> np.ndarray:
    """Sum of p v over the keys."""
    b, h, q, k = P_bhqk.shape
    g = V_bkge.shape[2]
    V_bgke = V_bkge.transpose(0, 2, 1, 3)
    O_bgnqe = P_bhqk.reshape(b, g, h // g, q, k) @ V_bgke[:, :, None]
    return O_bgnqe.transpose(0, 3, 1, 2, 4).reshape(b, q, h, -1)


def mean_values(P_bhqk: np.ndarray, mean_ge: np.ndarray) -> np.ndarray:
    """What the constant mean of V adds: once the probability that falls on these keys (1 if they are all)."""
    (b, h, q, _), g = P_bhqk.shape, len(mean_ge)
    total_bqgn1 = P_bhqk.sum(-1).swapaxes(1, 2).reshape(b, q, g, h // g, 1)
    return (total_bqgn1 * mean_ge[:, None]).reshape(b, q, h, -1)


def algorithm_1(
    AQ_bqrh: np.ndarray,
    BQ_bqrd: np.ndarray,
    AK_bksh: np.ndarray,
    BK_bksd: np.ndarray,
    AV_bkuh: np.ndarray,
    BV_bkue: np.ndarray,
    scale: float,
    seen_bqk: np.ndarray | None = None,
) -> np.ndarray:
    """The paper's Algorithm 1 as printed: Q, K and V all in factors, heads h on all three, nothing formed.

    Shapes: A_Q [b,q,r,h], B_Q [b,q,r,d], A_K [b,k,s,h], B_K [b,k,s,d], A_V [b,k,u,h], B_V [b,k,u,e] -> [b,q,h,e].
    """
    r, s, u = AQ_bqrh.shape[2], AK_bksh.shape[2], AV_bkuh.shape[2]
    P_bqkrs = einsum("bqrd,bksd->bqkrs", BQ_bqrd, BK_bksd)  # line 1: shared by all heads
    L_bhqk = einsum("bqrh,bksh,bqkrs->bhqk", AQ_bqrh, AK_bksh, P_bqkrs) * (scale / (r * s))  # line 2, Eq. (A.2)
    if seen_bqk is not None:
        L_bhqk = np.where(seen_bqk[:, None], L_bhqk, -np.inf)
    S_bhqk = softmax(L_bhqk)  # line 3
    return einsum("bhqk,bkuh,bkue->bqhe", S_bhqk, AV_bkuh, BV_bkue) / u  # line 4, Eq. (A.3)
