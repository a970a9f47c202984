"""`contextual`: the paper's TPA. Every token has factors of its own, a and b of Eq. (3.1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .attention import einsum, join_heads, split_heads
from .mode import Mode, Parts, Tokens
from .transform import fix_signs


class Contextual(Mode):
    """K = (1/R) sum_r a_r (x) b_r for each token. Parts: A (R g numbers in one row, which shares scales), B [R,d].

    >>> Contextual(g=4, d=256, rank=2, dtype="int4").token_bytes
    298
    """

    name = "contextual"
    rotated = "B"

    @classmethod
    def exact_rank(cls, g: int, d: int) -> int:
        return min(g, d)

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank * self.g,), "B": (self.rank, self.d)}

    def part_dtype(self, part: str) -> str:
        """Every a multiplies a whole b, so the a's never go below int8."""
        return "int8" if part == "A" and self.dtype == "int4" else self.dtype

    def encode(self, X_bkgd: np.ndarray, tokens: Tokens) -> Parts:
        A_bksg, B_bksd = factor(X_bkgd, self.rank)
        return {"A": A_bksg.reshape(*A_bksg.shape[:2], -1), "B": B_bksd}

    def decode(self, parts: Parts, tokens: Tokens) -> np.ndarray:
        """Eq. (3.1)."""
        return einsum("bksg,bksd->bkgd", self.weights(parts), parts["B"]) / self.rank

    def scores(self, Q_bqhd: np.ndarray, parts: Parts, tokens: Tokens, scale: float) -> np.ndarray:
        return scores_contextual(Q_bqhd, self.weights(parts), parts["B"], scale)

    def values(self, P_bhqk: np.ndarray, parts: Parts, tokens: Tokens) -> np.ndarray:
        return values_contextual(P_bhqk, self.weights(parts), parts["B"])

    def weights(self, parts: Parts) -> Any:
        """The a's as a matrix: [b,k,s,g]."""
        return parts["A"].reshape(*parts["A"].shape[:2], self.rank, self.g)


def factor(X_bkgd: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best rank-R factors of every token, by Eckart-Young: a_r = R u_r, b_r = u_r^T X, u_r the leading left
    singular vectors of X in R^{g x d}. They come from the small Gram matrix X X^T in R^{g x g}.

    The sign of u_r is free; its largest entry is made positive, so that every backend stores the same codes.
    The 1/R of Eq. (3.1) is undone in a.

    Shapes: [b,k,g,d], R -> A [b,k,R,g], B [b,k,R,d].

    >>> A, B = factor(np.array([[[[3.0, 4.0], [0.0, 0.0]]]]), rank=1)
    >>> A.ravel().tolist(), B.ravel().tolist()
    ([1.0, 0.0], [3.0, 4.0])
    """
    G_bkgj = einsum("bkgd,bkjd->bkgj", X_bkgd, X_bkgd)
    _, U_bkgs = np.linalg.eigh(G_bkgj)  # ascending eigenvalues
    U_bksg = np.swapaxes(U_bkgs[..., ::-1], -1, -2)[:, :, :rank]
    U_bksg = fix_signs(U_bksg).astype(X_bkgd.dtype)
    return rank * U_bksg, einsum("bksg,bkgd->bksd", U_bksg, X_bkgd)


def scores_contextual(Q_bqhd: np.ndarray, A_bksg: np.ndarray, B_bksd: np.ndarray, scale: float) -> np.ndarray:
    """Eq. (A.2) with dense queries: L = scale/R sum_s a_s[g] (q . b_s). One b per rank serves all heads.

    Shapes: Q [b,q,h,d], A [b,k,s,g], B [b,k,s,d] (rotated) -> [b,h,q,k].
    """
    s, g = A_bksg.shape[2:]
    dots_bgnqks = einsum("bqgnd,bksd->bgnqks", split_heads(Q_bqhd, g), B_bksd)  # q . b_s: all heads share b_s
    return join_heads(einsum("bksg,bgnqks->bgnqk", A_bksg, dots_bgnqks) * (scale / s))


def values_contextual(P_bhqk: np.ndarray, A_bkug: np.ndarray, B_bkue: np.ndarray) -> np.ndarray:
    """Eq. (A.3): O = 1/R sum_u sum_k (p a_u[g]) b_u. The weight p a is a scalar, so V is never formed.

    Shapes: P [b,h,q,k], A [b,k,u,g], B [b,k,u,e] -> [b,q,h,e].
    """
    b, h, q, k = P_bhqk.shape
    u, g = A_bkug.shape[2:]
    weights_bgnqku = einsum("bgnqk,bkug->bgnqku", P_bhqk.reshape(b, g, h // g, q, k), A_bkug)
    return einsum("bgnqku,bkue->bqgne", weights_bgnqku, B_bkue).reshape(b, q, h, -1) / u
