"""The names that tensors have in every format, brought to those of `weights.hf_names`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.weights import PROJECTOR, TOWER, VisionWeights, hf_names, is_vision, names_of
from .formats import Entry

VISION_PREFIXES = {  # the longer one first
    "model.vision_tower.vision_model.": TOWER,
    "model.vision_tower.": TOWER,
    "vision_tower.vision_model.": TOWER,
    "vision_tower.": TOWER,
    "siglip_vision_model.": TOWER,
    "model.multi_modal_projector.": PROJECTOR,
    "multi_modal_projector.": PROJECTOR,
    "mm_soft_embedding_norm.": f"{PROJECTOR}mm_soft_emb_norm.",
    "mm_input_projection.": f"{PROJECTOR}mm_input_projection.",
}
GEMMA_PYTORCH_TOWER = {
    "patch_embedding.": "embeddings.patch_embedding.",
    "position_embedding.": "embeddings.position_embedding.",
    "encoder_blocks.": "encoder.layers.",
    "self_attn.o_proj.": "self_attn.out_proj.",
    "final_norm.": "post_layernorm.",
}
UNTRANSPOSED = f"{PROJECTOR}mm_input_projection.weight"  # gemma_pytorch's projector is [m, z], Hugging Face's [z, m]
GEMMA_PYTORCH_NAMES = {  # the other names are the same as Hugging Face's
    "embedder.": "model.embed_tokens.",
    "text_token_embedder.": "model.embed_tokens.",
    ".self_attn.query_norm.": ".self_attn.q_norm.",
    ".self_attn.key_norm.": ".self_attn.k_norm.",
}


def named_entries(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors under the names of `weights.hf_names` (Q, K, V still fused where they are), buffers left out, int8
    weights multiplied with their scales, gemma_pytorch's projector transposed.
    """
    renamed: dict[str, Entry] = {}
    for key, entry in entries.items():
        name = our_name(key)
        if name is None:
            continue
        if name in renamed:
            raise TPAError(f"load: {name} is held twice, under two names, one of them {key}")
        renamed[name] = entry
    made = _dequantized(renamed)
    if UNTRANSPOSED in made:
        entry = made.pop(UNTRANSPOSED)
        made[names_of(VisionWeights)["W_project_zm"]] = Entry(entry.shape[::-1], entry.dtype, _transposed(entry))
    return made


def our_name(key: str) -> str | None:
    """The name used here of a tensor of any format; None for what the model does not use.

    >>> our_name("language_model.model.norm.weight"), our_name("model.language_model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    >>> our_name("text_token_embedder.weight"), our_name("model.layers.0.self_attn.key_norm.weight")
    ('model.embed_tokens.weight', 'model.layers.0.self_attn.k_norm.weight')
    >>> our_name("siglip_vision_model.final_norm.bias"), our_name("model.vision_tower.post_layernorm.bias")
    ('vision_tower.vision_model.post_layernorm.bias', 'vision_tower.vision_model.post_layernorm.bias')
    """
    if key.endswith("freqs_cis"):
        return None
    for prefix, ours in VISION_PREFIXES.items():
        if key.startswith(prefix):
            return _vision_name(ours, key.removeprefix(prefix), prefix == "siglip_vision_model.")
    if key in ("lm_head.weight", "language_model.lm_head.weight"):  # the output projection is the embedding
        return None
    for prefix in ("language_model.model.", "model.language_model."):
        if key.startswith(prefix):
            return "model." + key.removeprefix(prefix)
    for theirs, ours in GEMMA_PYTORCH_NAMES.items():
        if key.startswith(theirs) or (theirs.startswith(".") and theirs in key):
            return key.replace(theirs, ours, 1)
    return key


def _vision_name(prefix: str, name: str, gemma_pytorch: bool) -> str | None:
    """A name inside the image tower; Gemma uses neither SigLIP's pooling head nor the numbers of its positions."""
    if name.startswith("head.") or name.endswith("position_ids"):
        return None
    for theirs, ours in GEMMA_PYTORCH_TOWER.items() if gemma_pytorch else ():
        name = name.replace(theirs, ours, 1)
    return prefix + name


def _transposed(entry: Entry) -> Callable[[str], Any]:
    def read(framework: str) -> Any:
        made = entry.read(framework).T
        return np.ascontiguousarray(made) if framework == "numpy" else made.contiguous()

    return read


def _dequantized(entries: dict[str, Entry]) -> dict[str, Entry]:
    """int8 weights [n, m] with one scale a row [n] become float32: w = weight * scale."""
    scales = {name.removesuffix("_scaler"): name for name in entries if name.endswith(".weight_scaler")}
    made = {}
    for name, entry in entries.items():
        if name.endswith(".weight_scaler") and name.removesuffix("_scaler") in entries:
            continue
        if name in scales:
            scale = entries[scales[name]]
            if entry.dtype != "int8" or len(entry.shape) != 2 or scale.shape != entry.shape[:1]:
                raise TPAError(
                    f"load: {name} with a weight_scaler must be int8 with one scale a row, got {entry.dtype} "
                    f"{list(entry.shape)} and scales {list(scale.shape)}"
                )
            entry = Entry(entry.shape, "float32", _scaled(entry, scale))
        made[name] = entry
    return made


def _scaled(weight: Entry, scale: Entry) -> Callable[[str], Any]:
    def read(framework: str) -> Any:
        w, s = weight.read(framework), scale.read(framework)
        if framework == "numpy":
            return w.astype(np.float32) * s.astype(np.float32)[:, None]
        return w.float() * s.float()[:, None]

    return read


def split_qkv(entries: dict[str, Entry], config: GemmaConfig) -> tuple[dict[str, Entry], list[str]]:
    """(tensors with fused rows Q | K | V taken apart, a line for each that does not have these rows)."""
    expected, made, problems = hf_names(config), {}, []
    for name, entry in entries.items():
        if not name.endswith(".self_attn.qkv_proj.weight"):
            made[name] = entry
            continue
        names = [name.replace("qkv_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if any(part not in expected for part in names):  # a layer too many: reported as unexpected
            made[name] = entry
            continue
        rows = [expected[part][0] for part in names]
        if entry.shape != (sum(rows), config.hidden_size):
            problems.append(f"{name} must be {[sum(rows), config.hidden_size]}, got {list(entry.shape)}")
        start = 0
        for part, count in zip(names, rows, strict=True):
            made[part] = Entry((count, config.hidden_size), entry.dtype, _rows(entry, start, start + count))
            start += count
    return made, problems


def _rows(entry: Entry, start: int, stop: int) -> Callable[[str], Any]:
    def read(framework: str) -> Any:
        rows = entry.read(framework)[start:stop]
        return rows.copy() if framework == "numpy" else rows.clone()  # three views of one tensor cannot be saved

    return read


def shown_size(entries: dict[str, Entry]) -> tuple[int, int]:
    """(number of layers, model width) as the tensors show them; zeros where they do not."""
    numbers = [int(found[1]) for name in entries if (found := re.match(r"model\.layers\.(\d{1,4})\.", name))]
    embedding = entries.get("model.embed_tokens.weight")
    width = embedding.shape[1] if embedding and len(embedding.shape) == 2 else 0
    return max(numbers, default=-1) + 1, width


def with_vision(config: GemmaConfig, entries: dict[str, Entry]) -> tuple[GemmaConfig, dict[str, Entry]]:
    """Config and tensors, both with an image tower or both without: one that only the config or only the file knows
    of is left out.
    """
    if config.vision is None:
        return config, {name: entry for name, entry in entries.items() if not is_vision(name)}
    return (config if any(map(is_vision, entries)) else replace(config, vision=None)), entries


def with_rows(config: GemmaConfig, entries: dict[str, Entry]) -> GemmaConfig:
    """The config with the embedding rows that are there: 262,144 and 262,208 both occur for one and the same model."""
    embedding = entries.get("model.embed_tokens.weight")
    rows = embedding.shape[0] if embedding and len(embedding.shape) == 2 else config.vocab_size
    return replace(config, vocab_size=rows) if {rows, config.vocab_size} <= {262_144, 262_208} else config
