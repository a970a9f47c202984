"""Text from a model, token by token, streamed: greedy, temperature, top-k and top-p, seeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .errors import TPAError
from .model import Model
from .tokenizer import STOP

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
    rng = np.random.default_rng(seed)
    if cache is None:
        cache = model.new_cache(batch=1, max_len=len(ids) + max_new_tokens)
    hidden = prefill(model, ids, cache)
    for step in range(max_new_tokens):
        token = sample(model.logits(hidden[:, -1:])[0, 0], rng, temperature, top_k, top_p)
        yield token
        if token in STOP or step + 1 == max_new_tokens:
            return
        hidden = model.hidden(np.array([[token]]), cache=cache)


def prefill(model: Model, ids: Sequence[int], cache: Any) -> np.ndarray:
    """Run a prompt through the cache in chunks, so that memory does not grow with its square; last hidden states."""
    tokens_bq = np.array([list(ids)])
    for start in range(0, tokens_bq.shape[1], PREFILL_CHUNK):
        hidden = model.hidden(tokens_bq[:, start : start + PREFILL_CHUNK], cache=cache)
    return hidden


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


def decode_stream(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Token ids -> pieces of text, as soon as each is complete (a character may take several tokens)."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        if token in STOP:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if text.endswith("\ufffd"):  # the middle of a character
            continue
        yield text[len(shown) :]
        shown = text
    rest = tokenizer.decode(ids)[len(shown) :]
    if rest:
        yield rest


def require_tokenizer(model: Any) -> Any:
    """The model's tokenizer, or one line that says how to give one."""
    if model.tokenizer is None:
        raise TPAError(
            "generate: the model has no tokenizer, and text needs one; give its file with tokenizer= (--tokenizer)"
        )
    return model.tokenizer


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """BOS and the prompt, or BOS and the chat template around it."""
    if not prompt.strip():
        raise TPAError("generate: the prompt must not be empty")
    return tokenizer.encode_chat([("user", prompt)]) if chat else tokenizer.encode(prompt)


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
