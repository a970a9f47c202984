"""Models from disk and back. Never unpickles code. What the files look like is in `formats`.

A saved model is one of
    folder          config.json, model.safetensors (or shards with an index), tokenizer.model
    *.safetensors   one file, config and tokenizer in its metadata
    *.pt            {format, version, config, tokenizer, tensors}, read with weights_only=True (needs torch)
Its config.json is the Hugging Face one plus the key "tpa": version, TPAConfig and how every layer caches K and V.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..atomic import replacing
from ..compress.config import TPAConfig
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.model import Model
from ..gemma.weights import (
    VISION_BLOCKS,
    LayersOnDisk,
    Weights,
    from_named,
    hf_names,
    stored_name,
    to_named_layer,
    to_named_vision,
    vision_weights,
)
from .formats import FORMAT, VERSION
from .found import Found, inspect
from .pairs import describe, is_basis, named_arrays, saved_pairs

DTYPES = ("float32", "float64")
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
    return Loader(inspect(path, variant, config, tokenizer), dtype).model(progress, on_disk)


class Loader(Mapping[str, Any]):
    """The tensors of a checkpoint by name, read when they are asked for, in the dtype that is computed in."""

    model_class: type = Model

    def __init__(self, found: Found, dtype: str):
        self.found, self.dtype = found, dtype
        self._held: dict[str, Any] = {}  # read once, and kept

    def __getitem__(self, name: str) -> Any:
        return self._held[name] if name in self._held else self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.found.entries)

    def __len__(self) -> int:
        return len(self.found.entries)

    def read(self, name: str) -> Any:
        """One tensor; infinities and NaN are named and refused."""
        value = self.found.entries[name].read("numpy")
        value = value if is_basis(name) else value.astype(self.dtype, copy=False)
        # Both ends show what is not finite, without the temporary arrays of a test of every number.
        if value.size and not np.isfinite([value.min(), value.max()]).all():
            raise TPAError(
                f"load: {name} must be finite, got {int((~np.isfinite(value)).sum())} NaN or infinite numbers"
            )
        return value

    def model(self, progress: Callable = iter, on_disk: bool = False) -> Any:
        """The model, with its TPA factors if it was saved with some."""
        config, saved = self.found.config, self.found.tpa
        blocks = ("model.layers.", VISION_BLOCKS) if on_disk else "none"
        for name in progress([name for name in self if not name.startswith(blocks)]):
            self._held[name] = self.read(name)
        tpa, pairs, queries = None, None, None
        if saved is not None:
            try:
                tpa = TPAConfig.from_dict(saved["config"])
                pairs = saved_pairs(self.model_class, saved["factors"], self._held, config)
                queries = [query_factors(self._held, layer, config) for layer in range(config.num_layers)]
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
                raise TPAError(f"load: the saved TPA entry is unreadable: {problem}") from None
        made = self.model_class(
            config, self.weights(on_disk), self.found.tokenizer, tpa, pairs, queries, self.found.stored_dtype
        )
        made.choices = list(tpa.resolve(config)[0]) if tpa else made.choices
        return made

    def weights(self, on_disk: bool) -> Weights:
        """All weights; on_disk: the blocks are read whenever they are needed."""
        config = self.found.config
        if not on_disk:
            return from_named(self, config)
        vision = vision_weights(self, config, on_disk) if config.vision else None
        outer = self["model.embed_tokens.weight"], self["model.norm.weight"]
        return Weights(outer[0], LayersOnDisk(self, config), outer[1], vision)


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
    with replacing(path) as temporary:
        if path.suffix == ".pt":
            save_pt(model, temporary)
        elif path.suffix:
            save_safetensors(model, temporary)
        else:
            save_folder(model, temporary)
    return path


def parts(model: Any) -> Iterator[dict[str, np.ndarray]]:
    """Everything of a model that is an array, by name: what stands outside the layers, then layer by layer, then the
    image tower.
    """
    yield outer_part(model)
    for layer in range(model.config.num_layers):
        yield layer_part(model, layer)
    if model.config.vision:
        yield vision_part(model)


def stored(model: Any, x: Any) -> np.ndarray:
    """A weight in the dtype it was stored in."""
    return in_dtype(model.to_numpy(x), model.stored_dtype)


def in_dtype(x: np.ndarray, dtype: str) -> np.ndarray:
    """An array in a dtype, bfloat16 included, in one piece."""
    return np.ascontiguousarray(x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, copy=False))


def outer_part(model: Any) -> dict[str, np.ndarray]:
    """What stands outside the layers."""
    tensors = {"model.embed_tokens.weight": model.weights.embed_vm, "model.norm.weight": model.weights.final_norm_m}
    return {stored_name(name, model.config): stored(model, x) for name, x in tensors.items()}


def vision_part(model: Any) -> dict[str, np.ndarray]:
    """The image tower and its projector."""
    return {name: stored(model, x) for name, x in to_named_vision(model.weights.vision)}


def layer_part(model: Any, layer: int) -> dict[str, np.ndarray]:
    """One layer's weights in the dtype they were stored in, and its constant factors as they are."""
    block = to_named_layer(model.weights.layers[layer], layer)
    tensors = {stored_name(name, model.config): stored(model, x) for name, x in block.items()}
    factors = dict(named_arrays(model.pairs[layer], layer))
    factors |= {f"tpa.layers.{layer}.q.{name}": x for name, x in zip("AW", model.query_factors[layer] or ())}
    return tensors | {name: np.ascontiguousarray(model.to_numpy(x)) for name, x in factors.items()}


def config_json(model: Any) -> str:
    """The config.json of a saved model."""
    content = model.config.to_hf() | {"torch_dtype": model.stored_dtype}
    if model.tpa is not None:
        described = [describe(pair) for pair in model.pairs]
        content["tpa"] = {"version": VERSION, "config": model.tpa.to_dict(), "factors": described}
    return json.dumps(content, indent=2)


def save_safetensors(model: Any, target: Path) -> None:
    """One file with everything in its metadata."""
    proto = model.tokenizer.proto if model.tokenizer else b""
    metadata = {"format": FORMAT, "version": str(VERSION)}
    metadata |= {"config": config_json(model), "tokenizer": base64.b64encode(proto).decode()}
    save_file({name: x for part in parts(model) for name, x in part.items()}, target, metadata)


def save_folder(model: Any, target: Path) -> None:
    """A folder like Hugging Face's."""
    target.mkdir()
    if stored_bytes(model) <= SHARD_BYTES:
        tensors = {name: x for part in parts(model) for name, x in part.items()}
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    else:
        for number, part in enumerate(parts(model)):
            save_file(part, target / shard_name(number, model.config), {"format": "pt"})
        write_index(target)
    write_beside(model, target)


def save_pt(model: Any, target: Path) -> None:
    """A .pt of plain tensors and strings, readable with weights_only=True."""
    try:
        import torch
    except ImportError:
        raise TPAError("save: writing .pt needs torch, which is not installed; use .safetensors or a folder") from None
    tensors = {name: _to_torch(x) for part in parts(model) for name, x in part.items()}
    proto = torch.frombuffer(bytearray(model.tokenizer.proto), dtype=torch.uint8) if model.tokenizer else None
    content = {"format": FORMAT, "version": VERSION, "config": config_json(model), "tokenizer": proto}
    torch.save(content | {"tensors": tensors}, target)


def _to_torch(x: np.ndarray) -> Any:
    import torch

    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


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
    """tokenizer.model, where there is one, and config.json, which says that everything is there."""
    if model.tokenizer:
        (folder / "tokenizer.model").write_bytes(model.tokenizer.proto)
    (folder / "config.tmp").write_text(config_json(model), encoding="utf-8")
    os.replace(folder / "config.tmp", folder / "config.json")


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
