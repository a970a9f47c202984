"""Text from a model, token by token, streamed. Twin of `tpa_ref.generate`; greedy output is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.generate import (
    PREFILL_CHUNK,
    TextStream,
    check_sampling,
    padded,
    prompt_tokens,
    require_tokenizer,
    text_of_rows,
)
from tpa_ref.tokenizer import STOP

from .model import Model

__all__ = ["TextStream", "check_sampling", "padded", "prompt_tokens", "require_tokenizer", "text_of_rows"]


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
) -> Iterator[str]:
    """Stream the continuation of `prompt` as pieces of text. temperature 0 is greedy. Stops on <eos> and <end_of_turn>.

    chat: put the prompt into Gemma's chat template as the user's turn.
    """
    prompts = [prompt]
    for _, piece in generate_batch(model, prompts, max_new_tokens, temperature, top_k, top_p, seed, chat, cache):
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
) -> Iterator[tuple[int, str]]:
    """Several prompts at once: (number of the prompt, piece of its text). Each gets what it would get alone.

    progress: wraps the chunks of the prefill, for instance `tqdm.tqdm`.
    """
    tokenizer = require_tokenizer(model)
    rows = [prompt_tokens(tokenizer, prompt, chat) for prompt in prompts]
    steps = generate_rows(model, rows, max_new_tokens, temperature, top_k, top_p, seed, cache, progress)
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
) -> Iterator[int]:
    """The same on token ids, one row: prefill, then one step a token; the cache ends up without the last token."""
    for (token,) in generate_rows(model, [ids], max_new_tokens, temperature, top_k, top_p, seed, cache):
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
) -> Iterator[list[int | None]]:
    """Step by step the next token of every row of ids, None for a row that has stopped. Rows are padded on the right;
    every row has its own random numbers, the same as if it were alone.
    """
    for ids in rows:
        check_sampling(model.config, len(ids), max_new_tokens, temperature, top_k, top_p, seed)
    rngs = [torch.Generator().manual_seed(seed) for _ in rows]
    if cache is None:
        cache = model.new_cache(len(rows), max(map(len, rows)) + max_new_tokens)
    x_bqm = prefill(model, rows, cache, progress)
    running = [True] * len(rows)
    for step in range(max_new_tokens):
        L_bv = model.logits(x_bqm)[:, 0]
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


def prefill(model: Model, rows: Sequence[Sequence[int]], cache: Any, progress: Callable = iter) -> Tensor:
    """Run prompts through the cache in chunks, so that memory does not grow with their square; the final hidden state
    of each row's last token, [b,1,m].
    """
    tokens_bq, lengths_b = padded(rows)
    last_bm: list[Any] = [None] * len(rows)
    for start in progress(range(0, tokens_bq.shape[1], PREFILL_CHUNK)):
        chunk_bq = tokens_bq[:, start : start + PREFILL_CHUNK]
        here_b = np.clip(lengths_b - start, 0, chunk_bq.shape[1])
        x_bqm = model.hidden(chunk_bq, cache, None if (here_b == chunk_bq.shape[1]).all() else here_b)
        for row in np.flatnonzero(here_b):
            last_bm[row] = x_bqm[row, here_b[row] - 1]
    return torch.stack(last_bm)[:, None]


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
