"""What a Gemma 3 model is: `GemmaConfig`, and `VisionConfig` for its image tower.

This file lives once and serves both backends; it imports no array library.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TPAError

# Gemma 3 alternates five sliding-window ("local") layers with one that sees everything ("global").
LAYERS_PER_GLOBAL = 6
MAX_LAYERS = 10_000  # anything above is a damaged config


def layer_pattern(num_layers: int, period: int = LAYERS_PER_GLOBAL) -> tuple[bool, ...]:
    """True for every global layer: layer i is global iff (i + 1) is a multiple of `period`.

    >>> layer_pattern(7)
    (False, False, False, False, False, True, False)
    """
    return tuple((layer + 1) % period == 0 for layer in range(num_layers))


@dataclass(frozen=True)
class VisionConfig:
    """The shape of the image tower (SigLIP), by default the published one, and the tokens that stand for an image.

    >>> vision = VisionConfig()
    >>> vision.patches_per_side, vision.tokens_per_side, vision.pool
    (64, 16, 4)
    """

    image_size: int = 896  # pixels of a side
    patch_size: int = 14
    channels: int = 3  # c
    hidden_size: int = 1152  # z
    num_layers: int = 27
    num_heads: int = 16
    intermediate_size: int = 4304
    norm_eps: float = 1e-6
    tokens_per_image: int = 256  # t
    image_token: int = 262_144  # the placeholder whose embedding is replaced by a soft token
    start_token: int = 255_999
    end_token: int = 256_000

    def __post_init__(self) -> None:
        _check_numbers(self, "vision config")
        for name, whole, part in (
            ("hidden_size", self.hidden_size, self.num_heads),
            ("image_size", self.image_size, self.patch_size),
            ("patches of a side", self.patches_per_side, self.tokens_per_side),
        ):
            if whole % part:
                raise TPAError(f"vision config: {name} must be a multiple of {part}, got {whole}")
        if self.tokens_per_side**2 != self.tokens_per_image:
            raise TPAError(f"vision config: tokens_per_image must be a square number, got {self.tokens_per_image}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_side(self) -> int:
        return math.isqrt(self.tokens_per_image)

    @property
    def pool(self) -> int:
        """So many patches in each direction are averaged into one soft token."""
        return self.patches_per_side // self.tokens_per_side


@dataclass(frozen=True)
class GemmaConfig:
    """The shape of one Gemma 3 model. The letter of each axis stands behind its field."""

    vocab_size: int  # v
    hidden_size: int  # m
    num_layers: int  # l
    num_heads: int  # h, query heads
    num_kv_heads: int  # g, KV heads; n = h / g queries share one
    head_dim: int  # d (and e for values: Gemma uses the same)
    intermediate_size: int  # f, hidden width of the MLP
    sliding_window: int  # w, a local layer's query sees itself and w - 1 keys before it
    query_pre_attn_scalar: float  # logits are q.k / sqrt(this); 27B: 168, not head_dim
    max_positions: int
    is_global: tuple[bool, ...]  # one entry a layer
    rope_base_local: float = 10_000.0
    rope_base_global: float = 1_000_000.0
    rope_scale_global: float = 1.0  # linear scaling: global layers of 4B and up divide their frequencies by 8
    rms_eps: float = 1e-6
    variant: str = "custom"
    vision: VisionConfig | None = None  # None: a model that reads text only

    def __post_init__(self) -> None:
        _check_numbers(self, "config")
        if self.num_heads % self.num_kv_heads:
            raise TPAError(
                f"config: query heads must be a multiple of KV heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise TPAError(f"config: head_dim must be even (RoPE rotates pairs), got {self.head_dim}")
        if len(self.is_global) != self.num_layers:
            raise TPAError(
                f"config: one layer type per layer expected, got {len(self.is_global)} types "
                f"for {self.num_layers} layers"
            )

    @property
    def queries_per_kv(self) -> int:
        """n = h / g, the query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_scale(self) -> float:
        """What the logits q.k are multiplied with."""
        return self.query_pre_attn_scalar**-0.5

    @property
    def num_global(self) -> int:
        """G, the number of global layers."""
        return sum(self.is_global)

    def rope(self, is_global: bool) -> tuple[float, float]:
        """(base, scale) of the rotary embedding; the two kinds of layers use different ones."""
        return (self.rope_base_global, self.rope_scale_global) if is_global else (self.rope_base_local, 1.0)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """`window` of every layer."""
        return tuple(map(self.window, range(self.num_layers)))

    def window(self, layer: int) -> int | None:
        """How many positions a query of this layer sees, itself included; None: all of them."""
        return None if self.is_global[layer] else self.sliding_window

    def slots(self, layer: int, max_len: int) -> int:
        """How many tokens this layer's cache must hold for texts of `max_len` tokens."""
        return max_len if self.is_global[layer] else min(max_len, self.sliding_window)

    # ---- the published sizes ----

    @classmethod
    def tiny(cls) -> GemmaConfig:
        """The small model in assets/tiny-gemma3: all of Gemma 3's structure, 7.5 M parameters."""
        return cls(
            vocab_size=4096,
            hidden_size=256,
            num_layers=12,
            num_heads=8,
            num_kv_heads=4,
            head_dim=32,
            intermediate_size=448,
            sliding_window=128,
            query_pre_attn_scalar=32,
            max_positions=2048,
            is_global=layer_pattern(12),
            variant="tiny",
        )

    @classmethod
    def gemma3_270m(cls) -> GemmaConfig:
        return _published("270m", 640, 18, 4, 1, 256, 2048, 512, 256, 32_768, 1.0)

    @classmethod
    def gemma3_1b(cls) -> GemmaConfig:
        return _published("1b", 1152, 26, 4, 1, 256, 6912, 512, 256, 32_768, 1.0)

    @classmethod
    def gemma3_4b(cls) -> GemmaConfig:
        return _published("4b", 2560, 34, 8, 4, 256, 10_240, 1024, 256, 131_072, 8.0)

    @classmethod
    def gemma3_12b(cls) -> GemmaConfig:
        return _published("12b", 3840, 48, 16, 8, 256, 15_360, 1024, 256, 131_072, 8.0)

    @classmethod
    def gemma3_27b(cls) -> GemmaConfig:
        return _published("27b", 5376, 62, 32, 16, 128, 21_504, 1024, 168, 131_072, 8.0)

    @classmethod
    def of_variant(cls, variant: str) -> GemmaConfig:
        """The published config of a variant name.

        >>> GemmaConfig.of_variant("1b").num_kv_heads
        1
        """
        if variant not in VARIANTS:
            raise TPAError(f"config: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        return VARIANTS[variant]()

    # ---- Hugging Face config.json ----

    @classmethod
    def from_hf(cls, config: str | Path | dict[str, Any]) -> GemmaConfig:
        """Read a Hugging Face config.json (its path, or the dict in it), text-only or multimodal.

        Both generations of key names are understood (`rope_theta` ... and `rope_parameters`). Keys that a
        published file leaves out take the class defaults of `transformers`, as they do there.

        >>> GemmaConfig.from_hf({"model_type": "gemma3_text", "num_hidden_layers": 12, "head_dim": 64}).head_dim
        64
        """
        where = "config.json"
        if not isinstance(config, dict):
            where = str(config)
            config = _read_json(Path(config))
        text = config.get("text_config", config)
        if not isinstance(text, dict):
            raise TPAError(f"{where}: text_config must be an object, got {type(text).__name__}")
        model_type = text.get("model_type", config.get("model_type"))
        if model_type not in ("gemma3", "gemma3_text"):
            raise TPAError(f"{where}: model_type must be 'gemma3' or 'gemma3_text', got {model_type!r}")

        def read(name: str, default: Any) -> Any:
            value = text.get(name)
            return default if value is None else value

        try:
            num_layers = int(read("num_hidden_layers", 26))
            if not 0 < num_layers <= MAX_LAYERS:
                raise TPAError(f"{where}: num_hidden_layers must lie in 1 ... {MAX_LAYERS}, got {num_layers}")
            for name in ("attn_logit_softcapping", "final_logit_softcapping"):
                if text.get(name) is not None:
                    raise TPAError(f"{where}: {name} must be null for Gemma 3, got {text[name]!r}")
            for name in ("attention_bias", "use_bidirectional_attention"):
                if text.get(name):
                    raise TPAError(f"{where}: {name} must be false for Gemma 3, got {text[name]!r}")
            if text.get("tie_word_embeddings") is False or config.get("tie_word_embeddings") is False:
                raise TPAError(f"{where}: tie_word_embeddings must be true for Gemma 3, got False")
            if read("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
                raise TPAError(
                    f"{where}: hidden_activation must be 'gelu_pytorch_tanh', got {text['hidden_activation']!r}"
                )
            base_local, base_global, scale = _read_rope(text, where)
            found = cls(
                vocab_size=read("vocab_size", 262_208),
                hidden_size=read("hidden_size", 2304),
                num_layers=num_layers,
                num_heads=read("num_attention_heads", 8),
                num_kv_heads=read("num_key_value_heads", 4),
                head_dim=read("head_dim", 256),
                intermediate_size=read("intermediate_size", 9216),
                sliding_window=read("sliding_window", 4096),
                query_pre_attn_scalar=read("query_pre_attn_scalar", 256),
                max_positions=read("max_position_embeddings", 131_072),
                is_global=_read_layer_types(text, num_layers, where),
                rope_base_local=base_local,
                rope_base_global=base_global,
                rope_scale_global=scale,
                rms_eps=read("rms_norm_eps", 1e-6),
                vision=_read_vision(config, where),
            )
        except (TypeError, ValueError, AttributeError, OverflowError, MemoryError) as problem:
            raise TPAError(f"{where}: a value has the wrong type or size: {problem}") from None
        return dataclasses.replace(found, variant=_name_variant(found))

    def to_hf(self) -> dict[str, Any]:
        """The same model as a Hugging Face config.json, readable by every `transformers` >= 4.50."""
        scaled = self.rope_scale_global != 1.0
        text = {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "sliding_window": self.sliding_window,
            "layer_types": ["full_attention" if flag else "sliding_attention" for flag in self.is_global],
            "query_pre_attn_scalar": _whole(self.query_pre_attn_scalar),
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_base_global,
            "rope_local_base_freq": self.rope_base_local,
            "rope_scaling": {"rope_type": "linear", "factor": self.rope_scale_global} if scaled else None,
            "rms_norm_eps": self.rms_eps,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        }
        return (_with_vision(text, self.vision) if self.vision else text) | {"torch_dtype": "bfloat16"}


def _check_numbers(config: Any, where: str) -> None:
    """Every int and float field of a config is a positive number of its type, and is brought to it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type not in ("int", "float"):
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 < value < 2**53):
            raise TPAError(f"{where}: {field.name} must be a number in (0, 2^53), got {value!r:.60}")
        if field.type == "int" and int(value) != value:
            raise TPAError(f"{where}: {field.name} must be a whole number, got {value!r}")
        object.__setattr__(config, field.name, (int if field.type == "int" else float)(value))


def _read_vision(config: dict[str, Any], where: str) -> VisionConfig | None:
    """The image tower of a multimodal config.json; what it leaves out takes the class defaults of `transformers`."""
    tower = config.get("vision_config")
    if "text_config" not in config or tower is None:
        return None
    if not isinstance(tower, dict):
        raise TPAError(f"{where}: vision_config must be an object, got {type(tower).__name__}")
    if tower.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise TPAError(f"{where}: hidden_act must be 'gelu_pytorch_tanh', got {tower['hidden_act']!r}")

    def token(name: str, default: int) -> int:
        value = config.get(f"{name}_index", config.get(f"{name}_id"))
        return default if value is None else value

    return VisionConfig(
        image_size=tower.get("image_size", 224),
        patch_size=tower.get("patch_size", 16),
        channels=tower.get("num_channels", 3),
        hidden_size=tower.get("hidden_size", 768),
        num_layers=tower.get("num_hidden_layers", 12),
        num_heads=tower.get("num_attention_heads", 12),
        intermediate_size=tower.get("intermediate_size", 3072),
        norm_eps=tower.get("layer_norm_eps", 1e-6),
        tokens_per_image=config.get("mm_tokens_per_image", 256),
        image_token=token("image_token", 262_144),
        start_token=token("boi_token", 255_999),
        end_token=token("eoi_token", 256_000),
    )


def _with_vision(text: dict[str, Any], vision: VisionConfig) -> dict[str, Any]:
    """A text config.json inside a multimodal one."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.channels,
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.norm_eps,
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": False,
        },
        "mm_tokens_per_image": vision.tokens_per_image,
        "image_token_index": vision.image_token,
        "boi_token_index": vision.start_token,
        "eoi_token_index": vision.end_token,
        "tie_word_embeddings": True,
    }


def _whole(value: float) -> int | float:
    """An int where the number is one: `transformers` wants query_pre_attn_scalar as an int."""
    return int(value) if value == int(value) else value


def _published(
    name: str, m: int, layers: int, h: int, g: int, d: int, f: int, w: int, scalar: int, positions: int, scale: float
) -> GemmaConfig:
    # 262,144 rows; Hugging Face's multimodal files carry 64 extra ones (262,208), which the loader accepts.
    return GemmaConfig(
        vocab_size=262_144,
        hidden_size=m,
        num_layers=layers,
        num_heads=h,
        num_kv_heads=g,
        head_dim=d,
        intermediate_size=f,
        sliding_window=w,
        query_pre_attn_scalar=scalar,
        max_positions=positions,
        is_global=layer_pattern(layers),
        rope_scale_global=scale,
        variant=name,
    )


VARIANTS = {
    "tiny": GemmaConfig.tiny,
    "270m": GemmaConfig.gemma3_270m,
    "1b": GemmaConfig.gemma3_1b,
    "4b": GemmaConfig.gemma3_4b,
    "12b": GemmaConfig.gemma3_12b,
    "27b": GemmaConfig.gemma3_27b,
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TPAError(f"config: file not found: {path}") from None
    except (OSError, ValueError, RecursionError) as problem:  # ValueError: not UTF-8, not JSON, or absurd numbers
        raise TPAError(f"config: {path} is not a readable JSON file: {problem}") from None
    if not isinstance(content, dict):
        raise TPAError(f"config: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_rope(text: dict[str, Any], where: str) -> tuple[float, float, float]:
    """(local base, global base, global linear scale) from either generation of keys."""
    newer = text.get("rope_parameters") or {}
    local = newer.get("sliding_attention") or {}
    full = newer.get("full_attention") or {}
    if newer and not (local or full):  # one flat entry: the global layers'
        full = newer
    base_local = local.get("rope_theta") or text.get("rope_local_base_freq") or 10_000.0
    base_global = full.get("rope_theta") or text.get("rope_theta") or 1_000_000.0
    scaling = full or text.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear"):
        raise TPAError(f"{where}: rope scaling must be 'default' or 'linear' for Gemma 3, got {kind!r}")
    scale = scaling.get("factor") if kind == "linear" else 1.0
    if scale is None:
        raise TPAError(f"{where}: linear rope scaling needs a factor, got none")
    return float(base_local), float(base_global), float(scale)


def _read_layer_types(text: dict[str, Any], num_layers: int, where: str) -> tuple[bool, ...]:
    types = text.get("layer_types")
    if types is None:
        return layer_pattern(num_layers, int(text.get("sliding_window_pattern") or LAYERS_PER_GLOBAL))
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise TPAError(f"{where}: layer_types must be full_attention or sliding_attention, got {unknown[0]!r}")
    return tuple(kind == "full_attention" for kind in types)


def _name_variant(config: GemmaConfig) -> str:
    """The published name whose layer count and width this config has, else 'custom'."""
    for name, make in VARIANTS.items():
        published = make()
        if (published.num_layers, published.hidden_size) == (config.num_layers, config.hidden_size):
            return name
    return "custom"
