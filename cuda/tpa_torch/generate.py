"""Text from a model, token by token, streamed. Twin of `tpa_ref.generate`; greedy output is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tpa_ref.generate import PREFILL_CHUNK, check_sampling, decode_stream, prompt_tokens, require_tokenizer
from tpa_ref.tokenizer import STOP

from .model import Model

__all__ = ["check_sampling", "decode_stream", "prompt_tokens", "require_tokenizer"]


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
    tokenizer = require_tokenizer(model)
    ids = prompt_tokens(tokenizer, prompt, chat)
    yield from decode_stream(
        tokenizer, generate_tokens(model, ids, max_new_tokens, temperature, top_k, top_p, seed, cache)
    )


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
    """The same on token ids: prefill in chunks, then one step a token; the cache ends up without the last token."""
    check_sampling(model.config, len(ids), max_new_tokens, temperature, top_k, top_p, seed)
    rng = torch.Generator().manual_seed(seed)
    if cache is None:
        cache = model.new_cache(batch=1, max_len=len(ids) + max_new_tokens)
    hidden = prefill(model, ids, cache)
    for step in range(max_new_tokens):
        token = sample(model.logits(hidden[:, -1:])[0, 0], rng, temperature, top_k, top_p)
        yield token
        if token in STOP or step + 1 == max_new_tokens:
            return
        hidden = model.hidden([[token]], cache=cache)


def prefill(model: Model, ids: Sequence[int], cache: Any) -> Tensor:
    """Run a prompt through the cache in chunks, so that memory does not grow with its square; last hidden states."""
    for start in range(0, len(ids), PREFILL_CHUNK):
        hidden = model.hidden([list(ids[start : start + PREFILL_CHUNK])], cache=cache)
    return hidden


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
