"""Products of a few rows, and dequantized codes, as fast as a CPU reads them: compiled where there is a compiler.

How PyTorch is asked for a product of few rows decides its speed (measured on AVX-512): keys times queries is up to
three times as fast as queries times keys, and the weighted sum of values wants at least four rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import codes, quantize
from .kernels import native
from .kernels.native import Rows
from .scratch import Scratch

FEW_ROWS = 8


def dot(
    Q_bxd: Tensor, K_bkd: Tensor | Rows, scratch: Scratch, A_bgk: Tensor | None = None, L_bxk: Tensor | None = None
) -> Tensor:
    """[b,x,d] . [b,k,d] -> [b,x,k] in float32, valid until the next call.

    With A, each key weighs so much for the queries of a KV head; with L, the product is added to it.
    """
    if isinstance(K_bkd, Rows):
        out_bxk = scratch("L", Q_bxd, (*Q_bxd.shape[:2], K_bkd.shape[1]), torch.float32)
        return native.dot(Q_bxd, K_bkd, out_bxk, A_bgk, add=L_bxk is not None)
    P_bxk = keys_times_queries(Q_bxd, K_bkd)
    if A_bgk is None:
        return P_bxk if L_bxk is None else L_bxk.add_(P_bxk)
    P_bgxk = P_bxk.unflatten(1, (A_bgk.shape[1], -1)).mul_(A_bgk[:, :, None])
    return P_bxk if L_bxk is None else L_bxk.add_(P_bgxk.flatten(1, 2))


def keys_times_queries(Q_bxd: Tensor, K_bkd: Tensor) -> Tensor:
    if K_bkd.dtype == torch.bfloat16:
        return product(Q_bxd.to(K_bkd.dtype), K_bkd.mT).float()
    if Q_bxd.shape[1] > FEW_ROWS:
        return torch.bmm(Q_bxd, K_bkd.mT)
    return torch.bmm(K_bkd, Q_bxd.mT).mT.contiguous()


def weigh(P_bxk: Tensor, V_bke: Tensor | Rows, A_bgk: Tensor | None = None) -> Tensor:
    """[b,x,k] . [b,k,e] -> [b,x,e] in float32; with A, by the KV head of a query."""
    if isinstance(V_bke, Rows):
        return native.weigh(P_bxk, V_bke, A_bgk)
    if A_bgk is not None:
        P_bxk = (P_bxk.unflatten(1, (A_bgk.shape[1], -1)) * A_bgk[:, :, None]).flatten(1, 2)
    if V_bke.dtype == torch.bfloat16:
        return product(P_bxk.to(V_bke.dtype), V_bke).float()
    x = P_bxk.shape[1]
    if x >= 4:
        return torch.bmm(P_bxk, V_bke)
    return torch.bmm(F.pad(P_bxk, (0, 0, 0, 4 - x)), V_bke)[:, :x]


def product(X_bxy: Tensor, Y_byz: Tensor) -> Tensor:
    """In bfloat16 one matrix is multiplied up to twice as fast alone as in a batch of one."""
    return torch.mm(X_bxy[0], Y_byz[0])[None] if len(X_bxy) == 1 else torch.bmm(X_bxy, Y_byz)


def dequantized(fields: dict[str, Tensor], kind: str, n: int, scratch: Scratch, name: str) -> Tensor:
    """int8 or int4 with tokens last -> float32, with n numbers along the axis that is grouped."""
    stored, scale = fields["codes"], fields["scale"]
    axis = -2 if stored.ndim == 3 else -1
    shape = list(stored.shape)
    shape[axis] = stored.shape[axis] * (2 if kind == "int4" else 1)
    numbers = scratch(name, stored, shape, torch.float32)
    if kind == "int8":
        numbers.copy_(stored)
    else:
        low, high = numbers.unflatten(axis, (-1, 2)).unbind(-1 if axis == -1 else -2)
        low.copy_(stored & 15)
        high.copy_(stored >> 4)
        numbers = numbers.narrow(axis, 0, n)
    for group in range(scale.shape[axis]):
        start = group * quantize.GROUP
        here = numbers.narrow(axis, start, min(quantize.GROUP, n - start))
        here.mul_(scale.narrow(axis, group, 1).float())
        if kind == "int4":
            here.add_(fields["minimum"].narrow(axis, group, 1).float())
    return numbers


def unpacked(codes_bck: Tensor, widths: tuple[int, ...], scratch: Scratch) -> Tensor:
    """Codes [b,bytes,k] -> coefficients [b,s,k] in float32."""
    if not native.codes_take(codes_bck):
        return codes.dequantize(codes_bck.mT, widths).mT
    shape = len(codes_bck), len(widths), codes_bck.shape[-1]
    return native.levels(codes_bck, widths, scratch("levels", codes_bck, shape, torch.float32))
