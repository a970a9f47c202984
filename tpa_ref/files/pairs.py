"""How layers cache, as JSON and named tensors: what a saved TPA model adds to a checkpoint.

Every layer has an entry for K and one for V, {mode, rank, dtype, error, widths}, and its constant arrays are
`tpa.layers.L.k.basis` and so on. A spectral side is `latent` of dtype "spectral"; V's "shared": its coefficients are
those of K.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..compress.config import KV_DTYPES, width_counts, widths_of
from ..core.mode import MODES, Mode
from ..core.spectral import CodedLatent
from ..errors import TPAError
from ..gemma.config import GemmaConfig

ENTRY = {"mode", "rank", "dtype", "error", "widths"}


def constants() -> set[str]:
    """The names that constant arrays have in any mode.

    >>> sorted(constants())
    ['basis', 'encoder', 'mean', 'predictor']
    """
    modes: list[type[Mode]] = [*MODES.values(), CodedLatent]
    return {name for mode in modes for name in mode.constants}


def is_basis(name: str) -> bool:
    """Constant factors keep the precision they were made in; everything else takes the one that is computed in."""
    return name.startswith("tpa.") and name.rpartition(".")[2] in constants()


def is_factor(name: str, config: GemmaConfig) -> bool:
    """Is this the name of a constant factor that a saved TPA model may hold?"""
    parts = name.split(".")
    return (
        len(parts) == 5
        and parts[:2] == ["tpa", "layers"]
        and parts[2].isdecimal()
        and int(parts[2]) < config.num_layers
        and (parts[4] in constants() if parts[3] in "kv" else parts[3:] in (["q", "A"], ["q", "W"]))
    )


def describe(pair: Any) -> list[dict[str, Any]]:
    """The entries of K and of V, without the constant arrays."""
    k, v = (describe_mode(mode) for mode in pair.modes)
    if is_joint(pair):
        v = {name: x for name, x in v.items() if name != "widths"} | {"dtype": "shared"}
    return [k, v]


def describe_mode(mode: Mode) -> dict[str, Any]:
    """One entry."""
    content = {"mode": mode.name, "rank": mode.rank, "dtype": mode.dtype, "error": mode.error}
    if hasattr(mode, "widths"):
        content |= {"mode": "latent", "widths": width_counts(mode.widths)}
    return content


def is_joint(pair: Any) -> bool:
    """Do K and V share their coefficients?"""
    return not any(name.startswith("v.") for name in pair.fields())


def named_arrays(pair: Any, layer: int) -> Iterator[tuple[str, Any]]:
    """The constant arrays of a layer by the names that they have in a file."""
    for side, mode in zip("kv", pair.modes, strict=True):
        for name, x in mode.arrays().items():
            if x is not None:
                yield f"tpa.layers.{layer}.{side}.{name}", x


def saved_pairs(model_class: Any, entries: list[Any], tensors: Mapping[str, Any], config: GemmaConfig) -> list[Any]:
    """The pairs of all layers of a saved model, checked: ones this program could have made."""
    if len(entries) != config.num_layers:
        raise TPAError(f"load: saved factors must cover {config.num_layers} layers, got {len(entries)}")
    return [saved_pair(model_class, entry, tensors, config, layer) for layer, entry in enumerate(entries)]


def saved_pair(
    model_class: Any, entry: Any, tensors: Mapping[str, Any], config: GemmaConfig, layer: int, whole: bool = True
) -> Any:
    """The pair of one layer; whole: with its constant arrays, which are checked."""
    k_entry, v_entry = entry
    if unknown := sorted((set(k_entry) | set(v_entry)) - ENTRY):
        raise TPAError(f"load: saved factors of layer {layer}: keys are {', '.join(sorted(ENTRY))}, got {unknown[0]!r}")
    joint = v_entry["dtype"] == "shared"
    if joint and (v_entry["rank"], v_entry["mode"], k_entry["dtype"]) != (k_entry["rank"], "latent", "spectral"):
        raise TPAError(
            f"load: saved factors of layer {layer}, V: coefficients that V shares are those of a spectral K "
            f"of the same rank"
        )
    if joint:
        v_entry = {**k_entry, "error": v_entry["error"]}
    sides = [
        saved_mode(model_class, described, tensors, config, f"tpa.layers.{layer}.{side}", 2 if joint else 1)
        for side, described in zip("kv", (k_entry, v_entry), strict=True)
    ]
    for side, mode in zip("kv", sides if whole else (), strict=False):
        check_arrays(mode, f"tpa.layers.{layer}.{side}", 2 * config.hidden_size)
    return (model_class.Joint if joint else model_class.Pair)(*sides)


def saved_mode(
    model_class: Any, entry: dict[str, Any], tensors: Mapping[str, Any], config: GemmaConfig, name: str, sides: int
) -> Mode:
    """K or V of one layer; sides: of how many of them the coefficients are."""
    where = f"load: saved factors {name}"
    modes: dict[str, Any] = {**model_class.MODES, "dense": type(model_class.Pair.dense(1, 2).k)}
    g, d, kind, rank, dtype = config.num_kv_heads, config.head_dim, entry["mode"], entry["rank"], entry["dtype"]
    if kind not in modes:
        raise TPAError(f"{where}: mode must be one of {', '.join(modes)}, got {kind!r}")
    if dtype not in (*KV_DTYPES, "float64", "spectral"):
        raise TPAError(f"{where}: dtype must be one of {', '.join(KV_DTYPES)}, got {dtype!r}")
    spectral, widths = dtype == "spectral", widths_of(entry.get("widths", ()))
    least, most = (0 if spectral else 1), modes[kind].exact_rank(g, d) * sides
    if kind != "dense" and (type(rank) is not int or not least <= rank <= most):
        raise TPAError(f"{where}: rank must lie in {least} ... {most}, got {rank!r}")
    if spectral and (kind != "latent" or len(widths) != rank):
        raise TPAError(
            f"{where}: a spectral cache is latent with one width a coefficient, "
            f"got {kind}, rank {rank} and {len(widths)} widths"
        )
    made = model_class.CodedLatent if spectral else modes[kind]
    arrays = {constant: tensors.get(f"{name}.{constant}") for constant in made.constants}
    options = {"widths": widths} if spectral else {}
    return made(g, d, rank, dtype, float(entry["error"]), **arrays, **options)


def check_arrays(mode: Mode, name: str, z: int) -> None:
    """Constant arrays have the shapes of their mode; z: length of a token vector."""
    for constant, shapes in mode.array_shapes().items():
        value = mode.arrays()[constant]
        got = None if value is None else tuple(value.shape)
        allowed = [(z, *shape[1:]) if constant == "predictor" and shape else shape for shape in shapes]
        if got not in allowed:
            shapes_text = " or ".join(map(str, allowed))
            raise TPAError(f"load: {name}.{constant} of {mode.name} must have shape {shapes_text}, got {got}")
        if value is not None and "float" not in str(value.dtype):
            raise TPAError(f"load: {name}.{constant} must be float, got {value.dtype}")
