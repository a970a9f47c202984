"""The weights of a Gemma 3 text model, by the letters, and what Hugging Face calls each of them.

The two classes hold NumPy arrays in `tpa_ref` and torch tensors in `tpa_torch`; the table of names and shapes
lives once, here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import GemmaConfig


@dataclass
class LayerWeights:
    """One transformer block. Norm weights are stored as Gemma stores them: the factor applied is 1 + w."""

    attn_norm_m: Any
    WQ_hdm: Any
    WK_gdm: Any
    WV_gem: Any
    WO_mhe: Any
    q_norm_d: Any
    k_norm_d: Any
    post_attn_norm_m: Any
    mlp_norm_m: Any
    W_gate_fm: Any
    W_up_fm: Any
    W_down_mf: Any
    post_mlp_norm_m: Any


@dataclass
class Weights:
    """All weights of the text model; the output projection is the embedding itself (tied)."""

    embed_vm: Any
    layers: Sequence[LayerWeights]
    final_norm_m: Any


# field of LayerWeights -> (Hugging Face name inside model.layers.{i}, shape by letters)
LAYER_NAMES: dict[str, tuple[str, str]] = {
    "attn_norm_m": ("input_layernorm.weight", "m"),
    "WQ_hdm": ("self_attn.q_proj.weight", "hdm"),
    "WK_gdm": ("self_attn.k_proj.weight", "gdm"),
    "WV_gem": ("self_attn.v_proj.weight", "gem"),
    "WO_mhe": ("self_attn.o_proj.weight", "mhe"),
    "q_norm_d": ("self_attn.q_norm.weight", "d"),
    "k_norm_d": ("self_attn.k_norm.weight", "d"),
    "post_attn_norm_m": ("post_attention_layernorm.weight", "m"),
    "mlp_norm_m": ("pre_feedforward_layernorm.weight", "m"),
    "W_gate_fm": ("mlp.gate_proj.weight", "fm"),
    "W_up_fm": ("mlp.up_proj.weight", "fm"),
    "W_down_mf": ("mlp.down_proj.weight", "mf"),
    "post_mlp_norm_m": ("post_feedforward_layernorm.weight", "m"),
}


def axis_sizes(config: GemmaConfig) -> dict[str, int]:
    """The size of each letter.

    >>> axis_sizes(GemmaConfig.gemma3_4b())["g"]
    4
    """
    return {
        "v": config.vocab_size,
        "m": config.hidden_size,
        "h": config.num_heads,
        "g": config.num_kv_heads,
        "d": config.head_dim,
        "e": config.head_dim,
        "f": config.intermediate_size,
    }


def shape_of(letters: str, config: GemmaConfig) -> tuple[int, ...]:
    """The shape that a string of letters means.

    >>> shape_of("gdm", GemmaConfig.gemma3_1b())
    (1, 256, 1152)
    """
    sizes = axis_sizes(config)
    return tuple(sizes[letter] for letter in letters)


def hf_shape(letters: str, config: GemmaConfig) -> tuple[int, ...]:
    """The two-dimensional shape Hugging Face stores: head and head dimension are one axis there."""
    shape = shape_of(letters, config)
    if letters in ("hdm", "gdm", "gem"):
        return shape[0] * shape[1], shape[2]
    if letters == "mhe":
        return shape[0], shape[1] * shape[2]
    return shape


def hf_names(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a text-only Hugging Face checkpoint with the shape it must have.

    >>> hf_names(GemmaConfig.gemma3_1b())["model.layers.0.self_attn.k_proj.weight"]
    (256, 1152)
    """
    names = {"model.embed_tokens.weight": shape_of("vm", config), "model.norm.weight": shape_of("m", config)}
    for layer in range(config.num_layers):
        for name, letters in LAYER_NAMES.values():
            names[f"model.layers.{layer}.{name}"] = hf_shape(letters, config)
    return names


def from_named(tensors: dict[str, Any], config: GemmaConfig) -> Weights:
    """Named two-dimensional Hugging Face tensors -> `Weights`, split into heads (a view, nothing is copied)."""
    layers = [layer_weights(tensors.__getitem__, layer, config) for layer in range(config.num_layers)]
    return Weights(tensors["model.embed_tokens.weight"], layers, tensors["model.norm.weight"])


def layer_weights(read: Callable[[str], Any], layer: int, config: GemmaConfig) -> LayerWeights:
    """One block; `read` gives a tensor by its Hugging Face name."""
    return LayerWeights(
        **{
            field: read(f"model.layers.{layer}.{name}").reshape(shape_of(letters, config))
            for field, (name, letters) in LAYER_NAMES.items()
        }
    )


class LayersOnDisk(Sequence):
    """The blocks of a model larger than memory: each is read when it is asked for, and only the last one is kept."""

    def __init__(self, read: Callable[[str], Any], config: GemmaConfig):
        self._read, self._config = read, config
        self._held: tuple[int, LayerWeights] | None = None

    def __len__(self) -> int:
        return self._config.num_layers

    def __getitem__(self, layer: int) -> LayerWeights:  # type: ignore[override]
        if not 0 <= layer < len(self):
            raise IndexError(layer)
        if self._held is None or self._held[0] != layer:
            self._held = None  # let go of the old one before reading the next
            self._held = layer, layer_weights(self._read, layer, self._config)
        return self._held[1]


def to_named(weights: Weights, config: GemmaConfig) -> dict[str, Any]:
    """`Weights` -> named Hugging Face tensors; the inverse of `from_named`."""
    names = {"model.embed_tokens.weight": weights.embed_vm, "model.norm.weight": weights.final_norm_m}
    for layer, block in enumerate(weights.layers):
        names |= to_named_layer(block, layer, config)
    return names


def to_named_layer(block: LayerWeights, layer: int, config: GemmaConfig) -> dict[str, Any]:
    """One block -> named Hugging Face tensors."""
    return {
        f"model.layers.{layer}.{name}": getattr(block, field).reshape(hf_shape(letters, config))
        for field, (name, letters) in LAYER_NAMES.items()
    }
