"""Attention on dense K and V, the oracle of every mode. Twin of `tpa_ref.core.attention`, which explains it."""

from __future__ import annotations

import torch
from torch import Tensor


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


def mean_values(P_bhqk: Tensor, mean_ge: Tensor) -> Tensor:
    """What the constant mean of V adds: once the probability that falls on these keys (1 if they are all)."""
    n = P_bhqk.shape[1] // mean_ge.shape[0]
    return P_bhqk.sum(-1).transpose(1, 2)[..., None] * mean_ge.repeat_interleave(n, 0)
