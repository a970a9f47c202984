"""From a Gemma 3 of `transformers` to a codec, by its own forward and backward pass: quantized, adapted or spread over
devices, it is calibrated as it will run. What is looked for is `tpa_ref.compress.calibrate`'s, which explains it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.compress import token_prediction
from tpa_ref.compress.calibrate import WINDOW, add, sensitivity_windows, share
from tpa_ref.compress.config import DEFAULT_CONTEXT, TPAConfig
from tpa_ref.compress.convert import convert, predicts
from tpa_ref.compress.moments import LayerMoments, Moments
from tpa_ref.compress.plan import make_plan
from tpa_ref.compress.token_prediction import TokenMoments
from tpa_ref.errors import TPAError
from tpa_ref.gemma.backward import ROWS
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.texts import read_text, shipped, text_windows
from tpa_ref.gemma.token_vectors import numbered
from tpa_ref.gemma.weights import LayerWeights, Weights

from ..gemma.backward import draw, second_moment
from ..gemma.model import Model
from .cache import TPACache
from .codec import Codec
from .theirs import Theirs, find, is_here, weight_of

TOKENS, FEW = 16_384, 512


def calibrate_cache(
    model: Any,
    tokenizer: Any,
    text: str | Path | None = None,
    *,
    kv_budget: float | None = None,
    max_kl: float | None = None,
    holdout: str | Path | None = None,
    tokens: int = TOKENS,
    sensitivity_tokens: int | None = None,
    progress: Callable | None = None,
    **choice: Any,
) -> Codec:
    """How to cache the K and V of a model: `TPACache(codec, model)`.

    text: to calibrate on, or its path; best like what the model will read (default: the shipped one, of many kinds).
    choice: of `TPAConfig`: rate=3, or mode="latent", k_rank=..., sinks, recent, predict, context. Instead of a rate,
    kv_budget: at least so many times smaller than a dense cache; max_kl: at most this KL, measured on `holdout`.
    tokens: how much of the text is used; sensitivity_tokens: how much of it also goes backwards. progress: wraps the
    windows (default: a bar on a terminal).
    """
    theirs, planned = find(model), kv_budget is not None or max_kl is not None
    base = chosen(choice, planned, max_kl, holdout, tokens)
    if base.predict is None and not is_here(theirs.text.embed_tokens):
        base = replace(base, predict=False)  # token vectors would be read from where the table is offloaded to
    predict = predicts(base, theirs.config)
    with theirs.at_rest(), torch.inference_mode(False):
        ours = mirror(theirs, tokenizer, predict or token_prediction.knows(0, base, theirs.config, base.choice))
        said = shipped("calibration") if text is None else read_text(text)
        windows = list(text_windows(ours, said, tokens, WINDOW))
        if (count := sum(map(len, windows))) < FEW:
            warnings.warn(f"calibrated on {count} tokens alone: the codec will be poor", stacklevel=2)
        backwards = sensitivity_windows(windows, sensitivity_tokens or None)
        moments = measured(ours, windows, backwards, predict, progress or bar)
        if planned:
            context = base.context or min(DEFAULT_CONTEXT, theirs.config.max_positions)
            base = make_plan(ours, moments, kv_budget, max_kl, context, holdout or shipped("holdout"), base).config
        converted = convert(ours, base, moments)
        return converted.codec


def chosen(choice: dict[str, Any], planned: bool, max_kl: float | None, holdout: Any, tokens: Any) -> TPAConfig:
    """What was asked for, to convert with or to plan from, or one line about what means nothing here."""
    try:
        base = TPAConfig(**choice)
    except TypeError as problem:
        raise TPAError(f"calibrate_cache: {str(problem).replace('TPAConfig.__init__() ', '')}") from None
    if base.q_rank is not None:
        raise TPAError("calibrate_cache: q_rank is about queries, which are the model's own here")
    if holdout is not None and max_kl is None:
        raise TPAError("calibrate_cache: holdout is the text of max_kl, which is not given")
    if not (type(tokens) is int and tokens > 0):
        raise TPAError(f"calibrate_cache: tokens must be a whole number >= 1, got {tokens!r}")
    if planned and (base.rate is not None or base.mode is not None):
        raise TPAError("calibrate_cache: a rate or a mode, or else kv_budget and max_kl")
    return replace(base, rate=1.0) if planned else base


def bar(items: Any) -> Any:
    """A progress bar on a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc="calibrating", leave=False, disable=None)


class Mirror(Model):
    """A model of theirs as this package sees it: it converts and compares, and they compute."""

    theirs: Theirs

    @cached_property
    def codec(self) -> Codec:
        """How it caches, once it is converted."""
        return Codec(self.config, self.tpa, self.pairs, self.theirs.k_norms, self.theirs.samples)

    def hidden(self, tokens_bq: Any, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        """The final states of their model, with a cache of ours once there is one."""
        with torch.no_grad():
            cache = None if self.tpa is None else TPACache(self.codec, self.theirs.whole, fast=False)
            return self.theirs.run(torch.from_numpy(np.asarray(tokens_bq)), cache)

    def logits(self, x_bqm: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        with torch.no_grad():
            return self.theirs.logits(x_bqm).float()


def mirror(theirs: Theirs, tokenizer: Any, reads_tokens: bool) -> Mirror:
    """Their model for `compress`. reads_tokens: with their embedding table and first layer, which prediction needs."""
    kind = type("Mirror", (Mirror,), {"theirs": theirs})
    layers: list[Any] = []
    embed_vm = weight_of(theirs.text.embed_tokens) if reads_tokens else torch.zeros(1, 1)
    if reads_tokens:
        layers.append(first_layer(theirs, embed_vm))
    made: Mirror = kind(theirs.config, Weights(embed_vm, layers, torch.zeros(1)), Words(tokenizer))
    return made


def first_layer(theirs: Theirs, embed_vm: Tensor) -> LayerWeights:
    """What makes K and V of the first layer, adapters included: the maps are asked for what they do to unit vectors."""
    layer, config = theirs.text.layers[0], theirs.config
    attention = layer.self_attn
    units = torch.eye(config.hidden_size, dtype=embed_vm.dtype, device=embed_vm.device)
    with torch.no_grad():
        K_hm, V_hm = (project(units).mT.float() for project in (attention.k_proj, attention.v_proj))
    shape = config.num_kv_heads, config.head_dim, config.hidden_size
    made: dict[str, Any] = dict.fromkeys(LayerWeights.__dataclass_fields__)
    made |= {"WK_gdm": K_hm.reshape(shape), "WV_gem": V_hm.reshape(shape)}
    made |= {"attn_norm_m": weight_of(layer.input_layernorm).float(), "k_norm_d": weight_of(attention.k_norm).float()}
    return LayerWeights(**made)


class Words:
    """Their tokenizer as this package calls one."""

    def __init__(self, tokenizer: Any):
        if not callable(tokenizer) or getattr(tokenizer, "bos_token_id", None) is None:
            raise TPAError(f"calibrate_cache: the model's tokenizer is needed, got {type(tokenizer).__name__}")
        self.theirs, self.bos = tokenizer, tokenizer.bos_token_id

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids: list[int] = self.theirs(text, add_special_tokens=False)["input_ids"]
        return [self.bos, *ids] if bos else ids


def measured(ours: Mirror, windows: list[list[int]], backwards: int, predict: bool, progress: Callable) -> Moments:
    """Moments of every layer: all windows forwards, the first ones backwards as well."""
    rng, config = np.random.default_rng(0), ours.config
    sums: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    text: dict[str, Any] = {}
    firsts: list[list[np.ndarray]] = [[] for _ in range(config.num_layers)]
    for index, window in enumerate(progress(windows)):
        held, gradients = one_window(ours, window, index < backwards, rng)
        Z_bqz = vectors(ours, window) if predict else None
        if Z_bqz is not None:
            add(text, dict(zip(("mean", "S"), ours.token_moments(Z_bqz[:, 1:]), strict=True)))
        for layer, (K, V) in enumerate(held):
            Z = None if Z_bqz is None else Z_bqz[:, 1:].to(K.device)
            add(sums[layer], ours.moments(K[:, 1:], V[:, 1:], Z))
            sums[layer]["first.x"] = ours.moments(K[:, :1], V[:, :1])["mean"]
        for layer, pair in enumerate(gradients):
            F_k, F_v = (ours.double(second_moment(G[:, 1:])) for G in pair)
            add(sums[layer], {"F.k": F_k, "F.v": F_v})
            firsts[layer].append(np.concatenate([ours.double(G[0, 0]) for G in pair]))
    tokens, there = (max(1, sum(len(w) - 1 for w in of)) for of in (windows, windows[:backwards]))
    shares = np.array([share(windows), share(windows[:backwards])])
    layers = {}
    for layer, found in enumerate(sums):
        first = {"first.x": found.pop("first.x"), "first.share": shares, "first.G": np.stack(firsts[layer])}
        averaged = {name: total / (there if name.startswith("F.") else tokens) for name, total in found.items()}
        layers[layer] = LayerMoments.of(averaged | first)
    of_tokens = TokenMoments(text["mean"] / tokens, text["S"] / tokens, tokens) if text else None
    return Moments(layers, tokens, of_tokens)


def one_window(ours: Mirror, window: list[int], back: bool, rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """(K before RoPE and V of every layer, [b,q,g,d] each; their gradients of -log p(y), y drawn from p)."""
    theirs, config = ours.theirs, ours.config
    found: dict[tuple[int, str], Tensor] = {}
    with theirs.watched(lambda layer, name, x: found.__setitem__((layer, name), x)), torch.set_grad_enabled(back):
        states = theirs.run(torch.tensor([window]))
    layers = range(config.num_layers)
    gradients: list[Any] = []
    if back:
        wanted = [found[layer, name] for layer in layers for name in "KV"]
        made = torch.autograd.grad(states, wanted, head_gradient(theirs, states.detach(), rng))
        gradients = [(by_token(made[2 * n], config), by_token(made[2 * n + 1], config)) for n in layers]
    return [tuple(by_token(found[n, name].detach(), config) for name in "KV") for n in layers], gradients


def by_token(x: Tensor, config: GemmaConfig) -> Tensor:
    """K [b,g,q,d] or V [b,q,g d] -> [b,q,g,d] in float32."""
    whole = x.transpose(1, 2) if x.dim() == 4 else x.unflatten(-1, (config.num_kv_heads, config.head_dim))
    return whole.float()


def head_gradient(theirs: Theirs, states: Tensor, rng: np.random.Generator) -> Tensor:
    """Gradient of -log p(y) with respect to the final states, y drawn from the model's own p: [b,q,m] twice."""
    gradients = []
    for part in states.split(ROWS, 1):
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            logits = theirs.logits(part)
        P_bqv = torch.softmax(logits.detach().float(), -1)
        y_bq1 = draw(P_bqv, rng)[..., None]
        P_bqv.scatter_add_(-1, y_bq1, torch.full_like(y_bq1, -1, dtype=P_bqv.dtype))
        gradients.append(torch.autograd.grad(logits, part, P_bqv.to(logits.dtype))[0])
    return torch.cat(gradients, 1)


def vectors(ours: Mirror, window: list[int]) -> Tensor:
    """Token vectors of a window, [1,q,2m]."""
    text_bt = numbered(np.array([window]), np.ones((1, len(window)), bool))
    return ours.token_vectors(text_bt, np.arange(len(window))[None])
