"""The KV cache: what a token leaves behind in every layer, allocated once, in rings for window layers.

A layer with a sliding window holds min(max_len, window) slots, a global one max_len; token p lives in slot
p mod slots. No positions are stored: they follow from the length. What is held are exactly the quantized parts of
`factorize.part_shapes`, and `nbytes` is the sum over those arrays.

A converted global layer may keep its first tokens (attention sinks) and its newest ones as they are, in two small dense
caches beside the coded one; a query then reads up to three segments of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..compress import token_prediction as words
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from . import quantize
from .factorize import Factorization, part_shapes

Parts = dict[str, Any]  # part -> array [b, k, ...]; NumPy here, torch in the twin
Stored = dict[str, dict[str, Any]]  # part -> field -> array [b, k, ...]
LayerFactors = tuple[Factorization, Factorization]  # how K and how V are cached


DENSE = Factorization("dense", dtype="bfloat16"), Factorization("dense", dtype="bfloat16")  # of exact tokens


@dataclass(frozen=True)
class Exact:
    """How many tokens of a layer are read as they are: the first `sinks` of a text, and the newest `recent`."""

    sinks: int = 0
    recent: int = 0

    def __bool__(self) -> bool:
        return self.sinks > 0 or self.recent > 0


@dataclass(frozen=True)
class Segment:
    """Keys and values that a chunk of queries reads: what is held of them, and the position of each, [b,k].

    kind: "coded", "sinks" or "recent"; `masks.of_segment` says which of them a query reads where.
    """

    kind: str
    how: LayerFactors
    held: tuple[Stored, Stored]
    positions_bk: np.ndarray


@dataclass
class LayerCache:
    """K and V of one layer: for each the stored fields of its parts, [b, slots, ...]."""

    how: LayerFactors
    slots: int
    windowed: bool
    stored: tuple[Stored, Stored]
    sinks: LayerCache | None = None
    recent: LayerCache | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays really held."""
        own = sum(array.nbytes for side in self.stored for fields in side.values() for array in fields.values())
        return own + sum(part.nbytes for part in (self.sinks, self.recent) if part)

    def segments(
        self,
        new: tuple[Stored, Stored],
        exact: tuple[Stored, Stored] | None,
        positions_bq: np.ndarray,
        lengths_b: np.ndarray,
    ) -> list[Segment]:
        """Store new tokens, coded (`new`) and as they are (`exact`), and return all that their queries read."""
        found = [Segment("coded", self.how, *self.extend(new, positions_bq, lengths_b))]
        if self.sinks is not None and exact is not None:
            first = self.sinks.slots
            among_bq = np.where(positions_bq < first, positions_bq, -1)
            held, positions_bk = self.sinks.extend(exact, among_bq, np.minimum(lengths_b, first))
            found.append(Segment("sinks", DENSE, held, positions_bk))
        if self.recent is not None and exact is not None:
            found.append(Segment("recent", DENSE, *self.recent.extend(exact, positions_bq, lengths_b)))
        return found

    def extend(
        self, new: tuple[Stored, Stored], positions_bq: np.ndarray, lengths_b: np.ndarray
    ) -> tuple[tuple[Stored, Stored], np.ndarray]:
        """Store new tokens and return what their queries must read, with the position of each key, [b,k].

        A chunk longer than one token may overwrite ring slots that its own first queries still need: they read the
        old ring and the new tokens side by side. `positions_bq` is -1 for padding, `lengths_b` the length before.
        """
        after_b = np.maximum(lengths_b, positions_bq.max(1) + 1)
        if self.windowed and positions_bq.shape[1] > 1:
            old = self.read(lengths_b)
            held = tuple(self._joined(before, now) for before, now in zip(old, new, strict=True))
            positions_bk = np.concatenate(
                [slot_positions(self._filled(lengths_b), lengths_b, self.slots), positions_bq], 1
            )
            self.write(new, positions_bq)
            return held, positions_bk  # type: ignore[return-value]
        self.write(new, positions_bq)
        return self.read(after_b), slot_positions(self._filled(after_b), after_b, self.slots)

    def read(self, lengths_b: np.ndarray) -> tuple[Stored, Stored]:
        """The filled slots, as views."""
        filled = self._filled(lengths_b)
        return tuple(  # type: ignore[return-value]
            {part: {name: array[:, :filled] for name, array in fields.items()} for part, fields in side.items()}
            for side in self.stored
        )

    def write(self, new: tuple[Stored, Stored], positions_bq: np.ndarray) -> None:
        """Put each token into slot position mod slots; of a chunk longer than the ring only the newest remain."""
        newest_b = positions_bq.max(1, keepdims=True)
        row, column = np.nonzero((positions_bq >= 0) & (positions_bq > newest_b - self.slots))
        slot = positions_bq[row, column] % self.slots
        for side, fresh in zip(self.stored, new, strict=True):
            for part, fields in side.items():
                for name, array in fields.items():
                    array[row, slot] = fresh[part][name][row, column]

    def _filled(self, lengths_b: np.ndarray) -> int:
        return min(self.slots, int(lengths_b.max(initial=0)))

    @staticmethod
    def _joined(before: Stored, now: Stored) -> Stored:
        """Two stretches of tokens side by side."""
        return {
            part: {name: np.concatenate([before[part][name], array], 1) for name, array in fields.items()}
            for part, fields in now.items()
        }


def slot_positions(filled: int, lengths_b: np.ndarray, slots: int) -> np.ndarray:
    """Position of the token in each slot: the newest p < length with p mod slots = slot, -1 where there is none.

    Shapes: lengths [b] -> [b, filled].

    >>> slot_positions(4, np.array([6, 2]), slots=4).tolist()
    [[4, 5, 2, 3], [0, 1, -1, -1]]
    """
    last_b1 = lengths_b[:, None] - 1
    position = last_b1 - (last_b1 - np.arange(filled)) % slots
    return np.maximum(position, -1)


def whole_text(
    how: LayerFactors,
    new: tuple[Stored, Stored],
    exact_tokens: tuple[Stored, Stored] | None,
    positions_bq: np.ndarray,
    exact: Exact,
) -> list[Segment]:
    """The segments of a text that is read at once, without a cache: the same keys that a cache would have given."""
    found = [Segment("coded", how, new, positions_bq)]
    if exact.sinks and exact_tokens:
        first = tuple(
            {part: {name: x[:, : exact.sinks] for name, x in fields.items()} for part, fields in side.items()}
            for side in exact_tokens
        )
        found.append(Segment("sinks", DENSE, first, positions_bq[:, : exact.sinks]))  # type: ignore[arg-type]
    if exact.recent and exact_tokens:
        found.append(Segment("recent", DENSE, exact_tokens, positions_bq))
    return found


def store(parts: Parts, how: Factorization) -> Stored:
    """Quantize every part of new tokens; what comes out is what the cache holds."""
    if how.dtype == "spectral":
        return {part: quantize.quantize_spectral(array, how.widths) for part, array in parts.items()}
    return {part: quantize.quantize(array, part_dtype(part, array.ndim, how.dtype)) for part, array in parts.items()}


def load(stored: Stored, how: Factorization, g: int, d: int, dtype: np.dtype | type = np.float32) -> Parts:
    """The parts back as numbers (in `dtype`): what attention computes with."""
    if how.dtype == "spectral":
        return {
            part: quantize.dequantize_spectral(fields, how.widths).astype(dtype, copy=False)
            for part, fields in stored.items()
        }
    shapes = part_shapes(how.mode, how.rank, g, d)
    return {
        part: quantize.dequantize(fields, part_dtype(part, 2 + len(shapes[part]), how.dtype), shapes[part][-1]).astype(
            dtype, copy=False
        )
        for part, fields in stored.items()
    }


def load_pair(
    held: tuple[Stored, Stored],
    how: LayerFactors,
    g: int,
    d: int,
    dtype: np.dtype | type = np.float32,
    Z_bkz: np.ndarray | None = None,
) -> tuple[Parts, Parts]:
    """The parts of K and of V back as numbers, those that V shares with K and the words [b,k,2m] included."""
    parts_k, parts_v = (load(side, one, g, d, dtype) for side, one in zip(held, how, strict=True))
    return completed(parts_k, parts_v, how, Z_bkz)


def completed(parts_k: Parts, parts_v: Parts, how: LayerFactors, Z_bkz: Any) -> tuple[Parts, Parts]:
    """The parts of K and V with what nobody stored: those that V shares with K, and the words [b,k,2m]."""
    sides = parts_k, parts_k if how[1].dtype == "shared" else parts_v
    k, v = (parts if one.predictor is None else parts | {"Z": Z_bkz} for parts, one in zip(sides, how, strict=True))
    return k, v


def part_dtype(part: str, ndim: int, dtype: str) -> str:
    """The a's of `contextual` (R g numbers in one row) multiply a whole b each, so they never go below int8."""
    return "int8" if part == "A" and ndim == 3 and dtype == "int4" else dtype


class Cache:
    """The cache of a whole model: one `LayerCache` a layer and the length of every row of the batch.

    >>> config = GemmaConfig.tiny()
    >>> cache = Cache(config, [(Factorization("dense"), Factorization("dense"))] * 12, batch=1, max_len=2048)
    >>> cache.nbytes == cache.nbytes_at(2048) == 2 * 2 * 4 * 32 * (2 * 2048 + 10 * 128)
    True
    """

    layer_class = LayerCache

    def __init__(
        self,
        config: GemmaConfig,
        factors: Sequence[LayerFactors],
        batch: int = 1,
        max_len: int = 4096,
        exact: Exact | None = None,
    ):
        if batch < 1 or max_len < 1:
            raise TPAError(f"cache: batch and max_len must be >= 1, got {batch} and {max_len}")
        self.config, self.factors, self.batch, self.max_len = config, list(factors), batch, max_len
        self.exact = exact or Exact()
        self.layers = [self._new_layer(layer) for layer in range(config.num_layers)]
        self.text_bt: np.ndarray | None = None  # the tokens by position, where K or V is predicted from them
        if reads_words(factors):
            self.text_bt = np.zeros((batch, max_len), words.number_dtype(config.vocab_size))
        self.lengths_b = np.zeros(batch, np.int64)
        self._highest_b = np.zeros(batch, np.int64)  # how far each ring was ever written

    def _new_layer(self, layer: int) -> LayerCache:
        how, windowed = self.factors[layer], self.config.window(layer) is not None
        made = self._allocated(how, self.config.slots(layer, self.max_len), windowed)
        kept = exact_slots(self.config, how, layer, self.max_len, self.exact)
        if kept.sinks:
            made.sinks = self._allocated(DENSE, kept.sinks, windowed=False)
        if kept.recent:
            made.recent = self._allocated(DENSE, kept.recent, windowed=True)
        return made

    def _allocated(self, how: LayerFactors, slots: int, windowed: bool) -> LayerCache:
        stored = tuple(
            {
                part: {
                    name: self._zeros((self.batch, slots, *leading, size), kind)
                    for name, (size, kind) in fields.items()
                }
                for part, (leading, fields) in stored_shapes(side, self.config).items()
            }
            for side in how
        )
        return self.layer_class(how, slots, windowed, stored)  # type: ignore[arg-type]

    def _zeros(self, shape: tuple[int, ...], kind: np.dtype) -> Any:
        return np.zeros(shape, kind)

    @property
    def nbytes(self) -> int:
        """Allocated bytes of everything held, scales and padding included."""
        text = 0 if self.text_bt is None else self.text_bt.nbytes
        return text + sum(layer.nbytes for layer in self.layers)

    def nbytes_at(self, n: int, batch: int = 1) -> int:
        """`nbytes` of a new cache for `batch` texts of n tokens, by arithmetic, without allocating it."""
        return cache_bytes(self.config, self.factors, n, batch, self.exact)

    def positions(self, q: int, lengths_b: np.ndarray | None) -> np.ndarray:
        """Positions [b,q] of q new tokens a row; -1 where a row's text (`lengths_b`) is already over."""
        step_q = np.arange(q)
        positions_bq = self.lengths_b[:, None] + step_q
        if lengths_b is not None:
            positions_bq = np.where(step_q < lengths_b[:, None], positions_bq, -1)
        if positions_bq.max(initial=-1) >= self.max_len:
            raise TPAError(
                f"cache: {positions_bq.max() + 1} tokens do not fit: the cache was made for max_len {self.max_len}"
            )
        return positions_bq

    def remember(self, numbers_bq: np.ndarray, positions_bq: np.ndarray) -> np.ndarray | None:
        """Keep the tokens (`words.numbered`) of a chunk and return the text so far, [b,t] by position."""
        if self.text_bt is None:
            return None
        row, column = np.nonzero(positions_bq >= 0)
        self.text_bt[row, positions_bq[row, column]] = numbers_bq[row, column]
        return self.text_bt[:, : max(1, int(positions_bq.max()) + 1, int(self.lengths_b.max()))]

    def advance(self, positions_bq: np.ndarray) -> None:
        """Count the tokens of a chunk that every layer has stored."""
        self.lengths_b = np.maximum(self.lengths_b, positions_bq.max(1) + 1)
        self._highest_b = np.maximum(self._highest_b, self.lengths_b)

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        self.lengths_b = np.zeros(self.batch, np.int64)
        self._highest_b = np.zeros(self.batch, np.int64)

    def truncate(self, n: int) -> None:
        """Keep the first n tokens of every row. Past its window a ring has overwritten older keys, so then only the
        newest token can be taken back.
        """
        held = [part for layer in self.layers for part in (layer, layer.recent) if part]
        rings = [part.slots for part in held if part.windowed and part.slots < self.max_len]
        ring = min(rings, default=self.max_len)
        lost = (n < self._highest_b - 1) & (self._highest_b > ring) & (n < self.lengths_b)
        if n < 0 or lost.any():
            longest = int(self._highest_b.max())
            raise TPAError(
                f"cache: cannot truncate to {n} tokens: window layers hold the newest {ring} of {longest}; "
                f"reset() and run the text again"
            )
        self.lengths_b = np.minimum(self.lengths_b, n)


def stored_shapes(
    how: Factorization, config: GemmaConfig
) -> dict[str, tuple[tuple[int, ...], dict[str, tuple[int, np.dtype]]]]:
    """{part: (leading axes, {field: (last axis, dtype)})} of one token: what `store` makes of it."""
    if how.dtype == "shared":
        return {}
    if how.dtype == "spectral":
        return {"C": ((), {"codes": (quantize.packed_bytes(how.widths), np.dtype(np.uint8))})}
    shapes = part_shapes(how.mode, how.rank, config.num_kv_heads, config.head_dim)
    return {
        part: (shape[:-1], quantize.field_shapes(shape[-1], part_dtype(part, 2 + len(shape), how.dtype)))
        for part, shape in shapes.items()
    }


def token_bytes(how: Factorization, config: GemmaConfig) -> int:
    """Bytes that one token takes for K (or V) of one layer.

    >>> token_bytes(Factorization("contextual", 2, "int4"), GemmaConfig.gemma3_4b())
    298
    """
    return sum(
        int(np.prod(leading, dtype=int)) * size * kind.itemsize
        for leading, fields in stored_shapes(how, config).values()
        for size, kind in fields.values()
    )


def reads_words(factors: Sequence[LayerFactors]) -> bool:
    """Is K or V of any layer predicted from the tokens, so that these must be kept?"""
    return any(how.predictor is not None for pair in factors for how in pair)


def exact_slots(config: GemmaConfig, how: LayerFactors, layer: int, n: int, exact: Exact) -> Exact:
    """How many sinks and newest tokens one layer keeps in texts of n tokens: only a converted global one does."""
    if how[0].mode == "dense" or config.window(layer) is not None:
        return Exact()
    return Exact(min(exact.sinks, n), min(exact.recent, n))


def cache_bytes(
    config: GemmaConfig, factors: Sequence[LayerFactors], n: int, batch: int = 1, exact: Exact | None = None
) -> int:
    """Bytes of a cache for n tokens: slots times bytes per token, over all layers, the exact tokens, and the text where
    something is predicted from it.
    """
    if n < 1 or batch < 1:
        raise TPAError(f"cache: n and batch must be >= 1, got {n} and {batch}")
    total = n * words.token_bytes(config.vocab_size) if reads_words(factors) else 0
    for layer, how in enumerate(factors):
        total += config.slots(layer, n) * sum(token_bytes(side, config) for side in how)
        kept = exact_slots(config, how, layer, n, exact or Exact())
        total += (kept.sinks + kept.recent) * sum(token_bytes(side, config) for side in DENSE)
    return batch * total
