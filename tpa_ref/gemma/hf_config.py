"""Hugging Face's config.json, text-only or multimodal, to and from a `GemmaConfig`.

Two tables say which key is which field. Both generations of key names are understood (`rope_theta` ... and
`rope_parameters`); what is written every `transformers` >= 4.50 reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import TPAError
from .config import LAYERS_PER_GLOBAL, GemmaConfig, VisionConfig, layer_pattern, published

MAX_LAYERS = 10_000  # anything above is a damaged config
GELU = "gelu_pytorch_tanh"
Table = tuple[tuple[str, str, Any], ...]

# (field of GemmaConfig, key of the file, default): what a file leaves out takes the class defaults of `transformers`.
TEXT: Table = (
    ("vocab_size", "vocab_size", 262_208),
    ("hidden_size", "hidden_size", 2304),
    ("num_layers", "num_hidden_layers", 26),
    ("num_heads", "num_attention_heads", 8),
    ("num_kv_heads", "num_key_value_heads", 4),
    ("head_dim", "head_dim", 256),
    ("intermediate_size", "intermediate_size", 9216),
    ("sliding_window", "sliding_window", 4096),
    ("query_pre_attn_scalar", "query_pre_attn_scalar", 256),
    ("max_positions", "max_position_embeddings", 131_072),
    ("rms_eps", "rms_norm_eps", 1e-6),
)

# The same for VisionConfig inside vision_config, ...
TOWER: Table = (
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 16),
    ("channels", "num_channels", 3),
    ("hidden_size", "hidden_size", 768),
    ("num_layers", "num_hidden_layers", 12),
    ("num_heads", "num_attention_heads", 12),
    ("intermediate_size", "intermediate_size", 3072),
    ("norm_eps", "layer_norm_eps", 1e-6),
)

# ... and beside it. Newer files say `image_token_id` and so on.
IMAGE_TOKENS: Table = (
    ("image_token", "image_token_index", 262_144),
    ("start_token", "boi_token_index", 255_999),
    ("end_token", "eoi_token_index", 256_000),
)

# Keys of which Gemma 3 allows one value: (what a message calls it, is this it?).
Rule = tuple[str, Callable[[Any], bool]]
RULES: dict[str, Rule] = {
    "attn_logit_softcapping": ("null for Gemma 3", lambda x: x is None),
    "final_logit_softcapping": ("null for Gemma 3", lambda x: x is None),
    "attention_bias": ("false for Gemma 3", lambda x: not x),
    "use_bidirectional_attention": ("false for Gemma 3", lambda x: not x),
    "hidden_activation": (f"{GELU!r}", lambda x: x is None or x == GELU),
}


# ---- reading ----


def from_hf(config: str | Path | dict[str, Any]) -> GemmaConfig:
    """Read a config.json: its path, or the dict in it."""
    where = "config.json" if isinstance(config, dict) else str(config)
    content = config if isinstance(config, dict) else _read_json(Path(config))
    text = content.get("text_config", content)
    if not isinstance(text, dict):
        raise TPAError(f"{where}: text_config must be an object, got {type(text).__name__}")
    model_type = text.get("model_type", content.get("model_type"))
    if model_type not in ("gemma3", "gemma3_text"):
        raise TPAError(f"{where}: model_type must be 'gemma3' or 'gemma3_text', got {model_type!r}")
    try:
        found = _read(content, text, where)
    except (TypeError, ValueError, AttributeError, OverflowError, MemoryError) as problem:
        raise TPAError(f"{where}: a value has the wrong type or size: {problem}") from None
    named = published(found.num_layers, found.hidden_size)
    return dataclasses.replace(found, variant=named.variant if named else "custom")


def _read(content: dict[str, Any], text: dict[str, Any], where: str) -> GemmaConfig:
    fields = {field: default if text.get(key) is None else text[key] for field, key, default in TEXT}
    fields["num_layers"] = num_layers = int(fields["num_layers"])
    if not 0 < num_layers <= MAX_LAYERS:
        raise TPAError(f"{where}: num_hidden_layers must lie in 1 ... {MAX_LAYERS}, got {num_layers}")
    _check_rules(text, RULES, where)
    rope = _read_rope(text, where)
    tied = content.get("tie_word_embeddings", text.get("tie_word_embeddings")) is not False
    is_global, vision = _read_layer_types(text, num_layers, where), _read_vision(content, where)
    return GemmaConfig(**fields, **rope, is_global=is_global, vision=vision, tied=tied)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise TPAError(f"config: file not found: {path}") from None
    except (OSError, ValueError, RecursionError) as problem:  # ValueError: not UTF-8, not JSON, or absurd numbers
        raise TPAError(f"config: {path} is not a readable JSON file: {problem}") from None
    if not isinstance(content, dict):
        raise TPAError(f"config: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def _check_rules(content: dict[str, Any], rules: dict[str, Rule], where: str) -> None:
    for key, (said, fits) in rules.items():
        if not fits(content.get(key)):
            raise TPAError(f"{where}: {key} must be {said}, got {content[key]!r}")


def _read_rope(text: dict[str, Any], where: str) -> dict[str, Any]:
    """Base and linear scale of window and of global layers, from either generation of keys."""
    newer = text.get("rope_parameters") or {}
    if not ("sliding_attention" in newer or "full_attention" in newer):  # one flat entry: the global layers'
        newer = {"full_attention": newer}
    local, full = newer.get("sliding_attention") or {}, newer.get("full_attention") or {}
    full = full | (text.get("rope_scaling") or {})
    base_local = local.get("rope_theta") or text.get("rope_local_base_freq") or 10_000.0
    base_global = full.get("rope_theta") or text.get("rope_theta") or 1_000_000.0
    return {
        "rope_base_local": float(base_local),
        "rope_base_global": float(base_global),
        "rope_scale_local": _read_scale(local, where),
        "rope_scale_global": _read_scale(full, where),
    }


def _read_scale(scaling: dict[str, Any], where: str) -> float:
    """What positions are divided by."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear"):
        raise TPAError(f"{where}: rope scaling must be 'default' or 'linear' for Gemma 3, got {kind!r}")
    if scaling.get("partial_rotary_factor") not in (None, 1):
        found = scaling["partial_rotary_factor"]
        raise TPAError(f"{where}: partial_rotary_factor must be 1 for Gemma 3, got {found!r:.60}")
    if kind == "default":
        return 1.0
    if scaling.get("factor") is None:
        raise TPAError(f"{where}: linear rope scaling needs a factor, got none")
    return float(scaling["factor"])


def _read_layer_types(text: dict[str, Any], num_layers: int, where: str) -> tuple[bool, ...]:
    types = text.get("layer_types")
    if types is None:
        return layer_pattern(num_layers, int(text.get("sliding_window_pattern") or LAYERS_PER_GLOBAL))
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise TPAError(f"{where}: layer_types must be full_attention or sliding_attention, got {unknown[0]!r}")
    return tuple(kind == "full_attention" for kind in types)


def _read_vision(content: dict[str, Any], where: str) -> VisionConfig | None:
    """The image tower of a multimodal file."""
    tower = content.get("vision_config")
    if "text_config" not in content or tower is None:
        return None
    if not isinstance(tower, dict):
        raise TPAError(f"{where}: vision_config must be an object, got {type(tower).__name__}")
    if tower.get("hidden_act", GELU) != GELU:
        raise TPAError(f"{where}: hidden_act must be {GELU!r}, got {tower['hidden_act']!r}")
    fields: dict[str, Any] = {field: tower.get(key, default) for field, key, default in TOWER}
    fields["tokens_per_image"] = content.get("mm_tokens_per_image", 256)
    for field, key, default in IMAGE_TOKENS:
        value = content.get(key, content.get(key.replace("_index", "_id")))
        fields[field] = default if value is None else value
    return VisionConfig(**fields)


# ---- writing ----

SAVED_BY = "saved_by"  # the key that says that a folder is ours, and may be replaced

# Keys of an original config.json that are written from the `GemmaConfig`, or that its weights no longer fit; all others
# (token ids, names, whatever another program put there) are carried over.
OURS = {
    "tpa", "torch_dtype", "dtype", "architectures", "model_type", "text_config", "vision_config", "layer_types",
    "sliding_window_pattern", "_sliding_window_pattern", "quantization_config", "tie_word_embeddings",
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", SAVED_BY, *(key for _, key, _ in TEXT),
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "eos_token_id": [1, 106], "bos_token_id": 2}


def to_hf(config: GemmaConfig, original: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a config.json. original: the one that the model came with, for what is not ours."""
    original = original or {}
    was_text = original.get("text_config")
    text = {} if original else dict(TOKENS)
    text |= _carried(was_text if isinstance(was_text, dict) else original) | _text_to_hf(config)
    if config.vision is None:
        text |= {key: original[key] for key in TOKENS if original.get(key) is not None}
        return {"architectures": ["Gemma3ForCausalLM"]} | text | {"torch_dtype": "bfloat16"}
    tower = {"model_type": "siglip_vision_model", "hidden_act": GELU, "vision_use_head": False}
    beside = {key: value for key, value in _carried(original).items() if was_text is not None or key not in text}
    return beside | {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": tower | _named(config.vision, TOWER),
        "mm_tokens_per_image": config.vision.tokens_per_image,
        **_named(config.vision, IMAGE_TOKENS),
        "tie_word_embeddings": config.tied,
        "torch_dtype": "bfloat16",
    }


def _text_to_hf(config: GemmaConfig) -> dict[str, Any]:
    scalar = config.query_pre_attn_scalar
    return _named(config, TEXT) | _rope_to_hf(config) | {
        "model_type": "gemma3_text",
        "layer_types": ["full_attention" if flag else "sliding_attention" for flag in config.is_global],
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,  # `transformers` wants an int
        "hidden_activation": GELU, "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "tie_word_embeddings": config.tied,
    }  # fmt: skip


def _rope_to_hf(config: GemmaConfig) -> dict[str, Any]:
    """The older keys, which every `transformers` reads; what they cannot say, in the newer ones."""
    local, full = (
        {"rope_type": "linear", "factor": scale} if scale != 1.0 else None
        for scale in (config.rope_scale_local, config.rope_scale_global)
    )
    if local:
        default = {"rope_type": "default"}
        return {
            "rope_parameters": {
                "sliding_attention": local | {"rope_theta": config.rope_base_local},
                "full_attention": (full or default) | {"rope_theta": config.rope_base_global},
            }
        }
    bases = {"rope_theta": config.rope_base_global, "rope_local_base_freq": config.rope_base_local}
    return bases | {"rope_scaling": full}


def _carried(original: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in original.items() if key not in OURS}


def _named(config: Any, table: Table) -> dict[str, Any]:
    """The fields of a table by the keys of the file."""
    return {key: getattr(config, field) for field, key, _ in table}
