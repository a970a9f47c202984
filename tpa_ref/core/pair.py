"""K and V of one layer: how both are cached. Model and cache ask a pair, and know no mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..trace import Tracer, no_trace
from .dense import Dense
from .mode import Mode, Parts, Stored, Tokens, of_part


@dataclass(frozen=True)
class Pair:
    """K by one mode, V by another (or by the same)."""

    k: Mode
    v: Mode

    def encode(self, K_bkgd: np.ndarray, V_bkge: np.ndarray, tokens: Tokens, trace: Tracer = no_trace) -> Stored:
        """What a cache holds of some tokens: normed K before RoPE and V, [b,k,g,d] each -> {"k.part.field": [b,k,...]}.

        RoPE acts on b where b is what is cached (Theorem 3.1).
        """
        parts_k, rotated = self.k.encode(K_bkgd, tokens), self.k.rotated
        if rotated:
            parts_k[rotated] = trace(f"rope.K_{rotated}", self.k.turned(parts_k[rotated], tokens))
        return sides(self.k.store(parts_k), self.v.store(self.v.encode(V_bkge, tokens)))

    def load(self, stored: Stored, dtype: Any) -> tuple[Parts, Parts]:
        """The parts of K and of V as numbers in `dtype`."""
        return self.k.load(of_part(stored, "k"), dtype), self.v.load(of_part(stored, "v"), dtype)

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The arrays that one token takes, {"k.part.field": (shape, dtype)}."""
        return sides(self.k.fields(), self.v.fields())

    @property
    def token_bytes(self) -> int:
        """Bytes that K and V of one token take."""
        return sum(int(np.prod(shape, dtype=int)) * kind.itemsize for shape, kind in self.fields().values())

    @property
    def modes(self) -> tuple[Mode, Mode]:
        return self.k, self.v

    @property
    def is_dense(self) -> bool:
        """Is nothing compressed? `dense` cannot be asked for by name, so K is dense only where V is."""
        return isinstance(self.k, Dense)

    @property
    def is_exact(self) -> bool:
        """Is what it gives back K and V themselves: all numbers, or those that follow from the token alone?"""
        return self.is_dense or getattr(self.k, "k_norm", None) is not None

    @property
    def reads_tokens(self) -> bool:
        """Is K or V predicted from the tokens, so that their ids must be kept?"""
        return any(getattr(mode, "predictor", None) is not None for mode in self.modes)

    @staticmethod
    def dense(g: int, d: int, dtype: str = "bfloat16") -> Pair:
        """How a layer that is not converted caches K and V."""
        return Pair(Dense(g, d, dtype=dtype), Dense(g, d, dtype=dtype))


class Joint(Pair):
    """K and V as one vector: what V repeats of K is coded once. Coefficients are the sum of what each gives to them,
    C = E_k (K - ...) + E_v (V - ...), and lie with K.
    """

    def encode(self, K_bkgd: np.ndarray, V_bkge: np.ndarray, tokens: Tokens, trace: Tracer = no_trace) -> Stored:
        C_bks = self.k.encode(K_bkgd, tokens)["C"] + self.v.encode(V_bkge, tokens)["C"]
        return sides(self.k.store({"C": C_bks}), {})

    def load(self, stored: Stored, dtype: Any) -> tuple[Parts, Parts]:
        parts = self.k.load(of_part(stored, "k"), dtype)
        return parts, parts

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return sides(self.k.fields(), {})


def sides(k: dict[str, Any], v: dict[str, Any]) -> dict[str, Any]:
    """Entries of K and of V under names that tell them apart."""
    return {f"k.{name}": x for name, x in k.items()} | {f"v.{name}": x for name, x in v.items()}
