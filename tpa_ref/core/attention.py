"""Attention from factors: logits and values without forming K or V (paper: Eq. A.2, A.3, Algorithm 1).

For every mode there is one `scores_*` and one `values_*`; `scores_dense` and `values_dense` are the oracle they
must agree with. Gemma's queries are dense, so the paper's query factors A_Q, B_Q do not appear here; with them the
same sums are Algorithm 1, given whole in `algorithm_1`.

Shapes: Q [b,q,h,d]; logits and probabilities [b,h,q,k]; output [b,q,h,e]. Query head h belongs to KV head
g = h // n, so h splits into (g, n). `scale` is Gemma's query scale, and the 1/R of Eq. (3.1) is applied here.
B factors of K arrive already rotated (Eq. 3.5) in `contextual` and `fixed-a`; the other two rotate what they rebuild.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from . import rope
from .factorize import Factorization, as_pairs, decode, from_pairs

einsum = partial(np.einsum, optimize=True)
Tables = tuple[np.ndarray, np.ndarray]  # cos and sin of the key positions, [b,k,d/2] each


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


# ---- the oracle ----


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


# ---- contextual: a and b per token ----


def scores_contextual(Q_bqhd: np.ndarray, A_bksg: np.ndarray, B_bksd: np.ndarray, scale: float) -> np.ndarray:
    """Eq. (A.2) with dense queries: L = scale/R sum_s a_s[g] (q . b_s). One b per rank serves all heads.

    Shapes: Q [b,q,h,d], A [b,k,s,g], B [b,k,s,d] (rotated) -> [b,h,q,k].
    With s = g and one-hot a's times g this is `scores_dense`.
    """
    s, g = A_bksg.shape[2:]
    P_bgnqks = einsum("bqgnd,bksd->bgnqks", split_heads(Q_bqhd, g), B_bksd)  # shared by all heads: q . b
    return join_heads(einsum("bksg,bgnqks->bgnqk", A_bksg, P_bgnqks) * (scale / s))


def values_contextual(P_bhqk: np.ndarray, A_bkug: np.ndarray, B_bkue: np.ndarray) -> np.ndarray:
    """Eq. (A.3): O = 1/R sum_u sum_k (p a_u[g]) b_u. The weight p a is a scalar, so V is never formed.

    Shapes: P [b,h,q,k], A [b,k,u,g], B [b,k,u,e] -> [b,q,h,e].
    """
    b, h, q, k = P_bhqk.shape
    u, g = A_bkug.shape[2:]
    W_bgnqku = einsum("bgnqk,bkug->bgnqku", P_bhqk.reshape(b, g, h // g, q, k), A_bkug)
    return einsum("bgnqku,bkue->bqgne", W_bgnqku, B_bkue).reshape(b, q, h, -1) / u


# ---- fixed-a: constant a, so the query absorbs it ----


def scores_fixed_a(Q_bqhd: np.ndarray, A_sg: np.ndarray, B_bksd: np.ndarray, scale: float) -> np.ndarray:
    """The query absorbs A: q^_s = A[s,g] q. What remains is multi-query attention with one key of length R d.

    A may also be one complex number per RoPE pair (`factorize.mix_heads`); the query takes its conjugate.

    Shapes: Q [b,q,h,d], A [s,g] or [s,g,d], B [b,k,s,d] (rotated) -> [b,h,q,k].
    """
    s, g = A_sg.shape[:2]
    Q_bqgnd = split_heads(Q_bqhd, g)
    if A_sg.ndim == 2:
        Q_bqgnsd = einsum("sg,bqgnd->bqgnsd", A_sg, Q_bqgnd)
    else:
        Q_bqgnsd = from_pairs(einsum("sgp,bqgnp->bqgnsp", as_pairs(A_sg).conj(), as_pairs(Q_bqgnd)))
    return join_heads(einsum("bqgnsd,bksd->bgnqk", Q_bqgnsd, B_bksd) * (scale / s))


def values_fixed_a(P_bhqk: np.ndarray, A_ug: np.ndarray, B_bkue: np.ndarray) -> np.ndarray:
    """Aggregate b's first (all heads share them), mix with A once per query.

    Shapes: P [b,h,q,k], A [u,g] or [u,g,e], B [b,k,u,e] -> [b,q,h,e].
    """
    b, h, q, _ = P_bhqk.shape
    u, g = A_ug.shape[:2]
    Y_bqgnue = einsum("bhqk,bkue->bqhue", P_bhqk, B_bkue).reshape(b, q, g, h // g, u, -1)
    if A_ug.ndim == 3:
        O_bqgne = from_pairs(einsum("ugp,bqgnup->bqgnp", as_pairs(A_ug), as_pairs(Y_bqgnue)))
        return O_bqgne.reshape(b, q, h, -1) / u
    return einsum("ug,bqgnue->bqgne", A_ug, Y_bqgnue).reshape(b, q, h, -1) / u


# ---- fixed-b and latent: a constant basis over features ----


def scores_rebuilt(
    Q_bqhd: np.ndarray, parts: dict[str, np.ndarray], how: Factorization, g: int, tables: Tables, scale: float
) -> np.ndarray:
    """`fixed-b` and `latent`: form K from its coefficients, rotate it, then as dense.

    RoPE mixes features, so a basis over features cannot be absorbed into the query: this is the price of a cache
    that is smaller than the paper's. A fast kernel rebuilds tile by tile and never holds K whole.
    """
    K_bkgd = rope.rotate(decode(parts, how, g), *tables)
    return scores_dense(Q_bqhd, K_bkgd, scale)


def values_fixed_b(P_bhqk: np.ndarray, A_bkgu: np.ndarray, B_gue: np.ndarray) -> np.ndarray:
    """V needs no rotation, hence no rebuild: aggregate in R coefficients, apply the basis once per query.

    Shapes: P [b,h,q,k], A [b,k,g,u], B [g,u,e] -> [b,q,h,e].
    """
    b, h, q, k = P_bhqk.shape
    g = A_bkgu.shape[2]
    Y_bqgnu = einsum("bgnqk,bkgu->bqgnu", P_bhqk.reshape(b, g, h // g, q, k), A_bkgu)
    return einsum("bqgnu,gue->bqgne", Y_bqgnu, B_gue).reshape(b, q, h, -1)


def values_latent(P_bhqk: np.ndarray, C_bku: np.ndarray, B_uge: np.ndarray) -> np.ndarray:
    """The same with coefficients shared by all heads.

    Shapes: P [b,h,q,k], C [b,k,u], B [u,g,e] -> [b,q,h,e].
    """
    b, h, q, _ = P_bhqk.shape
    g = B_uge.shape[1]
    Y_bgnqu = (P_bhqk @ C_bku[:, None]).reshape(b, g, h // g, q, -1)
    return einsum("bgnqu,uge->bqgne", Y_bgnqu, B_uge).reshape(b, q, h, -1)


def mean_values(P_bhqk: np.ndarray, mean_ge: np.ndarray) -> np.ndarray:
    """What the constant mean of V adds: once the probability that falls on these keys (1 if they are all).

    Shapes: P [b,h,q,k], mean [g,e] -> [b,q,h,e].
    """
    h, g = P_bhqk.shape[1], mean_ge.shape[0]
    return einsum("bhq,he->bqhe", P_bhqk.sum(-1), np.repeat(mean_ge, h // g, axis=0))


# ---- one entry for every mode ----


def scores(
    Q_bqhd: np.ndarray, parts: dict[str, np.ndarray], how: Factorization, g: int, tables: Tables, scale: float
) -> np.ndarray:
    """Logits [b,h,q,k] of rotated queries against what a cache holds, whatever its mode."""
    if how.mode == "dense":
        return scores_dense(Q_bqhd, parts["X"], scale)
    if how.mode == "contextual":
        A_bksg = parts["A"].reshape(*parts["A"].shape[:2], how.rank, g)
        return scores_contextual(Q_bqhd, A_bksg, parts["B"], scale)
    if how.mode == "fixed-a":
        return scores_fixed_a(Q_bqhd, _like(how.basis, Q_bqhd), parts["B"], scale)
    return scores_rebuilt(Q_bqhd, parts, how, g, tables, scale)


def values(P_bhqk: np.ndarray, parts: dict[str, np.ndarray], how: Factorization, g: int) -> np.ndarray:
    """Output [b,q,h,e] of probabilities over what a cache holds, whatever its mode."""
    if how.mode == "dense":
        return values_dense(P_bhqk, parts["X"])
    if how.mode == "contextual":
        A_bkug = parts["A"].reshape(*parts["A"].shape[:2], how.rank, g)
        return values_contextual(P_bhqk, A_bkug, parts["B"])
    basis = _like(how.basis, P_bhqk)
    if how.mode == "fixed-a":
        return values_fixed_a(P_bhqk, basis, parts["B"])
    if how.mode == "fixed-b":
        O_bqhe = values_fixed_b(P_bhqk, parts["A"], basis)
    else:
        O_bqhe = values_latent(P_bhqk, parts["C"], basis)
    if how.predictor is not None:  # words are coefficients like others
        O_bqhe = O_bqhe + values_latent(P_bhqk, parts["Z"], _like(how.predictor, P_bhqk))
    return O_bqhe if how.mean is None else O_bqhe + mean_values(P_bhqk, _like(how.mean, P_bhqk))


def _like(basis: np.ndarray, x: np.ndarray) -> np.ndarray:
    return basis.astype(x.dtype)


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
