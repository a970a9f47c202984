"""How layers cache, as JSON and named tensors: what a saved TPA model adds to a checkpoint.

Every layer has an entry for K and one for V, {mode, rank, dtype, error, widths, groups}, and its constant arrays are
`tpa.layers.L.k.basis` and so on. A spectral side is `latent` of dtype "spectral"; V's "shared": its coefficients are
those of K.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..compress.config import KV_DTYPES, width_counts, widths_of
from ..core.banded import STRINGS, BandedLatent
from ..core.mode import MODES, Mode
from ..core.pair import Joint
from ..core.spectral import CodedLatent
from ..errors import TPAError
from ..gemma.config import GemmaConfig

ENTRY = {"mode", "rank", "dtype", "error", "widths", "groups"}


def is_basis(name: str) -> bool:
    """Is this a constant array of K or V? Those keep the precision they were made in.

    >>> is_basis("tpa.layers.0.k.basis"), is_basis("tpa.layers.0.q.A"), is_basis("model.norm.weight")
    (True, False, False)
    """
    modes: list[type[Mode]] = [*MODES.values(), CodedLatent, BandedLatent]
    return name.startswith("tpa.") and any(name.rpartition(".")[2] in mode.constants for mode in modes)


def is_factor(name: str, config: GemmaConfig) -> bool:
    """Is this the name of a constant factor that a saved TPA model may hold?"""
    found = re.fullmatch(r"tpa\.layers\.(\d{1,9})\.(?:[kv]\.\w+|(q\.[AW]))", name)
    return found is not None and int(found[1]) < config.num_layers and (found[2] is not None or is_basis(name))


def describe(pair: Any) -> list[dict[str, Any]]:
    """The entries of K and of V, without the constant arrays."""
    entries = []
    for mode in pair.modes:
        entries.append({"mode": mode.name, "rank": mode.rank, "dtype": mode.dtype, "error": mode.error})
        if isinstance(mode, BandedLatent):
            strings = [width_counts(widths) for widths in mode.widths_of_strings]
            entries[-1] |= {"widths": strings, "groups": mode.groups}
        elif mode.dtype == "spectral":
            entries[-1] |= {"mode": "latent", "widths": width_counts(mode.widths)}
    if isinstance(pair, Joint):
        entries[1] |= {"dtype": "shared"}
        del entries[1]["widths"]
    return entries


def named_arrays(pair: Any, layer: int) -> Iterator[tuple[str, Any]]:
    """The constant arrays of a layer by the names that they have in a file."""
    for side, mode in zip("kv", pair.modes, strict=True):
        for name, x in mode.arrays().items():
            if x is not None:
                yield f"tpa.layers.{layer}.{side}.{name}", x


def saved_pair(model_class: Any, entry: Any, tensors: Mapping[str, Any], config: GemmaConfig, layer: int) -> Any:
    """The pair of one layer, checked: one this program could have made.

    tensors: its constant arrays by name; if empty, the pair is made without them.
    """
    k_entry, v_entry = entry
    if unknown := sorted((set(k_entry) | set(v_entry)) - ENTRY):
        raise TPAError(f"load: saved factors of layer {layer}: keys are {', '.join(sorted(ENTRY))}, got {unknown[0]!r}")
    if "banded" in (k_entry["mode"], v_entry["mode"]):
        return saved_banded(model_class, entry, tensors, config, layer)
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
    return (model_class.Joint if joint else model_class.Pair)(*sides)


def saved_banded(model_class: Any, entry: Any, tensors: Mapping[str, Any], config: GemmaConfig, layer: int) -> Any:
    """K in two bands, and V behind them."""
    where = f"load: saved factors of layer {layer}"
    if any((x["mode"], x["dtype"]) != ("banded", "spectral") for x in entry):
        raise TPAError(f"{where}: a banded K and V belong together, got {entry[0]['mode']!r} and {entry[1]['mode']!r}")
    widths = [[widths_of(counts) for counts in x["widths"]] for x in entry]
    if [len(x) for x in widths] != [STRINGS - 1, 1]:
        raise TPAError(f"{where}: banded K has {STRINGS - 1} strings of widths and V 1, got {[len(x) for x in widths]}")
    modes, before, (g, d) = [], 0, (config.num_kv_heads, config.head_dim)
    groups = entry[0].get("groups", 1)
    if type(groups) is not int or groups < 1 or g % groups or entry[1].get("groups", 1) != groups:
        got = [x.get("groups", 1) for x in entry]
        raise TPAError(f"{where}: groups must divide the {g} KV heads, alike for K and V, got {got}")
    most = g // groups * d
    for side, described, strings in zip("kv", entry, widths, strict=True):
        rank, flat, name = described["rank"], sum(strings, ()), f"tpa.layers.{layer}.{side}"
        if rank != len(flat) or rank > most:
            raise TPAError(f"{where}: rank of {side} must be that of {len(flat)} widths, at most {most}, got {rank!r}")
        arrays: dict[str, Any] = {x: tensors.get(f"{name}.{x}") for x in BandedLatent.constants}
        sizes: dict[str, Any] = {
            "widths": flat,
            "strings": tuple(map(len, strings)),
            "before": before,
            "groups": groups,
        }
        modes.append(model_class.BandedLatent(g, d, rank, "spectral", float(described["error"]), **sizes, **arrays))
        before = rank
        if tensors:
            check_arrays(modes[-1], name, 0)
    if tensors and modes[0].theta is None:
        raise TPAError(f"load: tpa.layers.{layer}.k.theta of banded is missing")
    return model_class.Banded(*modes)


def saved_mode(
    model_class: Any, entry: dict[str, Any], tensors: Mapping[str, Any], config: GemmaConfig, name: str, sides: int
) -> Mode:
    """K or V of one layer. sides: 2 where one set of coefficients is that of both, else 1."""
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
    mode = made(g, d, rank, dtype, float(entry["error"]), **arrays, **options)
    if tensors:
        check_arrays(mode, name, 2 * config.hidden_size)
    return mode


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
