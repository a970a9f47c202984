"""Models from disk and back. Never unpickles code. What the files look like is in `formats`.

A saved model is one of
    folder          config.json, model.safetensors (or shards with an index), tokenizer and whatever lay beside
    *.safetensors   one file: config in its metadata, the files of a folder as tensors of bytes
    *.pt            {format, version, config, files, tensors}, read with weights_only=True (needs torch)
Its config.json is the Hugging Face one plus the key "tpa": version, TPAConfig and how every layer caches K and V.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..atomic import replacing
from ..compress.config import TPAConfig
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.hf_config import SAVED_BY
from ..gemma.model import Model
from ..gemma.pieces import JSON, MODEL
from ..gemma.side_files import KEPT
from ..gemma.weights import EMBED, HEAD, VISION_BLOCKS, from_named, hf_names, joined, joined_vision, stored_name
from .formats import FORMAT, SIDE_FILE, VERSION
from .found import Found, inspect
from .pairs import describe, is_basis, named_arrays, saved_pair

SAVED_NAMES = {*KEPT, JSON, MODEL, "model.safetensors.index.json"}  # in a saved folder
SHARD_BYTES = 4_000_000_000  # a saved folder's model.safetensors is split where it would be larger

# Beside a bare tokenizer.model, from a GGUF say: without it `transformers` puts no BOS before a text.
TOKENIZER = {
    "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False,
    "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
}  # fmt: skip


def load(
    path: str | Path,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    progress: Callable[[Iterable], Iterable] = iter,
    on_disk: bool = False,
) -> Model:
    """A model from any of the `formats`: a Hugging Face folder, a gemma_pytorch checkpoint, a GGUF, a saved TPA model.

    variant: 270m, 1b, 4b, 12b, 27b, to be checked against what is found; where there is no config.json it is guessed
    from the tensors. config: a GemmaConfig, or the path of a Hugging Face config.json, for sizes that were never
    published. tokenizer: path of a tokenizer.model or tokenizer.json. dtype: what is computed in; bf16 files are
    widened. progress: wraps the tensors being read, for instance `tqdm.tqdm`. on_disk: every block is read anew
    whenever it is needed, so that no more than one is in memory. A multimodal checkpoint comes with its image tower
    where config and tensors have one.
    """
    if dtype not in ("float32", "float64"):
        raise TPAError(f"load: dtype of the NumPy backend must be one of float32, float64, got {dtype!r}")
    return Loader(inspect(path, variant, config, tokenizer), dtype).model(progress, on_disk)


class Loader(dict[str, Any]):
    """The tensors of a checkpoint by name, in the dtype that is computed in: those that are kept, and any other is read
    whenever it is asked for.
    """

    model_class: type = Model

    def __init__(self, found: Found, dtype: str):
        super().__init__()
        self.found, self.dtype = found, dtype

    def __missing__(self, name: str) -> Any:
        return self.read(name)

    def read(self, name: str) -> Any:
        """One tensor; infinities and NaN are named and refused."""
        value = self.found.entries[name].read("numpy")
        value = value if is_basis(name) else value.astype(self.dtype, copy=False)
        # Both ends show what is not finite, without the temporary arrays of a test of every number.
        if value.size and not np.isfinite([value.min(), value.max()]).all():
            count = int((~np.isfinite(value)).sum())
            raise TPAError(f"load: {name} must be finite, got {count} NaN or infinite numbers")
        return value

    def model(self, progress: Callable = iter, on_disk: bool = False) -> Any:
        """The model, with its TPA factors if it was saved with some."""
        config, saved = self.found.config, self.found.tpa
        blocks = ("model.layers.", VISION_BLOCKS) if on_disk else ()
        for name in progress([name for name in self.found.entries if not name.startswith(blocks)]):
            self[name] = self.read(name)
        tpa, pairs, queries = None, None, None
        if saved is not None:
            try:
                tpa = TPAConfig.from_dict(saved["config"])
                if len(entries := saved["factors"]) != config.num_layers:
                    raise TPAError(f"load: saved factors must cover {config.num_layers} layers, got {len(entries)}")
                pairs = [saved_pair(self.model_class, entry, self, config, at) for at, entry in enumerate(entries)]
                queries = [query_factors(self, layer, config) for layer in range(config.num_layers)]
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
                raise TPAError(f"load: the saved TPA entry is unreadable: {problem}") from None
        weights = from_named(self, config, on_disk)
        found, stored = self.found, self.found.stored_dtype
        if found.quantized:
            stored = "float32" if self.dtype == "float64" else self.dtype
        made = self.model_class(config, weights, found.tokenizer, tpa, pairs, queries, stored, found.side_files)
        made.notes = list(found.notes)
        if tpa is not None:
            made.choices = list(tpa.resolve(config)[0])
        return made


def query_factors(tensors: Mapping[str, Any], layer: int, config: GemmaConfig) -> tuple[Any, Any] | None:
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


# ---- saving ----


def save(model: Any, path: str | Path) -> Path:
    """Write a model of either backend, dense or TPA, atomically; the suffix decides: .pt, .safetensors, none for a
    folder. A folder above 4 GB gets one file for each layer, and an index.
    """
    path = check_output(path)
    if model.rounded_weights:
        raise TPAError("save: the weights of this model are rounded to int8; load it without weights='int8' to save it")
    with replacing(path) as temporary:
        {".pt": save_pt, ".safetensors": save_safetensors, "": save_folder}[path.suffix](model, temporary)
    return path


def save_safetensors(model: Any, target: Path) -> None:
    """One file: tensors, config in its metadata, side files as tensors of bytes."""
    metadata = {"format": FORMAT, "version": str(VERSION), "config": config_json(model)}
    held = {SIDE_FILE + name: np.frombuffer(content, np.uint8) for name, content in side_files_of(model).items()}
    save_file(arrays(model) | held, target, metadata)


def save_folder(model: Any, target: Path) -> None:
    """A folder like Hugging Face's."""
    target.mkdir()
    numbers = sum(math.prod(shape) for shape in hf_names(model.config).values())
    if numbers * np.dtype(model.stored_dtype).itemsize <= SHARD_BYTES:
        save_file(arrays(model), target / "model.safetensors", {"format": "pt"})
    else:
        for number in range(shard_count(model.config)):
            save_file(shard(model, number), target / shard_name(number, model.config), {"format": "pt"})
        write_index(target)
    write_side_files(model, target)


def save_pt(model: Any, target: Path) -> None:
    """A .pt of plain tensors and strings, readable with weights_only=True."""
    try:
        import torch
    except ImportError:
        raise TPAError("save: writing .pt needs torch, which is not installed; use .safetensors or a folder") from None
    tensors = {}
    for name, x in arrays(model).items():
        is_bfloat16 = x.dtype == "bfloat16"  # which torch does not take from NumPy
        tensors[name] = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(x)
    files = side_files_of(model).items()
    held = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in files}
    content = {"format": FORMAT, "version": VERSION, "config": config_json(model)}
    torch.save(content | {"files": held, "tensors": tensors}, target)


def arrays(model: Any) -> dict[str, np.ndarray]:
    """Everything of a model that is an array, by name."""
    return {name: x for number in range(shard_count(model.config)) for name, x in shard(model, number).items()}


def shard_count(config: GemmaConfig) -> int:
    return config.num_layers + 1 + (config.vision is not None)


def shard_name(number: int, config: GemmaConfig) -> str:
    """The file of a shard.

    >>> shard_name(0, GemmaConfig.gemma3_1b())
    'model-00001-of-00027.safetensors'
    """
    return f"model-{number + 1:05d}-of-{shard_count(config):05d}.safetensors"


def shard(model: Any, number: int) -> dict[str, np.ndarray]:
    """Shard 0 is what stands outside the layers, shard i + 1 is layer i, and one more is the image tower. Weights come
    in the dtype they were stored in, constant factors as they are.
    """
    config, weights, layer = model.config, model.weights, number - 1
    factors: dict[str, Any] = {}
    named: Iterable[tuple[str, Any]]
    if number == 0:
        named = [(EMBED, weights.embed_vm), ("model.norm.weight", weights.final_norm_m)]
        named += [] if config.tied else [(HEAD, weights.head_vm)]
    elif layer == config.num_layers:
        named = joined_vision(weights.vision)
    else:
        named = joined(weights.layers[layer], f"model.layers.{layer}.")
        factors = dict(named_arrays(model.pairs[layer], layer))
        factors |= {f"tpa.layers.{layer}.q.{name}": x for name, x in zip("AW", model.query_factors[layer] or ())}
    tensors = {
        stored_name(name, config): np.ascontiguousarray(model.to_numpy(x), model.stored_dtype) for name, x in named
    }
    return tensors | {name: np.ascontiguousarray(model.to_numpy(x)) for name, x in factors.items()}


def config_json(model: Any) -> str:
    """The config.json of a saved model."""
    content = model.config.to_hf(model.side_files.config)
    content |= {"torch_dtype": model.stored_dtype, SAVED_BY: FORMAT}
    if model.tpa is not None:
        factors = [describe(pair) for pair in model.pairs]
        content["tpa"] = {"version": VERSION, "config": model.tpa.to_dict(), "factors": factors}
    return json.dumps(content, indent=2)


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


def side_files_of(model: Any) -> dict[str, bytes]:
    """The small files that are saved with a model, but for config.json."""
    files = dict(model.side_files.files) | (model.tokenizer.files if model.tokenizer else {})
    return {name: content for name, content in files.items() if name != "config.json"}


def write_side_files(model: Any, folder: Path) -> None:
    """All side files; config.json last, since it says that everything is there."""
    files = side_files_of(model)
    if "tokenizer.model" in files and not {"tokenizer_config.json", "tokenizer.json"} & files.keys():
        files["tokenizer_config.json"] = json.dumps(TOKENIZER, indent=2).encode() + b"\n"
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.tmp").write_text(config_json(model), encoding="utf-8")
    os.replace(folder / "config.tmp", folder / "config.json")


def check_output(path: str | Path, source: str | Path | None = None) -> Path:
    """Refuse, before any work is done, a place that cannot be written to or that holds something else.

    source: the checkpoint that is read, which nothing may replace.
    """
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
    if source is not None and path.exists() and os.path.exists(source) and is_part_of(path, Path(source)):
        raise TPAError(f"save: {path} is the checkpoint that is read, or a part of it; choose another place")
    if path.suffix and path.is_dir():
        raise TPAError(f"save: {path} is a folder, a file was expected")
    if not path.suffix and path.exists():
        other = path if path.is_file() else next((file for file in path.iterdir() if not is_model_file(file)), None)
        if other is None and not is_ours(path):
            other = path / "config.json"  # of somebody else's checkpoint
        if other is not None:
            raise TPAError(
                f"save: {path} exists and was not saved by this program (it holds {other.name}); "
                f"choose another place or remove it"
            )
    return path


def is_part_of(path: Path, source: Path) -> bool:
    """Is a place the checkpoint that is read, a folder that holds it, or a file of it?"""
    place, read = path.resolve(), source.resolve()
    return place == read or place in read.parents or (read.is_dir() and place.is_file() and place.parent == read)


def is_ours(folder: Path) -> bool:
    """Was this folder saved by this program? An empty one is nobody's."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return not any(folder.iterdir())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and (content.get(SAVED_BY) == FORMAT or "tpa" in content)


def is_model_file(file: Path) -> bool:
    """Is this one of the files that `save` and `export` write?"""
    weights = file.name.startswith("model") and file.suffix == ".safetensors"
    return file.is_file() and (weights or file.name in SAVED_NAMES)
