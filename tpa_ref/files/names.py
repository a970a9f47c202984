"""The names that tensors have in every format, brought to those of `weights.hf_names`."""

from __future__ import annotations

import itertools
from dataclasses import replace

from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.weights import HEAD, PROJECTOR, TOWER, VisionWeights, hf_names, is_vision, names_of
from .entry import Entry

GEMMA_PYTORCH_VISION = "siglip_vision_model."
PREFIXES = {  # theirs: ours, the longer one first
    "model.vision_tower.vision_model.": TOWER,
    "model.vision_tower.": TOWER,
    "vision_tower.vision_model.": TOWER,
    "vision_tower.": TOWER,
    GEMMA_PYTORCH_VISION: TOWER,
    "model.multi_modal_projector.": PROJECTOR,
    "multi_modal_projector.": PROJECTOR,
    "mm_soft_embedding_norm.": f"{PROJECTOR}mm_soft_emb_norm.",
    "mm_input_projection.": f"{PROJECTOR}mm_input_projection.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "embedder.": "model.embed_tokens.",
    "embed_tokens.": "model.embed_tokens.",  # saved without a head
    "layers.": "model.layers.",
    "norm.": "model.norm.",
    "text_token_embedder.": "model.embed_tokens.",
}
GEMMA_PYTORCH_TEXT = {  # within a name; what is not here has the name that it has in Hugging Face's files
    ".self_attn.query_norm.": ".self_attn.q_norm.",
    ".self_attn.key_norm.": ".self_attn.k_norm.",
}
GEMMA_PYTORCH_TOWER = {
    "patch_embedding.": "embeddings.patch_embedding.",
    "position_embedding.": "embeddings.position_embedding.",
    "encoder_blocks.": "encoder.layers.",
    "self_attn.o_proj.": "self_attn.out_proj.",
    "final_norm.": "post_layernorm.",
}
UNTRANSPOSED = f"{PROJECTOR}mm_input_projection.weight"  # gemma_pytorch's projector is [m, z], Hugging Face's [z, m]


def our_name(key: str) -> str | None:
    """The name used here of a tensor of any format; None for what the model does not use.

    >>> our_name("language_model.model.norm.weight"), our_name("model.language_model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    >>> our_name("text_token_embedder.weight"), our_name("model.layers.0.self_attn.key_norm.weight")
    ('model.embed_tokens.weight', 'model.layers.0.self_attn.k_norm.weight')
    >>> our_name("siglip_vision_model.final_norm.bias"), our_name("model.vision_tower.post_layernorm.bias")
    ('vision_tower.vision_model.post_layernorm.bias', 'vision_tower.vision_model.post_layernorm.bias')
    """
    if key.endswith(("freqs_cis", "inv_freq")):
        return None  # RoPE's tables
    if key in (HEAD, f"language_model.{HEAD}"):
        return HEAD
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    ours, name = PREFIXES.get(prefix, ""), key.removeprefix(prefix)
    if is_vision(ours) and (name.startswith("head.") or name.endswith("position_ids")):
        return None  # Gemma uses neither SigLIP's pooling head nor the numbers of its positions
    inner = {"": GEMMA_PYTORCH_TEXT, GEMMA_PYTORCH_VISION: GEMMA_PYTORCH_TOWER}.get(prefix, {})
    for theirs in inner:
        name = name.replace(theirs, inner[theirs], 1)
    return ours + name


def named_entries(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors under the names of `weights.hf_names` (Q, K, V still fused where they are), buffers left out, int8
    weights multiplied with their scales, gemma_pytorch's projector transposed.
    """
    renamed: dict[str, Entry] = {}
    for key, entry in entries.items():
        name = our_name(key)
        if name in renamed:
            raise TPAError(f"load: {name} is held twice, under two names, one of them {key}")
        if name is not None:
            renamed[name] = entry
    made = dequantized(renamed)
    if UNTRANSPOSED in made:
        entry = made.pop(UNTRANSPOSED)
        made[names_of(VisionWeights)["W_project_zm"]] = replace(entry, shape=entry.shape[::-1], transposed=True)
    return made


def dequantized(entries: dict[str, Entry]) -> dict[str, Entry]:
    """int8 weights [n, m] with one scale a row [n] become float32: w = weight * scale."""
    made = {}
    for name, entry in entries.items():
        if name.endswith(".weight_scaler") and name.removesuffix("_scaler") in entries:
            continue
        scale = entries.get(f"{name}_scaler") if name.endswith(".weight") else None
        if scale and (entry.dtype != "int8" or len(entry.shape) != 2 or scale.shape != entry.shape[:1]):
            raise TPAError(
                f"load: {name} with a weight_scaler must be int8 with one scale a row, got {entry.dtype} "
                f"{list(entry.shape)} and scales {list(scale.shape)}"
            )
        made[name] = replace(entry, dtype="float32", scale=scale) if scale else entry
    return made


def split_qkv(entries: dict[str, Entry], config: GemmaConfig) -> tuple[dict[str, Entry], list[str]]:
    """(tensors with fused rows Q | K | V taken apart, a line for each that does not have these rows)."""
    expected, made, problems = hf_names(config), {}, []
    for name, entry in entries.items():
        parts = [name.replace("qkv_proj", f"{part}_proj") for part in "qkv"]
        if not name.endswith(".self_attn.qkv_proj.weight") or any(part not in expected for part in parts):
            made[name] = entry  # a fused one here is of a layer too many, and reported as unexpected
            continue
        stops = list(itertools.accumulate(expected[part][0] for part in parts))
        if entry.shape != (stops[-1], config.hidden_size):
            problems.append(f"{name} must be {[stops[-1], config.hidden_size]}, got {list(entry.shape)}")
        for part, start, stop in zip(parts, [0, *stops], stops):
            made[part] = replace(entry, shape=(stop - start, config.hidden_size), rows=slice(start, stop))
    return made, problems
