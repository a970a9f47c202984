"""Attention from factors: logits and values without forming K or V. Twin of `tpa_ref.attention`, which explains it.

The sums over ranks are loops here: one matrix product a rank, and no array with a rank axis beside the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rope
from .factorize import Factorization, decode, multiply_pairs

Tables = tuple[Tensor, Tensor]  # cos and sin of the key positions, [b,k,d/2] each


def softmax(L_bhqk: Tensor) -> Tensor:
    """exp(L) / sum exp(L) over k, in float32 or better."""
    return torch.softmax(L_bhqk, -1)


def split_heads(Q_bqhd: Tensor, g: int) -> Tensor:
    """[b,q,h,d] -> [b,q,g,n,d]: the n query heads of each KV head."""
    return Q_bqhd.unflatten(2, (g, -1))


def join_heads(L_bgnqk: Tensor) -> Tensor:
    """[b,g,n,q,k] -> [b,h,q,k]."""
    return L_bgnqk.flatten(1, 2)


def scores_dense(Q_bqhd: Tensor, K_bkgd: Tensor, scale: float) -> Tensor:
    """q . k for every query head and its KV head; the n queries of a head are one matrix, K is not repeated."""
    Q_bqgnd = split_heads(Q_bqhd, K_bkgd.shape[2])
    return join_heads(torch.einsum("bqgnd,bkgd->bgnqk", Q_bqgnd, K_bkgd)) * scale


def values_dense(P_bhqk: Tensor, V_bkge: Tensor) -> Tensor:
    """Sum of p v over the keys."""
    P_bgnqk = P_bhqk.unflatten(1, (V_bkge.shape[2], -1))
    return torch.einsum("bgnqk,bkge->bqgne", P_bgnqk, V_bkge).flatten(2, 3)


def scores_contextual(Q_bqhd: Tensor, A_bksg: Tensor, B_bksd: Tensor, scale: float) -> Tensor:
    """Eq. (A.2) with dense queries: L = scale/R sum_s a_s[g] (q . b_s)."""
    s, g = A_bksg.shape[2:]
    Q_bqgnd = split_heads(Q_bqhd, g)
    L_bgnqk: Tensor | float = 0.0
    for rank in range(s):
        P_bgnqk = torch.einsum("bqgnd,bkd->bgnqk", Q_bqgnd, B_bksd[:, :, rank])
        L_bgnqk = L_bgnqk + A_bksg[:, :, rank].mT[:, :, None, None] * P_bgnqk
    assert isinstance(L_bgnqk, Tensor)
    return join_heads(L_bgnqk) * (scale / s)


def values_contextual(P_bhqk: Tensor, A_bkug: Tensor, B_bkue: Tensor) -> Tensor:
    """Eq. (A.3): O = 1/R sum_u sum_k (p a_u[g]) b_u."""
    u, g = A_bkug.shape[2:]
    P_bgnqk = P_bhqk.unflatten(1, (g, -1))
    O_bqgne: Tensor | float = 0.0
    for rank in range(u):
        W_bgnqk = P_bgnqk * A_bkug[:, :, rank].mT[:, :, None, None]
        O_bqgne = O_bqgne + torch.einsum("bgnqk,bke->bqgne", W_bgnqk, B_bkue[:, :, rank])
    assert isinstance(O_bqgne, Tensor)
    return O_bqgne.flatten(2, 3) / u


def scores_fixed_a(Q_bqhd: Tensor, A_sg: Tensor, B_bksd: Tensor, scale: float) -> Tensor:
    """The query absorbs A; what remains is multi-query attention with one key of length R d."""
    s, g = A_sg.shape[:2]
    Q_bqgnsd = absorb(split_heads(Q_bqhd, g), A_sg)
    return join_heads(torch.einsum("bqgnx,bkx->bgnqk", Q_bqgnsd.flatten(-2), B_bksd.flatten(-2))) * (scale / s)


def absorb(Q_bqgnd: Tensor, A_sg: Tensor) -> Tensor:
    """The query with a constant A, [s,g] or [s,g,d], in it: [b,q,g,n,d] -> [b,q,g,n,s,d]."""
    if A_sg.ndim == 2:
        return torch.einsum("sg,bqgnd->bqgnsd", A_sg, Q_bqgnd)
    real, imaginary = A_sg.movedim(0, 1)[:, None].chunk(2, -1)  # [g,1,s,d/2], against [b,q,g,n,1,d/2]
    return multiply_pairs(real, -imaginary, Q_bqgnd[..., None, :])  # a complex query takes the conjugate


def values_fixed_a(P_bhqk: Tensor, A_ug: Tensor, B_bkue: Tensor) -> Tensor:
    """Aggregate b's first (all heads share them), mix with A once per query."""
    u, g = A_ug.shape[:2]
    Y_bqhx = torch.einsum("bhqk,bkx->bqhx", P_bhqk, B_bkue.flatten(-2))
    return mix(Y_bqhx.unflatten(-1, (u, -1)).unflatten(2, (g, -1)), A_ug).flatten(2, 3) / u


def mix(Y_bqgnue: Tensor, A_ug: Tensor) -> Tensor:
    """Sums of b's of every rank to values, with a constant A, [u,g] or [u,g,e]: [b,q,g,n,u,e] -> [b,q,g,n,e]."""
    if A_ug.ndim == 2:
        return torch.einsum("ug,bqgnue->bqgne", A_ug, Y_bqgnue)
    real, imaginary = A_ug.movedim(0, 1)[:, None].chunk(2, -1)
    return multiply_pairs(real, imaginary, Y_bqgnue).sum(-2)


def scores_rebuilt(
    Q_bqhd: Tensor, parts: dict[str, Tensor], how: Factorization, g: int, tables: Tables, scale: float
) -> Tensor:
    """`fixed-b` and `latent`: form K from its coefficients, rotate it, then as dense."""
    K_bkgd = rope.rotate(decode(parts, how, g), *tables)
    return scores_dense(Q_bqhd, K_bkgd, scale)


def values_fixed_b(P_bhqk: Tensor, A_bkgu: Tensor, B_gue: Tensor) -> Tensor:
    """V needs no rotation, hence no rebuild: aggregate in R coefficients, apply the basis once per query."""
    Y_bqgnu = torch.einsum("bgnqk,bkgu->bqgnu", P_bhqk.unflatten(1, (A_bkgu.shape[2], -1)), A_bkgu)
    return torch.einsum("bqgnu,gue->bqgne", Y_bqgnu, B_gue).flatten(2, 3)


def values_latent(P_bhqk: Tensor, C_bku: Tensor, B_uge: Tensor) -> Tensor:
    """The same with coefficients shared by all heads."""
    Y_bgnqu = torch.einsum("bhqk,bku->bhqu", P_bhqk, C_bku).unflatten(1, (B_uge.shape[1], -1))
    return torch.einsum("bgnqu,uge->bqgne", Y_bgnqu, B_uge).flatten(2, 3)


def mean_values(P_bhqk: Tensor, mean_ge: Tensor) -> Tensor:
    """What the constant mean of V adds: once the probability that falls on these keys (1 if they are all)."""
    n = P_bhqk.shape[1] // mean_ge.shape[0]
    return P_bhqk.sum(-1).transpose(1, 2)[..., None] * mean_ge.repeat_interleave(n, 0)


def scores(
    Q_bqhd: Tensor, parts: dict[str, Tensor], how: Factorization, g: int, tables: Tables, scale: float
) -> Tensor:
    """Logits [b,h,q,k] of rotated queries against what a cache holds, whatever its mode."""
    if how.mode == "dense":
        return scores_dense(Q_bqhd, parts["X"], scale)
    if how.mode == "contextual":
        return scores_contextual(Q_bqhd, parts["A"].unflatten(-1, (how.rank, g)), parts["B"], scale)
    if how.mode == "fixed-a":
        return scores_fixed_a(Q_bqhd, how.basis.to(Q_bqhd.dtype), parts["B"], scale)
    return scores_rebuilt(Q_bqhd, parts, how, g, tables, scale)


def values(P_bhqk: Tensor, parts: dict[str, Tensor], how: Factorization, g: int) -> Tensor:
    """Output [b,q,h,e] of probabilities over what a cache holds, whatever its mode."""
    if how.mode == "dense":
        return values_dense(P_bhqk, parts["X"])
    if how.mode == "contextual":
        return values_contextual(P_bhqk, parts["A"].unflatten(-1, (how.rank, g)), parts["B"])
    basis = how.basis.to(P_bhqk.dtype)
    if how.mode == "fixed-a":
        return values_fixed_a(P_bhqk, basis, parts["B"])
    if how.mode == "fixed-b":
        O_bqhe = values_fixed_b(P_bhqk, parts["A"], basis)
    else:
        O_bqhe = values_latent(P_bhqk, parts["C"], basis)
    if how.predictor is not None:
        O_bqhe = O_bqhe + values_latent(P_bhqk, parts["Z"].to(P_bhqk.dtype), how.predictor.to(P_bhqk.dtype))
    return O_bqhe if how.mean is None else O_bqhe + mean_values(P_bhqk, how.mean.to(P_bhqk.dtype))


def algorithm_1(
    AQ_bqrh: Tensor,
    BQ_bqrd: Tensor,
    AK_bksh: Tensor,
    BK_bksd: Tensor,
    AV_bkuh: Tensor,
    BV_bkue: Tensor,
    scale: float,
    seen_bqk: Tensor | None = None,
) -> Tensor:
    """The paper's Algorithm 1 as printed: Q, K and V all in factors, heads h on all three, nothing formed."""
    r, s, u = AQ_bqrh.shape[2], AK_bksh.shape[2], AV_bkuh.shape[2]
    P_bqkrs = torch.einsum("bqrd,bksd->bqkrs", BQ_bqrd, BK_bksd)
    L_bhqk = torch.einsum("bqrh,bksh,bqkrs->bhqk", AQ_bqrh, AK_bksh, P_bqkrs) * (scale / (r * s))
    if seen_bqk is not None:
        L_bhqk = L_bhqk.masked_fill(~seen_bqk[:, None], -torch.inf)
    S_bhqk = softmax(L_bhqk)
    return torch.einsum("bhqk,bkuh,bkue->bqhe", S_bhqk, AV_bkuh, BV_bkue) / u
