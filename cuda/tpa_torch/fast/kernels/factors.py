"""The best factors of each token (`contextual`) in one launch: `graph.leading_vectors` in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def of_unit_size(M):
    return M / tl.maximum(tl.max(tl.max(tl.abs(M), 1), 0), 1e-30)


@triton.jit
def of_unit_length(u):
    return u / tl.maximum(tl.sqrt(tl.sum(u * u, 0)), 1e-30)


@triton.jit
def factor_token(x, a, b, squarings, G: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, BLOCK_G: tl.constexpr):
    """One token: x [g,d] -> a = R u_s [R,g], b = u_s^T x [R,d] with the leading left singular vectors u_s."""
    token = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, BLOCK_G), tl.arange(0, D)
    X = tl.load(x + (token * G + i[:, None]) * D + d[None, :], (i < G)[:, None], 0).to(tl.float32)
    M = tl.dot(X, tl.trans(X), input_precision="ieee")
    rest = tl.where(i[:, None] == i[None, :], 1.0, 0.0)  # the projection on what is orthogonal to all vectors found
    for s in tl.static_range(RANK):
        P = of_unit_size(M)
        for _ in range(squarings):
            P = of_unit_size(tl.dot(P, P, input_precision="ieee"))
        P = tl.dot(rest, P, input_precision="ieee")
        column = tl.argmax(tl.sum(P * P, 0), 0)
        u = of_unit_length(tl.sum(tl.where(i[None, :] == column, P, 0.0), 1))
        u = of_unit_length(tl.sum(rest * u[None, :], 1))
        largest = tl.sum(tl.where(i == tl.argmax(tl.abs(u), 0), u, 0.0), 0)
        u = tl.where(largest < 0, -u, u)  # `transform.fix_signs`
        tl.store(a + (token * RANK + s) * G + i, u * RANK, i < G)
        tl.store(b + (token * RANK + s) * D + d, tl.sum(u[:, None] * X, 0))
        rest = rest - u[:, None] * u[None, :]
        M = tl.dot(tl.dot(rest, M, input_precision="ieee"), rest, input_precision="ieee")


def contextual_factors(X_bkgd: Tensor, rank: int, squarings: int) -> tuple[Tensor, Tensor]:
    """[b,k,g,d] -> A [b,k,R,g], B [b,k,R,d] in the same dtype; inside in float32. d is a power of two."""
    b, k, g, d = X_bkgd.shape
    A_bksg, B_bksd = X_bkgd.new_empty((b, k, rank, g)), X_bkgd.new_empty((b, k, rank, d))
    block_g = max(16, triton.next_power_of_2(g))
    factor_token[(b * k,)](X_bkgd.contiguous(), A_bksg, B_bksd, squarings, G=g, D=d, RANK=rank, BLOCK_G=block_g)
    return A_bksg, B_bksd
