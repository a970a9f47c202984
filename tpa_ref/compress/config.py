"""How a KV cache is to be compressed. Written once for both backends.

A choice is one of two types: `FixedRank` (factors of a mode, rank and storage dtype) or `Spectral` (a rate: as many
bits as it allows, where the model feels them). `TPAConfig` is what command lines, files and most users write:
keywords in, one choice for every layer out, resolved once (`Model.choices`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..core.banded import STRINGS
from ..core.mode import MODES
from ..errors import TPAError
from ..gemma.config import GemmaConfig

KV_DTYPES = ("float32", "bfloat16", "int8", "int4")
DEFAULT_RATE = 3.0  # bits per number: KL is at most .005 on the real Gemma 3 270M (docs/quality.md)
PREFER = ("speed", "size")
MAX_RATE = 8
DEFAULT_CONTEXT = 32_768  # where bytes are compared, or the model's positions if they are fewer
DEFAULT_SINKS = 1
MAX_EXACT = 64
FORM = ("mode", "k_mode", "v_mode", "k_rank", "v_rank", "kv_dtype", "k_dtype", "v_dtype")  # excluded by a rate


def exact_rank(mode: str, config: GemmaConfig) -> int:
    """The rank from which on a mode loses nothing; larger ranks are clamped to it.

    >>> [exact_rank(mode, GemmaConfig.gemma3_4b()) for mode in ("contextual", "fixed-a", "fixed-b", "latent")]
    [4, 4, 256, 1024]
    """
    return MODES[mode].exact_rank(config.num_kv_heads, config.head_dim)


# ---- the two types of choices ----


@dataclass(frozen=True)
class Side:
    """How K (or V) is cached by itself. rank None: half of the exact rank, at least 1."""

    mode: str
    rank: int | None = None
    dtype: str = "bfloat16"

    def resolved(self, name: str, config: GemmaConfig, notes: list[str]) -> Side:
        """The same with a rank that exists; a note where it had to be clamped."""
        bound = exact_rank(self.mode, config)
        if self.rank is not None and self.rank > bound:
            notes.append(f"{name} {self.rank} is above the exact bound {bound} of {self.mode}: clamped to {bound}")
        return replace(self, rank=max(1, bound // 2) if self.rank is None else min(self.rank, bound))


@dataclass(frozen=True)
class FixedRank:
    """Factors of fixed rank, for K and for V.

    >>> FixedRank(Side("contextual", 2), Side("contextual", 2, "int8")).v.dtype
    'int8'
    """

    k: Side
    v: Side

    def resolved(self, config: GemmaConfig, notes: list[str]) -> FixedRank:
        return FixedRank(self.k.resolved("k_rank", config, notes), self.v.resolved("v_rank", config, notes))


@dataclass(frozen=True)
class Spectral:
    """Coefficients with a width of their own each.

    rate: mean bits per number of dense K and V, in (0, 8]. k: K by itself, of fixed rank, so that the rate is V's
    alone. predict: code only what the tokens do not predict; None: where calibration has measured that. widths: the
    bits of each coefficient that has any, strongest first, once they are chosen for a layer. prefer: "speed" (K in two
    bands, `core.banded`) or "size" (K and V as one vector). strings: for "speed", those of fast K, slow K, V.
    """

    rate: float = DEFAULT_RATE
    k: Side | None = None
    predict: bool | None = None
    widths: tuple[int, ...] = ()
    prefer: str = PREFER[0]
    strings: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.predict or (self.widths and self.k is None):
            object.__setattr__(self, "prefer", PREFER[1])
        object.__setattr__(self, "strings", self.strings if any(self.strings) else ())  # nothing coded, or not yet
        if len(self.strings) not in (0, STRINGS) or (self.strings and not self.banded):
            raise TPAError(f"tpa config: {STRINGS} strings of widths belong to prefer 'speed', got {self!r:.80}")
        for widths in (self.widths, *self.strings):
            known = isinstance(widths, tuple) and set(map(type, widths)) <= {int}  # thousands, in every trial
            falls = known and list(widths) == sorted(widths, reverse=True)
            if not falls or not set(widths) <= set(range(1, MAX_RATE + 1)):
                raise TPAError(f"tpa config: widths must fall from at most {MAX_RATE} to 1, got {widths!r:.60}")

    @property
    def banded(self) -> bool:
        """Is K coded in two bands, with V behind it?"""
        return self.prefer == PREFER[0] and self.k is None and not self.predict and not self.widths

    @property
    def joint(self) -> bool:
        """Are K and V coded as one vector?"""
        return self.k is None and not self.banded

    @property
    def of_strings(self) -> tuple[tuple[int, ...], ...]:
        """The widths of each string of codes, empty where it has no coefficient."""
        return (self.strings or ((),) * STRINGS) if self.banded else (self.widths,)

    @property
    def given(self) -> tuple[int, ...]:
        """The widths of all coefficients."""
        return sum(self.of_strings, ())

    def resolved(self, config: GemmaConfig, notes: list[str]) -> Spectral:
        most = exact_rank("latent", config) * (1 if self.k else 2)
        if len(self.given) > most:
            raise TPAError(f"tpa config: at most {most} coefficients have a width, got {len(self.given)}")
        if self.k is None:
            return self
        rank = exact_rank(self.k.mode, config) if self.k.rank is None else self.k.rank
        return replace(self, k=replace(self.k, rank=rank).resolved("k_rank", config, notes))


Choice = FixedRank | Spectral


# ---- what users write ----


@dataclass(frozen=True)
class TPAConfig:
    """How to convert a model. Nothing given: the spectral cache at 3 bits a number, 5x smaller than bfloat16.

    rate: mean bits per number of dense K and V, in (0, 8]: `Spectral`. With a k_mode other than latent (k_rank, default
    exact; k_dtype, default int8) it is V's alone.
    Instead of a rate, factors of fixed rank, `FixedRank`:
    mode (or k_mode, v_mode): contextual, fixed-a, fixed-b, latent. Ranks given without a mode mean `contextual`.
    k_rank, v_rank: default half of the exact rank of the mode, at least 1. Larger than exact is clamped.
    kv_dtype (or k_dtype, v_dtype): float32, bfloat16, int8, int4; bfloat16 is the default.
    For both:
    q_rank: head-mixing rank of Q, at most h (the default, exact). It saves no cache.
    layers: "all", "global", "local", or numbers such as "5,11"; the other layers keep a dense cache.
    context: the length of text at which the rate is kept, since window layers hold fewer tokens (default: 32,768).
    sinks: how many first tokens are kept exactly, in bfloat16 (default: 1, BOS, with a rate, else none). recent: how
    many of the newest the global layers keep so (default: none).
    prefer: of a spectral cache. "speed", the default: K in two bands, hardly rebuilt when it is read. "size": K and V
    as one vector, and what tokens predict of them not coded: fewer bytes at an equal loss. predict: is that last part
    done? Default: with prefer "size", where calibration measured it.
    per_layer: the complete choice, one `FixedRank`, `Spectral` with widths, or None (dense) a layer.

    >>> TPAConfig(k_rank=2, v_rank=2).choice.k.mode
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
    per_layer: tuple[Choice | None, ...] | None = None
    context: int | None = None
    sinks: int | None = None
    recent: int = 0
    predict: bool | None = None
    prefer: str | None = None

    def __post_init__(self) -> None:
        self._check_one_of("prefer", PREFER)
        for name in ("mode", "k_mode", "v_mode"):
            self._check_one_of(name, tuple(MODES))
        for name in ("kv_dtype", "k_dtype", "v_dtype"):
            self._check_one_of(name, KV_DTYPES)
        for name in ("q_rank", "k_rank", "v_rank", "context"):
            self._check_whole(name, 1, 2**31)
        for name in ("sinks", "recent"):
            self._check_whole(name, 0, MAX_EXACT)
        if self.predict not in (None, True, False):
            raise TPAError(f"tpa config: predict must be true, false or not given, got {self.predict!r}")
        if self.predict and not self.spectral:
            raise TPAError("tpa config: only a spectral cache is predicted from tokens, so predict wants a rate")
        if self.predict and self.prefer == "speed":
            raise TPAError(
                "tpa config: what is predicted from tokens must be rebuilt, so predict excludes prefer 'speed'"
            )
        if self.rate is not None:
            self._check_rate(self.rate)
        for choice in self.per_layer or ():
            if not isinstance(choice, FixedRank | Spectral | None):
                raise TPAError(f"tpa config: per_layer holds FixedRank, Spectral or None, got {choice!r:.60}")
            TPAConfig(**side_keywords(choice))

    def _check_one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value is not None and value not in allowed:
            raise TPAError(f"tpa config: {name} must be one of {', '.join(allowed)}, got {value!r}")

    def _check_whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if value is None and name != "recent":
            return
        if not (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most):
            bound = f"in {least} ... {most}" if most == MAX_EXACT else f">= {least}"
            raise TPAError(f"tpa config: {name} must be a whole number {bound}, got {value!r}")

    def _check_rate(self, rate: float) -> None:
        """A rate is a number, and excludes whatever chooses ranks and bits by hand."""
        if not (isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate <= MAX_RATE):
            raise TPAError(f"tpa config: rate must lie in (0, {MAX_RATE}] bits per number, got {rate!r}")
        given = [name for name in FORM if getattr(self, name) is not None]
        if self.k_mode not in (None, "latent") and set(given) <= {"k_mode", "k_rank", "k_dtype"}:
            if self.predict:
                raise TPAError(f"tpa config: tokens predict K and V together, not V beside k_mode {self.k_mode!r}")
        elif {self.mode, self.k_mode, self.v_mode} - {None, "latent"} or set(given) - set(FORM[:3]):
            raise TPAError(
                f"tpa config: a rate chooses latent, its ranks and its bits, so it excludes {given[-1]}, "
                f"got {getattr(self, given[-1])!r} and rate {rate}"
            )

    @classmethod
    def of(cls, choice: TPAConfig | Choice | None) -> TPAConfig:
        """Whatever a user may give: a configuration, a `FixedRank`, a `Spectral`, or nothing.

        >>> TPAConfig.of(Spectral(rate=1.0)).rate
        1.0
        """
        if isinstance(choice, TPAConfig):
            return choice
        if not isinstance(choice, FixedRank | Spectral | None):
            raise TPAError(f"tpa config: must be a TPAConfig, FixedRank, Spectral or None, got {choice!r:.60}")
        if not isinstance(choice, Spectral):
            return cls(**side_keywords(choice))
        if choice.given:
            raise TPAError(f"tpa config: widths are those of one layer, so they go into per_layer, got {choice!r:.80}")
        return cls(rate=choice.rate, predict=choice.predict, prefer=choice.prefer, **side_keywords(choice))

    @property
    def spectral(self) -> bool:
        """Is the cache (or a part of it) a spectral one? It is when nothing is chosen."""
        if self.per_layer is not None:
            return any(isinstance(choice, Spectral) for choice in self.per_layer)
        return self.rate is not None or all(getattr(self, name) is None for name in FORM)

    @property
    def choice(self) -> Choice:
        """What is asked of every layer that is converted."""
        if self.spectral:
            alone = self.rate is not None and self.k_mode not in (None, "latent")
            k = Side(str(self.k_mode), self.k_rank, self.k_dtype or "int8") if alone else None
            return Spectral(self.rate or DEFAULT_RATE, k, self.predict, prefer=self.prefer or PREFER[0])
        ranks_given = self.k_rank is not None or self.v_rank is not None
        mode = self.mode or ("contextual" if ranks_given else "latent")
        dtype = self.kv_dtype or "bfloat16"
        return FixedRank(
            Side(self.k_mode or mode, self.k_rank, self.k_dtype or dtype),
            Side(self.v_mode or mode, self.v_rank, self.v_dtype or dtype),
        )

    @property
    def exact_tokens(self) -> tuple[int, int]:
        """(sinks, recent): how many first tokens converted layers keep exactly, how many newest the global ones."""
        return (DEFAULT_SINKS if self.spectral else 0) if self.sinks is None else self.sinks, self.recent

    def resolve(self, config: GemmaConfig) -> tuple[tuple[Choice | None, ...], list[str]]:
        """(the choice of every layer, None for dense; a line for every choice that had to be clamped)."""
        notes: list[str] = []
        if self.per_layer is not None:
            if (got := len(self.per_layer)) != (layers := config.num_layers):
                raise TPAError(f"tpa config: per_layer must have one entry a layer, got {got} for {layers} layers")
            resolved = tuple(choice and choice.resolved(config, notes) for choice in self.per_layer)
            return resolved, list(dict.fromkeys(notes))
        chosen, choice = chosen_layers(self.layers, config), self.choice.resolved(config, notes)
        return tuple(choice if layer in chosen else None for layer in range(config.num_layers)), notes

    def resolve_q_rank(self, config: GemmaConfig) -> tuple[int, list[str]]:
        """(rank of Q, a line if it had to be clamped); h, the default, is exact."""
        h, asked = config.num_heads, self.q_rank
        if asked is None or asked <= h:
            return asked or h, []
        return h, [f"q_rank {asked} is above the exact bound {h} (query heads): clamped to {h}"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; widths become counts."""
        content = dict(vars(self))
        if self.per_layer is not None:
            content["per_layer"] = [choice and choice_to_dict(choice) for choice in self.per_layer]
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TPAConfig:
        """The inverse of `to_dict`."""
        try:
            content = dict(content)
            if content.get("per_layer") is not None:
                rate, predict = content.get("rate") or DEFAULT_RATE, content.get("predict")
                entries = content["per_layer"]
                content["per_layer"] = tuple(entry and choice_from_dict(entry, rate, predict) for entry in entries)
            return cls(**content)
        except (TypeError, AttributeError, KeyError, ValueError) as problem:
            raise TPAError(f"tpa config: unreadable: {problem}") from None


def side_keywords(choice: Choice | None) -> dict[str, Any]:
    """The sides of a choice as `TPAConfig` takes them: k_mode, k_rank, k_dtype, v_mode ..."""
    sides = {name: getattr(choice, name) for name in "kv" if getattr(choice, name, None) is not None}
    for side in sides.values():
        if not isinstance(side, Side):
            raise TPAError(f"tpa config: k and v of a choice must be a Side each, got {side!r:.60}")
    return {f"{name}_{field}": x for name, side in sides.items() for field, x in vars(side).items()}


# ---- choices of single layers as JSON: the entries that saved models have always had ----


def choice_to_dict(choice: Choice) -> dict[str, Any]:
    """One entry a side, {k_mode, k_rank, k_dtype, k_widths, v_...}; "shared": V's coefficients are those of K. Of a
    banded choice the widths are a list of counts for each string.
    """
    none: list[int] = []
    sides: list[tuple[str, int | None, str, Any]]
    if isinstance(choice, FixedRank):
        sides = [(x.mode, x.rank, x.dtype, none) for x in (choice.k, choice.v)]
    elif choice.banded:
        halves = choice.of_strings[:-1], choice.of_strings[-1:]
        sides = [("banded", sum(map(len, x)), "spectral", [width_counts(widths) for widths in x]) for x in halves]
    else:
        coded = ("latent", len(choice.widths), "spectral", width_counts(choice.widths))
        shared = (*coded[:2], "shared", none)
        sides = [coded, shared] if choice.k is None else [(choice.k.mode, choice.k.rank, choice.k.dtype, none), coded]
    names = ("mode", "rank", "dtype", "widths")
    return {f"{side}_{name}": x for side, entry in zip("kv", sides) for name, x in zip(names, entry, strict=True)}


def choice_from_dict(entry: dict[str, Any], rate: float, predict: bool | None) -> Choice:
    """The inverse of `choice_to_dict`; rate and predict are the configuration's. K and V with codes of their own each
    (format 2) count as one choice of K's.
    """
    k, v = (Side(entry[f"{side}_mode"], entry[f"{side}_rank"], entry[f"{side}_dtype"]) for side in "kv")
    found = [entry.get(f"{side}_widths", ()) for side in "kv"]
    if k.mode == "banded":
        return Spectral(rate, None, predict, strings=tuple(map(widths_of, [*found[0], *found[1]])))
    k_widths, v_widths = map(widths_of, found)
    if k.dtype == "spectral":
        return Spectral(rate, None, predict, k_widths, "size")
    if v.dtype == "spectral":
        return Spectral(rate, k, predict, v_widths)
    return FixedRank(k, v)


def width_counts(widths: tuple[int, ...]) -> list[int]:
    """Widths, which never increase, as how many there are of 8, 7 ... 1 bits.

    >>> width_counts((8, 2, 2))
    [1, 0, 0, 0, 0, 0, 2, 0]
    """
    return [widths.count(width) for width in range(MAX_RATE, 0, -1)] if widths else []


def widths_of(counts: Any) -> tuple[int, ...]:
    """The inverse of `width_counts`; refuses anything else.

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
