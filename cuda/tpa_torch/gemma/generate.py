"""Text from a model, token by token, streamed. Twin of `tpa_ref.generate`; greedy output is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.gemma.generate import (
    PREFILL_CHUNK,
    TextStream,
    check_sampling,
    chunks,
    padded,
    prompt_tokens,
    require_tokenizer,
    text_of_rows,
)
from tpa_ref.gemma.tokenizer import STOP

from ..fast import graph
from . import vision
from .model import Model

__all__ = ["TextStream", "check_sampling", "chunks", "padded", "prompt_tokens", "require_tokenizer", "text_of_rows"]


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
    rngs = [torch.Generator().manual_seed(seed) for _ in rows]
    if cache is None:
        cache = model.new_cache(len(rows), max(map(len, rows)) + max_new_tokens)
    x_bqm = prefill(model, rows, cache, progress, images)
    if graph.serves(model, cache, max_new_tokens):
        yield from graph.stream(model, cache, x_bqm, max_new_tokens, graph.Sampling(temperature, top_k, top_p, seed))
        return
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
) -> Tensor:
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
    return torch.stack(last_bm)[:, None]


@torch.inference_mode()
def next_logits(model: Model, x_bqm: Tensor) -> Tensor:
    """Logits [b,v] of the next token. The placeholder of an image is no word: it is never said."""
    L_bv = model.logits(x_bqm)[:, 0]
    if model.config.vision is not None:
        placeholder = model.config.vision.image_token
        L_bv[:, placeholder : placeholder + 1] = -torch.inf
    return L_bv


@torch.inference_mode()
def sample(
    logits_v: Tensor,
    rng: torch.Generator,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """One token: the most likely at temperature 0, else drawn from softmax(logits / temperature) after both cuts.

    top_k keeps the k most likely; top_p the fewest most likely ones whose probabilities reach p.
    """
    if temperature == 0:
        return int(logits_v.argmax())
    logits, order = logits_v.double().cpu().sort(descending=True, stable=True)
    p = torch.softmax((logits[:top_k] - logits[0]) / temperature, -1)
    if top_p is not None:
        p = p[: int(torch.searchsorted(p.cumsum(-1), top_p - 1e-12)) + 1]
    return int(order[torch.multinomial(p, 1, generator=rng)])
