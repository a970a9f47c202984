"""Text from a model, token by token, streamed: greedy, temperature, top-k and top-p, seeded; one prompt or a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..errors import TPAError
from . import vision
from .chat import prompt_tokens, stop_tokens
from .tokenizer import require_tokenizer

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the most likely token. Otherwise one drawn from softmax(logits / temperature) after both cuts:
    top_k keeps the k most likely; top_p the fewest most likely ones whose probabilities reach p. seed: of the random
    numbers; every row of a batch has its own.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self, config: Any, prompt: int, new: int, held: int = 0) -> None:
        """Every rule on the arguments of `generate`: for so many tokens in the cache, of the prompt and new ones."""
        self._check_types(new)
        if prompt < 1:
            raise TPAError("generate: the prompt must have at least one token, got 0")
        if new < 1:
            raise TPAError(f"generate: max_new_tokens must be >= 1, got {new}")
        most = config.max_positions
        if held + prompt + new > most:
            before = f"{held} tokens in the cache, " if held else ""
            raise TPAError(
                f"generate: {before}prompt of {prompt} and {new} new tokens exceed the model's {most} positions"
            )
        if not 0 <= self.temperature < float("inf"):
            raise TPAError(f"generate: temperature must be a number >= 0, got {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise TPAError(f"generate: seed must lie in 0 ... 2^63 - 1, got {self.seed}")
        if self.top_k is not None and self.top_k < 1:
            raise TPAError(f"generate: top_k must be >= 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise TPAError(f"generate: top_p must lie in (0, 1], got {self.top_p}")

    def _check_types(self, new: Any) -> None:
        for name, value, kind in (
            ("max_new_tokens", new, Integral),
            ("temperature", self.temperature, Real),
            ("top_k", 1 if self.top_k is None else self.top_k, Integral),
            ("top_p", 1 if self.top_p is None else self.top_p, Real),
            ("seed", self.seed, Integral),
        ):
            if not isinstance(value, kind):
                wanted = "a whole number" if kind is Integral else "a number"
                raise TPAError(f"generate: {name} must be {wanted}, got {value!r}")

    def generators(self, rows: int) -> list[np.random.Generator]:
        """Random numbers of every row of a batch: its own, and the same whatever other rows there are. Those of the
        first row are those of a prompt alone.
        """
        return [np.random.default_rng([self.seed, row]) for row in range(rows)]

    def choose(self, logits_v: np.ndarray, rng: np.random.Generator) -> int:
        """One token.

        >>> Sampling().choose(np.array([0.0, 2.0, 1.0]), np.random.default_rng(0))
        1
        """
        if self.temperature == 0:
            return int(logits_v.argmax())
        order = self.candidates(logits_v)
        logits = logits_v[order].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature makes -inf of the others, which is what it means
            p = np.exp((logits - logits.max()) / self.temperature)
        p /= p.sum()
        if self.top_p is not None:
            p = p[: int(np.searchsorted(np.cumsum(p), self.top_p - 1e-12)) + 1]
            p /= p.sum()
        return int(order[rng.choice(len(p), p=p)])

    def candidates(self, logits_v: np.ndarray) -> np.ndarray:
        """The tokens to draw from, the most likely first; as they are where nothing is cut off, since sorting a large
        vocabulary takes longer than all the rest.
        """
        if self.top_k is not None and self.top_k < len(logits_v):
            least = np.partition(logits_v, -self.top_k)[-self.top_k]
            order = np.flatnonzero(logits_v >= least)
            return order[np.argsort(-logits_v[order], kind="stable")][: self.top_k]
        if self.top_p is not None:
            return np.argsort(-logits_v, kind="stable")
        return np.arange(len(logits_v))


GREEDY = Sampling()


def generate(
    model: Any,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    cache: Any = None,
    images: Any = None,
    system: str | None = None,
) -> Iterator[str]:
    """Stream the continuation of `prompt` as pieces of text. temperature 0 is greedy. Stops where the model's files say
    (`SideFiles.stop_tokens`).

    chat: put the prompt into the chat template as the user's turn, behind a `system` text if there is one. images:
    pixels [i,c,x,y] (`images.read_images`); each goes where the prompt has a <start_of_image>, or all before it. cache:
    what it holds is the beginning of the text; the prompt follows as it is, with BOS only before a cache's first text.
    """
    how = temperature, top_k, top_p, seed, chat, cache
    for _, piece in generate_batch(model, [prompt], max_new_tokens, *how, images=images, system=system):
        yield piece


def generate_batch(
    model: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    cache: Any = None,
    progress: Callable = iter,
    images: Any = None,
    system: str | None = None,
) -> Iterator[tuple[int, str]]:
    """Several prompts at once: (number of the prompt, piece of its text). At temperature 0 each gets what it would get
    alone; above, it has random numbers of its own by its number, so that equal prompts get different texts, which do
    not depend on how many follow. The first prompt gets what it would get alone.

    progress: wraps the chunks of the prefill, for instance `tqdm.tqdm`. images: every prompt gets all of them.
    """
    prompts = list_of_texts(prompts)
    tokenizer = require_tokenizer(model, "generate")
    bos = begins_text(held_before(model, cache, len(prompts)))
    images = vision.as_pixels(images)
    shown = 0 if images is None else len(images)
    if shown:
        vision.require_vision(model.config)
    rows = [prompt_tokens(model, prompt, chat, shown, system, bos) for prompt in prompts]
    stop = stop_tokens(model, chat)
    images = None if images is None else np.concatenate([images] * len(rows))
    sampling = Sampling(temperature, top_k, top_p, seed)
    chosen = generate_rows(model, rows, max_new_tokens, sampling, cache, images, progress, stop)
    yield from text_of_rows(tokenizer, len(rows), chosen, stop)


def generate_tokens(
    model: Any,
    ids: Sequence[int],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    cache: Any = None,
    images: Any = None,
    stop: frozenset[int] | None = None,
) -> Iterator[int]:
    """The same on token ids, one row: prefill, then one step a token; the cache ends up without the last token."""
    for (token,) in generate_rows(model, [ids], max_new_tokens, sampling, cache, images, stop=stop):
        assert token is not None
        yield token


def generate_rows(
    model: Any,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    cache: Any = None,
    images: Any = None,
    progress: Callable = iter,
    stop: frozenset[int] | None = None,
) -> Iterator[list[int | None]]:
    """Step by step the next token of every row of ids, None for a row that has stopped. Rows are padded on the right;
    every row has its own random numbers (`Sampling.generators`). images: of all rows, one row after another. stop: ids
    that end a row (default: the model's).
    """
    stop = model.side_files.stop_tokens if stop is None else stop
    rows = [whole_numbers(ids) for ids in rows]
    held_b = held_before(model, cache, len(rows))
    for ids, held in zip(rows, held_b, strict=True):
        sampling.check(model.config, len(ids), max_new_tokens, held)
        if cache is not None and held + len(ids) + max_new_tokens - 1 > cache.max_len:  # the last one is never fed
            raise TPAError(
                f"generate: {held} tokens in the cache, prompt of {len(ids)} and {max_new_tokens} new tokens do not "
                f"fit: the cache was made for max_len {cache.max_len}"
            )
    if cache is None:
        cache = model.new_cache(len(rows), max(map(len, rows)) + max_new_tokens)
    L_bv = prefill(model, rows, cache, progress, images)
    streamed = model.stream(cache, L_bv, max_new_tokens, sampling, stop)
    yield from steps(model, cache, L_bv, max_new_tokens, sampling, stop) if streamed is None else streamed


def steps(
    model: Any, cache: Any, L_bv: np.ndarray, count: int, sampling: Sampling, stop: frozenset[int]
) -> Iterator[list[int | None]]:
    """From the logits after the prompts: choose a token a row, feed it, and so on."""
    rngs = sampling.generators(len(L_bv))
    runs_b = np.ones(len(L_bv), bool)
    for step in range(count):
        tokens = [sampling.choose(L_v, rng) if runs else None for L_v, rng, runs in zip(L_bv, rngs, runs_b)]
        yield tokens
        runs_b = np.array([token is not None and token not in stop for token in tokens])
        if not runs_b.any() or step + 1 == count:
            return
        lengths_b = None if runs_b.all() else runs_b.astype(np.int64)
        L_bv = next_logits(model, model.hidden(np.array([[token or 0] for token in tokens]), cache, lengths_b))


def prefill(
    model: Any, rows: Sequence[Sequence[int]], cache: Any, progress: Callable = iter, images: Any = None
) -> np.ndarray:
    """Run prompts through the cache in chunks, so that memory does not grow with their square; the logits [b,v] after
    each row's last token.
    """
    tokens_bq, lengths_b = padded(rows)
    images = vision.as_pixels(images)
    is_image_bq = vision.check_images(images, tokens_bq, np.zeros_like(tokens_bq), model.config)
    last: list[Any] = [None] * len(rows)
    for start, end in progress(chunks(is_image_bq, PREFILL_CHUNK)):
        here_b = np.clip(lengths_b - start, 0, end - start)
        counts_b = None if (here_b == end - start).all() else here_b
        shown = vision.images_between(images, is_image_bq, start, end)
        x_bqm = model.hidden(tokens_bq[:, start:end], cache, counts_b, shown)
        for row in np.flatnonzero(here_b * (start + here_b == lengths_b)):
            last[row] = next_logits(model, x_bqm[row : row + 1, here_b[row] - 1 : here_b[row]])[0]
    return np.stack(last)


def chunks(is_image_bq: np.ndarray, size: int) -> list[tuple[int, int]]:
    """(start, end) of stretches of a text of at most `size` tokens, longer only where an image would be cut.

    >>> chunks(np.array([[False, False, True, True, True, False]]), 3)
    [(0, 2), (2, 5), (5, 6)]
    """
    inside_q = (is_image_bq[:, 1:] & is_image_bq[:, :-1]).any(0)  # no cut between these columns and the next ones
    ends = np.append(np.flatnonzero(~inside_q) + 1, is_image_bq.shape[1])
    made, start = [], 0
    while start < ends[-1]:
        end = int(max(ends[ends > start][0], ends[ends <= start + size].max(initial=0)))
        made.append((start, end))
        start = end
    return made


def next_logits(model: Any, x_bqm: np.ndarray) -> np.ndarray:
    """Logits [b,v] of the next token. The placeholder of an image is no word: it is never said."""
    L_bv = model.to_numpy(model.logits(x_bqm)[:, 0])
    if model.config.vision is not None:
        placeholder = model.config.vision.image_token
        L_bv[:, placeholder : placeholder + 1] = -np.inf
    return L_bv


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(rows of ids as one array [b,q], padding on the right; their lengths [b]).

    >>> padded([[5], [6, 7]])[0].tolist()
    [[5, 0], [6, 7]]
    """
    lengths_b = np.array([len(ids) for ids in rows])
    tokens_bq = np.zeros((len(rows), lengths_b.max()), np.int64)
    for row, ids in zip(tokens_bq, rows, strict=True):
        row[: len(ids)] = ids
    return tokens_bq, lengths_b


class TextStream:
    """Token ids in, pieces of text out, as soon as each is complete: a character may take several tokens, one for each
    of its up to four bytes.

    What a token means can depend on the one before it, and bytes on all bytes of their run, so tokens are decoded with
    those of the last piece in front of them.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._last: list[int] = []  # the tokens of the last piece
        self._before = ""  # their text
        self._pending: list[int] = []

    def push(self, token: int | None = None) -> str:
        """The text that one more token completes, empty in the middle of a character; without a token what is left."""
        self._pending += [] if token is None else [token]
        text, count = self._text_of(self._pending), len(self._pending)
        if token is None or not text.endswith("\ufffd"):
            return self._shown(count, text)
        if count <= 3:  # may still become a character
            return ""
        first = self._text_of(self._pending[:3])  # one U+FFFD that was meant, or bytes that are no character
        return self._shown(3, first) if len(first) == 1 else self._shown(1, self._text_of(self._pending[:1]))

    def _text_of(self, ids: list[int]) -> str:
        text = self.tokenizer.decode([*self._last, *ids])
        return text[len(self._before) :] if text.startswith(self._before) else self.tokenizer.decode(ids)

    def _shown(self, count: int, text: str) -> str:
        if text or not self._last:
            self._last = self._pending[:count]
            self._before = self.tokenizer.decode(self._last)
        self._pending = self._pending[count:]
        return text


def text_of_rows(
    tokenizer: Any, count: int, steps: Iterator[list[int | None]], stop: frozenset[int]
) -> Iterator[tuple[int, str]]:
    """Steps of `generate_rows` -> (row, piece of text)."""
    streams = [TextStream(tokenizer) for _ in range(count)]
    for tokens in steps:
        for row, token in enumerate(tokens):
            if token is not None and token not in stop and (piece := streams[row].push(token)):
                yield row, piece
    for row, stream in enumerate(streams):
        if piece := stream.push():
            yield row, piece


def list_of_texts(prompts: Any) -> list[str]:
    """Several prompts as a list; one text alone, none at all, or anything that is no text is refused."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise TPAError(f"generate: prompts must be a list of texts, got {type(prompts).__name__}")
    prompts = list(prompts)
    if not prompts:
        raise TPAError("generate: prompts must hold at least one text, got 0")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TPAError(f"generate: the prompt must be a text (str), got {type(prompt).__name__}")
    return prompts


def whole_numbers(ids: Any) -> list[int]:
    """The ids of one row as a list."""
    try:
        found = np.asarray(ids)
    except ValueError:  # rows of different length
        found = np.array(None)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        got = " ".join(repr(ids).split())
        raise TPAError(f"generate: the ids of a row must be a list of whole numbers, got {got:.60}")
    return found.tolist()


def held_before(model: Any, cache: Any, rows: int) -> list[int]:
    """How many tokens of every row a cache holds already."""
    if rows < 1:
        raise TPAError("generate: at least one row of ids is needed, got 0")
    if cache is None:
        return [0] * rows
    model.check_cache(cache, rows)
    return cache.lengths_b.tolist()


def begins_text(held: Sequence[int]) -> bool:
    """Does the text of every row begin now, with BOS?"""
    if any(held) != all(held):
        raise TPAError(f"generate: either all rows of the cache must be empty or none, got lengths {list(held)}")
    return not any(held)
