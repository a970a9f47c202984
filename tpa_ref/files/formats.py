"""The formats Gemma 3 is shared in, brought to one table of named tensors. Nothing is read before it is asked for.

    Hugging Face            model.safetensors, or shards and their index; memory-mapped. pytorch_model.bin likewise
    google/gemma_pytorch    *.ckpt, or shards and pytorch_model.bin.index.json; torch.load(weights_only=True, mmap=True)
      its int8 variant      the same, int8 `weight` with a `weight_scaler` per row
    GGUF                    *.gguf of llama.cpp, quantized or not, in one part or several (see `gguf_format`)
    saved by this program   folder, *.safetensors or *.pt (see `checkpoint`)

Tensors keep the names they have there (`names` brings them to those of `weights.hf_names`). A pickle is only opened
where it holds nothing but tensors: one that would run code is refused. torch is imported for pickles alone.
"""

from __future__ import annotations

import base64
import json
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
from safetensors import SafetensorError, safe_open

from ..errors import TPAError
from ..gemma.pieces import JSON, MODEL
from ..gemma.side_files import KEPT
from .entry import Container, Entry
from .gguf_format import gguf_files, open_gguf

FORMAT, VERSION = "tpa-gemma3", 4  # of models saved by this program
# In 2 nothing was predicted, and K and V had codes of their own; in 3 only the tokenizer was kept of what lies beside.
READABLE = ("2", "3", "4")
SIDE_FILE = "file."  # in a single file: tensors of bytes, the files that lie beside the weights in a folder
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}


def open_checkpoint(path: Path) -> Container:
    """What lies at a path: tensors by the names they have there, and what was found beside them."""
    if not os.path.exists(path):  # False also for a name too long, or with a null byte in it
        raise TPAError(f"load: no such file or folder: {path}")
    try:
        files = checkpoint_files(path)
        opened = {".safetensors": _open_safetensors, ".gguf": open_gguf}.get(files[0].suffix.lower(), _open_pickles)
        return opened(files)
    except OSError as problem:
        raise TPAError(f"load: cannot read {path}: {problem.strerror or problem}") from None


def checkpoint_files(path: Path) -> list[Path]:
    """The files that hold the tensors: the one named, or those of a folder."""
    if not path.is_dir():
        if path.suffix.lower() == ".gguf":
            return gguf_files(path)
        if path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
            raise TPAError(
                f"load: {path} must be a folder, a .safetensors or .gguf file, a gemma_pytorch .ckpt or a saved .pt "
                f"model, got {path.suffix or 'a file without suffix'}"
            )
        return [path]
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if (path / single).is_file():  # before an index, as in `transformers`
            return [path / single]
        if index.is_file():
            return _shards_of_index(index)
    found = sorted(path.glob("*.ckpt"))
    if len(found) > 1:
        raise TPAError(f"load: {path} holds {len(found)} .ckpt files; name one of them: {found[0].name}, ...")
    found = found or gguf_files(path)
    if not found:
        raise TPAError(
            f"load: {path} holds no model.safetensors, no pytorch_model.bin, no index of one of them, no .ckpt and no "
            f".gguf file"
        )
    return found


def _shards_of_index(index: Path) -> list[Path]:
    shards = _parse_json(_read_bytes(index), index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise TPAError(f"load: {index} must hold a weight_map of names, got {type(shards).__name__}")
    if not shards:
        raise TPAError(f"load: {index} must name at least one shard, got an empty weight_map")
    files = [index.parent / name for name in sorted(set(shards.values()))]
    for file in files:
        if file.parent != index.parent or not os.path.isfile(file):
            raise TPAError(f"load: {index.name} names {file.name}, which is not in {index.parent}")
        if file.suffix != Path(index.name.removesuffix(".index.json")).suffix:
            raise TPAError(f"load: {index.name} names {file.name}, which is of another format")
    return files


# ---- safetensors ----


class SafetensorsFile:
    """A file's tensors, mapped and not read: opened once for each framework, and closed with the last reader."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: dict[str, Any] = {}

    def open(self, framework: str) -> Any:
        try:
            if framework not in self._opened:
                self._opened[framework] = safe_open(self.path, framework)
            return self._opened[framework]
        except SafetensorError as problem:
            raise TPAError(f"load: {self.path} is truncated or not a safetensors file: {problem}") from None
        except OSError as problem:
            raise TPAError(f"load: cannot read {self.path}: {problem.strerror or problem}") from None

    def read(self, key: str, framework: str, rows: slice = slice(None)) -> Any:
        try:
            opened = self.open(framework)
            return opened.get_tensor(key) if rows == slice(None) else opened.get_slice(key)[rows]
        except SafetensorError as problem:
            raise TPAError(f"load: {key} of {self.path} cannot be read: {problem}") from None


def _open_safetensors(files: list[Path]) -> Container:
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in map(SafetensorsFile, files):
        handle = file.open("numpy")
        metadata = handle.metadata() or metadata
        for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
            if key in entries:
                raise TPAError(f"load: {key} is held twice, in {entries[key].file.path.name} and in {file.path.name}")
            view = handle.get_slice(key)
            dtype = SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
            entries[key] = Entry(tuple(view.get_shape()), dtype, file, key)
    if metadata.get("format") != FORMAT:
        return Container(entries, *_beside(files[0].parent))
    check_version(files[0], metadata.get("version"))
    inside = {name: entries.pop(name) for name in list(entries) if name.startswith(SIDE_FILE)}
    held = {name.removeprefix(SIDE_FILE): entry.read("numpy").tobytes() for name, entry in inside.items()}
    held["config.json"] = metadata.get("config", "").encode()
    if proto := metadata.get("tokenizer"):  # before version 4
        try:
            held[MODEL] = base64.b64decode(proto, validate=True)
        except ValueError:
            raise TPAError(f"load: the tokenizer inside {files[0]} is damaged (not base64)") from None
    return Container(entries, _parse_json(metadata.get("config", ""), files[0]), held)


# ---- pickles: gemma_pytorch's files, pytorch_model.bin, and .pt saved by this program ----


class PickledFile(dict[Any, Any]):
    """The tensors of a pickle, mapped and not read."""

    def read(self, key: str, framework: str, rows: slice = slice(None)) -> Any:
        x = self[key][rows] if self[key].ndim else self[key]
        if framework == "pt":
            return x
        if str(x.dtype) != "torch.bfloat16":  # which NumPy has not
            return x.numpy()
        import torch

        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _open_pickles(files: list[Path]) -> Container:
    entries: dict[str, Entry] = {}
    for file in files:
        held = _load_pickle(file)
        if held.get("format") == FORMAT:
            return _saved_pt(file, held)
        held = held.get("model_state_dict", held)
        if not isinstance(held, dict):
            raise TPAError(f"load: model_state_dict of {file} must hold named tensors, got {type(held).__name__}")
        for key, entry in _tensor_entries(file, held).items():
            if key in entries:
                raise TPAError(f"load: {key} is held twice, in {file.name} and in a shard before it")
            entries[key] = entry
    content, side_files = _beside(files[0].parent)
    # What lies beside a .ckpt may describe something else; a Hugging Face config says what it is.
    is_hf = content is not None and ("model_type" in content or "text_config" in content)
    if not is_hf:
        side_files.pop("config.json", None)
    return Container(entries, content if is_hf else None, side_files)


def _load_pickle(file: Path) -> dict[Any, Any]:
    """The dict in a file of torch.save, memory-mapped; refused where it holds more than tensors and plain values."""
    try:
        import torch
    except ImportError:
        raise TPAError(f"load: reading {file} needs torch, which is not installed: pip install torch") from None
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

    opened = PickledFile(held)
    entries: dict[str, Entry] = {}
    for key, value in held.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided):
            raise TPAError(f"load: {file} must hold named dense tensors, got {str(key)[:60]}: {type(value).__name__}")
        if value.device.type != "cpu":
            raise TPAError(f"load: {key} of {file} must be a tensor with data, got one on {value.device}")
        entries[key] = Entry(tuple(value.shape), str(value.dtype).removeprefix("torch."), opened, key)
    return entries


def _saved_pt(file: Path, content: dict[Any, Any]) -> Container:
    check_version(file, content.get("version"))
    held, proto, config = (content.get(name) for name in ("tensors", "tokenizer", "config"))
    held_files = content.get("files", {} if proto is None else {MODEL: proto})  # proto: before version 4
    if not (isinstance(held, dict) and isinstance(config, str) and isinstance(held_files, dict)):
        raise TPAError(f"load: {file} must hold a config text, files as tensors of bytes, and named dense tensors")
    files = {"config.json": config.encode()}
    for name, x in held_files.items():
        if not (isinstance(name, str) and str(getattr(x, "dtype", "")) == "torch.uint8" and x.device.type == "cpu"):
            raise TPAError(f"load: files inside {file} must be tensors of bytes, got {str(name)[:60]!r}")
        files[name] = x.numpy().tobytes()
    return Container(_tensor_entries(file, held), _parse_json(config, file), files)


# ---- what lies beside ----


def _beside(folder: Path) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """(content of config.json, None without one; the files of a folder that are kept)."""
    files = {name: _read_bytes(folder / name) for name in (*KEPT, JSON, MODEL) if (folder / name).is_file()}
    config = files.get("config.json")
    return None if config is None else _parse_json(config, folder / "config.json"), files


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise TPAError(f"load: cannot read {path}: {problem.strerror or problem}") from None


def _parse_json(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except UnicodeDecodeError:
        raise TPAError(f"load: {path} is not UTF-8 text") from None
    except (ValueError, RecursionError) as problem:
        raise TPAError(f"load: {path} is not valid JSON: {problem}") from None
    if not isinstance(content, dict):
        raise TPAError(f"load: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def check_version(path: Path, version: Any) -> None:
    if str(version) not in READABLE:
        age = "a newer" if str(version).isdecimal() and int(version) > VERSION else "another"
        raise TPAError(
            f"load: {path} was saved in format version {version} by {age} release, this one reads {', '.join(READABLE)}"
        )
