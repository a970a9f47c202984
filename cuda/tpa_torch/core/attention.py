"""Attention on dense K and V, the oracle of every mode. Twin of `tpa_ref.core.attention`, which explains it."""

from typing import Any

import torch
from torch import Tensor

from tpa_ref.core import attention as reference

split_heads: Any = reference.split_heads
join_heads: Any = reference.join_heads
mean_values: Any = reference.mean_values


def softmax(L_bhqk: Tensor) -> Tensor:
    """exp(L) / sum exp(L) over k, in float32 or better."""
    return torch.softmax(L_bhqk, -1)


def scores_dense(Q_bqhd: Tensor, K_bkgd: Tensor, scale: float) -> Tensor:
    """q . k for every query head and its KV head; the n queries of a head are one matrix, K is not repeated."""
    Q_bqgnd = split_heads(Q_bqhd, K_bkgd.shape[2])
    return join_heads(torch.einsum("bqgnd,bkgd->bgnqk", Q_bqgnd, K_bkgd)) * scale


def values_dense(P_bhqk: Tensor, V_bkge: Tensor) -> Tensor:
    """Sum of p v over the keys."""
    P_bgnqk = P_bhqk.unflatten(1, (V_bkge.shape[2], -1))
    return torch.einsum("bgnqk,bkge->bqgne", P_bgnqk, V_bkge).flatten(2, 3)
