"""What others do to a KV cache, simulated: numbers are rounded as theirs are and kept as floats, so only quality and
counted bits mean anything. Written from the papers, with their settings named; not their code.

KIVI-like (arXiv 2402.02750): asymmetric integers, K per channel over groups of 64 tokens, V per token over groups of 64
channels, a scale and a minimum of 16 bits each. K is rounded before RoPE, which favours it, and the last, incomplete
group stays exact, as there. TurboQuant-like (arXiv 2504.19874): each head of each token turned by a random rotation,
its norm in 16 bits, every coordinate by the Lloyd-Max levels of a normal variable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_torch.core.dense import Dense
from tpa_torch.core.pair import Pair

GROUP = 64


@dataclass(frozen=True)
class KiviLike(Dense):
    """Integers of so many bits along an axis of [b,k,g,d]: tokens for K, channels for V."""

    bits: int = 4
    axis: int = 1

    @property
    def bits_per_number(self) -> float:
        return self.bits + 32 / GROUP

    def encode(self, X_bkgd: Any, tokens: Any) -> dict[str, Any]:
        return {"X": rounded(X_bkgd, self.bits, self.axis)}


@dataclass(frozen=True)
class TurboQuantLike(Dense):
    """Levels of a normal variable behind a random rotation."""

    bits: int = 4

    @property
    def bits_per_number(self) -> float:
        return self.bits + 16 / self.d

    def encode(self, X_bkgd: Any, tokens: Any) -> dict[str, Any]:
        R_de = rotation(self.d).to(X_bkgd)
        norm_bkg1 = X_bkgd.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        levels = lloyd_max(self.bits).to(X_bkgd) / self.d**0.5
        edges = (levels[1:] + levels[:-1]) / 2
        U_bkge = X_bkgd / norm_bkg1 @ R_de
        return {"X": levels[torch.bucketize(U_bkge.contiguous(), edges)] @ R_de.mT * norm_bkg1.half().to(X_bkgd)}


def rounded(X: Tensor, bits: int, axis: int) -> Tensor:
    """Integers between the least and the largest of each group of 64 along an axis; what fills no group stays.

    >>> rounded(torch.arange(64.0).reshape(1, 64, 1, 1), 1, 1).unique().tolist()
    [0.0, 63.0]
    """
    X = X.movedim(axis, -1)
    whole = X.shape[-1] // GROUP * GROUP
    groups = X[..., :whole].unflatten(-1, (-1, GROUP))
    least = groups.amin(-1, keepdim=True).half().to(X)
    scale = ((groups.amax(-1, keepdim=True) - least) / (2**bits - 1)).clamp(min=1e-6).half().to(X)
    codes = ((groups - least) / scale).round().clamp(0, 2**bits - 1)
    return torch.cat([(codes * scale + least).flatten(-2), X[..., whole:]], -1).movedim(-1, axis)


@lru_cache
def rotation(d: int) -> Tensor:
    """A random orthogonal matrix [d,e], always the same."""
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0])


@lru_cache
def lloyd_max(bits: int) -> Tensor:
    """The levels that leave the least squared error on normal numbers, by Lloyd's algorithm.

    >>> [round(x, 3) for x in lloyd_max(2).tolist()]
    [-1.51, -0.453, 0.453, 1.51]
    """
    X = np.sort(np.random.default_rng(0).standard_normal(400_000))
    X = np.concatenate([X, -X])
    levels = np.quantile(X, (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(300):
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, X)
        levels = np.bincount(nearest, X) / np.bincount(nearest)
    return torch.from_numpy(levels)


def kivi_like(dense: Any, bits: int) -> Any:
    """The model with such a cache in every layer."""
    g, d = dense.config.num_kv_heads, dense.config.head_dim
    k, v = (KiviLike(g, d, dtype="float32", bits=bits, axis=axis) for axis in (1, 3))
    return with_cache(dense, Pair(k, v))


def turboquant_like(dense: Any, bits: int) -> Any:
    """The model with such a cache in every layer."""
    side = TurboQuantLike(dense.config.num_kv_heads, dense.config.head_dim, dtype="float32", bits=bits)
    return with_cache(dense, Pair(side, side))


def with_cache(dense: Any, pair: Pair) -> Any:
    """The model with another cache in every layer."""
    config, kept = dense.config, (dense.stored_dtype, dense.side_files)
    return type(dense)(config, dense.weights, dense.tokenizer, None, [pair] * config.num_layers, None, *kept)


def bits_per_number(model: Any) -> float | None:
    """Of a simulated cache; None of any other, whose bytes can be counted."""
    return getattr(model.pairs[0].k, "bits_per_number", None)
