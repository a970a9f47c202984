"""Text from a model, token by token, streamed: greedy, temperature, top-k and top-p, seeded; one prompt or a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TPAError
from . import vision
from .chat import chat_tokens
from .tokenizer import END_OF_TURN, place_images, require_tokenizer

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the most likely token. Otherwise one drawn from softmax(logits / temperature) after both cuts:
    top_k keeps the k most likely; top_p the fewest most likely ones whose probabilities reach p.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self, config: Any, prompt: int, new: int) -> None:
        """Every rule on the arguments of `generate`, for a prompt of so many tokens and so many new ones."""
        if prompt < 1:
            raise TPAError("generate: the prompt must have at least one token, got 0")
        if new < 1:
            raise TPAError(f"generate: max_new_tokens must be >= 1, got {new}")
        most = config.max_positions
        if prompt + new > most:
            raise TPAError(f"generate: prompt of {prompt} and {new} new tokens exceed the model's {most} positions")
        if not 0 <= self.temperature < float("inf"):
            raise TPAError(f"generate: temperature must be a number >= 0, got {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise TPAError(f"generate: seed must lie in 0 ... 2^63 - 1, got {self.seed}")
        if self.top_k is not None and self.top_k < 1:
            raise TPAError(f"generate: top_k must be >= 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise TPAError(f"generate: top_p must lie in (0, 1], got {self.top_p}")

    def choose(self, logits_v: np.ndarray, rng: np.random.Generator) -> int:
        """One token.

        >>> Sampling().choose(np.array([0.0, 2.0, 1.0]), np.random.default_rng(0))
        1
        """
        if self.temperature == 0:
            return int(logits_v.argmax())
        order = np.argsort(-logits_v, kind="stable")[: self.top_k or len(logits_v)]
        logits = logits_v[order].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature makes -inf of the others, which is what it means
            p = np.exp((logits - logits.max()) / self.temperature)
        p /= p.sum()
        if self.top_p is not None:
            p = p[: int(np.searchsorted(np.cumsum(p), self.top_p - 1e-12)) + 1]
            p /= p.sum()
        return int(order[rng.choice(len(p), p=p)])


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
    (`Beside.stop_tokens`).

    chat: put the prompt into the chat template as the user's turn, behind a `system` text if there is one. images:
    pixels [i,c,x,y] (`images.read_images`); each goes where the prompt has a <start_of_image>, or all before it.
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
    """Several prompts at once: (number of the prompt, piece of its text). Each gets what it would get alone.

    progress: wraps the chunks of the prefill, for instance `tqdm.tqdm`. images: every prompt gets all of them.
    """
    tokenizer = require_tokenizer(model, "generate")
    images = vision.as_pixels(images)
    shown = 0 if images is None else len(images)
    if shown:
        vision.require_vision(model.config)
    rows = [prompt_tokens(model, prompt, chat, shown, system) for prompt in prompts]
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
    every row has its own random numbers, the same as if it were alone. images: of all rows, one row after another.
    stop: ids that end a row (default: the model's).
    """
    stop = model.beside.stop_tokens if stop is None else stop
    for ids in rows:
        sampling.check(model.config, len(ids), max_new_tokens)
    if cache is None:
        cache = model.new_cache(len(rows), max(map(len, rows)) + max_new_tokens)
    L_bv = prefill(model, rows, cache, progress, images)
    streamed = model.stream(cache, L_bv, max_new_tokens, sampling, stop)
    yield from steps(model, cache, L_bv, max_new_tokens, sampling, stop) if streamed is None else streamed


def steps(
    model: Any, cache: Any, L_bv: np.ndarray, count: int, sampling: Sampling, stop: frozenset[int]
) -> Iterator[list[int | None]]:
    """From the logits after the prompts: choose a token a row, feed it, and so on."""
    rngs = [np.random.default_rng(sampling.seed) for _ in L_bv]
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
    """Token ids in, pieces of text out, as soon as each is complete (a character may take several tokens)."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, *tokens: int) -> str:
        """The text that one more token completes, empty in the middle of a character; without a token what is left."""
        self._ids += tokens
        text = self.tokenizer.decode(self._ids)
        if tokens and text.endswith("\ufffd"):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece


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


def prompt_tokens(model: Any, prompt: str, chat: bool, images: int = 0, system: str | None = None) -> list[int]:
    """BOS and the prompt, or the chat template around it, with the tokens of so many images in it.

    model: also a `Found`, which has the same tokenizer, config and files.
    """
    check_system(system, chat)
    if not prompt.strip():
        raise TPAError("generate: the prompt must not be empty")
    shown = model.config.vision
    prompt = place_images(prompt, images) if shown else prompt
    if not chat:
        return model.tokenizer.encode(prompt, vision=shown)
    turns = [("user", prompt)] if system is None else [("system", system), ("user", prompt)]
    return chat_tokens(model.tokenizer, model.beside, turns, shown)


def check_system(system: str | None, chat: bool) -> None:
    if system is not None and not chat:
        raise TPAError("generate: a system text belongs to a chat, but chat (--chat) is not asked for")


def stop_tokens(model: Any, chat: bool) -> frozenset[int]:
    """Ids that end a text: what the model's files say, and in a chat the end of a turn."""
    return model.beside.stop_tokens | ({END_OF_TURN} if chat else set())
