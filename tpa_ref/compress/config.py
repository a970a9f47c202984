"""How a KV cache is to be compressed: `TPAConfig`. This file lives once and serves both backends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import TPAError
from ..gemma.config import GemmaConfig

MODES = ("contextual", "fixed-a", "fixed-b", "latent")
KV_DTYPES = ("float32", "bfloat16", "int8", "int4")
DEFAULT_RATE = 2.0  # bits per number
MAX_RATE = 8
DEFAULT_CONTEXT = 32_768  # where bytes are compared, or the model's positions if they are fewer
DEFAULT_SINKS = 4
MAX_EXACT = 64
MANY = 2**31
WIDTHS = ("k_widths", "v_widths")
FORM = ("mode", "k_mode", "v_mode", "k_rank", "v_rank", "kv_dtype", "k_dtype", "v_dtype")  # excluded by a rate


def exact_rank(mode: str, config: GemmaConfig) -> int:
    """The rank from which on a mode loses nothing; larger ranks are clamped to it.

    >>> [exact_rank(mode, GemmaConfig.gemma3_4b()) for mode in MODES]
    [4, 4, 256, 1024]
    """
    g, d = config.num_kv_heads, config.head_dim
    return {"contextual": min(g, d), "fixed-a": g, "fixed-b": d, "latent": g * d}[mode]


@dataclass(frozen=True)
class LayerConfig:
    """What the cache of one converted layer holds: mode, rank and storage dtype, for K and for V.

    dtype "spectral": the widths give the bits of each of the `rank` coefficients. v_dtype "shared": those of K are also
    V's.
    """

    k_mode: str
    v_mode: str
    k_rank: int
    v_rank: int
    k_dtype: str
    v_dtype: str
    k_widths: tuple[int, ...] = ()
    v_widths: tuple[int, ...] = ()

    @classmethod
    def spectral(cls, widths: tuple[int, ...]) -> LayerConfig:
        """`latent`, K and V as one vector, with a width for every coefficient; none at all leaves the mean alone."""
        return cls("latent", "latent", len(widths), len(widths), "spectral", "shared", tuple(widths))

    def with_widths(self, widths: tuple[int, ...]) -> LayerConfig:
        """The same with the bits of the coefficients chosen: of K and V, or of V alone."""
        if self.v_dtype == "shared":
            return self.spectral(widths)
        return dataclasses.replace(self, v_rank=len(widths), v_widths=tuple(widths))

    def learns(self, config: GemmaConfig) -> bool:
        """Do constant factors depend on K and V? `contextual` has none, and at full rank they are units."""
        sides = (self.k_mode, self.k_rank, self.k_dtype), (self.v_mode, self.v_rank, self.v_dtype)
        return any(
            dtype in ("spectral", "shared") or (mode != "contextual" and rank < exact_rank(mode, config))
            for mode, rank, dtype in sides
        )


@dataclass(frozen=True)
class TPAConfig:
    """How to convert a model. Nothing given: the spectral cache at a rate of 2 bits, 8x smaller than bfloat16.

    rate: mean bits per number of dense K and V, in (0, 8]; they are spent where the model feels them (`spectral`).
    With a k_mode other than latent (k_rank, default exact; k_dtype, default int8) it is V's alone: the fast cache,
    since nothing costs more time than K that must be rebuilt.
    Instead of a rate, factors of fixed rank:
    mode (or k_mode, v_mode): contextual, fixed-a, fixed-b, latent. Ranks given without a mode mean `contextual`.
    k_rank, v_rank: default half of the exact rank of the mode, at least 1. Larger than exact is clamped.
    kv_dtype (or k_dtype, v_dtype): float32, bfloat16, int8, int4; bfloat16 is the default.
    For both:
    q_rank: head-mixing rank of Q, at most h (the default, exact). It saves no cache.
    layers: "all", "global", "local", or numbers such as "5,11"; the other layers keep a dense cache.
    context: the length of text at which the rate is kept, since window layers hold fewer tokens (default: 32,768).
    sinks, recent: how many first and newest tokens the global layers also keep exactly, in bfloat16 (default: 4 and 0
    with a rate, else none).
    predict: whether a spectral cache codes only what the words do not tell (`words`); default: where calibration has
    found out what they do.
    per_layer: the complete choice, one LayerConfig (or None: dense) a layer, instead of mode, ranks, dtypes and layers.

    >>> TPAConfig(k_rank=2, v_rank=2).resolve(GemmaConfig.gemma3_4b())[0][0].k_mode
    'contextual'
    """

    mode: str | None = None
    k_mode: str | None = None
    v_mode: str | None = None
    q_rank: int | None = None
    k_rank: int | None = None
    v_rank: int | None = None
    kv_dtype: str | None = None
    k_dtype: str | None = None
    v_dtype: str | None = None
    rate: float | None = None
    layers: str = "all"
    per_layer: tuple[LayerConfig | None, ...] | None = None
    context: int | None = None
    sinks: int | None = None
    recent: int = 0
    predict: bool | None = None

    def __post_init__(self) -> None:
        for name in ("mode", "k_mode", "v_mode"):
            _one_of(name, getattr(self, name), MODES)
        for name in ("kv_dtype", "k_dtype", "v_dtype"):
            _one_of(name, getattr(self, name), KV_DTYPES)
        for name, least, most in (
            ("q_rank", 1, MANY),
            ("k_rank", 1, MANY),
            ("v_rank", 1, MANY),
            ("context", 1, MANY),
            ("sinks", 0, MAX_EXACT),
            ("recent", 0, MAX_EXACT),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if (value is not None or name == "recent") and not (whole and least <= value <= most):
                bound = f">= {least}" if most == MANY else f"in {least} ... {most}"
                raise TPAError(f"tpa config: {name} must be a whole number {bound}, got {value!r}")
        if self.predict not in (None, True, False):
            raise TPAError(f"tpa config: predict must be true, false or not given, got {self.predict!r}")
        if self.predict and not self.spectral:
            raise TPAError("tpa config: only a spectral cache is predicted from words, so predict wants a rate")
        if self.rate is None:
            return
        number = isinstance(self.rate, (int, float)) and not isinstance(self.rate, bool)
        if not (number and 0 < self.rate <= MAX_RATE):
            raise TPAError(f"tpa config: rate must lie in (0, {MAX_RATE}] bits per number, got {self.rate!r}")
        given = [name for name in FORM if getattr(self, name) is not None]
        if self.codes_v_alone and not set(given) - {"k_mode", "k_rank", "k_dtype"}:
            if self.predict:
                raise TPAError(f"tpa config: words predict K and V together, not V beside k_mode {self.k_mode!r}")
            return
        if (given and {self.mode, self.k_mode, self.v_mode} - {None, "latent"}) or set(given) - set(FORM[:3]):
            raise TPAError(
                f"tpa config: a rate chooses latent, its ranks and its bits, so it excludes {given[-1]}, "
                f"got {getattr(self, given[-1])!r} and rate {self.rate}"
            )

    @property
    def spectral(self) -> bool:
        """Is the cache (or a part of it) a spectral one? So it is when nothing is chosen, too."""
        if self.per_layer is not None:
            return any("spectral" in (choice.k_dtype, choice.v_dtype) for choice in self.per_layer if choice)
        return self.rate is not None or all(getattr(self, name) is None for name in FORM)

    @property
    def codes_v_alone(self) -> bool:
        """Is the rate spent on V alone, beside a K of fixed rank?"""
        return self.rate is not None and self.k_mode not in (None, "latent")

    @property
    def exact_tokens(self) -> tuple[int, int]:
        """(sinks, recent) that converted global layers keep exactly."""
        return (DEFAULT_SINKS if self.spectral else 0) if self.sinks is None else self.sinks, self.recent

    def resolve(self, config: GemmaConfig) -> tuple[tuple[LayerConfig | None, ...], list[str]]:
        """(one LayerConfig, or None for dense, per layer; a line for every choice that had to be clamped)."""
        if self.per_layer is not None:
            if len(self.per_layer) != config.num_layers:
                raise TPAError(
                    f"tpa config: per_layer must have one entry a layer, got {len(self.per_layer)} "
                    f"for {config.num_layers} layers"
                )
            return self.per_layer, []
        chosen = chosen_layers(self.layers, config)
        notes: list[str] = []
        if self.spectral:  # widths follow from the spectra of all layers
            exact = exact_rank("latent", config)
            layer = LayerConfig("latent", "latent", 2 * exact, 2 * exact, "spectral", "shared")
            if self.codes_v_alone and self.k_mode:
                k_rank = _clamp("k_rank", self.k_rank or exact_rank(self.k_mode, config), self.k_mode, config, notes)
                layer = LayerConfig(self.k_mode, "latent", k_rank, exact, self.k_dtype or "int8", "spectral")
            return tuple(layer if index in chosen else None for index in range(config.num_layers)), notes
        ranks_given = self.k_rank is not None or self.v_rank is not None
        mode = self.mode or ("contextual" if ranks_given else "latent")
        k_mode, v_mode = self.k_mode or mode, self.v_mode or mode
        dtype = self.kv_dtype or "bfloat16"
        layer = LayerConfig(
            k_mode=k_mode,
            v_mode=v_mode,
            k_rank=_clamp("k_rank", self.k_rank, k_mode, config, notes),
            v_rank=_clamp("v_rank", self.v_rank, v_mode, config, notes),
            k_dtype=self.k_dtype or dtype,
            v_dtype=self.v_dtype or dtype,
        )
        return tuple(layer if index in chosen else None for index in range(config.num_layers)), notes

    def resolve_q_rank(self, config: GemmaConfig) -> tuple[int, list[str]]:
        """(rank of Q, a line if it had to be clamped); h, the default, is exact."""
        if self.q_rank is None or self.q_rank == config.num_heads:
            return config.num_heads, []
        if self.q_rank > config.num_heads:
            return config.num_heads, [
                f"q_rank {self.q_rank} is above the exact bound {config.num_heads} (query heads): "
                f"clamped to {config.num_heads}"
            ]
        return self.q_rank, []

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; widths become counts."""
        content = dataclasses.asdict(self)
        for entry in content["per_layer"] or ():
            for name in WIDTHS if entry else ():
                entry[name] = width_counts(entry[name])
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TPAConfig:
        """The inverse of `to_dict`."""
        try:
            content = dict(content)
            if content.get("per_layer") is not None:
                content["per_layer"] = tuple(_layer_config(entry) if entry else None for entry in content["per_layer"])
            return cls(**content)
        except (TypeError, AttributeError) as problem:
            raise TPAError(f"tpa config: unreadable: {problem}") from None


def _layer_config(entry: dict[str, Any]) -> LayerConfig:
    """A LayerConfig from JSON, where widths are counts."""
    return LayerConfig(**entry | {name: widths_of(entry.get(name, ())) for name in WIDTHS})


def width_counts(widths: tuple[int, ...]) -> list[int]:
    """Widths, which never increase, as how many there are of 8, 7 ... 1 bits.

    >>> width_counts((8, 2, 2))
    [1, 0, 0, 0, 0, 0, 2, 0]
    """
    return [widths.count(width) for width in range(MAX_RATE, 0, -1)] if widths else []


def widths_of(counts: Any) -> tuple[int, ...]:
    """The inverse of `width_counts`; refuses what is none.

    >>> widths_of([1, 0, 0, 0, 0, 0, 2, 0])
    (8, 2, 2)
    """
    whole = isinstance(counts, (list, tuple)) and all(type(count) is int and 0 <= count < 2**20 for count in counts)
    if not whole or len(counts) not in (0, MAX_RATE):
        raise TPAError(f"tpa config: widths must be {MAX_RATE} counts, of 8 to 1 bits, got {counts!r:.60}")
    return tuple(MAX_RATE - place for place, count in enumerate(counts) for _ in range(count))


def chosen_layers(layers: str, config: GemmaConfig) -> set[int]:
    """The layer numbers that a `layers` choice means.

    >>> sorted(chosen_layers("global", GemmaConfig.tiny()))
    [5, 11]
    """
    everything = range(config.num_layers)
    if layers == "all":
        return set(everything)
    if layers in ("global", "local"):
        return {layer for layer in everything if config.is_global[layer] == (layers == "global")}
    try:
        chosen = {int(part) for part in str(layers).split(",")}
    except ValueError:
        raise TPAError(f"tpa config: layers must be all, global, local or numbers like 5,11, got {layers!r}") from None
    outside = sorted(chosen - set(everything))
    if outside:
        raise TPAError(f"tpa config: layers must lie in 0 ... {config.num_layers - 1}, got {outside[0]}")
    return chosen


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise TPAError(f"tpa config: {name} must be one of {', '.join(allowed)}, got {value!r}")


def _clamp(name: str, rank: int | None, mode: str, config: GemmaConfig, notes: list[str]) -> int:
    bound = exact_rank(mode, config)
    if rank is None:
        return max(1, bound // 2)
    if rank > bound:
        notes.append(f"{name} {rank} is above the exact bound {bound} of {mode}: clamped to {bound}")
    return min(rank, bound)
