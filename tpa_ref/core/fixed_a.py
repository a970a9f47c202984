"""`fixed-a`: TPA with a constant A. The query absorbs it; what is left is multi-query attention, keys of length R d."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .attention import einsum, join_heads, split_heads
from .mode import Mode, Parts, Tokens
from .transform import fix_signs, relative_error


@dataclass(frozen=True)
class FixedA(Mode):
    """Cached are the b's, B = (1/R) A X, [R,d]. At full rank this is the GQA cache written as TPA.

    basis: A [s,g], or [s,g,d] with one complex number for every pair of features that RoPE rotates (`mix_heads`).
    """

    basis: Any = field(default=None, repr=False)

    name = "fixed-a"
    rotated = "B"
    constants = ("basis",)

    @classmethod
    def exact_rank(cls, g: int, d: int) -> int:
        return g

    @classmethod
    def fit(
        cls, g: int, d: int, rank: int, dtype: str, M_gdgd: np.ndarray, mean_gd: Any = None, F_gdgd: Any = None
    ) -> FixedA:
        if rank == g:
            return cls(g, d, rank, dtype, 0.0, g * np.eye(g))
        A_sgd, error = leading_pairs(M_gdgd, rank)
        return cls(g, d, rank, dtype, error, A_sgd)

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {"B": (self.rank, self.d)}

    def array_shapes(self) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
        return {"basis": ((self.rank, self.g), (self.rank, self.g, self.d))}

    def encode(self, X_bkgd: np.ndarray, tokens: Tokens) -> Parts:
        """B = (1/R) A X; A has rows R u_r, so this is the projection u_r^T X."""
        return {"B": mix_heads_back(self.cast(self.basis, X_bkgd.dtype), X_bkgd) / self.rank}

    def decode(self, parts: Parts, tokens: Tokens) -> np.ndarray:
        return mix_heads(self.cast(self.basis, parts["B"].dtype), parts["B"]) / self.rank

    def scores(self, Q_bqhd: np.ndarray, parts: Parts, tokens: Tokens, scale: float) -> np.ndarray:
        return scores_fixed_a(Q_bqhd, self.cast(self.basis, Q_bqhd.dtype), parts["B"], scale)

    def values(self, P_bhqk: np.ndarray, parts: Parts, tokens: Tokens) -> np.ndarray:
        return values_fixed_a(P_bhqk, self.cast(self.basis, P_bhqk.dtype), parts["B"])


def leading_pairs(M_gdgd: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """A constant A for each RoPE pair by itself: leading eigenvectors of E[z z^H] in C^{g x g}, z the heads'
    pair as complex numbers, rows times R. As many bytes per token as one A for all pairs, and never worse.

    Shapes: M [g,d,g,d] = E[x x^T] of the flattened token -> A [R,g,d] (see `mix_heads`), relative error.
    """
    g, d = M_gdgd.shape[:2]
    M_pgjxy = np.einsum("gxpjyp->pgjxy", M_gdgd.reshape(g, 2, d // 2, g, 2, d // 2))  # x, y: real or imaginary part
    Z_pgj = M_pgjxy[..., 0, 0] + M_pgjxy[..., 1, 1] + 1j * (M_pgjxy[..., 1, 0] - M_pgjxy[..., 0, 1])
    values_pg, U_pgs = np.linalg.eigh((Z_pgj + Z_pgj.conj().swapaxes(1, 2)) / 2)
    U_psg = fix_signs(U_pgs[..., ::-1].swapaxes(1, 2)[:, :rank])
    return rank * from_pairs(U_psg.transpose(1, 2, 0)), relative_error(values_pg[:, g - rank :].sum(), values_pg.sum())


def scores_fixed_a(Q_bqhd: np.ndarray, A_sg: np.ndarray, B_bksd: np.ndarray, scale: float) -> np.ndarray:
    """The query absorbs A: q^_s = A[s,g] q (the conjugate, where A is complex), then q^ . b.

    Shapes: Q [b,q,h,d], A [s,g] or [s,g,d], B [b,k,s,d] (rotated) -> [b,h,q,k].
    """
    s, g = A_sg.shape[:2]
    Q_bqgnsd = mixed("sg,bqgnd->bqgnsd", A_sg, split_heads(Q_bqhd, g), conjugate=True)
    return join_heads(einsum("bqgnsd,bksd->bgnqk", Q_bqgnsd, B_bksd) * (scale / s))


def values_fixed_a(P_bhqk: np.ndarray, A_ug: np.ndarray, B_bkue: np.ndarray) -> np.ndarray:
    """Aggregate b's first (all heads share them), mix with A once per query.

    Shapes: P [b,h,q,k], A [u,g] or [u,g,e], B [b,k,u,e] -> [b,q,h,e].
    """
    b, h, q, _ = P_bhqk.shape
    u, g = A_ug.shape[:2]
    Y_bqgnue = einsum("bhqk,bkue->bqhue", P_bhqk, B_bkue).reshape(b, q, g, h // g, u, -1)
    return mixed("ug,bqgnue->bqgne", A_ug, Y_bqgnue).reshape(b, q, h, -1) / u


def mix_heads(A: np.ndarray, B_bksd: np.ndarray) -> np.ndarray:
    """sum_s a_s (x) b_s with a constant A: [s,g], or [s,g,d], one complex number for every pair of features that RoPE
    rotates (real part at i, imaginary part at i + d/2). Such an A turns a pair like RoPE does, so the two commute.

    Shapes: A, B [b,k,s,d] -> [b,k,g,d].

    >>> mix_heads(np.array([[[0.0, 1.0]]]), np.array([[[[1.0, 0.0]]]])).tolist()  # times i: a quarter turn
    [[[[0.0, 1.0]]]]
    """
    return mixed("sg,bksd->bkgd", A, B_bksd)


def mix_heads_back(A: np.ndarray, X_bkgd: np.ndarray) -> np.ndarray:
    """The adjoint of `mix_heads`: b_s = sum_g conj(a_sg) x_g. With it <x, A b> = <mix_heads_back(A, x), b>."""
    return mixed("sg,bkgd->bksd", A, X_bkgd, conjugate=True)


def mixed(letters: str, A: np.ndarray, X: np.ndarray, conjugate: bool = False) -> np.ndarray:
    """einsum with a real A [s,g], or with a complex one, [s,g,d], to which the letter of the features is added."""
    if A.ndim == 2:
        return einsum(letters, A, X)
    A_sgp = as_pairs(A).conj() if conjugate else as_pairs(A)
    return from_pairs(einsum(letters.replace(",", f"{letters[-1]},"), A_sgp, as_pairs(X)))


def as_pairs(x: np.ndarray) -> np.ndarray:
    """Features i and i + d/2, which RoPE rotates together, as one complex number: [..., d] -> [..., d/2]."""
    real, imaginary = np.split(x, 2, -1)
    return real + 1j * imaginary


def from_pairs(z: np.ndarray) -> np.ndarray:
    """The inverse of `as_pairs`."""
    return np.concatenate([z.real, z.imag], -1)
