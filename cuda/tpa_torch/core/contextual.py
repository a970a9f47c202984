"""`contextual`: the paper's TPA, factors a and b for every token. Twin of `tpa_ref.core.contextual`.

The sums over ranks are loops here: one matrix product a rank, and no array with a rank axis beside the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpa_ref.core import contextual as reference
from tpa_ref.core.mode import Parts

from .attention import join_heads, split_heads
from .mode import Mode


class Contextual(Mode, reference.Contextual):
    """K = (1/R) sum_r a_r (x) b_r for each token."""

    def encode(self, X_bkgd: Tensor, tokens: Any) -> Parts:  # type: ignore[override]
        A_bksg, B_bksd = self.factor(X_bkgd)
        return {"A": A_bksg.flatten(2), "B": B_bksd}

    def factor(self, X_bkgd: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of every token."""
        return factor(X_bkgd, self.rank)

    def decode(self, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        """Eq. (3.1)."""
        return torch.einsum("bksg,bksd->bkgd", self.weights(parts), parts["B"]) / self.rank

    def scores(self, Q_bqhd: Tensor, parts: Parts, tokens: Any, scale: float) -> Tensor:  # type: ignore[override]
        return scores_contextual(Q_bqhd, self.weights(parts), parts["B"], scale)

    def values(self, P_bhqk: Tensor, parts: Parts, tokens: Any) -> Tensor:  # type: ignore[override]
        return values_contextual(P_bhqk, self.weights(parts), parts["B"])


def factor(X_bkgd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-R factors of every token: a_r = R u_r, b_r = u_r^T X with the leading left singular vectors u_r.

    Shapes: [b,k,g,d], R -> A [b,k,R,g], B [b,k,R,d].
    """
    X32 = X_bkgd if X_bkgd.dtype == torch.float64 else X_bkgd.float()
    if X32.shape[2] == 1:  # one KV head: K itself is b
        return torch.ones_like(X_bkgd[..., :1]), X_bkgd
    _, U_bkgs = torch.linalg.eigh(X32 @ X32.mT)  # ascending eigenvalues
    U_bksg = fix_signs(U_bkgs.flip(-1).mT[:, :, :rank])
    return (rank * U_bksg).to(X_bkgd.dtype), (U_bksg @ X32).to(X_bkgd.dtype)


def fix_signs(U_sx: Tensor) -> Tensor:
    """Rows with their largest entry made positive: eigenvectors have no sign, but both backends choose one."""
    largest = U_sx.gather(-1, U_sx.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -U_sx, U_sx)


def scores_contextual(Q_bqhd: Tensor, A_bksg: Tensor, B_bksd: Tensor, scale: float) -> Tensor:
    """Eq. (A.2) with dense queries: L = scale/R sum_s a_s[g] (q . b_s)."""
    s, g = A_bksg.shape[2:]
    Q_bqgnd = split_heads(Q_bqhd, g)
    L_bgnqk: Any = 0
    for rank in range(s):
        dots_bgnqk = torch.einsum("bqgnd,bkd->bgnqk", Q_bqgnd, B_bksd[:, :, rank])
        L_bgnqk = L_bgnqk + A_bksg[:, :, rank].mT[:, :, None, None] * dots_bgnqk
    return join_heads(L_bgnqk) * (scale / s)


def values_contextual(P_bhqk: Tensor, A_bkug: Tensor, B_bkue: Tensor) -> Tensor:
    """Eq. (A.3): O = 1/R sum_u sum_k (p a_u[g]) b_u."""
    u, g = A_bkug.shape[2:]
    P_bgnqk = P_bhqk.unflatten(1, (g, -1))
    O_bqgne: Any = 0
    for rank in range(u):
        weights_bgnqk = P_bgnqk * A_bkug[:, :, rank].mT[:, :, None, None]
        O_bqgne = O_bqgne + torch.einsum("bgnqk,bke->bqgne", weights_bgnqk, B_bkue[:, :, rank])
    return O_bqgne.flatten(2, 3) / u
