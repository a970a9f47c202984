"""The formats Gemma 3 is shared in, brought to one table of named tensors. Nothing is read before it is asked for.

    Hugging Face            model.safetensors, or shards and model.safetensors.index.json; memory-mapped
    google/gemma_pytorch    *.ckpt, or shards and pytorch_model.bin.index.json; torch.load(weights_only=True, mmap=True)
      its int8 variant      the same, int8 `weight` with a `weight_scaler` per row
    saved by this program   folder, *.safetensors or *.pt (see `checkpoint`)

Names of three generations of Hugging Face files and of gemma_pytorch become those of `weights.hf_names`. A pickle is
only opened where it holds nothing but tensors: one that would run code is refused. torch is imported for pickles alone.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.weights import PROJECTOR, TOWER, VISION_NAMES, hf_names, is_vision

FORMAT, VERSION = "tpa-gemma3", 3  # of models saved by this program
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
VISION_PREFIXES = {  # the longer one first
    "model.vision_tower.vision_model.": TOWER,
    "model.vision_tower.": TOWER,
    "vision_tower.vision_model.": TOWER,
    "vision_tower.": TOWER,
    "siglip_vision_model.": TOWER,
    "model.multi_modal_projector.": PROJECTOR,
    "multi_modal_projector.": PROJECTOR,
    "mm_soft_embedding_norm.": f"{PROJECTOR}mm_soft_emb_norm.",
    "mm_input_projection.": f"{PROJECTOR}mm_input_projection.",
}
GEMMA_PYTORCH_TOWER = {
    "patch_embedding.": "embeddings.patch_embedding.",
    "position_embedding.": "embeddings.position_embedding.",
    "encoder_blocks.": "encoder.layers.",
    "self_attn.o_proj.": "self_attn.out_proj.",
    "final_norm.": "post_layernorm.",
}
UNTRANSPOSED = f"{PROJECTOR}mm_input_projection.weight"  # gemma_pytorch's projector is [m, z], Hugging Face's [z, m]
GEMMA_PYTORCH_NAMES = {  # the other names are the same as Hugging Face's
    "embedder.": "model.embed_tokens.",
    "text_token_embedder.": "model.embed_tokens.",
    ".self_attn.query_norm.": ".self_attn.q_norm.",
    ".self_attn.key_norm.": ".self_attn.k_norm.",
}


@dataclass(frozen=True)
class Entry:
    """One tensor that has not been read: `read("numpy")` or `read("pt")` gives it, in the dtype it is stored in."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[str], Any]


@dataclass
class Container:
    """What lies at a path: tensors by the names they have there, and what was found beside them."""

    entries: dict[str, Entry]
    content: dict[str, Any] | None = None  # config.json
    proto: bytes | None = None  # tokenizer.model


def open_checkpoint(path: Path) -> Container:
    """Recognise a format by its files and look inside, without reading a tensor."""
    if not exists(path):
        raise TPAError(f"load: no such file or folder: {path}")
    files = checkpoint_files(path)
    if files[0].suffix == ".safetensors":
        return _open_safetensors(path, files)
    return _open_pickles(path, files)


def checkpoint_files(path: Path) -> list[Path]:
    """The files that hold the tensors: the one named, or those of a folder."""
    if not path.is_dir():
        if path.suffix not in (".safetensors", *PICKLES):
            raise TPAError(
                f"load: {path} must be a folder, a .safetensors file, a gemma_pytorch .ckpt or a saved .pt model, got "
                f"{path.suffix or 'a file without suffix'}"
            )
        return [path]
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if index.is_file():
            return _shards_of_index(index)
        if (path / single).is_file():
            return [path / single]
    found = sorted(path.glob("*.ckpt"))
    if len(found) > 1:
        raise TPAError(f"load: {path} holds {len(found)} .ckpt files; name one of them: {found[0].name}, ...")
    if not found:
        raise TPAError(
            f"load: {path} holds no model.safetensors, no pytorch_model.bin, no index of one of them and no .ckpt file"
        )
    return found


def _shards_of_index(index: Path) -> list[Path]:
    shards = parse_json(read_text(index), index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise TPAError(f"load: {index} must hold a weight_map of names, got {type(shards).__name__}")
    if not shards:
        raise TPAError(f"load: {index} must name at least one shard, got an empty weight_map")
    files = [index.parent / name for name in sorted(set(shards.values()))]
    for file in files:
        if file.parent != index.parent or not (exists(file) and file.is_file()):
            raise TPAError(f"load: {index.name} names {file.name}, which is not in {index.parent}")
        if file.suffix != Path(index.name.removesuffix(".index.json")).suffix:
            raise TPAError(f"load: {index.name} names {file.name}, which is of another format")
    return files


# ---- safetensors ----


def _open_safetensors(path: Path, files: list[Path]) -> Container:
    entries: dict[str, Entry] = {}
    holder: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for file in files:
        handles = Handles(file)
        handle = handles("numpy")
        metadata = handle.metadata() or metadata
        for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
            if key in holder:
                raise TPAError(f"load: {key} is held twice, in {holder[key].name} and in {file.name}")
            holder[key] = file
            view = handle.get_slice(key)
            dtype = SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
            entries[key] = Entry(tuple(view.get_shape()), dtype, _reader(handles, key))
    if metadata.get("format") != FORMAT:
        return Container(entries, *_beside(path if path.is_dir() else path.parent))
    check_version(path, metadata.get("version"))
    try:
        proto = base64.b64decode(metadata.get("tokenizer", ""), validate=True) or None
    except ValueError:
        raise TPAError(f"load: the tokenizer inside {path} is damaged (not base64)") from None
    return Container(entries, parse_json(metadata.get("config", ""), path), proto)


def _reader(handles: Handles, key: str) -> Callable[[str], Any]:
    def read(framework: str) -> Any:
        try:
            return handles(framework).get_tensor(key)
        except SafetensorError as problem:
            raise TPAError(f"load: {key} of {handles.file} cannot be read: {problem}") from None

    return read


class Handles:
    """A file's tensors, mapped and not read: opened once for each framework, and closed with the last reader."""

    def __init__(self, file: Path):
        self.file = file
        self._opened: dict[str, Any] = {}

    def __call__(self, framework: str) -> Any:
        try:
            if framework not in self._opened:
                self._opened[framework] = safe_open(self.file, framework)
            return self._opened[framework]
        except SafetensorError as problem:
            raise TPAError(f"load: {self.file} is truncated or not a safetensors file: {problem}") from None
        except OSError as problem:
            raise TPAError(f"load: cannot read {self.file}: {problem.strerror or problem}") from None


def _beside(folder: Path) -> tuple[dict[str, Any] | None, bytes | None]:
    """(config.json, tokenizer.model) of a folder, None for what is not there."""
    config, words = folder / "config.json", folder / "tokenizer.model"
    content = parse_json(read_text(config), config) if config.is_file() else None
    try:
        return content, words.read_bytes() if words.is_file() else None
    except OSError as problem:
        raise TPAError(f"load: cannot read {words}: {problem.strerror or problem}") from None


# ---- pickles: gemma_pytorch's files, pytorch_model.bin, and .pt saved by this program ----


def _open_pickles(path: Path, files: list[Path]) -> Container:
    entries: dict[str, Entry] = {}
    for file in files:
        held = load_pickle(file)
        if held.get("format") == FORMAT:
            return _saved_pt(file, held)
        held = held.get("model_state_dict", held)
        if not isinstance(held, dict):
            raise TPAError(f"load: model_state_dict of {file} must hold named tensors, got {type(held).__name__}")
        for key, entry in _tensor_entries(file, held).items():
            if key in entries:
                raise TPAError(f"load: {key} is held twice, in {file.name} and in a shard before it")
            entries[key] = entry
    content, proto = _beside(path if path.is_dir() else path.parent)
    # What lies beside a .ckpt may describe something else; a Hugging Face config says what it is.
    is_hf = content is not None and ("model_type" in content or "text_config" in content)
    return Container(entries, content if is_hf else None, proto)


def load_pickle(file: Path) -> dict[Any, Any]:
    """The dict in a file of torch.save, memory-mapped; refused where it holds more than tensors and plain values."""
    try:
        import torch
    except ImportError:
        raise TPAError(f"load: reading {file} needs torch, which is not installed: pip install torch") from None
    import warnings
    import zipfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles, in front of the line that refuses them
            # Files older than torch 1.6 are no zip archives and cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as problem:  # a damaged pickle can raise anything
        called = re.search(r"GLOBAL (\S+)", str(problem))  # never torch's advice to open it all the same
        if called:
            raise TPAError(f"load: {file} would call {called[1][:80]} when opened, so it is not opened") from None
        first_line = str(problem).split("\n", 1)[0].split(". ")[0][:120]
        raise TPAError(f"load: {file} is damaged or holds more than tensors, and is not opened: {first_line}") from None
    if not isinstance(content, dict):
        raise TPAError(f"load: {file} must hold a dict of tensors, got {type(content).__name__}")
    return content


def _tensor_entries(file: Path, held: dict[Any, Any]) -> dict[str, Entry]:
    import torch

    entries = {}
    for key, value in held.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided):
            raise TPAError(f"load: {file} must hold named dense tensors, got {str(key)[:60]}: {type(value).__name__}")
        if value.device.type != "cpu":
            raise TPAError(f"load: {key} of {file} must be a tensor with data, got one on {value.device}")
        dtype = str(value.dtype).removeprefix("torch.")
        entries[key] = Entry(tuple(value.shape), dtype, partial(_of_torch, value))
    return entries


def _of_torch(value: Any, framework: str) -> Any:
    """A torch tensor for either backend; NumPy has no bfloat16 of its own."""
    if framework != "numpy":
        return value
    if str(value.dtype) != "torch.bfloat16":
        return value.numpy()
    import torch

    return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _saved_pt(file: Path, content: dict[Any, Any]) -> Container:
    check_version(file, content.get("version"))
    held, words, config = (content.get(name) for name in ("tensors", "tokenizer", "config"))
    is_tensor = hasattr(words, "numpy")
    if not isinstance(held, dict) or not isinstance(config, str) or not (words is None or is_tensor):
        raise TPAError(f"load: {file} must hold a config text, a tokenizer tensor or None, and named dense tensors")
    proto = words.numpy().tobytes() if words is not None else None
    return Container(_tensor_entries(file, held), parse_json(config, file), proto)


# ---- names ----


def named_entries(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors under the names of `weights.hf_names` (Q, K, V still fused where they are), buffers left out, int8
    weights multiplied with their scales, gemma_pytorch's projector transposed.
    """
    renamed: dict[str, Entry] = {}
    for key, entry in entries.items():
        name = our_name(key)
        if name is None:
            continue
        if name in renamed:
            raise TPAError(f"load: {name} is held twice, under two names, one of them {key}")
        renamed[name] = entry
    made = _dequantized(renamed)
    if UNTRANSPOSED in made:
        entry = made.pop(UNTRANSPOSED)
        made[VISION_NAMES["W_project_zm"][0]] = Entry(entry.shape[::-1], entry.dtype, _transposed(entry))
    return made


def our_name(key: str) -> str | None:
    """The name used here of a tensor of any format; None for what the model does not use.

    >>> our_name("language_model.model.norm.weight"), our_name("model.language_model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    >>> our_name("text_token_embedder.weight"), our_name("model.layers.0.self_attn.key_norm.weight")
    ('model.embed_tokens.weight', 'model.layers.0.self_attn.k_norm.weight')
    >>> our_name("siglip_vision_model.final_norm.bias"), our_name("model.vision_tower.post_layernorm.bias")
    ('vision_tower.vision_model.post_layernorm.bias', 'vision_tower.vision_model.post_layernorm.bias')
    """
    if key.endswith("freqs_cis"):
        return None
    for prefix, ours in VISION_PREFIXES.items():
        if key.startswith(prefix):
            return _vision_name(ours, key.removeprefix(prefix), prefix == "siglip_vision_model.")
    if key in ("lm_head.weight", "language_model.lm_head.weight"):  # the output projection is the embedding
        return None
    for prefix in ("language_model.model.", "model.language_model."):
        if key.startswith(prefix):
            return "model." + key.removeprefix(prefix)
    for theirs, ours in GEMMA_PYTORCH_NAMES.items():
        if key.startswith(theirs) or (theirs.startswith(".") and theirs in key):
            return key.replace(theirs, ours, 1)
    return key


def _vision_name(prefix: str, name: str, gemma_pytorch: bool) -> str | None:
    """A name inside the image tower; Gemma uses neither SigLIP's pooling head nor the numbers of its positions."""
    if name.startswith("head.") or name.endswith("position_ids"):
        return None
    for theirs, ours in GEMMA_PYTORCH_TOWER.items() if gemma_pytorch else ():
        name = name.replace(theirs, ours, 1)
    return prefix + name


def _transposed(entry: Entry) -> Callable[[str], Any]:
    def read(framework: str) -> Any:
        made = entry.read(framework).T
        return np.ascontiguousarray(made) if framework == "numpy" else made.contiguous()

    return read


def _dequantized(entries: dict[str, Entry]) -> dict[str, Entry]:
    """int8 weights [n, m] with one scale a row [n] become float32: w = weight * scale."""
    scales = {name.removesuffix("_scaler"): name for name in entries if name.endswith(".weight_scaler")}
    made = {}
    for name, entry in entries.items():
        if name.endswith(".weight_scaler") and name.removesuffix("_scaler") in entries:
            continue
        if name in scales:
            scale = entries[scales[name]]
            if entry.dtype != "int8" or len(entry.shape) != 2 or scale.shape != entry.shape[:1]:
                raise TPAError(
                    f"load: {name} with a weight_scaler must be int8 with one scale a row, got {entry.dtype} "
                    f"{list(entry.shape)} and scales {list(scale.shape)}"
                )
            entry = Entry(entry.shape, "float32", _scaled(entry, scale))
        made[name] = entry
    return made


def _scaled(weight: Entry, scale: Entry) -> Callable[[str], Any]:
    def read(framework: str) -> Any:
        w, s = weight.read(framework), scale.read(framework)
        if framework == "numpy":
            return w.astype(np.float32) * s.astype(np.float32)[:, None]
        return w.float() * s.float()[:, None]

    return read


def split_qkv(entries: dict[str, Entry], config: GemmaConfig) -> tuple[dict[str, Entry], list[str]]:
    """(tensors with fused rows Q | K | V taken apart, a line for each that does not have these rows)."""
    expected, made, problems = hf_names(config), {}, []
    for name, entry in entries.items():
        if not name.endswith(".self_attn.qkv_proj.weight"):
            made[name] = entry
            continue
        names = [name.replace("qkv_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if any(part not in expected for part in names):  # a layer too many: reported as unexpected
            made[name] = entry
            continue
        rows = [expected[part][0] for part in names]
        if entry.shape != (sum(rows), config.hidden_size):
            problems.append(f"{name} must be {[sum(rows), config.hidden_size]}, got {list(entry.shape)}")
        start = 0
        for part, count in zip(names, rows, strict=True):
            made[part] = Entry((count, config.hidden_size), entry.dtype, _rows(entry, start, start + count))
            start += count
    return made, problems


def _rows(entry: Entry, start: int, stop: int) -> Callable[[str], Any]:
    def read(framework: str) -> Any:
        rows = entry.read(framework)[start:stop]
        return rows.copy() if framework == "numpy" else rows.clone()  # three views of one tensor cannot be saved

    return read


def shown_size(entries: dict[str, Entry]) -> tuple[int, int]:
    """(number of layers, model width) as the tensors show them; zeros where they do not."""
    numbers = [int(found[1]) for name in entries if (found := re.match(r"model\.layers\.(\d{1,4})\.", name))]
    embedding = entries.get("model.embed_tokens.weight")
    width = embedding.shape[1] if embedding and len(embedding.shape) == 2 else 0
    return max(numbers, default=-1) + 1, width


def with_vision(config: GemmaConfig, entries: dict[str, Entry]) -> tuple[GemmaConfig, dict[str, Entry]]:
    """Config and tensors, both with an image tower or both without: one that only the config or only the file knows
    of is left out.
    """
    if config.vision is None:
        return config, {name: entry for name, entry in entries.items() if not is_vision(name)}
    return (config if any(map(is_vision, entries)) else replace(config, vision=None)), entries


def with_rows(config: GemmaConfig, entries: dict[str, Entry]) -> GemmaConfig:
    """The config with the embedding rows that are there: 262,144 and 262,208 both occur for one and the same model."""
    embedding = entries.get("model.embed_tokens.weight")
    rows = embedding.shape[0] if embedding and len(embedding.shape) == 2 else config.vocab_size
    return replace(config, vocab_size=rows) if {rows, config.vocab_size} <= {262_144, 262_208} else config


# ---- files ----


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte in it
        return False


def check_version(path: Path, version: Any) -> None:
    if str(version) != str(VERSION):
        age = "a newer" if str(version).isdecimal() and int(version) > VERSION else "another"
        raise TPAError(f"load: {path} was saved in format version {version} by {age} release, this one reads {VERSION}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TPAError(f"load: {path} is not UTF-8 text") from None
    except OSError as problem:
        raise TPAError(f"load: cannot read {path}: {problem.strerror or problem}") from None


def parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise TPAError(f"load: {path} is not valid JSON: {problem}") from None
    if not isinstance(content, dict):
        raise TPAError(f"load: {path} must hold a JSON object, got {type(content).__name__}")
    return content
