"""A Gemma 3 model of `transformers`: where its parts are, whatever is wrapped around it (PEFT, images, accelerate)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpa_ref.errors import TPAError
from tpa_ref.gemma.config import GemmaConfig


@dataclass(frozen=True)
class Theirs:
    """whole: what the user has. outer: the part that is given token ids and masks. text: the layers."""

    whole: Any
    outer: Any
    text: Any
    config: GemmaConfig

    @property
    def attentions(self) -> list[Any]:
        """The attention of every layer."""
        return [layer.self_attn for layer in self.text.layers]

    @property
    def k_norms(self) -> Tensor:
        """The gains of every layer's K norm, [l,d], which tell one model from another."""
        return torch.stack([weight_of(attention.k_norm).float().cpu() for attention in self.attentions])

    @property
    def samples(self) -> Tensor:
        """What every layer's K and V projections make of one vector, [l,n]: another model's are others."""
        found = []
        with torch.no_grad():
            for attention in self.attentions:
                maps = attention.k_proj, attention.v_proj
                like = next((x for x in attention.parameters() if x.is_floating_point()), torch.zeros(1))
                device = like.device if like.device.type != "meta" else "cpu"
                unit_m = sample(self.config.hidden_size).to(device, like.dtype)
                found.append(torch.cat([project(unit_m).float().cpu() for project in maps]))
        return torch.stack(found)

    def run(self, ids: Tensor, cache: Any = None) -> Tensor:
        """The states behind the last norm, [b,q,m]."""
        name = "cache" if "cache" in inspect.signature(self.outer.forward).parameters else "past_key_values"
        given = {name: cache} if cache is not None else {}
        ids = ids.to(weight_of(self.text.embed_tokens).device if is_here(self.text.embed_tokens) else ids.device)
        states: Tensor = self.outer(input_ids=ids, use_cache=cache is not None, **given).last_hidden_state
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Their output projection."""
        found: Tensor = self.whole.get_output_embeddings()(states)
        return found

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """In evaluation mode, as it is used later."""
        was = self.whole.training
        self.whole.eval()
        try:
            yield
        finally:
            self.whole.train(was)

    @contextmanager
    def watched(self, found: Callable[[int, str, Tensor], None]) -> Iterator[None]:
        """Calls `found` with normed K before RoPE, [b,g,q,d], and V, [b,q,g d], of every layer that runs; the states
        before the first layer have a gradient, where gradients are wanted.
        """

        def tell(layer: int, name: str) -> Callable[..., None]:
            return lambda module, given, made: found(layer, name, made)

        def with_gradient(module: Any, given: Any, made: Tensor) -> Tensor:
            return made.detach().requires_grad_() if torch.is_grad_enabled() else made

        handles = [self.text.embed_tokens.register_forward_hook(with_gradient)]
        for layer, attention in enumerate(self.attentions):
            handles.append(attention.k_norm.register_forward_hook(tell(layer, "K")))
            handles.append(attention.v_proj.register_forward_hook(tell(layer, "V")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def sample(size: int) -> Tensor:
    """A vector with entries of about 1, always the same."""
    return torch.cos(torch.arange(size) ** 2 * 0.37) * 1.4


def find(model: Any) -> Theirs:
    """The parts of a model, or one line that says what is wrong with it."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    by_name = {type(module).__name__: module for module in reversed(modules)}  # the outermost of a kind
    text = by_name.get("Gemma3TextModel")
    if text is None:
        raise TPAError(f"cache: a Gemma 3 model of transformers is needed, got {type(model).__name__}")
    outer: Any = by_name.get("Gemma3Model", text)
    return Theirs(model, outer, text, GemmaConfig.from_hf(outer.config.to_dict()))


def weight_of(module: Any) -> Tensor:
    """The weight of a module, from where accelerate put it if it is not here."""
    weight: Tensor = module.weight
    if weight.device.type == "meta":
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if kept is None:
            raise TPAError("cache: weights of the model are on no device, and nothing says where they are kept")
        weight = kept["weight"]
    return weight.detach()


def is_here(module: Any) -> bool:
    """Are the weights of a module on a device, and not offloaded?"""
    return bool(module.weight.device.type != "meta")
