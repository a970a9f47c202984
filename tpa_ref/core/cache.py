"""The KV cache: what a token leaves behind in every layer, allocated once, in rings for window layers.

A layer with a sliding window holds min(max_len, window) slots, a global one max_len; token p lives in slot
p mod slots. No positions are stored: they follow from the length. `nbytes` is the sum over the arrays really held.

A converted global layer may keep its first tokens (attention sinks) and its newest ones as they are, in two small dense
rings beside the coded one. A query then reads up to three segments of keys, each key from exactly one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import TPAError
from ..trace import Tracer, no_trace
from . import masks
from .mode import Parts, Stored, Tokens
from .pair import Pair


@dataclass(frozen=True)
class Exact:
    """How many tokens of a layer are read as they are: the first `sinks` of a text, and the newest `recent`."""

    sinks: int = 0
    recent: int = 0

    def kept(self, pair: Pair, window: int | None, n: int) -> Exact:
        """How many of them one layer keeps in texts of n tokens: an exact one none, newest tokens only a global one."""
        if pair.is_exact:
            return Exact()
        return Exact(min(self.sinks, n), min(self.recent, n) if window is None else 0)


@dataclass(frozen=True)
class Segment:
    """Stored keys and values that a chunk of queries reads, with what is known of them. kind: see `masks.segment_mask`;
    positions_bk: -1 for a slot with nothing in it.
    """

    kind: str
    pair: Pair
    stored: Stored
    positions_bk: np.ndarray
    tokens: Tokens


@dataclass(frozen=True)
class Keys:
    """All that a chunk of queries reads in one layer, up to three segments.

    at: where the queries stand (`gemma.positions`). held: the layer's cache. lengths_b: of each row, before this chunk.
    """

    segments: list[Segment]
    at: Any
    held: LayerCache
    lengths_b: np.ndarray
    made: list[tuple[Parts, Parts]] = field(default_factory=list, repr=False)

    def _parts(self, dtype: Any) -> list[tuple[Parts, Parts]]:
        """The numbers of every segment, made once for scores and values."""
        if not self.made:
            self.made.extend(segment.pair.load(segment.stored, dtype) for segment in self.segments)
        return self.made

    def scores(self, Q_bqhd: np.ndarray, scale: float) -> np.ndarray:
        """Logits [b,h,q,k] over the keys of all segments, masked."""
        logits = []
        for segment, (parts_k, _) in zip(self.segments, self._parts(Q_bqhd.dtype), strict=True):
            L_bhqk = segment.pair.k.scores(Q_bqhd, parts_k, segment.tokens, scale)
            logits.append(masks.apply_mask(L_bhqk, self.seen(segment)))
        return np.concatenate(logits, -1)

    def values(self, P_bhqk: np.ndarray) -> np.ndarray:
        """Values [b,q,h,e] summed over the keys of all segments."""
        ends = np.cumsum([segment.positions_bk.shape[1] for segment in self.segments])[:-1]
        each = zip(self.segments, np.split(P_bhqk, ends, -1), self._parts(P_bhqk.dtype), strict=True)
        total: Any = sum(segment.pair.v.values(P, parts_v, segment.tokens) for segment, P, (_, parts_v) in each)
        return total

    def seen(self, segment: Segment) -> np.ndarray:
        """Which keys of a segment each query reads there, [b,q,k]."""
        positions_bq, positions_bk, exact = self.at.positions_bq, segment.positions_bk, self.held.exact
        seen_bqk = masks.visible(positions_bq, positions_bk, self.held.window, self.at.last_bq)
        return masks.segment_mask(segment.kind, seen_bqk, positions_bq, positions_bk, exact.sinks, exact.recent)


class Ring:
    """The arrays of one stretch of slots: {"k.part.field": [b, slots, ...]}."""

    def __init__(self, pair: Pair, slots: int, windowed: bool, arrays: Stored):
        self.pair, self.slots, self.windowed, self.arrays = pair, slots, windowed, arrays

    def append(self, new: Stored, positions_bq: np.ndarray, lengths_b: np.ndarray) -> tuple[Stored, np.ndarray]:
        """Store new tokens and return what their queries must read, with the position of each key, [b,k].

        A chunk longer than one token may overwrite slots that its own first queries still need: they read the old ring
        and the new tokens side by side. `positions_bq` is -1 for padding, `lengths_b` the length before.
        """
        if self.windowed and positions_bq.shape[1] > 1:
            before, positions_bk = self.read(lengths_b)
            held = self.joined(before, new)
            self.write(new, positions_bq)
            return held, np.concatenate([positions_bk, positions_bq], 1)
        self.write(new, positions_bq)
        return self.read(np.maximum(lengths_b, positions_bq.max(1) + 1))

    def read(self, lengths_b: np.ndarray) -> tuple[Stored, np.ndarray]:
        """The filled slots, as views, and the position of the token in each, [b,k]."""
        filled = min(self.slots, int(lengths_b.max(initial=0)))
        stored = {name: array[:, :filled] for name, array in self.arrays.items()}
        return stored, slot_positions(filled, lengths_b, self.slots)

    def write(self, new: Stored, positions_bq: np.ndarray) -> None:
        """Put each token into slot position mod slots; of a chunk longer than the ring only the newest tokens stay."""
        newest_b = positions_bq.max(1, keepdims=True)
        row, column = np.nonzero((positions_bq >= 0) & (positions_bq > newest_b - self.slots))
        slot = positions_bq[row, column] % self.slots
        for name, array in self.arrays.items():
            array[row, slot] = new[name][row, column]

    @staticmethod
    def joined(before: Stored, now: Stored) -> Stored:
        """Two stretches of tokens side by side."""
        return {name: np.concatenate([before[name], array], 1) for name, array in now.items()}


class PassThrough(Ring):
    """A ring that keeps nothing: a whole text is read at once, so its queries read the new tokens themselves."""

    def append(self, new: Stored, positions_bq: np.ndarray, lengths_b: np.ndarray) -> tuple[Stored, np.ndarray]:
        end = None if self.windowed else self.slots  # sinks are the first tokens; a window is the mask's business
        return {name: array[:, :end] for name, array in new.items()}, positions_bq[:, :end]


def slot_positions(filled: int, lengths_b: np.ndarray, slots: int) -> np.ndarray:
    """Position of the token in each slot: the newest p < length with p mod slots = slot, -1 where there is none.

    Shapes: lengths [b] -> [b, filled].

    >>> slot_positions(4, np.array([6, 2]), slots=4).tolist()
    [[4, 5, 2, 3], [0, 1, -1, -1]]
    """
    last_b1 = lengths_b[:, None] - 1
    return np.maximum(last_b1 - (last_b1 - np.arange(filled)) % slots, -1)


class LayerCache:
    """One layer: the coded ring and, where exact tokens are kept, one of sinks and one of the newest tokens."""

    keys_class: type = Keys

    def __init__(self, window: int | None, exact: Exact, rings: dict[str, Ring]):
        self.window, self.exact, self.rings = window, exact, rings
        self.pair = rings["coded"].pair

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays really held."""
        return sum(array.nbytes for ring in self.rings.values() for array in ring.arrays.values())

    def append(self, K_bkgd: Any, V_bkge: Any, at: Any, lengths_b: np.ndarray, trace: Tracer = no_trace) -> Any:
        """Store K (normed, before RoPE) and V of new tokens, and return what their queries read.

        at: where the new tokens stand (`gemma.positions.Positions`).
        """
        segments = []
        encoded: dict[int, Stored] = {}  # by pair: sinks and newest tokens are kept alike
        for kind, ring in self.rings.items():
            if kind == "sinks" and self.window is not None:
                oldest = int(at.positions_bq.min(initial=1 << 60, where=at.positions_bq >= 0))  # of the queries
                if oldest >= self.window + ring.slots - 1:
                    continue  # no query sees them any more
            if (pair := id(ring.pair)) not in encoded:
                traced = trace if kind == "coded" else no_trace
                encoded[pair] = ring.pair.encode(K_bkgd, V_bkge, at.new_tokens, traced)
            new = encoded[pair]
            positions_bq, before_b = at.positions_bq, lengths_b
            if kind == "sinks":
                positions_bq = np.where(positions_bq < ring.slots, positions_bq, -1)
                before_b = np.minimum(lengths_b, ring.slots)
            stored, positions_bk = ring.append(new, positions_bq, before_b)
            segments.append(Segment(kind, ring.pair, stored, positions_bk, at.tokens(positions_bk, kind)))
        return self.keys_class(segments, at, self, lengths_b)


class Cache:
    """The cache of a whole model: one `LayerCache` a layer and the length of every row of the batch.

    windows: how many tokens a query of each layer sees, None for all. ids: the dtype in which token ids are kept, where
    K or V is predicted from them. spare: slots that rings of window layers have beyond their window, so that as many
    tokens can be taken back (`truncate`).

    >>> cache = Cache([Pair.dense(4, 32)] * 3, [128, 128, None], batch=1, max_len=2048)
    >>> cache.nbytes == cache.nbytes_at(2048) == 2 * 2 * 4 * 32 * (2048 + 2 * 128)
    True
    """

    layer_class: type = LayerCache
    ring_class: type = Ring

    def __init__(
        self,
        pairs: Sequence[Pair],
        windows: Sequence[int | None],
        batch: int = 1,
        max_len: int = 4096,
        exact: Exact | None = None,
        ids: np.dtype | None = None,
        spare: int = 0,
    ):
        if batch < 1 or max_len < 1:
            raise TPAError(f"cache: batch and max_len must be >= 1, got {batch} and {max_len}")
        self.pairs, self.windows, self.batch, self.max_len = list(pairs), list(windows), batch, max_len
        self.exact, self.ids, self.spare = exact or Exact(), ids, spare
        self.layers = [self._new_layer(pair, window) for pair, window in zip(pairs, windows, strict=True)]
        kept = ids is not None and any(pair.reads_tokens for pair in pairs)
        self.text_bt = np.zeros((batch, max_len), ids) if kept else None  # the token ids by position
        self.reset()

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        self.lengths_b = np.zeros(self.batch, np.int64)
        self._least_b = np.zeros(self.batch, np.int64)  # what a row can be cut to: below, rings have overwritten keys

    def copy(self) -> Cache:
        """An independent cache of the same model with the same contents: many texts can begin with one prefix."""
        return deepcopy(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """Pairs are constants of the model, which knows its caches by them: shared, unless the model is copied too."""
        for pair in (*self.pairs, *(ring.pair for layer in self.layers for ring in layer.rings.values())):
            memo.setdefault(id(pair), pair)
        made = object.__new__(type(self))
        vars(made).update(deepcopy(vars(self), memo))
        return made

    def _new_layer(self, pair: Pair, window: int | None) -> LayerCache:
        kept = self.exact.kept(pair, window, self.max_len)
        coded = self.max_len if window is None else min(self.max_len, window + self.spare)
        rings = {"coded": self._new_ring(pair, coded, window is not None)}
        dense = pair.dense(pair.k.g, pair.k.d)
        if kept.sinks:
            rings["sinks"] = self._new_ring(dense, kept.sinks, windowed=False)
        if kept.recent:
            rings["recent"] = self._new_ring(dense, kept.recent + self.spare, windowed=True)
        return self.layer_class(window, kept, rings)

    def _new_ring(self, pair: Pair, slots: int, windowed: bool) -> Ring:
        arrays = {name: self._zeros((self.batch, slots, *shape), kind) for name, (shape, kind) in pair.fields().items()}
        return self.ring_class(pair, slots, windowed, arrays)

    def _zeros(self, shape: tuple[int, ...], kind: np.dtype) -> Any:
        return np.zeros(shape, kind)

    def append(self, layer: int, K_bkgd: Any, V_bkge: Any, at: Any, trace: Tracer = no_trace) -> Any:
        """Write the new tokens of one layer and read what their queries see: `Keys`."""
        return self.layers[layer].append(K_bkgd, V_bkge, at, self.lengths_b, trace)

    @property
    def nbytes(self) -> int:
        """Allocated bytes of everything held, scales and padding included."""
        text = 0 if self.text_bt is None else self.text_bt.nbytes
        return text + sum(layer.nbytes for layer in self.layers)

    def nbytes_at(self, n: int, batch: int = 1) -> int:
        """`nbytes` of a new cache for `batch` texts of n tokens, by arithmetic, without allocating it."""
        return cache_bytes(self.pairs, self.windows, n, batch, self.exact, self.ids)

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
        """Keep the tokens (numbered from 1) of a chunk and return the text so far, [b,t] by position."""
        if self.text_bt is None:
            return None
        row, column = np.nonzero(positions_bq >= 0)
        self.text_bt[row, positions_bq[row, column]] = numbers_bq[row, column]
        return self.text_bt[:, : max(1, int(positions_bq.max()) + 1, int(self.lengths_b.max()))]

    def advance(self, positions_bq: np.ndarray) -> None:
        """Count the tokens of a chunk that every layer has stored."""
        self.reach(positions_bq.max(1) + 1)

    def reach(self, lengths_b: np.ndarray) -> None:
        """Every layer has stored so many tokens of each row."""
        self.lengths_b = np.maximum(self.lengths_b, lengths_b)
        overwritten_b = self.lengths_b > self._window_slots
        least_b = np.maximum(self._least_b, self.lengths_b - 1 - self.spare)
        self._least_b = np.where(overwritten_b, least_b, self._least_b)

    def truncate(self, n: Any) -> None:
        """Keep the first n tokens of every row, or n[b]. Past its window a ring has overwritten older keys: then only
        the newest token can be taken back, and as many more as there are spare slots.
        """
        lost_b = (n < self._least_b) & (n < self.lengths_b)
        if np.min(n) < 0 or lost_b.any():
            raise TPAError(
                f"cache: cannot truncate to {n} tokens: window layers hold the newest {self._window_slots} of "
                f"{self.lengths_b.max()}; reset() and run the text again"
            )
        self.lengths_b = np.minimum(self.lengths_b, n)

    def select(self, rows: Any) -> None:
        """Keep these rows in this order; a row may come twice, as in a beam search."""
        rows = np.asarray(rows)
        for layer in self.layers:
            for ring in layer.rings.values():
                ring.arrays = {name: self._rows(array, rows) for name, array in ring.arrays.items()}
        self.batch, self.lengths_b, self._least_b = len(rows), self.lengths_b[rows], self._least_b[rows]
        self.text_bt = None if self.text_bt is None else self.text_bt[rows]

    @staticmethod
    def _rows(array: Any, rows: np.ndarray) -> Any:
        return array[rows]

    def grow(self, max_len: int, spare: int = 0) -> None:
        """Make room for more tokens, and more spare slots. What is held stays."""
        self.max_len, self.spare = max(max_len, self.max_len), max(spare, self.spare)
        for index, old in enumerate(self.layers):
            layer = self.layers[index] = self._new_layer(old.pair, old.window)
            for kind, ring in old.rings.items():
                lengths_b = np.minimum(self.lengths_b, ring.slots) if kind == "sinks" else self.lengths_b
                Ring.write(layer.rings[kind], *ring.read(lengths_b))
        if self.text_bt is not None:
            self.text_bt = np.pad(self.text_bt, ((0, 0), (0, self.max_len - self.text_bt.shape[1])))

    @property
    def _window_slots(self) -> int:
        """The fewest that a ring has which is ever overwritten."""
        rings = [ring for layer in self.layers for ring in layer.rings.values() if ring.windowed]
        return min([self.max_len, *(ring.slots for ring in rings)])


class WholeText(Cache):
    """Stands in for a cache when a text is read at once: queries read the same keys that a cache would give them."""

    def _new_ring(self, pair: Pair, slots: int, windowed: bool) -> Ring:
        return PassThrough(pair, slots, windowed, {})


def cache_bytes(
    pairs: Sequence[Pair],
    windows: Sequence[int | None],
    n: int,
    batch: int = 1,
    exact: Exact | None = None,
    ids: np.dtype | None = None,
) -> int:
    """Bytes of a cache for n tokens: slots times bytes per token, over all layers, the exact tokens, and the text where
    something is predicted from it.
    """
    if n < 1 or batch < 1:
        raise TPAError(f"cache: n and batch must be >= 1, got {n} and {batch}")
    total = n * ids.itemsize if ids is not None and any(pair.reads_tokens for pair in pairs) else 0
    for pair, window in zip(pairs, windows, strict=True):
        kept = (exact or Exact()).kept(pair, window, n)
        total += (n if window is None else min(n, window)) * pair.token_bytes
        total += (kept.sinks + kept.recent) * pair.dense(pair.k.g, pair.k.d).token_bytes
    return batch * total
