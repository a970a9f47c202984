"""Conversion of a checkpoint larger than memory: layer by layer from disk to disk, and on after an interruption.

    forwards   read layer l -> run the calibration text through it -> its moments
    backwards  read layer l -> run the gradients back through it -> its sensitivity
    transforms moments and sensitivity of layer l -> its spectral transform
    factors    read layer l -> its factors -> write its file

The recipe is that of `compress.calibrate` and `compress.convert`; what they find lies in files here. Never more than
the embedding, one layer and the text's hidden states are held. What is finished lies in a folder `.NAME.partial` beside
the target, which takes the target's name at the end; the same call resumes where one was interrupted. Every file takes
its name when it is complete, and none goes before what follows from it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..atomic import replacing, writing
from ..compress.calibrate import WINDOW, Calibration
from ..compress.config import TPAConfig
from ..compress.convert import Conversion, begin_conversion, predicts
from ..compress.moments import Moments
from ..compress.store import Arrays
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.texts import read_text, text_windows
from ..gemma.weights import is_vision, stored_name
from . import formats
from .checkpoint import (
    SAVED_NAMES,
    check_output,
    load,
    shard,
    shard_count,
    shard_name,
    side_files_of,
    write_index,
    write_side_files,
)
from .found import inspect
from .pairs import describe, saved_pair

try:
    import fcntl
except ImportError:  # Windows, where nobody holds a folder
    fcntl = None  # type: ignore[assignment]

RECIPE = "conversion.json"  # what a partial folder was begun with


def convert_checkpoint(
    path: str | Path,
    target: str | Path,
    tpa: TPAConfig | None = None,
    calibration: Moments | str | Path | None = None,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    max_tokens: int = 4096,
    progress: Callable = iter,
) -> Path:
    """Convert a dense checkpoint of any format into a saved TPA folder, in bounded memory.

    The result is that of load, convert, save. calibration: a text (or its path), `Moments`, or None for the weights
    alone; max_tokens of the text are used. dtype: what is computed in; weights are stored as they were. Called again
    after an interruption with the same arguments, it resumes.
    """
    target = check_folder(target, path)
    dense = load(path, variant, config, tokenizer, dtype, on_disk=True)
    return convert_on_disk(dense, path, target, tpa, calibration, max_tokens, progress)


def convert_on_disk(
    dense: Any, path: str | Path, target: Path, tpa: Any, calibration: Any, max_tokens: int, progress: Callable
) -> Path:
    """`convert_checkpoint` of a dense model of either backend that reads its blocks from disk."""
    converted = begin_conversion(dense, tpa)
    folder = target.absolute().parent / f".{target.name}.partial"
    with alone(folder), writing(target, folder):
        resume_folder(folder, recipe(path, converted, calibration, max_tokens))
        if not (folder / "config.json").is_file():
            write_files(folder, dense, converted, calibration, max_tokens, progress)
        finish_folder(folder, target, dense.config)
    return target


def write_files(
    folder: Path, dense: Any, converted: Any, calibration: Any, max_tokens: int, progress: Callable
) -> None:
    """All files of a converted model, config.json last."""
    store, config, moments = Folder(folder, dense), dense.config, calibration
    write_shard(folder, converted, 0)
    if calibration is not None and not isinstance(calibration, Moments):
        windows = list(text_windows(dense, calibration, max_tokens, WINDOW))
        moments = Calibration(dense, windows, store, predict=predicts(converted.tpa, config))
        moments.run(progress)
    conversion = DiskConversion(converted, moments, store)
    conversion.run(progress, conversion.finished_layers())
    if config.vision:
        write_shard(folder, converted, config.num_layers + 1)
    write_index(folder)
    write_side_files(converted, folder)


def write_shard(folder: Path, model: Any, number: int) -> None:
    """A shard that is not there yet."""
    file = folder / shard_name(number, model.config)
    if not file.is_file():
        save_whole(shard(model, number), file, {"format": "pt"})


def save_whole(arrays: Arrays, file: Path, metadata: dict[str, str] | None = None) -> None:
    """A file that takes its name when it is complete."""
    temporary = file.with_suffix(".tmp")
    save_file(arrays, temporary, metadata)
    os.replace(temporary, file)


class Folder:
    """`store.Memory` on disk: a file for each kind and layer, complete wherever it has its name."""

    def __init__(self, folder: Path, model: Any):
        self.folder, self.model = folder, model

    def file(self, kind: str, layer: int) -> Path:
        return self.folder / f"{kind}-{layer:05d}.safetensors"

    def has(self, kind: str, layer: int) -> bool:
        return self.file(kind, layer).is_file()

    def put(self, kind: str, layer: int, arrays: Arrays) -> None:
        arrays = {name: np.ascontiguousarray(self.model.to_numpy(x)) for name, x in arrays.items()}
        save_whole(arrays, self.file(kind, layer))

    def get(self, kind: str, layer: int) -> Arrays:
        """The arrays that were kept, in the order of their names."""
        return dict(sorted(load_file(self.file(kind, layer)).items()))

    def variance(self, layer: int) -> Arrays:
        """Of a transform only what bits are spent by."""
        with safe_open(self.file("spectrum", layer), "numpy") as file:
            predictor = {"predictor": None} if "predictor" in file.keys() else {}  # noqa: SIM118 (not a dict)
            return {"variance": file.get_tensor("variance")} | predictor

    def trim(self, kind: str, layer: int, count: int) -> None:
        """What is not asked for again goes; single arrays stay where they are."""
        if count == 0:
            self.file(kind, layer).unlink(missing_ok=True)


class DiskConversion(Conversion):
    """A conversion whose layers are written as soon as they are made, and forgotten."""

    def finished(self, layer: int) -> None:
        converted, pair = self.converted, self.converted.pairs[layer]
        self.factors_file(layer).write_text(json.dumps(describe(pair)), encoding="utf-8")
        write_shard(self.store.folder, converted, layer + 1)
        # What lies in a file by now is let go of.
        converted.pairs[layer] = type(pair)(*(mode.with_arrays(dict.fromkeys(mode.arrays())) for mode in pair.modes))
        converted.query_factors[layer] = None

    def variances(self) -> dict[int, Arrays]:
        return {layer: self.store.variance(layer) for layer in self.spectral}

    def finished_layers(self) -> int:
        """How many layers are written; the model learns how they cache."""
        for layer in range(self.config.num_layers):
            if not (self.store.folder / shard_name(layer + 1, self.config)).is_file():
                return layer
            entry = json.loads(self.factors_file(layer).read_text("utf-8"))
            self.converted.pairs[layer] = saved_pair(type(self.converted), entry, {}, self.config, layer)
        return self.config.num_layers

    def factors_file(self, layer: int) -> Path:
        """How a finished layer caches."""
        return self.store.file("factors", layer).with_suffix(".json")


def check_folder(target: str | Path, source: str | Path | None = None) -> Path:
    """`check_output` of a place for a folder."""
    target = check_output(target, source)
    if target.suffix:
        raise TPAError(f"save: a conversion layer by layer writes a folder, without suffix, got {target}")
    return target


def recipe(path: str | Path, converted: Any, calibration: Any, max_tokens: int) -> str:
    """Everything that decides what a conversion writes; a partial folder with another recipe is begun anew."""
    if isinstance(calibration, Moments):
        said = [x.tobytes() for _, found in sorted(calibration.layers.items()) for x in found.arrays().values()]
    else:
        said = [read_text(calibration).encode(), str(max_tokens).encode()] if calibration is not None else []
    files = formats.checkpoint_files(Path(path))
    content = {
        "format": formats.FORMAT,
        "version": formats.VERSION,
        "files": [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "config": converted.config.to_hf(),
        "tpa": converted.tpa.to_dict(),
        "dtype": converted.dtype,
        "side files": {name: hashlib.sha256(x).hexdigest() for name, x in side_files_of(converted).items()},
        "calibration": hashlib.sha256(b"\0".join(said)).hexdigest() if said else None,
    }
    return json.dumps(content)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a partial folder, or refuse where another run holds it. The lock goes with its process."""
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        held = lock.open("w")
        if fcntl:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TPAError(f"save: another run is writing {folder.name}; wait for it, or choose another place") from None
    except OSError as problem:
        raise TPAError(f"save: cannot write in {folder.parent}: {problem.strerror or problem}") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.close()


def resume_folder(folder: Path, recipe: str) -> None:
    """Make the partial folder: the one an interrupted conversion left, if it was the same, else a new one."""
    with suppress(OSError, ValueError):
        if (folder / RECIPE).read_text("utf-8") == recipe:
            return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / RECIPE).write_text(recipe, encoding="utf-8")


def finish_folder(folder: Path, target: Path, config: GemmaConfig) -> None:
    """Only the model's files stay, and the folder takes the target's name."""
    kept = {shard_name(number, config) for number in range(shard_count(config))}
    kept |= SAVED_NAMES
    # What only the work needed goes, and what a killed library left half-written; without its recipe no folder is
    # resumed, so that goes last.
    for file in sorted(folder.iterdir(), key=lambda file: file.name == RECIPE):
        if file.name not in kept:
            file.unlink()
    if not target.exists():  # one step, between which and the next nothing can be lost
        folder.rename(target)
        return
    with replacing(target) as temporary:
        folder.rename(temporary)


# ---- back to a dense model ----


def shard_of(name: str, config: GemmaConfig) -> int:
    """The shard that a tensor belongs to.

    >>> [shard_of(f"model.{name}.weight", GemmaConfig.gemma3_1b()) for name in ("norm", "layers.3.mlp.up_proj")]
    [0, 4]
    """
    if is_vision(name):
        return config.num_layers + 1
    return int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0


def export(
    path: str | Path,
    target: str | Path,
    progress: Callable = iter,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Path:
    """A saved TPA model, or a checkpoint of any format, as a dense Hugging Face folder: one file a layer, and an index.

    A conversion leaves the weights as they are, so what comes out is the model that went in.
    """
    found, target = inspect(path, variant, config, tokenizer), check_folder(target, path)
    config = found.config
    with replacing(target) as temporary:
        temporary.mkdir()
        for number in progress(range(shard_count(config))):
            arrays = {
                stored_name(name, config): np.ascontiguousarray(entry.read("numpy"), found.stored_dtype)
                for name, entry in found.entries.items()
                if not name.startswith("tpa.") and shard_of(name, config) == number
            }
            save_file(arrays, temporary / shard_name(number, config), {"format": "pt"})
        write_index(temporary)
        write_side_files(replace(found, tpa=None), temporary)
    return target
