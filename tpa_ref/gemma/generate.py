"""Text from a model, token by token, streamed: greedy, temperature, top-k and top-p, seeded; one prompt or a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import TPAError
from . import vision
from .config import VisionConfig
from .sampling import Sampling
from .tokenizer import STOP, place_images

PREFILL_CHUNK = 512


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
) -> Iterator[str]:
    """Stream the continuation of `prompt` as pieces of text. temperature 0 is greedy. Stops on <eos> and <end_of_turn>.

    chat: put the prompt into Gemma's chat template as the user's turn. images: pixels [i,c,x,y] (`images.read_images`);
    each goes where the prompt has a <start_of_image>, or all of them before it.
    """
    batch = generate_batch(model, [prompt], max_new_tokens, temperature, top_k, top_p, seed, chat, cache, images=images)
    for _, piece in batch:
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
) -> Iterator[tuple[int, str]]:
    """Several prompts at once: (number of the prompt, piece of its text). Each gets what it would get alone.

    progress: wraps the chunks of the prefill, for instance `tqdm.tqdm`. images: every prompt gets all of them.
    """
    tokenizer = require_tokenizer(model)
    images = vision.as_pixels(images)
    seen = model.config.vision if images is None else vision.require_vision(model.config)
    rows = [prompt_tokens(tokenizer, prompt, chat, seen, 0 if images is None else len(images)) for prompt in prompts]
    images = None if images is None else np.concatenate([images] * len(rows))
    chosen = generate_rows(model, rows, max_new_tokens, temperature, top_k, top_p, seed, cache, progress, images)
    yield from text_of_rows(tokenizer, len(rows), chosen)


def generate_tokens(
    model: Any,
    ids: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: Any = None,
    images: Any = None,
) -> Iterator[int]:
    """The same on token ids, one row: prefill, then one step a token; the cache ends up without the last token."""
    rows = generate_rows(model, [ids], max_new_tokens, temperature, top_k, top_p, seed, cache, images=images)
    for (token,) in rows:
        assert token is not None
        yield token


def generate_rows(
    model: Any,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: Any = None,
    progress: Callable = iter,
    images: Any = None,
) -> Iterator[list[int | None]]:
    """Step by step the next token of every row of ids, None for a row that has stopped. Rows are padded on the right;
    every row has its own random numbers, the same as if it were alone. images: of all rows, one row after another.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    for ids in rows:
        sampling.check(model.config, len(ids), max_new_tokens)
    if cache is None:
        cache = model.new_cache(len(rows), max(map(len, rows)) + max_new_tokens)
    L_bv = prefill(model, rows, cache, progress, images)
    streamed = model.stream(cache, L_bv, max_new_tokens, sampling)
    yield from steps(model, cache, L_bv, max_new_tokens, sampling) if streamed is None else streamed


def steps(
    model: Any, cache: Any, L_bv: np.ndarray, max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int | None]]:
    """From the logits behind the prompts: choose a token a row, feed it, and so on."""
    rngs = [np.random.default_rng(sampling.seed) for _ in L_bv]
    running = [True] * len(L_bv)
    for step in range(max_new_tokens):
        tokens = [
            sampling.choose(L_v, rng) if runs else None for L_v, rng, runs in zip(L_bv, rngs, running, strict=True)
        ]
        yield tokens
        running = [token is not None and token not in STOP for token in tokens]
        if not any(running) or step + 1 == max_new_tokens:
            return
        lengths_b = None if all(running) else np.array(running, np.int64)
        L_bv = next_logits(model, model.hidden(np.array([[token or 0] for token in tokens]), cache, lengths_b))


def prefill(
    model: Any, rows: Sequence[Sequence[int]], cache: Any, progress: Callable = iter, images: Any = None
) -> np.ndarray:
    """Run prompts through the cache in chunks, so that memory does not grow with their square; the logits [b,v] behind
    each row's last token.
    """
    tokens_bq, lengths_b = padded(rows)
    images = vision.as_pixels(images)
    is_image_bq = vision.check_images(images, tokens_bq, np.zeros_like(tokens_bq), model.config)
    last: list[Any] = [None] * len(rows)
    for start, end in progress(chunks(is_image_bq, PREFILL_CHUNK)):
        here_b = np.clip(lengths_b - start, 0, end - start)
        x_bqm = model.hidden(
            tokens_bq[:, start:end],
            cache,
            None if (here_b == end - start).all() else here_b,
            vision.images_between(images, is_image_bq, start, end),
        )
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

    def push(self, token: int) -> str:
        """The text that one more token completes; empty in the middle of a character."""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._show(text)

    def rest(self) -> str:
        """What is left at the end."""
        return self._show(self.tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        piece, self._shown = text[len(self._shown) :], text
        return piece


def text_of_rows(tokenizer: Any, count: int, steps: Iterator[list[int | None]]) -> Iterator[tuple[int, str]]:
    """Steps of `generate_rows` -> (row, piece of text)."""
    streams = [TextStream(tokenizer) for _ in range(count)]
    for tokens in steps:
        for row, token in enumerate(tokens):
            piece = "" if token is None or token in STOP else streams[row].push(token)
            if piece:
                yield row, piece
    for row, stream in enumerate(streams):
        if rest := stream.rest():
            yield row, rest


def require_tokenizer(model: Any) -> Any:
    """The model's tokenizer, or one line that says how to give one."""
    if model.tokenizer is None:
        raise TPAError(
            "generate: the model has no tokenizer, and text needs one; give its file with tokenizer= (--tokenizer)"
        )
    return model.tokenizer


def prompt_tokens(
    tokenizer: Any, prompt: str, chat: bool, vision: VisionConfig | None = None, images: int = 0
) -> list[int]:
    """BOS and the prompt, or BOS and the chat template around it; with vision, the tokens of so many images in it."""
    if not prompt.strip():
        raise TPAError("generate: the prompt must not be empty")
    options = {"vision": vision} if vision else {}
    prompt = place_images(prompt, images) if vision else prompt
    return tokenizer.encode_chat([("user", prompt)], **options) if chat else tokenizer.encode(prompt, **options)
