"""Text from a model, token by token, streamed: greedy, temperature, top-k and top-p, seeded; one prompt or a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import TPAError
from . import vision
from .config import VisionConfig
from .model import Model
from .tokenizer import STOP, place_images

PREFILL_CHUNK = 512


def generate(
    model: Model,
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
    model: Model,
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
    steps = generate_rows(model, rows, max_new_tokens, temperature, top_k, top_p, seed, cache, progress, images)
    yield from text_of_rows(tokenizer, len(rows), steps)


def generate_tokens(
    model: Model,
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
    model: Model,
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
    for ids in rows:
        check_sampling(model.config, len(ids), max_new_tokens, temperature, top_k, top_p, seed)
    rngs = [np.random.default_rng(seed) for _ in rows]
    if cache is None:
        cache = model.new_cache(len(rows), max(map(len, rows)) + max_new_tokens)
    x_bqm = prefill(model, rows, cache, progress, images)
    running = [True] * len(rows)
    for step in range(max_new_tokens):
        L_bv = next_logits(model, x_bqm)
        tokens = [
            sample(L_v, rng, temperature, top_k, top_p) if runs else None
            for L_v, rng, runs in zip(L_bv, rngs, running, strict=True)
        ]
        yield tokens
        running = [token is not None and token not in STOP for token in tokens]
        if not any(running) or step + 1 == max_new_tokens:
            return
        lengths_b = None if all(running) else np.array(running, np.int64)
        x_bqm = model.hidden(np.array([[token or 0] for token in tokens]), cache, lengths_b)


def prefill(
    model: Model, rows: Sequence[Sequence[int]], cache: Any, progress: Callable = iter, images: Any = None
) -> np.ndarray:
    """Run prompts through the cache in chunks, so that memory does not grow with their square; the final hidden state
    of each row's last token, [b,1,m].
    """
    tokens_bq, lengths_b = padded(rows)
    images = vision.as_pixels(images)
    is_image_bq = vision.check_images(images, tokens_bq, np.zeros_like(tokens_bq), model.config)
    last_bm: list[Any] = [None] * len(rows)
    for start, end in progress(chunks(is_image_bq, PREFILL_CHUNK)):
        here_b = np.clip(lengths_b - start, 0, end - start)
        x_bqm = model.hidden(
            tokens_bq[:, start:end],
            cache,
            None if (here_b == end - start).all() else here_b,
            vision.images_between(images, is_image_bq, start, end),
        )
        for row in np.flatnonzero(here_b):
            last_bm[row] = x_bqm[row, here_b[row] - 1]
    return np.stack(last_bm)[:, None]


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


def next_logits(model: Model, x_bqm: np.ndarray) -> np.ndarray:
    """Logits [b,v] of the next token. The placeholder of an image is no word: it is never said."""
    L_bv = model.logits(x_bqm)[:, 0]
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


def sample(
    logits_v: np.ndarray,
    rng: np.random.Generator,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """One token: the most likely at temperature 0, else drawn from softmax(logits / temperature) after both cuts.

    top_k keeps the k most likely; top_p the fewest most likely ones whose probabilities reach p.

    >>> sample(np.array([0.0, 2.0, 1.0]), np.random.default_rng(0))
    1
    """
    if temperature == 0:
        return int(logits_v.argmax())
    order = np.argsort(-logits_v, kind="stable")[: top_k or len(logits_v)]
    logits = logits_v[order].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature makes -inf of the others, which is what it means
        p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if top_p is not None:
        p = p[: int(np.searchsorted(np.cumsum(p), top_p - 1e-12)) + 1]
        p /= p.sum()
    return int(order[rng.choice(len(p), p=p)])


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


def check_sampling(
    config: Any, prompt: int, new: int, temperature: float, top_k: int | None, top_p: float | None, seed: int = 0
) -> None:
    """Every rule on the arguments of `generate`, in one place for both backends."""
    if prompt < 1:
        raise TPAError("generate: the prompt must have at least one token, got 0")
    if new < 1:
        raise TPAError(f"generate: max_new_tokens must be >= 1, got {new}")
    if prompt + new > config.max_positions:
        raise TPAError(
            f"generate: prompt of {prompt} and {new} new tokens exceed the model's {config.max_positions} positions"
        )
    if not 0 <= temperature < float("inf"):
        raise TPAError(f"generate: temperature must be a number >= 0, got {temperature}")
    if not 0 <= seed < 2**63:
        raise TPAError(f"generate: seed must lie in 0 ... 2^63 - 1, got {seed}")
    if top_k is not None and top_k < 1:
        raise TPAError(f"generate: top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise TPAError(f"generate: top_p must lie in (0, 1], got {top_p}")
