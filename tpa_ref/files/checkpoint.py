"""Models from disk and back. Never unpickles code. What the files look like is in `formats`.

A saved model is one of
    folder          config.json, model.safetensors (or shards with an index), tokenizer.model
    *.safetensors   one file, config and tokenizer in its metadata
    *.pt            {format, version, config, tokenizer, tensors}, read with weights_only=True (needs torch)
Its config.json is the Hugging Face one plus the key "tpa": version, TPAConfig and how every layer caches K and V.
The functions that touch no array are shared with the torch backend.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..atomic import replacing
from ..compress.config import KV_DTYPES, MODES, TPAConfig, exact_rank, width_counts, widths_of
from ..core.factorize import Factorization
from ..errors import TPAError
from ..gemma.config import VARIANTS, GemmaConfig, VisionConfig
from ..gemma.model import Model
from ..gemma.tokenizer import Tokenizer
from ..gemma.weights import (
    VISION_BLOCKS,
    LayersOnDisk,
    Weights,
    from_named,
    hf_names,
    is_vision,
    stored_name,
    to_named_layer,
    to_named_vision,
    vision_weights,
)
from . import formats
from .formats import FORMAT, VERSION, Entry

DTYPES = ("float32", "float64")
CONSTANTS = ("basis", "encoder", "mean", "predictor")  # of a Factorization
SPARE_ROWS = 64  # embedding rows a checkpoint may have beyond the tokenizer's pieces
SHARD_BYTES = 4_000_000_000  # a saved folder's model.safetensors is split where it would be larger


def load(
    path: str | Path,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    progress: Callable[[Iterable], Iterable] = iter,
    on_disk: bool = False,
) -> Model:
    """A model from any of the `formats`: a Hugging Face folder, a gemma_pytorch checkpoint, a saved TPA model.

    variant: 270m, 1b, 4b, 12b, 27b, to be checked against what is found; where there is no config.json it is guessed
    from the tensors. config: a GemmaConfig, or the path of a Hugging Face config.json, for sizes that were never
    published. tokenizer: path of a tokenizer.model. dtype: what is computed in; bf16 files are widened. progress: wraps
    the tensors being read, for instance `tqdm.tqdm`. on_disk: every block is read anew whenever it is needed, so that
    no more than one is in memory. A multimodal checkpoint comes with its image tower where config and tensors have one.
    """
    if dtype not in DTYPES:
        raise TPAError(f"load: dtype of the NumPy backend must be one of {', '.join(DTYPES)}, got {dtype!r}")
    found = inspect(path, variant, config, tokenizer)
    return assemble(Model, found, lambda name: read(found, name, dtype), progress, on_disk)


def read(found: Found, name: str, dtype: str) -> np.ndarray:
    """One tensor, in the dtype that is computed in."""
    return widen(name, found.entries[name].read("numpy"), None if is_basis(name) else dtype)


def is_basis(name: str) -> bool:
    """Constant factors keep the precision they were made in; everything else takes the one that is computed in."""
    return name.startswith("tpa.") and name.rpartition(".")[2] in CONSTANTS


def widen(name: str, value: np.ndarray, dtype: str | None) -> np.ndarray:
    """A stored tensor in the dtype that is computed in (None: as it is); infinities and NaN are named and refused."""
    value = value if dtype is None else value.astype(dtype, copy=False)
    # Both ends show what is not finite, without the temporary arrays of a test of every number.
    if value.size and not np.isfinite([value.min(), value.max()]).all():
        raise TPAError(f"load: {name} must be finite, got {int((~np.isfinite(value)).sum())} NaN or infinite numbers")
    return value


# ---- what is on disk (shared by both backends) ----


@dataclass
class Found:
    """A checkpoint that has been looked at and checked, but not read."""

    path: Path
    config: GemmaConfig
    tpa: dict[str, Any] | None  # the "tpa" entry of a saved model's config
    tokenizer: Tokenizer | None
    stored_dtype: str
    entries: dict[str, Entry]  # by the names of `hf_names`, and tpa.* of a saved model


def inspect(
    path: str | Path,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Found:
    """Recognise the format, read config and tokenizer, and check every tensor's name and shape, without reading one."""
    path = Path(path)
    if variant is not None and variant not in VARIANTS:
        raise TPAError(f"load: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    container = formats.open_checkpoint(path)
    entries = formats.named_entries(container.entries)
    found_config = formats.with_rows(_choose_config(path, container.content, variant, config, entries), entries)
    found_config, entries = formats.with_vision(found_config, entries)
    stored_dtype = _stored_dtype(path, {e.dtype for name, e in entries.items() if not name.startswith("tpa.")})
    saved_tpa = container.content.get("tpa") if container.content else None
    if saved_tpa is not None and not isinstance(saved_tpa, dict):
        raise TPAError(f"load: the tpa entry of {path} must be an object, got {type(saved_tpa).__name__}")
    if saved_tpa is not None:
        formats.check_version(path, saved_tpa.get("version"))
    entries, problems = formats.split_qkv(entries, found_config)
    check_tensors(path, {name: entry.shape for name, entry in entries.items()}, found_config, saved_tpa, problems)
    words = Tokenizer.from_file(tokenizer) if tokenizer else None
    if words is None and container.proto:
        words = Tokenizer(container.proto, str(path))
    if words and not words.vocab_size <= found_config.vocab_size <= words.vocab_size + SPARE_ROWS:
        raise TPAError(
            f"load: the tokenizer's pieces must match the embedding rows (up to {SPARE_ROWS} spare), "
            f"got {words.vocab_size} pieces and {found_config.vocab_size} rows"
        )
    return Found(path, found_config, saved_tpa, words, stored_dtype, entries)


def _stored_dtype(path: Path, kinds: set[str]) -> str:
    """The widest dtype of the weights; refused where Gemma 3 cannot live in it."""
    if "float16" in kinds:
        raise TPAError(
            f"load: {path} holds float16 weights, but Gemma 3's activations exceed its range: use bfloat16 or float32"
        )
    allowed = ("float64", "float32", "bfloat16")
    if unknown := sorted(kinds - set(allowed)):
        raise TPAError(f"load: {path}: weights must be bfloat16, float32 or float64, got {unknown[0]}")
    return next((dtype for dtype in allowed if dtype in kinds), "float32")


def _choose_config(
    path: Path,
    content: dict[str, Any] | None,
    variant: str | None,
    config: GemmaConfig | str | Path | None,
    entries: dict[str, Entry],
) -> GemmaConfig:
    """The config given, else the one beside the weights, else the published one of this size; no contradictions."""
    layers, width = formats.shown_size(entries)
    if isinstance(config, GemmaConfig):
        chosen = config
    elif config is not None:
        chosen = GemmaConfig.from_hf(Path(config))
    elif content is not None:
        chosen = GemmaConfig.from_hf(content)
    else:
        sizes = {(made.num_layers, made.hidden_size): made for made in (make() for make in VARIANTS.values())}
        if (layers, width) in sizes:  # published sizes have the published image tower, or none
            chosen = replace(sizes[layers, width], vision=VisionConfig() if any(map(is_vision, entries)) else None)
        elif variant is not None:  # its size is contradicted below
            chosen = GemmaConfig.of_variant(variant)
        else:
            raise TPAError(
                f"load: {path} comes without config.json and its {layers} layers of width {width} are no published "
                f"size; give config= (--config)"
            )
    if variant is not None:
        wanted = GemmaConfig.of_variant(variant)
        shown = (layers, width) if content is None and config is None else (chosen.num_layers, chosen.hidden_size)
        if shown != (wanted.num_layers, wanted.hidden_size):
            raise TPAError(
                f"load: variant {variant} has {wanted.num_layers} layers of width {wanted.hidden_size}, "
                f"but {path} has {shown[0]} of {shown[1]}"
            )
    return chosen


def check_tensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    config: GemmaConfig,
    saved_tpa: dict[str, Any] | None,
    problems: Iterable[str] = (),
) -> None:
    """Every expected tensor is there with its shape, and nothing else: one error names all that is not so."""
    expected = hf_names(config)
    problems = list(problems)
    problems += [f"missing {name}" for name in expected if name not in shapes]
    problems += [
        f"{name} must be {list(expected[name])}, got {list(shape)}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    problems += [
        f"unexpected {name}" for name in shapes if name not in expected and not (saved_tpa and _is_factor(name, config))
    ]
    if problems:
        more = f" ... and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise TPAError(f"load: {path} does not fit its config: {'; '.join(problems[:4])}{more}")


def _is_factor(name: str, config: GemmaConfig) -> bool:
    """Is this the name of a constant factor that a saved TPA model may hold?"""
    parts = name.split(".")
    return (
        len(parts) == 5
        and parts[:2] == ["tpa", "layers"]
        and parts[2].isdecimal()
        and int(parts[2]) < config.num_layers
        and (parts[4] in CONSTANTS if parts[3] in "kv" else parts[3:] in (["q", "A"], ["q", "W"]))
    )


def assemble(
    model_class: Any, found: Found, read: Callable[[str], Any], progress: Callable = iter, on_disk: bool = False
) -> Any:
    """Tensors and config -> a model of either backend, with its TPA factors if it was saved with some."""
    config = found.config
    blocks = ("model.layers.", VISION_BLOCKS) if on_disk else "none"
    tensors = {name: read(name) for name in progress([name for name in found.entries if not name.startswith(blocks)])}
    tpa, factors, queries = None, None, None
    if found.tpa is not None:
        try:
            tpa = TPAConfig.from_dict(found.tpa["config"])
            factors = [
                tuple(
                    factorization(how, {name: tensors.get(f"tpa.layers.{layer}.{side}.{name}") for name in CONSTANTS})
                    for side, how in zip("kv", pair, strict=True)
                )
                for layer, pair in enumerate(found.tpa["factors"])
            ]
            check_factors(factors, config)
            queries = [_query_factors(tensors, layer, config) for layer in range(config.num_layers)]
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise TPAError(f"load: the saved TPA entry is unreadable: {problem}") from None
    if on_disk:
        outer = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
        reread = lambda name: tensors[name] if name in tensors else read(name)  # noqa: E731
        vision = vision_weights(reread, config, on_disk) if config.vision else None
        weights = Weights(outer[0], LayersOnDisk(read, config), outer[1], vision)
    else:
        weights = from_named(tensors, config)
    return model_class(config, weights, found.tokenizer, tpa, factors, queries, found.stored_dtype)


def describe(how: Factorization) -> dict[str, Any]:
    """A factorization as JSON, without its constant arrays."""
    content = {"mode": how.mode, "rank": how.rank, "dtype": how.dtype, "error": how.error}
    return content | ({"widths": width_counts(how.widths)} if how.widths else {})


def factorization(described: dict[str, Any], constants: dict[str, Any]) -> Factorization:
    """The inverse of `describe`, with the constant arrays."""
    return Factorization(**described | {"widths": widths_of(described.get("widths", ()))}, **constants)


def _query_factors(tensors: dict[str, Any], layer: int, config: GemmaConfig) -> tuple[Any, Any] | None:
    """A [r,h] and W [r,d,m] of one layer where a q rank was saved, else None."""
    names = f"tpa.layers.{layer}.q.A", f"tpa.layers.{layer}.q.W"
    found = [tensors[name] for name in names if name in tensors]
    if not found:
        return None
    shapes = [tuple(value.shape) for value in found]
    r = shapes[0][0] if shapes[0] else 0
    expected = [(r, config.num_heads), (r, config.head_dim, config.hidden_size)]
    if shapes != expected or not 1 <= r <= config.num_heads:
        raise TPAError(f"load: {names[0]} and {names[1]} must have shapes {expected}, got {shapes}")
    return found[0], found[1]


def check_factors(factors: list[Any], config: GemmaConfig) -> None:
    """Saved factorizations are ones this program could have made: known modes and dtypes, bases of the right shape."""
    if len(factors) != config.num_layers:
        raise TPAError(f"load: saved factors must cover {config.num_layers} layers, got {len(factors)}")
    for layer, pair in enumerate(factors):
        for side, how in zip("KV", pair, strict=True):
            where = f"load: saved factors of layer {layer}, {side}"
            if how.mode not in (*MODES, "dense"):
                raise TPAError(f"{where}: mode must be one of {', '.join(MODES)} or dense, got {how.mode!r}")
            if how.dtype not in (*KV_DTYPES, "float64", "spectral", *(["shared"] if side == "V" else [])):
                raise TPAError(f"{where}: dtype must be one of {', '.join(KV_DTYPES)}, got {how.dtype!r}")
            if how.mode == "dense":
                continue
            least = 0 if how.dtype in ("spectral", "shared") else 1
            both = pair[1].dtype == "shared"  # coefficients of K and V together
            most = exact_rank(how.mode, config) * (2 if both else 1)
            if type(how.rank) is not int or not least <= how.rank <= most:
                raise TPAError(f"{where}: rank must lie in {least} ... {most}, got {how.rank!r}")
            if both and (how.rank, how.mode, pair[0].dtype) != (pair[0].rank, "latent", "spectral"):
                raise TPAError(f"{where}: coefficients that V shares are those of a spectral K of the same rank")
            if how.dtype == "spectral" and (how.mode != "latent" or len(how.widths) != how.rank):
                raise TPAError(
                    f"{where}: a spectral cache is latent with one width a coefficient, "
                    f"got {how.mode}, rank {how.rank} and {len(how.widths)} widths"
                )
            for name, shapes in constant_shapes(how, config).items():
                value = how.constants()[name]
                got, tensor = None if value is None else tuple(value.shape), f"tpa.layers.{layer}.{side.lower()}.{name}"
                if got not in shapes:
                    raise TPAError(f"load: {tensor} of {how.mode} must have shape {shapes[0]}, got {got}")
                if value is not None and "float" not in str(value.dtype):
                    raise TPAError(f"load: {tensor} must be float, got {value.dtype}")


def constant_shapes(how: Factorization, config: GemmaConfig) -> dict[str, list]:
    """The shapes that each constant array of a factorization may have; None: there need be none."""
    R, g, d = how.rank, config.num_kv_heads, config.head_dim
    basis: dict[str, list] = {
        "contextual": [None],
        "fixed-a": [(R, g), (R, g, d)],
        "fixed-b": [(g, R, d)],
        "latent": [(R, g, d)],
    }
    weighted = how.mode in ("fixed-b", "latent")
    coded = how.dtype in ("spectral", "shared")
    if coded or how.encoder is not None or how.mean is not None:
        encoder, mean = (basis[how.mode], [(g, d)]) if weighted else ([None], [None])
    else:
        encoder, mean = [None], [None]
    predictor = [None, (2 * config.hidden_size, g, d)] if coded else [None]
    return {"basis": basis[how.mode], "encoder": encoder, "mean": mean, "predictor": predictor}


# ---- saving ----


def save(model: Model, path: str | Path) -> Path:
    """Write a model, dense or TPA, atomically; the suffix decides: .pt, .safetensors, none for a folder.

    A folder above 4 GB gets one file for each layer, and an index.
    """
    path = check_output(path)
    with replacing(path) as temporary:
        if path.suffix == ".pt":
            tensors = {name: _to_torch(value) for part in parts(model, cast) for name, value in part.items()}
            save_pt(model, tensors, temporary)
        else:
            write_safetensors(model, parts(model, cast), temporary, save_file)
    return path


def cast(value: np.ndarray, dtype: str | None) -> np.ndarray:
    """A tensor in the dtype it is stored in (None: its own)."""
    kind = value.dtype if dtype is None else ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return np.ascontiguousarray(value.astype(kind, copy=False))


def parts(model: Any, cast: Callable[[Any, str | None], Any]) -> Iterator[dict[str, Any]]:
    """Everything of a model that is an array, by name: what stands outside the layers, then layer by layer, then the
    image tower.
    """
    yield outer_part(model, cast)
    for layer in range(model.config.num_layers):
        yield layer_part(model, layer, cast)
    if model.config.vision:
        yield vision_part(model, cast)


def outer_part(model: Any, cast: Callable[[Any, str | None], Any]) -> dict[str, Any]:
    """What stands outside the layers."""
    tensors = {
        "model.embed_tokens.weight": model.weights.embed_vm,
        "model.norm.weight": model.weights.final_norm_m,
    }
    return {stored_name(name, model.config): cast(value, model.stored_dtype) for name, value in tensors.items()}


def vision_part(model: Any, cast: Callable[[Any, str | None], Any]) -> dict[str, Any]:
    """The image tower and its projector."""
    return {name: cast(value, model.stored_dtype) for name, value in to_named_vision(model.weights.vision)}


def layer_part(model: Any, layer: int, cast: Callable[[Any, str | None], Any]) -> dict[str, Any]:
    """One layer's weights in the dtype they were stored in, and its constant factors as they are."""
    block = to_named_layer(model.weights.layers[layer], layer, model.config)
    tensors = {stored_name(name, model.config): cast(value, model.stored_dtype) for name, value in block.items()}
    for side, how in zip("kv", model.factors[layer], strict=True):
        for name, value in how.constants().items():
            if value is not None:
                tensors[f"tpa.layers.{layer}.{side}.{name}"] = cast(value, None)
    for name, value in zip("AW", model.query_factors[layer] or (), strict=False):
        tensors[f"tpa.layers.{layer}.q.{name}"] = cast(value, None)
    return tensors


def config_json(model: Any) -> str:
    """The config.json of a saved model."""
    content = model.config.to_hf() | {"torch_dtype": model.stored_dtype}
    if model.tpa is not None:
        described = [[describe(how) for how in pair] for pair in model.factors]
        content["tpa"] = {"version": VERSION, "config": model.tpa.to_dict(), "factors": described}
    return json.dumps(content, indent=2)


def write_safetensors(model: Any, parts: Iterator[dict[str, Any]], target: Path, save_file: Callable) -> None:
    """One file with everything in its metadata, or a folder."""
    if target.suffix:
        proto = model.tokenizer.proto if model.tokenizer else b""
        metadata = {"format": FORMAT, "version": str(VERSION)}
        metadata |= {"config": config_json(model), "tokenizer": base64.b64encode(proto).decode()}
        save_file({name: value for part in parts for name, value in part.items()}, target, metadata)
        return
    target.mkdir()
    if stored_bytes(model) <= SHARD_BYTES:
        tensors = {name: value for part in parts for name, value in part.items()}
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    else:
        for number, part in enumerate(parts):
            save_file(part, target / shard_name(number, model.config), {"format": "pt"})
        write_index(target)
    write_beside(model, target)


def stored_bytes(model: Any) -> int:
    """Bytes of the weights as they are saved."""
    itemsize = {"bfloat16": 2, "float32": 4, "float64": 8}[model.stored_dtype]
    return itemsize * sum(int(np.prod(shape)) for shape in hf_names(model.config).values())


def shard_name(number: int, config: GemmaConfig) -> str:
    """Shard 0 is what stands outside the layers, shard i + 1 is layer i, and one more is the image tower.

    >>> shard_name(0, GemmaConfig.gemma3_1b())
    'model-00001-of-00027.safetensors'
    """
    return f"model-{number + 1:05d}-of-{shard_count(config):05d}.safetensors"


def shard_count(config: GemmaConfig) -> int:
    return config.num_layers + 1 + (config.vision is not None)


def write_index(folder: Path) -> None:
    """The index of all shards in a folder, from their headers."""
    weight_map: dict[str, str] = {}
    total = 0
    for file in sorted(folder.glob("model-*-of-*.safetensors")):
        with safe_open(file, "numpy") as handle:
            weight_map |= dict.fromkeys(handle.keys(), file.name)
        with file.open("rb") as stream:
            total += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_beside(model: Any, folder: Path) -> None:
    """config.json and, where there is one, tokenizer.model."""
    (folder / "config.json").write_text(config_json(model), encoding="utf-8")
    if model.tokenizer:
        (folder / "tokenizer.model").write_bytes(model.tokenizer.proto)


def save_pt(model: Any, tensors: dict[str, Any], target: Path) -> None:
    """A .pt of plain tensors and strings, readable with weights_only=True."""
    import torch

    proto = torch.frombuffer(bytearray(model.tokenizer.proto), dtype=torch.uint8) if model.tokenizer else None
    content = {"format": FORMAT, "version": VERSION, "config": config_json(model), "tokenizer": proto}
    torch.save(content | {"tensors": tensors}, target)


def _to_torch(value: np.ndarray) -> Any:
    try:
        import torch
    except ImportError:
        raise TPAError("save: writing .pt needs torch, which is not installed; use .safetensors or a folder") from None
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def check_output(path: str | Path) -> Path:
    """Refuse, before any work is done, a place that cannot be written to or that holds something else."""
    path = Path(path)
    if len(path.name) > 200 or "\0" in str(path):
        raise TPAError(
            f"save: the name must be shorter than 200 characters, without null bytes, got {path.name[:40]!r}..."
        )
    if path.suffix not in ("", ".pt", ".safetensors"):
        raise TPAError(f"save: {path} must end in .pt, .safetensors or nothing (a folder), got {path.suffix}")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise TPAError(f"save: the folder of {path} does not exist: {parent}")
    if not os.access(parent, os.W_OK):
        raise TPAError(f"save: no permission to write in {parent}")
    if path.suffix and path.is_dir():
        raise TPAError(f"save: {path} is a folder, a file was expected")
    if not path.suffix and path.exists():
        ours = path.is_dir() and (not any(path.iterdir()) or (path / "config.json").is_file())
        if not ours:
            raise TPAError(f"save: {path} exists and is not a saved model; choose another place or remove it")
    return path
