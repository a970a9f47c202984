"""What a Gemma 3 model is: `GemmaConfig`, and `VisionConfig` for its image tower. Files are read in `hf_config`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TPAError

# Gemma 3 alternates five sliding-window ("local") layers with one that sees everything ("global").
LAYERS_PER_GLOBAL = 6

# The first ten fields of `GemmaConfig` and rope_scale_global. Hugging Face's multimodal files have 64 rows more in the
# vocabulary (262,208), which the loader accepts.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "tiny": (4096, 256, 12, 8, 4, 32, 448, 128, 32, 2048, 1.0),
    "270m": (262_144, 640, 18, 4, 1, 256, 2048, 512, 256, 32_768, 1.0),
    "1b": (262_144, 1152, 26, 4, 1, 256, 6912, 512, 256, 32_768, 1.0),
    "4b": (262_144, 2560, 34, 8, 4, 256, 10_240, 1024, 256, 131_072, 8.0),
    "12b": (262_144, 3840, 48, 16, 8, 256, 15_360, 1024, 256, 131_072, 8.0),
    "27b": (262_144, 5376, 62, 32, 16, 128, 21_504, 1024, 168, 131_072, 8.0),
}


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
    """The shape of one Gemma 3 model. The letter of each axis is beside its field."""

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
    rope_scale_local: float = 1.0  # the same for window layers; no published size scales them
    rms_eps: float = 1e-6
    tied: bool = True  # is the output projection the embedding table?
    variant: str = "custom"
    vision: VisionConfig | None = None  # None: a model that reads text only

    def __post_init__(self) -> None:
        _check_numbers(self, "config")
        h, g = self.num_heads, self.num_kv_heads
        if h % g:
            raise TPAError(f"config: query heads must be a multiple of KV heads, got {h} and {g}")
        if self.head_dim % 2:
            raise TPAError(f"config: head_dim must be even (RoPE rotates pairs), got {self.head_dim}")
        if len(self.is_global) != self.num_layers:
            found = f"{len(self.is_global)} types for {self.num_layers} layers"
            raise TPAError(f"config: one layer type per layer expected, got {found}")

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
        if is_global:
            return self.rope_base_global, self.rope_scale_global
        return self.rope_base_local, self.rope_scale_local

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
    def of_variant(cls, variant: str) -> GemmaConfig:
        """The published config of a variant name.

        >>> GemmaConfig.of_variant("1b").num_kv_heads
        1
        """
        if variant not in VARIANTS:
            raise TPAError(f"config: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        *sizes, scale = VARIANTS[variant]
        named: dict[str, Any] = dict(zip((field.name for field in dataclasses.fields(cls)), sizes))
        return cls(**named, is_global=layer_pattern(named["num_layers"]), rope_scale_global=scale, variant=variant)

    @classmethod
    def tiny(cls) -> GemmaConfig:
        """The small model in assets/tiny-gemma3: all of Gemma 3's structure, 7.5 M parameters."""
        return cls.of_variant("tiny")

    @classmethod
    def gemma3_270m(cls) -> GemmaConfig:
        return cls.of_variant("270m")

    @classmethod
    def gemma3_1b(cls) -> GemmaConfig:
        return cls.of_variant("1b")

    @classmethod
    def gemma3_4b(cls) -> GemmaConfig:
        return cls.of_variant("4b")

    @classmethod
    def gemma3_12b(cls) -> GemmaConfig:
        return cls.of_variant("12b")

    @classmethod
    def gemma3_27b(cls) -> GemmaConfig:
        return cls.of_variant("27b")

    # ---- Hugging Face config.json ----

    @classmethod
    def from_hf(cls, config: str | Path | dict[str, Any]) -> GemmaConfig:
        """Read a Hugging Face config.json (its path, or the dict in it), text-only or multimodal.

        >>> GemmaConfig.from_hf({"model_type": "gemma3_text", "num_hidden_layers": 12, "head_dim": 64}).head_dim
        64
        """
        from . import hf_config  # which builds on this file

        return hf_config.from_hf(config)

    def to_hf(self, original: dict[str, Any] | None = None) -> dict[str, Any]:
        """The same model as the content of a Hugging Face config.json; original: one whose other keys are kept."""
        from . import hf_config

        return hf_config.to_hf(self, original)


def published(num_layers: int, hidden_size: int) -> GemmaConfig | None:
    """The published size with so many layers of this width.

    >>> published(26, 1152).variant
    '1b'
    """
    sizes = map(GemmaConfig.of_variant, VARIANTS)
    return next((made for made in sizes if (made.num_layers, made.hidden_size) == (num_layers, hidden_size)), None)


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
