"""Models from disk and back: Hugging Face folders (safetensors) and saved TPA models. Never unpickles code.

A saved model is one of
    folder          config.json, model.safetensors, tokenizer.model
    *.safetensors   one file, config and tokenizer in its metadata
    *.pt            {format, version, config, tokenizer, tensors}, read with weights_only=True (needs torch)
Its config.json is the Hugging Face one plus the key "tpa": version, TPAConfig and how every layer caches K and V.
The functions that touch no array are shared with the torch backend.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .config import KV_DTYPES, MODES, VARIANTS, GemmaConfig, TPAConfig, exact_rank
from .errors import TPAError
from .factorize import Factorization
from .model import Model
from .tokenizer import Tokenizer
from .weights import from_named, hf_names, to_named

FORMAT, VERSION = "tpa-gemma3", 1
DTYPES = ("float32", "float64")
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SPARE_ROWS = 64  # embedding rows a checkpoint may have beyond the tokenizer's pieces


def load(
    path: str | Path,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    progress: Callable[[Iterable], Iterable] = iter,
) -> Model:
    """A model from a Hugging Face folder, a .safetensors file, or a saved TPA model.

    variant: 270m, 1b, 4b, 12b, 27b, to be checked against what is found. config: a GemmaConfig, or the path of a
    Hugging Face config.json, where the checkpoint carries none. tokenizer: path of a tokenizer.model. dtype: what is
    computed in; bf16 files are widened. progress: wraps the tensors being read, for instance `tqdm.tqdm`.
    """
    if dtype not in DTYPES:
        raise TPAError(f"load: dtype of the NumPy backend must be one of {', '.join(DTYPES)}, got {dtype!r}")
    found = inspect(path, variant, config, tokenizer)
    tensors = {
        name: widen(name, value, None if is_basis(name) else dtype) for name, value in progress(found.tensors("numpy"))
    }
    return assemble(Model, found, tensors)


def is_basis(name: str) -> bool:
    """Constant factors keep the precision they were made in; everything else takes the one that is computed in."""
    return name.startswith("tpa.") and name.endswith(".basis")


def widen(name: str, value: np.ndarray, dtype: str | None) -> np.ndarray:
    """A stored tensor in the dtype that is computed in (None: as it is); infinities and NaN are named and refused."""
    value = value if dtype is None else value.astype(dtype)
    if not np.isfinite(value).all():
        raise TPAError(f"load: {name} must be finite, got {int((~np.isfinite(value)).sum())} NaN or infinite numbers")
    return value


# ---- what is on disk (shared by both backends) ----


@dataclass
class Found:
    """A checkpoint that has been looked at and checked, but not read."""

    config: GemmaConfig
    tpa: dict[str, Any] | None  # the "tpa" entry of a saved model's config
    tokenizer: Tokenizer | None
    stored_dtype: str
    tensors: Callable[[str], Iterator[tuple[str, Any]]]  # framework -> (our name, tensor), one at a time


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
    if not _exists(path):
        raise TPAError(f"load: no such file or folder: {path}")
    if path.suffix == ".pt" and path.is_file():
        content, proto, shapes, stored_dtype, tensors = _open_pt(path)
    elif path.is_dir() or path.suffix == ".safetensors":
        content, proto, shapes, stored_dtype, tensors = _open_safetensors(path)
    else:
        raise TPAError(
            f"load: {path} must be a Hugging Face folder, a .safetensors file or a saved .pt model, got "
            f"{path.suffix or 'a file without suffix'}"
        )
    found_config = _choose_config(path, content, variant, config)
    saved_tpa = content.get("tpa") if content else None
    if saved_tpa is not None and not isinstance(saved_tpa, dict):
        raise TPAError(f"load: the tpa entry of {path} must be an object, got {type(saved_tpa).__name__}")
    if saved_tpa is not None:
        _check_version(path, saved_tpa.get("version"))
    check_tensors(path, shapes, found_config, saved_tpa)
    words = Tokenizer.from_file(tokenizer) if tokenizer else Tokenizer(proto, str(path)) if proto else None
    if words and not words.vocab_size <= found_config.vocab_size <= words.vocab_size + SPARE_ROWS:
        raise TPAError(
            f"load: the tokenizer's pieces must match the embedding rows (up to {SPARE_ROWS} spare), "
            f"got {words.vocab_size} pieces and {found_config.vocab_size} rows"
        )
    return Found(found_config, saved_tpa, words, stored_dtype, tensors)


def _open_safetensors(path: Path):
    files = _safetensors_files(path)
    where: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: set[str] = set()
    metadata: dict[str, str] = {}
    for file in files:
        with _opened(file, "numpy") as handle:
            metadata = handle.metadata() or metadata
            for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                name = our_name(key)
                if name is None:
                    continue
                if name in where:
                    raise TPAError(f"load: {key} is held twice, in {where[name][0].name} and in {file.name}")
                view = handle.get_slice(key)
                where[name], shapes[name] = (file, key), tuple(view.get_shape())
                if not name.startswith("tpa."):
                    kinds.add(SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype()))
    stored_dtype = _stored_dtype(path, kinds)
    content, proto = None, None
    folder = path if path.is_dir() else path.parent
    if path.is_file() and metadata.get("format") == FORMAT:
        _check_version(path, metadata.get("version"))
        content = _parse_json(metadata.get("config", ""), path)
        try:
            proto = base64.b64decode(metadata.get("tokenizer", ""), validate=True) or None
        except ValueError:
            raise TPAError(f"load: the tokenizer inside {path} is damaged (not base64)") from None
    elif (folder / "config.json").is_file():
        content = _parse_json(_read_text(folder / "config.json"), folder / "config.json")
    if proto is None and (folder / "tokenizer.model").is_file() and metadata.get("format") != FORMAT:
        proto = (folder / "tokenizer.model").read_bytes()

    def tensors(framework: str) -> Iterator[tuple[str, Any]]:
        for file in files:
            with _opened(file, framework) as handle:
                for name, (held_in, key) in where.items():
                    if held_in == file:
                        yield name, handle.get_tensor(key)

    return content, proto, shapes, stored_dtype, tensors


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


def _safetensors_files(path: Path) -> list[Path]:
    """The file itself, the shards an index names, or model.safetensors."""
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = _parse_json(_read_text(index), index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise TPAError(f"load: {index} must hold a weight_map of names, got {type(shards).__name__}")
        files = [path / name for name in sorted(set(shards.values()))]
        for file in files:
            if file.parent != path or not _exists(file):
                raise TPAError(f"load: {index.name} names {file.name}, which is not in {path}")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    raise TPAError(f"load: {path} holds no model.safetensors and no model.safetensors.index.json")


@contextmanager
def _opened(file: Path, framework: str):
    try:
        with safe_open(file, framework) as handle:
            yield handle
    except SafetensorError as problem:
        raise TPAError(f"load: {file} is truncated or not a safetensors file: {problem}") from None
    except OSError as problem:
        raise TPAError(f"load: cannot read {file}: {problem.strerror or problem}") from None


def our_name(key: str) -> str | None:
    """The text-only name of a Hugging Face tensor under any of its prefixes; None for what is not used here.

    >>> our_name("language_model.model.norm.weight"), our_name("model.language_model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    """
    for prefix in ("language_model.model.", "model.language_model."):
        if key.startswith(prefix):
            return "model." + key.removeprefix(prefix)
    other = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
    if key.startswith(other) or key.endswith("lm_head.weight"):  # the output projection is the embedding
        return None
    return key


def _open_pt(path: Path):
    try:
        import torch
    except ImportError:
        raise TPAError(f"load: reading {path} needs torch, which is not installed: pip install torch") from None
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as problem:
        first_line = str(problem).split("\n", 1)[0][:160]
        raise TPAError(f"load: {path} is damaged or holds more than tensors, and is not opened: {first_line}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TPAError(f"load: {path} is not a model saved by this program (format must be {FORMAT!r})")
    _check_version(path, content.get("version"))
    held: Any = content.get("tensors")
    words = content.get("tokenizer")
    plain = isinstance(held, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for name, value in held.items()
    )
    if (
        not plain
        or not isinstance(content.get("config"), str)
        or not (words is None or isinstance(words, torch.Tensor))
    ):
        raise TPAError(f"load: {path} must hold a config text, a tokenizer tensor or None, and named dense tensors")
    kinds = {str(value.dtype).removeprefix("torch.") for name, value in held.items() if not name.startswith("tpa.")}
    stored_dtype = _stored_dtype(path, kinds)

    def tensors(framework: str) -> Iterator[tuple[str, Any]]:
        for name, value in held.items():
            if framework == "numpy":
                is_bf16 = value.dtype == torch.bfloat16
                value = value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_bf16 else value.numpy()
            yield name, value

    proto = words.numpy().tobytes() if words is not None else None
    shapes = {name: tuple(value.shape) for name, value in held.items()}
    return _parse_json(content["config"], path), proto, shapes, stored_dtype, tensors


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte in it
        return False


def _check_version(path: Path, version: Any) -> None:
    if str(version) != str(VERSION):
        raise TPAError(f"load: {path} was saved in format version {version}, this program reads {VERSION}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TPAError(f"load: {path} is not UTF-8 text") from None
    except OSError as problem:
        raise TPAError(f"load: cannot read {path}: {problem.strerror or problem}") from None


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise TPAError(f"load: {path} is not valid JSON: {problem}") from None
    if not isinstance(content, dict):
        raise TPAError(f"load: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def _choose_config(
    path: Path, content: dict[str, Any] | None, variant: str | None, config: GemmaConfig | str | Path | None
) -> GemmaConfig:
    """The config given, else the one found beside the weights, else the variant's; they must not contradict."""
    if isinstance(config, GemmaConfig):
        chosen = config
    elif config is not None:
        chosen = GemmaConfig.from_hf(Path(config))
    elif content is not None:
        chosen = GemmaConfig.from_hf(content)
    elif variant is not None:
        return GemmaConfig.of_variant(variant)
    else:
        raise TPAError(f"load: {path} comes without config.json; give config= (--config) or variant= (--variant)")
    if variant is not None and chosen.variant != variant:
        wanted = GemmaConfig.of_variant(variant)
        raise TPAError(
            f"load: variant {variant} has {wanted.num_layers} layers of width {wanted.hidden_size}, "
            f"but {path} has {chosen.num_layers} of {chosen.hidden_size}"
        )
    return chosen


def check_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], config: GemmaConfig, saved_tpa: dict[str, Any] | None
) -> None:
    """Every expected tensor is there with its shape, and nothing else: one error names all that is not so."""
    expected = hf_names(config)
    problems = [f"missing {name}" for name in expected if name not in shapes]
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
        and (parts[3], parts[4]) in {("k", "basis"), ("v", "basis"), ("q", "A"), ("q", "W")}
    )


def assemble(model_class: Any, found: Found, tensors: dict[str, Any], **extra: Any) -> Any:
    """Tensors and config -> a model of either backend, with its TPA factors if it was saved with some."""
    config = found.config
    tpa, factors, queries = None, None, None
    if found.tpa is not None:
        try:
            tpa = TPAConfig.from_dict(found.tpa["config"])
            factors = [
                tuple(
                    Factorization(**how, basis=tensors.get(f"tpa.layers.{layer}.{side}.basis"))
                    for side, how in zip("kv", pair, strict=True)
                )
                for layer, pair in enumerate(found.tpa["factors"])
            ]
            check_factors(factors, config)
            queries = [_query_factors(tensors, layer, config) for layer in range(config.num_layers)]
        except (KeyError, TypeError, ValueError) as problem:
            raise TPAError(f"load: the saved TPA entry is unreadable: {problem}") from None
    weights = from_named(tensors, config)
    return model_class(config, weights, found.tokenizer, tpa, factors, queries, found.stored_dtype, **extra)


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
    g, d = config.num_kv_heads, config.head_dim
    for layer, pair in enumerate(factors):
        for side, how in zip("KV", pair, strict=True):
            where = f"load: saved factors of layer {layer}, {side}"
            if how.mode not in (*MODES, "dense"):
                raise TPAError(f"{where}: mode must be one of {', '.join(MODES)} or dense, got {how.mode!r}")
            if how.dtype not in (*KV_DTYPES, "float64"):
                raise TPAError(f"{where}: dtype must be one of {', '.join(KV_DTYPES)}, got {how.dtype!r}")
            if how.mode == "dense":
                continue
            if type(how.rank) is not int or not 1 <= how.rank <= exact_rank(how.mode, config):
                raise TPAError(f"{where}: rank must lie in 1 ... {exact_rank(how.mode, config)}, got {how.rank!r}")
            R = how.rank
            expected = {"contextual": None, "fixed-a": (R, g), "fixed-b": (g, R, d), "latent": (R, g, d)}[how.mode]
            got = None if how.basis is None else tuple(how.basis.shape)
            if got != expected:
                raise TPAError(
                    f"load: tpa.layers.{layer}.{side.lower()}.basis of {how.mode} must have shape {expected}, got {got}"
                )
            if how.basis is not None and "float" not in str(how.basis.dtype):
                raise TPAError(f"load: tpa.layers.{layer}.{side.lower()}.basis must be float, got {how.basis.dtype}")


# ---- saving ----


def save(model: Model, path: str | Path) -> Path:
    """Write a model, dense or TPA, atomically; the suffix decides: .pt, .safetensors, none for a folder."""
    path = check_output(path)
    tensors = {name: np.ascontiguousarray(value) for name, value in named_tensors(model, cast).items()}
    with replacing(path) as temporary:
        if path.suffix == ".pt":
            save_pt(model, {name: _to_torch(value) for name, value in tensors.items()}, temporary)
        else:
            write_safetensors(model, tensors, temporary, save_file, single=path.suffix == ".safetensors")
    return path


def cast(value: np.ndarray, dtype: str) -> np.ndarray:
    return value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def named_tensors(model: Any, cast: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Everything of a model that is an array, by name; weights in the dtype they were stored in, bases as they are."""
    tensors = {name: cast(value, model.stored_dtype) for name, value in to_named(model.weights, model.config).items()}
    for layer, (pair, query) in enumerate(zip(model.factors, model.query_factors, strict=True)):
        for side, how in zip("kv", pair, strict=True):
            if how.basis is not None:
                tensors[f"tpa.layers.{layer}.{side}.basis"] = how.basis
        if query is not None:
            tensors[f"tpa.layers.{layer}.q.A"], tensors[f"tpa.layers.{layer}.q.W"] = query
    return tensors


def config_json(model: Any) -> str:
    """The config.json of a saved model."""
    content = model.config.to_hf()
    if model.tpa is not None:
        described = [
            [{"mode": how.mode, "rank": how.rank, "dtype": how.dtype, "error": how.error} for how in pair]
            for pair in model.factors
        ]
        content["tpa"] = {"version": VERSION, "config": model.tpa.to_dict(), "factors": described}
    return json.dumps(content, indent=2)


def write_safetensors(model: Any, tensors: dict[str, Any], target: Path, save_file: Callable, single: bool) -> None:
    """One file with everything in its metadata, or a folder."""
    metadata = {"format": FORMAT, "version": str(VERSION)}
    proto = model.tokenizer.proto if model.tokenizer else b""
    if single:
        metadata |= {"config": config_json(model), "tokenizer": base64.b64encode(proto).decode()}
        save_file(tensors, target, metadata)
        return
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(config_json(model), encoding="utf-8")
    if proto:
        (target / "tokenizer.model").write_bytes(proto)


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when all went well, and vanishes when not."""
    try:
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", dir=path.absolute().parent))
    except OSError as problem:
        raise TPAError(f"save: cannot write in {path.absolute().parent}: {problem.strerror or problem}") from None
    temporary = holder / path.name
    try:
        yield temporary
        if path.is_dir():
            path.rename(holder / "replaced")
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as problem:  # the last two: a disk that fills up inside a library
        reason = getattr(problem, "strerror", None) or str(problem).split("\n", 1)[0][:120]
        raise TPAError(f"save: cannot write {path}: {reason}") from None
    finally:
        shutil.rmtree(holder, ignore_errors=True)
