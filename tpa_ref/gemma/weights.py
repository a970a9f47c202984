"""The weights of a Gemma 3 model, by the letters, and what Hugging Face calls each of them.

A field's suffix is its shape (`WQ_hdm`: h x d x m); its metadata is the name inside a Hugging Face file, where head and
head dimension are one axis. The classes hold NumPy arrays in `tpa_ref` and torch tensors in `tpa_torch`.
"""

# ruff: noqa: RUF009 (the defaults are fields)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .config import GemmaConfig

TOWER, PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
VISION_BLOCKS = f"{TOWER}encoder.layers."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def hf(name: str) -> Any:
    """A field that Hugging Face calls so."""
    return field(metadata={"hf": name})


@dataclass
class LayerWeights:
    """One transformer block. Norm weights are stored as Gemma stores them: the factor applied is 1 + w."""

    attn_norm_m: Any = hf("input_layernorm.weight")
    WQ_hdm: Any = hf("self_attn.q_proj.weight")
    WK_gdm: Any = hf("self_attn.k_proj.weight")
    WV_gem: Any = hf("self_attn.v_proj.weight")
    WO_mhe: Any = hf("self_attn.o_proj.weight")
    q_norm_d: Any = hf("self_attn.q_norm.weight")
    k_norm_d: Any = hf("self_attn.k_norm.weight")
    post_attn_norm_m: Any = hf("post_attention_layernorm.weight")
    mlp_norm_m: Any = hf("pre_feedforward_layernorm.weight")
    W_gate_fm: Any = hf("mlp.gate_proj.weight")
    W_up_fm: Any = hf("mlp.up_proj.weight")
    W_down_mf: Any = hf("mlp.down_proj.weight")
    post_mlp_norm_m: Any = hf("post_feedforward_layernorm.weight")


@dataclass
class Weights:
    """All weights of a model. The output projection (the head) is the embedding itself unless it is given (untied)."""

    embed_vm: Any
    layers: Sequence[LayerWeights]
    final_norm_m: Any
    vision: VisionWeights | None = None
    head_vm: Any = None

    def __post_init__(self) -> None:
        if self.head_vm is None:
            self.head_vm = self.embed_vm


@dataclass
class VisionLayerWeights:
    """One block of the image tower. h, d, e and f are the tower's own; LayerNorm multiplies with w, not with 1 + w."""

    attn_norm_z: Any = hf("layer_norm1.weight")
    attn_norm_bias_z: Any = hf("layer_norm1.bias")
    WQ_hdz: Any = hf("self_attn.q_proj.weight")
    Q_bias_hd: Any = hf("self_attn.q_proj.bias")
    WK_hdz: Any = hf("self_attn.k_proj.weight")
    K_bias_hd: Any = hf("self_attn.k_proj.bias")
    WV_hez: Any = hf("self_attn.v_proj.weight")
    V_bias_he: Any = hf("self_attn.v_proj.bias")
    WO_zhe: Any = hf("self_attn.out_proj.weight")
    O_bias_z: Any = hf("self_attn.out_proj.bias")
    mlp_norm_z: Any = hf("layer_norm2.weight")
    mlp_norm_bias_z: Any = hf("layer_norm2.bias")
    W_up_fz: Any = hf("mlp.fc1.weight")
    up_bias_f: Any = hf("mlp.fc1.bias")
    W_down_zf: Any = hf("mlp.fc2.weight")
    down_bias_z: Any = hf("mlp.fc2.bias")


@dataclass
class VisionWeights:
    """The image tower, and the projector into the text model (whose norm is Gemma's: times 1 + w)."""

    layers: Sequence[VisionLayerWeights]
    W_patch_zcxy: Any = hf(f"{TOWER}embeddings.patch_embedding.weight")
    patch_bias_z: Any = hf(f"{TOWER}embeddings.patch_embedding.bias")
    position_pz: Any = hf(f"{TOWER}embeddings.position_embedding.weight")
    final_norm_z: Any = hf(f"{TOWER}post_layernorm.weight")
    final_norm_bias_z: Any = hf(f"{TOWER}post_layernorm.bias")
    soft_norm_z: Any = hf(f"{PROJECTOR}mm_soft_emb_norm.weight")
    W_project_zm: Any = hf(f"{PROJECTOR}mm_input_projection_weight")


def names_of(kind: type) -> dict[str, str]:
    """{field: Hugging Face name} of one of the classes above.

    >>> names_of(VisionWeights)["position_pz"]
    'vision_tower.vision_model.embeddings.position_embedding.weight'
    """
    return {f.name: f.metadata["hf"] for f in fields(kind) if "hf" in f.metadata}


# ---- shapes ----


def text_sizes(config: GemmaConfig) -> dict[str, int]:
    """The size of each letter in the text model."""
    return {
        "v": config.vocab_size, "m": config.hidden_size, "h": config.num_heads, "g": config.num_kv_heads,
        "d": config.head_dim, "e": config.head_dim, "f": config.intermediate_size,
    }  # fmt: skip


def vision_sizes(config: GemmaConfig) -> dict[str, int]:
    """The size of each letter in the image tower; c, x, y are those of one patch."""
    assert config.vision is not None
    vision = config.vision
    return {
        "c": vision.channels, "x": vision.patch_size, "y": vision.patch_size, "p": vision.patches_per_side**2,
        "z": vision.hidden_size, "h": vision.num_heads, "d": vision.head_dim, "e": vision.head_dim,
        "f": vision.intermediate_size, "m": config.hidden_size,
    }  # fmt: skip


def shape_of(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that the suffix of a field means.

    >>> shape_of("WK_gdm", text_sizes(GemmaConfig.gemma3_1b()))
    (1, 256, 1152)
    """
    return tuple(sizes[letter] for letter in name.rpartition("_")[2])


def hf_shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape in a file: a head dimension (d, e) is joined to the head axis (h, g) in front of it.

    >>> hf_shape("WK_gdm", text_sizes(GemmaConfig.gemma3_1b()))
    (256, 1152)
    """
    letters = name.rpartition("_")[2]
    shape: list[int] = []
    for before, letter in zip(" " + letters, letters):
        if before in "hg" and letter in "de":
            shape[-1] *= sizes[letter]
        else:
            shape.append(sizes[letter])
    return tuple(shape)


def hf_names(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with the shape it must have: those of the text model by their names in a text-only
    Hugging Face file, those of the image tower, if there is one, by the published ones.

    >>> hf_names(GemmaConfig.gemma3_1b())["model.layers.0.self_attn.k_proj.weight"]
    (256, 1152)
    """
    sizes = text_sizes(config)
    names = {EMBED: shape_of("_vm", sizes), "model.norm.weight": shape_of("_m", sizes)}
    names |= {} if config.tied else {HEAD: names[EMBED]}
    for layer in range(config.num_layers):
        names |= {f"model.layers.{layer}.{name}": hf_shape(own, sizes) for own, name in names_of(LayerWeights).items()}
    if config.vision is not None:
        sizes = vision_sizes(config)
        names |= {name: hf_shape(own, sizes) for own, name in names_of(VisionWeights).items()}
        blocks = names_of(VisionLayerWeights)
        for layer in range(config.vision.num_layers):
            names |= {f"{VISION_BLOCKS}{layer}.{name}": hf_shape(own, sizes) for own, name in blocks.items()}
    return names


def stored_name(name: str, config: GemmaConfig) -> str:
    """The name that a tensor has in a file: multimodal checkpoints put `language_model.` before the text model's.

    >>> stored_name("model.norm.weight", GemmaConfig.gemma3_1b())
    'model.norm.weight'
    """
    return f"language_model.{name}" if config.vision and name.startswith(("model.", HEAD)) else name


def is_vision(name: str) -> bool:
    """Is this the name of a tensor of the image tower or its projector?"""
    return name.startswith((TOWER, PROJECTOR))


# ---- from names and back ----


def from_named(tensors: Mapping[str, Any], config: GemmaConfig, on_disk: bool = False) -> Weights:
    """Named Hugging Face tensors -> `Weights`, split into heads (a view, nothing is copied).

    on_disk: each block is taken from `tensors` whenever it is needed.
    """

    def blocks(kind: type, prefix: str, count: int, sizes: Mapping[str, int]) -> Sequence[Any]:
        layers = LayersOnDisk(tensors, kind, prefix, count, sizes)
        return layers if on_disk else list(layers)

    vision = None
    if config.vision:
        sizes = vision_sizes(config)
        tower = blocks(VisionLayerWeights, VISION_BLOCKS, config.vision.num_layers, sizes)
        vision = VisionWeights(tower, **split(tensors, VisionWeights, "", sizes))
    layers = blocks(LayerWeights, "model.layers.", config.num_layers, text_sizes(config))
    head_vm = None if config.tied else tensors[HEAD]
    return Weights(tensors[EMBED], layers, tensors["model.norm.weight"], vision, head_vm)


def split(tensors: Mapping[str, Any], kind: type, prefix: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a class from named tensors."""
    return {own: tensors[prefix + name].reshape(shape_of(own, sizes)) for own, name in names_of(kind).items()}


class LayersOnDisk(Sequence):
    """The blocks of a model larger than memory: each is read when it is asked for, and only the last one is kept."""

    def __init__(self, tensors: Mapping[str, Any], kind: type, prefix: str, length: int, sizes: Mapping[str, int]):
        self.tensors, self.kind, self.prefix, self.length, self.sizes = tensors, kind, prefix, length, sizes
        self._held: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, layer: int) -> Any:  # type: ignore[override]
        if not 0 <= layer < len(self):
            raise IndexError(layer)
        held = self._held
        if held is None or held[0] != layer:
            self._held = held = None  # let go of the old one before reading the next
            self._held = held = layer, self._read(layer)
        return held[1]  # what was read here, whatever another thread has read meanwhile

    def _read(self, layer: int) -> Any:
        return self.kind(**split(self.tensors, self.kind, f"{self.prefix}{layer}.", self.sizes))


def joined(block: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The inverse of `split`: (name, tensor) of everything in one of the classes above, head axes joined."""
    for own, name in names_of(type(block)).items():
        array = getattr(block, own)
        sizes = dict(zip(own.rpartition("_")[2], array.shape, strict=True))
        yield prefix + name, array.reshape(hf_shape(own, sizes))


def joined_vision(vision: VisionWeights) -> Iterator[tuple[str, Any]]:
    """The same of the whole image tower, one tensor after another."""
    yield from joined(vision, "")
    for layer, block in enumerate(vision.layers):
        yield from joined(block, f"{VISION_BLOCKS}{layer}.")
