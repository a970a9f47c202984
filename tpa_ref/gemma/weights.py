"""The weights of a Gemma 3 model, by the letters, and what Hugging Face calls each of them.

The classes hold NumPy arrays in `tpa_ref` and torch tensors in `tpa_torch`; the tables of names and shapes live once,
here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    vision: VisionWeights | None = None


@dataclass
class VisionLayerWeights:
    """One block of the image tower. h, d, e and f are the tower's own; LayerNorm multiplies with w, not with 1 + w."""

    attn_norm_z: Any
    attn_norm_bias_z: Any
    WQ_hdz: Any
    Q_bias_hd: Any
    WK_hdz: Any
    K_bias_hd: Any
    WV_hez: Any
    V_bias_he: Any
    WO_zhe: Any
    O_bias_z: Any
    mlp_norm_z: Any
    mlp_norm_bias_z: Any
    W_up_fz: Any
    up_bias_f: Any
    W_down_zf: Any
    down_bias_z: Any


@dataclass
class VisionWeights:
    """The image tower, and the projector into the text model (whose norm is Gemma's: times 1 + w)."""

    W_patch_zcxy: Any
    patch_bias_z: Any
    position_pz: Any
    layers: Sequence[VisionLayerWeights]
    final_norm_z: Any
    final_norm_bias_z: Any
    soft_norm_z: Any
    W_project_zm: Any


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

# The same for the image tower, by the names in the published Hugging Face files.
TOWER, PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
VISION_BLOCKS = f"{TOWER}encoder.layers."
VISION_NAMES: dict[str, tuple[str, str]] = {
    "W_patch_zcxy": (f"{TOWER}embeddings.patch_embedding.weight", "zcxy"),
    "patch_bias_z": (f"{TOWER}embeddings.patch_embedding.bias", "z"),
    "position_pz": (f"{TOWER}embeddings.position_embedding.weight", "pz"),
    "final_norm_z": (f"{TOWER}post_layernorm.weight", "z"),
    "final_norm_bias_z": (f"{TOWER}post_layernorm.bias", "z"),
    "soft_norm_z": (f"{PROJECTOR}mm_soft_emb_norm.weight", "z"),
    "W_project_zm": (f"{PROJECTOR}mm_input_projection_weight", "zm"),
}
VISION_LAYER_NAMES: dict[str, tuple[str, str]] = {
    "attn_norm_z": ("layer_norm1.weight", "z"),
    "attn_norm_bias_z": ("layer_norm1.bias", "z"),
    "WQ_hdz": ("self_attn.q_proj.weight", "hdz"),
    "Q_bias_hd": ("self_attn.q_proj.bias", "hd"),
    "WK_hdz": ("self_attn.k_proj.weight", "hdz"),
    "K_bias_hd": ("self_attn.k_proj.bias", "hd"),
    "WV_hez": ("self_attn.v_proj.weight", "hez"),
    "V_bias_he": ("self_attn.v_proj.bias", "he"),
    "WO_zhe": ("self_attn.out_proj.weight", "zhe"),
    "O_bias_z": ("self_attn.out_proj.bias", "z"),
    "mlp_norm_z": ("layer_norm2.weight", "z"),
    "mlp_norm_bias_z": ("layer_norm2.bias", "z"),
    "W_up_fz": ("mlp.fc1.weight", "fz"),
    "up_bias_f": ("mlp.fc1.bias", "f"),
    "W_down_zf": ("mlp.fc2.weight", "zf"),
    "down_bias_z": ("mlp.fc2.bias", "z"),
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
    return _joined(letters, axis_sizes(config))


def _joined(letters: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of some letters with a head dimension (d, e) joined to the head axis (h, g) in front of it."""
    shape: list[int] = []
    for before, letter in zip(" " + letters, letters):
        if before in "hg" and letter in "de":
            shape[-1] *= sizes[letter]
        else:
            shape.append(sizes[letter])
    return tuple(shape)


def vision_sizes(config: GemmaConfig) -> dict[str, int]:
    """The size of each letter in the image tower; c, x, y are those of one patch."""
    assert config.vision is not None
    vision, d = config.vision, config.vision.head_dim
    return {
        "c": vision.channels,
        "x": vision.patch_size,
        "y": vision.patch_size,
        "p": vision.patches_per_side**2,
        "z": vision.hidden_size,
        "h": vision.num_heads,
        "d": d,
        "e": d,
        "f": vision.intermediate_size,
        "m": config.hidden_size,
    }


def hf_names(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with the shape it must have: those of the text model by their names in a text-only
    Hugging Face file, those of the image tower, if there is one, by the published ones.

    >>> hf_names(GemmaConfig.gemma3_1b())["model.layers.0.self_attn.k_proj.weight"]
    (256, 1152)
    """
    names = {"model.embed_tokens.weight": shape_of("vm", config), "model.norm.weight": shape_of("m", config)}
    for layer in range(config.num_layers):
        for name, letters in LAYER_NAMES.values():
            names[f"model.layers.{layer}.{name}"] = hf_shape(letters, config)
    if config.vision is not None:
        sizes = vision_sizes(config)
        names |= {name: _joined(letters, sizes) for name, letters in VISION_NAMES.values()}
        for layer in range(config.vision.num_layers):
            for name, letters in VISION_LAYER_NAMES.values():
                names[f"{VISION_BLOCKS}{layer}.{name}"] = _joined(letters, sizes)
    return names


def stored_name(name: str, config: GemmaConfig) -> str:
    """The name that a tensor has in a file: multimodal checkpoints put `language_model.` before the text model's.

    >>> stored_name("model.norm.weight", GemmaConfig.gemma3_1b())
    'model.norm.weight'
    """
    return f"language_model.{name}" if config.vision and name.startswith("model.") else name


def is_vision(name: str) -> bool:
    """Is this the name of a tensor of the image tower or its projector?"""
    return name.startswith((TOWER, PROJECTOR))


def from_named(tensors: Mapping[str, Any], config: GemmaConfig) -> Weights:
    """Named two-dimensional Hugging Face tensors -> `Weights`, split into heads (a view, nothing is copied)."""
    layers = [layer_weights(tensors, layer, config) for layer in range(config.num_layers)]
    vision = vision_weights(tensors, config) if config.vision else None
    return Weights(tensors["model.embed_tokens.weight"], layers, tensors["model.norm.weight"], vision)


def layer_weights(tensors: Mapping[str, Any], layer: int, config: GemmaConfig) -> LayerWeights:
    """One block, from tensors by their Hugging Face names."""
    return LayerWeights(
        **{
            field: tensors[f"model.layers.{layer}.{name}"].reshape(shape_of(letters, config))
            for field, (name, letters) in LAYER_NAMES.items()
        }
    )


def vision_weights(tensors: Mapping[str, Any], config: GemmaConfig, on_disk: bool = False) -> VisionWeights:
    """The image tower and the projector; on_disk: each block is read when it is needed."""
    assert config.vision is not None
    sizes, count = vision_sizes(config), config.vision.num_layers
    outer = {
        field: tensors[name].reshape([sizes[letter] for letter in letters])
        for field, (name, letters) in VISION_NAMES.items()
    }
    if on_disk:
        return VisionWeights(layers=VisionLayersOnDisk(tensors, config), **outer)
    return VisionWeights(layers=[vision_layer_weights(tensors, layer, config) for layer in range(count)], **outer)


def vision_layer_weights(tensors: Mapping[str, Any], layer: int, config: GemmaConfig) -> VisionLayerWeights:
    """One block of the image tower."""
    sizes = vision_sizes(config)
    return VisionLayerWeights(
        **{
            field: tensors[f"{VISION_BLOCKS}{layer}.{name}"].reshape([sizes[letter] for letter in letters])
            for field, (name, letters) in VISION_LAYER_NAMES.items()
        }
    )


class LayersOnDisk(Sequence):
    """The blocks of a model larger than memory: each is read when it is asked for, and only the last one is kept."""

    def __init__(self, tensors: Mapping[str, Any], config: GemmaConfig):
        self._tensors, self._config = tensors, config
        self._held: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._config.num_layers

    def __getitem__(self, layer: int) -> Any:  # type: ignore[override]
        if not 0 <= layer < len(self):
            raise IndexError(layer)
        if self._held is None or self._held[0] != layer:
            self._held = None  # let go of the old one before reading the next
            self._held = layer, self._read(layer)
        return self._held[1]

    def _read(self, layer: int) -> Any:
        return layer_weights(self._tensors, layer, self._config)


class VisionLayersOnDisk(LayersOnDisk):
    """The same of the image tower."""

    def __len__(self) -> int:
        return self._config.vision.num_layers if self._config.vision else 0

    def _read(self, layer: int) -> Any:
        return vision_layer_weights(self._tensors, layer, self._config)


def to_named(weights: Weights, config: GemmaConfig) -> dict[str, Any]:
    """`Weights` -> named Hugging Face tensors; the inverse of `from_named`."""
    names = {"model.embed_tokens.weight": weights.embed_vm, "model.norm.weight": weights.final_norm_m}
    for layer, block in enumerate(weights.layers):
        names |= to_named_layer(block, layer, config)
    return names | dict(to_named_vision(weights.vision) if weights.vision else ())


def to_named_vision(vision: VisionWeights) -> Iterator[tuple[str, Any]]:
    """The image tower as named Hugging Face tensors, one after another."""
    for field, (name, letters) in VISION_NAMES.items():
        yield name, _flattened(getattr(vision, field), letters)
    for layer, block in enumerate(vision.layers):
        for field, (name, letters) in VISION_LAYER_NAMES.items():
            yield f"{VISION_BLOCKS}{layer}.{name}", _flattened(getattr(block, field), letters)


def _flattened(array: Any, letters: str) -> Any:
    """An array with its head axes joined."""
    return array.reshape(_joined(letters, dict(zip(letters, array.shape, strict=True))))


def to_named_layer(block: LayerWeights, layer: int, config: GemmaConfig) -> dict[str, Any]:
    """One block -> named Hugging Face tensors."""
    return {
        f"model.layers.{layer}.{name}": getattr(block, field).reshape(hf_shape(letters, config))
        for field, (name, letters) in LAYER_NAMES.items()
    }
