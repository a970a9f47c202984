"""`fixed-a`: TPA with a constant A, which the query absorbs. Twin of `tpa_ref.core.fixed_a`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpa_ref.core import fixed_a as reference
from tpa_ref.core.mode import Parts

from .attention import join_heads, split_heads
from .mode import Mode


class FixedA(Mode, reference.FixedA):
    """Cached are the b's, B = (1/R) A X, [R,d]."""

    def encode(self, X_bkgd: Tensor, tokens: Any) -> Parts:  # type: ignore[override]
        return {"B": mix_heads_back(self.basis.to(X_bkgd.dtype), X_bkgd) / self.rank}

    def decode(self, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        return mix_heads(self.basis.to(parts["B"].dtype), parts["B"]) / self.rank

    def scores(self, Q_bqhd: Tensor, parts: Parts, tokens: Any, scale: float) -> Tensor:  # type: ignore[override]
        return scores_fixed_a(Q_bqhd, self.basis.to(Q_bqhd.dtype), parts["B"], scale)

    def values(self, P_bhqk: Tensor, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        return values_fixed_a(P_bhqk, self.basis.to(P_bhqk.dtype), parts["B"])


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


def mix_heads(A: Tensor, B_bksd: Tensor) -> Tensor:
    """sum_s a_s (x) b_s with a constant A, [s,g] or, complex for every RoPE pair, [s,g,d]. B [b,k,s,d] -> [b,k,g,d]."""
    if A.ndim == 2:
        return torch.einsum("sg,bksd->bkgd", A, B_bksd)
    real, imaginary = A.movedim(0, 1).chunk(2, -1)  # [g,s,d/2] against [b,k,1,s,d/2]
    return multiply_pairs(real, imaginary, B_bksd[:, :, None]).sum(-2)


def mix_heads_back(A: Tensor, X_bkgd: Tensor) -> Tensor:
    """The adjoint of `mix_heads`: b_s = sum_g conj(a_sg) x_g."""
    if A.ndim == 2:
        return torch.einsum("sg,bkgd->bksd", A, X_bkgd)
    real, imaginary = A.chunk(2, -1)  # [s,g,d/2] against [b,k,1,g,d/2]
    return multiply_pairs(real, -imaginary, X_bkgd[:, :, None]).sum(-2)


def multiply_pairs(real: Tensor, imaginary: Tensor, x: Tensor) -> Tensor:
    """(real + i imaginary) times the pairs (i, i + d/2) of x as complex numbers: [..., d]."""
    first, second = x.chunk(2, -1)
    return torch.cat([real * first - imaginary * second, real * second + imaginary * first], -1)
