"""What a mode is: how one layer caches its K, or its V.

A mode turns one token's matrix X (g heads by d features) into the numbers that a cache holds, its *parts*, and reads
them in three ways: as X again (`decode`), as logits of queries against it (`scores`), and as a weighted sum of it
(`values`). A new mode is one class in one file: `parts`, `encode` and `decode` are enough; `scores` and `values` may
do better than to form X first.

    mode         cached per token         constant               exact when
    dense        X (g d)                  nothing                always
    contextual   a (R g) and b (R d)      nothing                R >= min(g, d)
    fixed-a      b (R d)                  A (R x g [x d])        R = g
    fixed-b      a (g R)                  B (g x R x d)          R = d
    latent       c (R), for all heads     B (R x g x d)          R = g d
    spectral     c (R) in 1 to 8 bits     B (R x g x d)          never

Always the *normed* K is factorized: Gemma norms K before RoPE. Where `rotated` names a part, that part is cached after
RoPE (Theorem 3.1: RoPE acts on b alone); the other modes cache K before RoPE and rotate when they read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from . import attention, quantize
from .rope import rotate

Parts = dict[str, Any]  # part -> array [b,k,...]
Stored = dict[str, Any]  # "part.field" -> array [b,k,...], as a cache holds it


@dataclass(frozen=True)
class Tokens:
    """What is known of some tokens without reading a cache.

    tables: cos and sin of their positions, [b,k,d/2] each. Z_bkz: their token vectors (`gemma.token_vectors`), or None.
    """

    tables: tuple[Any, Any]
    Z_bkz: Any = None


@dataclass(frozen=True)
class Mode:
    """How one layer caches its K (or its V): g heads of d features in `rank` factors, stored as `dtype`.

    error: the root of the share of the second moment (or of the damage) that the constant factors leave out.
    """

    g: int
    d: int
    rank: int = 0
    dtype: str = "bfloat16"
    error: float = 0.0

    name: ClassVar[str] = ""
    rotated: ClassVar[str | None] = None  # the part that is cached after RoPE
    constants: ClassVar[tuple[str, ...]] = ()  # names of the constant arrays
    # Another backend overrides these two modules, `cast` and `turned`
    attention: ClassVar[Any] = attention
    quantize: ClassVar[Any] = quantize

    # ---- what a mode defines ----

    @classmethod
    def exact_rank(cls, g: int, d: int) -> int:
        """The rank from which on the mode loses nothing."""
        raise NotImplementedError

    @classmethod
    def fit(
        cls, g: int, d: int, rank: int, dtype: str, M_gdgd: np.ndarray, mean_gd: Any = None, F_gdgd: Any = None
    ) -> Mode:
        """The mode with its constant factors from second moments, means and, where measured, Fisher matrices."""
        return cls(g, d, rank, dtype)

    def parts(self) -> dict[str, tuple[int, ...]]:
        """What one token caches, {part: shape}; numbers are quantized along the last axis."""
        raise NotImplementedError

    def encode(self, X_bkgd: np.ndarray, tokens: Tokens) -> Parts:
        """The parts of some tokens' K (before RoPE) or V: [b,k,g,d] -> {part: [b,k,*shape]}."""
        raise NotImplementedError

    def decode(self, parts: Parts, tokens: Tokens) -> np.ndarray:
        """K or V formed again: [b,k,g,d]; K is rotated as its parts are."""
        raise NotImplementedError

    def scores(self, Q_bqhd: np.ndarray, parts: Parts, tokens: Tokens, scale: float) -> np.ndarray:
        """Logits [b,h,q,k] of rotated queries against cached K."""
        return self.attention.scores_dense(Q_bqhd, self.rotated_keys(parts, tokens), scale)

    def values(self, P_bhqk: np.ndarray, parts: Parts, tokens: Tokens) -> np.ndarray:
        """Sums [b,q,h,e] of cached V, weighted with probabilities [b,h,q,k]."""
        return self.attention.values_dense(P_bhqk, self.decode(parts, tokens))

    def rotated_keys(self, parts: Parts, tokens: Tokens) -> np.ndarray:
        """K after RoPE, [b,k,g,d]."""
        K_bkgd = self.decode(parts, tokens)
        return K_bkgd if self.rotated else self.turned(K_bkgd, tokens)

    @staticmethod
    def turned(X_bksd: Any, tokens: Tokens) -> Any:
        """RoPE."""
        return rotate(X_bksd, *tokens.tables)

    # ---- how the numbers are stored ----

    def part_dtype(self, part: str) -> str:
        """How a part is stored."""
        return self.dtype

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The arrays that one token takes, {"part.field": (shape, dtype)}: what `store` makes of it."""
        return {
            f"{part}.{field}": ((*shape[:-1], size), kind)
            for part, shape in self.parts().items()
            for field, (size, kind) in quantize.field_shapes(shape[-1], self.part_dtype(part)).items()
        }

    def store(self, parts: Parts) -> Stored:
        """Quantize every part: what comes out is what a cache holds."""
        return {
            f"{part}.{field}": x
            for part, array in parts.items()
            for field, x in self.quantize.quantize(array, self.part_dtype(part)).items()
        }

    def load(self, stored: Stored, dtype: Any) -> Parts:
        """The parts back as numbers in `dtype`: what attention computes with."""
        return {
            part: self.cast(self.quantize.dequantize(of_part(stored, part), self.part_dtype(part), shape[-1]), dtype)
            for part, shape in self.parts().items()
        }

    @staticmethod
    def cast(x: Any, dtype: Any) -> Any:
        """An array in another dtype."""
        return x.astype(dtype, copy=False)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes."""
        return sum(int(np.prod(shape, dtype=int)) * kind.itemsize for shape, kind in self.fields().values())

    # ---- constant arrays ----

    def arrays(self) -> dict[str, Any]:
        """The constant arrays by name, None where there is none."""
        return {name: getattr(self, name) for name in self.constants}

    def with_arrays(self, arrays: Mapping[str, Any]) -> Mode:
        """The same mode with other constant arrays."""
        return replace(self, **arrays)

    def array_shapes(self) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
        """The shapes that each constant array may have; None: it may be missing."""
        return {}

    def needs_moments(self) -> bool:
        """Do the constant arrays depend on K and V? At full rank they are unit vectors."""
        return bool(self.constants) and self.rank < self.exact_rank(self.g, self.d)


def of_part(stored: Stored, part: str) -> dict[str, Any]:
    """The fields of one part.

    >>> of_part({"A.x": 1, "B.codes": 2, "B.scale": 3}, "B")
    {'codes': 2, 'scale': 3}
    """
    return {name.removeprefix(f"{part}."): x for name, x in stored.items() if name.startswith(f"{part}.")}


MODES: dict[str, type[Mode]] = {}  # the modes that can be asked for by name


def register(mode: type[Mode]) -> None:
    """Make a mode known by its name."""
    MODES[mode.name] = mode
