"""The metadata of GGUF files as the content of a config.json.

What a file does not say is what llama.cpp assumes when it loads one (load_arch_hparams in src/models/gemma3.cpp of
github.com/ggml-org/llama.cpp): every sixth layer is global, local layers rotate with base 10,000, a model of 62 layers
scales its queries as 27B does. In one point we differ: without a RoPE scaling in the file llama.cpp has none, and we
take that of the published size, 8 from 4B on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import TPAError
from ..gemma.config import LAYERS_PER_GLOBAL, GemmaConfig, published
from .gguf_header import Header

LAYERS_OF_27B = 62


def read_config(model: Header, towers: list[Header], rows: int) -> dict[str, Any]:
    """The content of a config.json, multimodal where there is an image tower; rows: of the embedding."""
    if (kind := model.text("general.architecture")) != "gemma3":
        raise TPAError(f"load: the architecture of {model.path} must be 'gemma3', got {kind!r:.60}")
    content = _text_config(model, rows) | _layer_types(model)
    for tower in towers:
        content = {"model_type": "gemma3", "text_config": content} | _vision_config(tower)
    return content | _about_texts(model)


def _text_config(header: Header, rows: int) -> dict[str, Any]:
    """The content of a text-only config.json."""

    def number(key: str, default: float | None = None) -> Any:
        return header.number(f"gemma3.{key}", default)

    head_dim = number("attention.key_length")
    if (turned := number("rope.dimension_count", head_dim)) != head_dim:
        raise TPAError(f"load: RoPE of {header.path} must turn all {head_dim} features of a head, got {turned}")
    layers, width, heads = map(number, ("block_count", "embedding_length", "attention.head_count"))
    context = number("context_length")
    return {
        "model_type": "gemma3_text",
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": number("feed_forward_length"),
        "sliding_window": number("attention.sliding_window", 0) or context,
        "query_pre_attn_scalar": width // heads if layers == LAYERS_OF_27B and heads else head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": decimal(number("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": number("rope.freq_base", 1e6),
        "rope_local_base_freq": number("rope.freq_base_swa", 1e4),
        "rope_scaling": _rope_scaling(header, published(layers, width)),
        "attn_logit_softcapping": number("attn_logit_softcapping", 0) or None,
        "final_logit_softcapping": number("final_logit_softcapping", 0) or None,
    }


def decimal(value: float) -> float:
    """The number that was meant by a float32.

    >>> decimal(float(np.float32(1e-6)))
    1e-06
    """
    return float(f"{value:.6g}")


def _layer_types(header: Header) -> dict[str, Any]:
    """Which layers are global: every sixth, or what the file says, by a period or by one flag a layer."""
    key = "gemma3.attention.sliding_window_pattern"
    if not header.number("gemma3.attention.sliding_window", 0):
        return {"sliding_window_pattern": 1}  # no window: all are global
    if isinstance(flags := header.values.get(key), np.ndarray):
        return {"layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in flags.tolist()]}
    return {"sliding_window_pattern": header.number(key, LAYERS_PER_GLOBAL)}


def _rope_scaling(header: Header, named: GemmaConfig | None) -> dict[str, Any] | None:
    """The linear scaling of global layers."""
    kind = header.text("gemma3.rope.scaling.type", "linear")
    default = header.number("gemma3.rope.scale_linear", named.rope_scale_global if named else 1.0)
    factor = header.number("gemma3.rope.scaling.factor", default)
    return None if kind == "none" else {"rope_type": kind, "factor": factor or 1.0}


def _vision_config(header: Header) -> dict[str, Any]:
    """What a multimodal config.json has besides its text_config."""
    kind = (
        header.text("general.architecture"),
        header.text("clip.projector_type", header.text("clip.vision.projector_type")),
    )
    if kind != ("clip", "gemma3"):
        raise TPAError(
            f"load: {header.path} must be a 'clip' with a 'gemma3' projector, got {kind[0]!r} and {kind[1]!r}"
        )

    def number(key: str, default: float | None = None) -> Any:
        return header.number(f"clip.vision.{key}", default)

    image, patch, pool = number("image_size"), number("patch_size"), number("projector.scale_factor", 4)
    if not (patch > 0 and pool > 0 and 0 < image < 2**31):
        raise TPAError(
            f"load: images of {header.path} must have a size, got {image}, patches {patch}, pooled by {pool}"
        )
    tower = {
        "image_size": image,
        "patch_size": patch,
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "intermediate_size": number("feed_forward_length"),
        "layer_norm_eps": decimal(number("attention.layer_norm_epsilon", 1e-6)),
    }
    return {"vision_config": tower, "mm_tokens_per_image": (image // patch // pool) ** 2}


def _about_texts(header: Header) -> dict[str, Any]:
    """Where texts begin and end, as far as the file says."""
    bos, *ends = (header.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot"))
    ends = list(dict.fromkeys(token for token in ends if isinstance(token, int)))
    found = {"bos_token_id": bos, "eos_token_id": ends or None}
    return {name: value for name, value in found.items() if value is not None}
