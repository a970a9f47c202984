"""A `Cache` of `transformers` that holds our codes.

Its layers are given K after RoPE, turn it back, and code it as this package's own models do (`core.cache`): rows lie by
position, so that padding takes no place, and rings of window layers hold their window. What comes back is K and V as
the codes say, in the columns that `transformers` counts in; or, for few queries, the codes themselves, which
`attention` reads. Where new tokens stand is told by a hook before the layers run.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tpa_ref.core.cache import Keys, Segment
from tpa_ref.errors import TPAError
from tpa_ref.gemma.token_vectors import id_dtype

from ..core import cache as ours
from ..core.rope import rotate
from ..fast import kernels, prefill
from ..fast.decode import FEW_QUERIES
from ..gemma.positions import Tokens
from ..lasting import lasting
from . import attention
from .codec import Codec
from .places import PLACES, New, Place
from .theirs import Theirs, find

PIECE = 1024  # tokens whose K and V are formed at a time
ROOM = 16  # tokens that a cache grows by, at least; else by an eighth
SPARE = 128  # tokens that can be taken back past a window: more than any assistant proposes


class TPALayer(CacheLayerMixin):
    """One layer. `columns` counts as they do, padding included; `held` is a cache of ours with this layer alone."""

    is_croppable = True

    def __init__(self, cache: TPACache, index: int):
        super().__init__()
        self.cache, self.index, self.columns = cache, index, 0
        self.window = cache.codec.config.windows[index]
        self.is_sliding = self.window is not None
        self.held: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Room on the layer's device, for as many rows as the first keys have."""
        cache, device = self.cache, key_states.device
        self.dtype, self.device = key_states.dtype, device
        with lasting():  # inference mode, too, may only be the first caller's
            self.held = ours.Cache(
                [cache.codec.pair_on(self.index, device)], [self.window], len(key_states), cache.room,
                cache.codec.exact, None, device, kernels.runs_on(device), cache.spare,
            )  # fmt: skip
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Code new keys (after RoPE) and values, [b,g,q,d] each, and give back what their queries read."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise TPAError("cache: codes have no gradients; train without a cache, or run under torch.no_grad()")
        new = self.cache.new_tokens(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        place, is_global = self.cache.place(key_states.device), not self.is_sliding
        turns = new.turns(place, is_global)
        K_bkgd = rotate(key_states.transpose(1, 2).float(), turns.real, -turns.imag)
        keys = self.held.append(0, K_bkgd, value_states.transpose(1, 2).float(), new.at(place, is_global))
        self.held.advance(new.positions_bq)
        start = self.get_mask_sizes(0)[1]
        self.columns += key_states.shape[2]
        if new.plain and key_states.shape[2] <= FEW_QUERIES and self.cache.reads_codes:
            key_states.tpa = keys, place, new.shift(place, is_global)  # type: ignore[attr-defined]
            return key_states, value_states
        return self.formed(keys, start, new.shift(place, is_global))

    def formed(self, keys: Keys, start: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """K and V of their columns from `start` on, [b,g,k,d] each; zeros where there is padding."""
        wanted_bk = self.cache.positions_bc[:, start : self.columns]
        config = self.cache.codec.config
        shape = *wanted_bk.shape, config.num_kv_heads, config.head_dim
        K_bkgd, V_bkgd = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "KV")
        for segment in in_pieces(keys.segments):
            slots_bk = slots_of(segment.positions_bk, wanted_bk)
            if segment.kind == "recent":
                slots_bk[wanted_bk <= keys.at.positions_bq.max(1, keepdims=True) - keys.held.exact.recent] = -1
            row, column = np.nonzero(slots_bk >= 0)
            rows, columns, slots = (torch.from_numpy(x).to(self.device) for x in (row, column, slots_bk[row, column]))
            for whole, part in zip((K_bkgd, V_bkgd), prefill.formed(segment, self.dtype), strict=True):
                whole[rows, columns] = part[rows, slots].to(self.dtype)
        if shift is not None:
            K_bkgd = rotate(K_bkgd, shift.real, shift.imag)
        return K_bkgd.transpose(1, 2), V_bkgd.transpose(1, 2)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(how many columns the keys of so many queries have, the first of them). An older `transformers` gives the
        queries' positions instead of their number.
        """
        q = query_length if isinstance(query_length, int) else len(query_length)
        kept = self.columns if self.window is None else min(self.columns, self.window - 1)
        return kept + q, self.columns - kept

    def get_seq_length(self, *_: Any) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    get_max_cache_shape = get_max_length  # an older name

    def cut(self, columns: int, lengths_b: np.ndarray) -> None:
        """Keep the first columns."""
        if self.held is not None:
            self.held.truncate(lengths_b)
        self.columns = columns

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows."""
        if self.held is not None:
            with lasting():
                self.held.select(rows)

    def reset(self) -> None:
        self.held, self.columns, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise TPAError("cache: rows are reordered in all layers at once, by the cache")


def in_pieces(segments: list[Segment]) -> Iterator[Segment]:
    """Stretches of so many tokens that forming K and V takes little memory beside them."""
    for segment in segments:
        for start in range(0, segment.positions_bk.shape[1], PIECE):
            at, tokens = slice(start, start + PIECE), cast(Tokens, segment.tokens)
            stored = {name: x[:, at] for name, x in segment.stored.items()}
            positions_bk = segment.positions_bk[:, at]
            yield replace(segment, stored=stored, positions_bk=positions_bk, tokens=cast(Any, tokens.of(at)))


def slots_of(positions_bk: np.ndarray, wanted_bk: np.ndarray) -> np.ndarray:
    """In which slot the token of each wanted position lies, -1 where it is in none.

    >>> slots_of(np.array([[4, 5, 3]]), np.array([[-1, 3, 4, 9]])).tolist()
    [[-1, 2, 0, -1]]
    """
    size = 2 + max(positions_bk.max(initial=0), wanted_bk.max(initial=0))
    slot_bt = np.full((len(positions_bk), size), -1)
    row, slot = np.nonzero(positions_bk >= 0)
    slot_bt[row, positions_bk[row, slot]] = slot
    return np.take_along_axis(slot_bt, np.where(wanted_bk < 0, size - 1, wanted_bk), 1)


class TPACache(Cache):
    """The cache of one `generate`, or of one conversation.

    codec: of `calibrate_cache`, for this model. model: a Gemma 3 of transformers, on one device or many, with images or
    without, in PEFT or not. fast: read codes where they lie; a model that attends by "sdpa", as they do by default,
    attends by "tpa" from then on, which is the same for every other cache. False, or any other attention: K and V are
    given back.
    """

    layers: list[Any]

    def __init__(self, codec: Codec, model: Any, fast: bool = True, **unsupported: Any):
        if unsupported:
            name = next(iter(unsupported))
            raise TPAError(f"cache: {name} is not supported: codes grow with the text, and stay where their layer is")
        if not isinstance(codec, Codec):
            raise TPAError(f"cache: a Codec is needed, of calibrate_cache or Codec.load, got {type(codec).__name__}")
        self.codec, self.theirs, self.fast = codec, find(model), fast
        codec.check(self.theirs)
        self.reads_tokens = any(pair.reads_tokens for pair in codec.pairs)
        self.places: dict[torch.device, Place] = PLACES.setdefault(self.theirs.outer, {})
        self.room, self.spare, self.records = ROOM, 0, False
        super().__init__(layers=[TPALayer(self, index) for index in range(codec.config.num_layers)])
        self._forget()
        listen(self.theirs)
        if fast and self.theirs.text.config._attn_implementation in attention.LIKE:
            self.theirs.text.config._attn_implementation = attention.NAME

    def _forget(self) -> None:
        self.positions_bc = np.zeros((0, 0), np.int32)  # of every column so far
        self.text_bt: np.ndarray | None = None  # numbered ids by position
        self.shift_b: np.ndarray | None = None
        self.now: New | None = None

    # ---- where new tokens stand ----

    @torch.compiler.disable
    def begin(self, given: dict[str, Any]) -> None:
        """The hook: what the model was called with."""
        ids, mask, theirs = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        told = ids if ids is not None else given.get("inputs_embeds")
        if told is None:
            raise TPAError("cache: the model was called without input_ids and inputs_embeds")
        (b, q), first = told.shape[:2], self.get_seq_length()
        if q == 0:
            raise TPAError(f"cache: no new tokens beside the {first} that it holds; another text wants reset()")
        if first == 0:
            self.reset()
            self.positions_bc = np.zeros((b, 0), np.int32)
        if len(self.positions_bc) != b:
            raise TPAError(f"cache: it holds {len(self.positions_bc)} rows, got a batch of {b}")
        before_bc = self.positions_bc[:, :first]
        mask_bc = host(mask) if isinstance(mask, Tensor) and mask.dim() == 2 else None
        real_bq = np.ones((b, q), bool) if mask_bc is None else self._real(mask_bc, before_bc, q)
        positions_bq = before_bc.max(1, initial=-1, keepdims=True) + np.cumsum(real_bq, 1)
        positions_bq = np.where(real_bq, positions_bq, -1).astype(np.int64)
        theirs_bq = np.broadcast_to(first + np.arange(q) if theirs is None else host(theirs), (b, q))
        self.positions_bc = np.concatenate([before_bc, positions_bq.astype(np.int32)], 1)
        self._count_ahead(theirs_bq, positions_bq)
        if first == 0 and ids is not None:
            self._expect_bos(host(ids), real_bq)
        self._make_room(int(positions_bq.max(initial=0)) + 1, q)
        text_bt = self._remember(ids, positions_bq) if self.reads_tokens else None
        plain = bool(real_bq.any()) and (mask is None or mask_bc is not None)
        self.now = New(positions_bq, theirs_bq, self.shift_b, text_bt, plain)

    @staticmethod
    def _real(mask_bc: np.ndarray, before_bc: np.ndarray, q: int) -> np.ndarray:
        """Which new tokens are real, of a mask over all columns or the new ones."""
        real_bq, first = mask_bc[:, -q:].astype(bool), before_bc.shape[1]
        if mask_bc.shape[1] == first + q and (mask_bc[:, :first].astype(bool) != (before_bc >= 0)).any():
            raise TPAError("cache: attention_mask hides tokens that are already cached")
        behind_b = (before_bc >= 0).any(1) & (before_bc[:, -1:] < 0).all(1) if first else np.zeros(len(mask_bc), bool)
        if (behind_b & real_bq.any(1)).any():
            raise TPAError("cache: padding must stand before a text that goes on, on the left, not behind it")
        return real_bq

    def _expect_bos(self, ids_bq: np.ndarray, real_bq: np.ndarray) -> None:
        """A Gemma is lost without BOS, with any cache, and a codec expects it."""
        bos = self.theirs.outer.config.get_text_config().bos_token_id
        first_b = np.take_along_axis(ids_bq, real_bq.argmax(1)[:, None], 1)[:, 0]
        if bos is not None and (first_b != bos)[real_bq.any(1)].any():
            warnings.warn(f"the text does not begin with BOS, token {bos}: does the tokenizer add it?", stacklevel=2)

    def _count_ahead(self, theirs_bq: np.ndarray, positions_bq: np.ndarray) -> None:
        """Their positions are ours but for a number that is the same for all tokens of a row."""
        ahead_bq = np.where(positions_bq >= 0, theirs_bq - positions_bq, 0)
        first_b = np.take_along_axis(ahead_bq, (positions_bq >= 0).argmax(1)[:, None], 1)[:, 0]
        known_b = (self.positions_bc[:, : -positions_bq.shape[1]] >= 0).any(1)
        shift_b = np.where(known_b, 0 if self.shift_b is None else self.shift_b, first_b)
        if ((ahead_bq != shift_b[:, None]) & (positions_bq >= 0)).any():
            held = int((self.positions_bc[:, : -positions_bq.shape[1]] >= 0).sum(1).max())
            raise TPAError(
                f"cache: these tokens do not follow on the {held} that it holds: position_ids must rise by one from "
                f"token to token, padding left out; another text wants a new cache or reset()"
            )
        self.shift_b = shift_b if shift_b.any() else None

    def _make_room(self, tokens: int, q: int) -> None:
        """Longer texts, and rings from which the last forward pass can be taken back, where that may be asked."""
        spare = max(self.spare, min(q, SPARE)) if self.records else self.spare
        if tokens <= self.room and spare == self.spare:
            return
        if tokens > self.room:
            self.room = tokens + max(ROOM, tokens // 8)
        self.spare = spare
        for layer in self.layers:
            if layer.held is not None:
                with lasting():
                    layer.held.grow(self.room, spare)

    def _remember(self, ids: Tensor | None, positions_bq: np.ndarray) -> np.ndarray:
        """The text so far, numbered from 1, by position; 0 for places of an image."""
        if ids is None:
            raise TPAError(
                "cache: K and V follow from the tokens in part, so input_ids are needed, not inputs_embeds; "
                "or calibrate with predict=False"
            )
        numbers_bq, vision = host(ids) + 1, self.codec.config.vision
        if vision is not None:
            numbers_bq = np.where(numbers_bq == vision.image_token + 1, 0, numbers_bq)
        held = 0 if self.text_bt is None else self.text_bt.shape[1]
        if held < self.room:
            made = np.zeros((len(positions_bq), self.room), id_dtype(self.codec.config.vocab_size))
            if self.text_bt is not None:
                made[:, :held] = self.text_bt
            self.text_bt = made
        assert self.text_bt is not None
        row, column = np.nonzero(positions_bq >= 0)
        self.text_bt[row, positions_bq[row, column]] = numbers_bq[row, column]
        return self.text_bt[:, : int(self.positions_bc.max(initial=0)) + 1]

    def new_tokens(self, key_states: Tensor) -> New:
        """What the hook has found of the tokens whose keys these are."""
        if self.now is None or self.now.positions_bq.shape != (len(key_states), key_states.shape[2]):
            raise TPAError("cache: it was made for another model than the one that runs; give TPACache this model")
        return self.now

    def place(self, device: torch.device) -> Place:
        """What attention needs on a device."""
        if device not in self.places:
            self.places[device] = Place(self.theirs, device)
        return self.places[device]

    @property
    def reads_codes(self) -> bool:
        """Does the model attend through our function?"""
        return self.fast and self.theirs.text.config._attn_implementation == attention.NAME

    # ---- what transformers asks of a cache ----

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens of all rows back: -n; an older `transformers` gives the length to keep instead."""
        columns = self.get_seq_length()
        kept = columns + tokens_to_remove if tokens_to_remove <= 0 else min(columns, tokens_to_remove)
        if kept == columns:
            return
        if kept < 0:
            raise TPAError(f"cache: cannot take back {-tokens_to_remove} tokens of {columns}")
        lengths_b = self.positions_bc[:, :kept].max(1, initial=-1).astype(np.int64) + 1
        for layer in self.layers:
            layer.cut(kept, lengths_b)
        self.positions_bc = self.positions_bc[:, :kept]

    def activate_past_recording(self) -> None:
        """From now on the tokens of the last forward pass can be taken back, also past a window."""
        self.records = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(host(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(np.repeat(np.arange(len(self.positions_bc)), repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(np.arange(len(self.positions_bc))[host(indices)])

    def _select(self, rows: np.ndarray) -> None:
        if not self.get_seq_length():
            return
        for layer in self.layers:
            layer.select(rows)
        self.positions_bc = self.positions_bc[rows]
        self.text_bt = None if self.text_bt is None else self.text_bt[rows]
        self.shift_b = None if self.shift_b is None else self.shift_b[rows]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> TPACache:
        """Many texts can begin with one: codes are copied, the model and the codec are not."""
        made = TPACache(self.codec, self.theirs.whole, self.fast)
        made.room, made.spare, made.records = self.room, self.spare, self.records
        made.positions_bc, made.shift_b = self.positions_bc.copy(), copy(self.shift_b)
        made.text_bt = None if self.text_bt is None else self.text_bt.copy()
        for new, old in zip(made.layers, self.layers, strict=True):
            new.held, new.columns, new.is_initialized = deepcopy(old.held), old.columns, old.is_initialized
            if old.is_initialized:
                new.dtype, new.device = old.dtype, old.device
        return made

    def __copy__(self) -> TPACache:
        return deepcopy(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes that are really held, room to grow included, and of the text where it is kept."""
        text = 0 if self.text_bt is None else self.text_bt.nbytes
        return text + sum(layer.held.nbytes for layer in self.layers if layer.held is not None)


def host(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def listen(theirs: Theirs) -> None:
    """A hook, once a model: a TPACache that it is called with is told where the new tokens stand."""
    if not hasattr(theirs.outer, "_tpa_listens"):
        theirs.outer._tpa_listens = True
        theirs.outer.register_forward_pre_hook(before_forward, with_kwargs=True)


def before_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    for value in tuple(given.values()):
        if isinstance(value, TPACache):
            value.begin(given)
