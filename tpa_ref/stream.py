"""Conversion of a checkpoint larger than memory: layer by layer from disk to disk, and on after an interruption.

    read layer l -> run the calibration text through it -> its factors -> write its file -> forget it

Never more than the embedding, one layer and the text's hidden states are held. What is finished lies in a folder
`.NAME.partial` beside the target, which takes the target's name at the end; the same call goes on where one was killed.
The functions that touch no array are shared with the torch backend.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from . import formats
from .calibrate import WINDOW, Moments, begin, read_text, text_windows, through_layer
from .checkpoint import (
    cast,
    check_output,
    inspect,
    layer_part,
    load,
    outer_part,
    replacing,
    shard_count,
    shard_name,
    vision_part,
    write_beside,
    write_index,
    writing,
)
from .config import GemmaConfig, TPAConfig
from .errors import TPAError
from .factorize import Factorization
from .model import begin_conversion, convert_layer
from .weights import is_vision, stored_name

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
    after an interruption with the same arguments, it goes on where it was.
    """
    target = check_folder(target)
    dense = load(path, variant, config, tokenizer, dtype, on_disk=True)
    converted = begin_conversion(dense, tpa)
    folder = resume_folder(target, recipe(path, converted, calibration, max_tokens))
    with writing(target, folder):
        first = finished_layers(folder, converted)
        states = None
        if calibration is not None and not isinstance(calibration, Moments):
            states = begin(dense, text_windows(dense, calibration, max_tokens, WINDOW))
        if first < 0:
            write_part(folder, 0, converted, outer_part(converted, cast), save_file)
        elif states and first > 0:
            states = [x_bqm for _, x_bqm in sorted(load_file(states_file(folder, first)).items())]
        for layer in progress(range(max(first, 0), dense.config.num_layers)):
            moments = calibration.of_layer(layer) if isinstance(calibration, Moments) else None
            if states:
                states, moments = through_layer(dense, layer, states)
                save_states(folder, layer + 1, states, save_file)
            convert_layer(converted, layer, moments)
            write_part(folder, layer + 1, converted, layer_part(converted, layer, cast), save_file)
        if dense.config.vision:
            write_shard(folder, dense.config.num_layers + 1, dense.config, vision_part(dense, cast), save_file)
        finish_folder(folder, target, converted)
    return target


# ---- shared by both backends ----


def check_folder(target: str | Path) -> Path:
    """A place for a saved model that is a folder."""
    target = check_output(target)
    if target.suffix:
        raise TPAError(f"save: a conversion layer by layer writes a folder, without suffix, got {target}")
    return target


def recipe(path: str | Path, converted: Any, calibration: Any, max_tokens: int) -> dict[str, Any]:
    """Everything that decides what a conversion writes; a partial folder with another recipe is begun anew."""
    if isinstance(calibration, Moments):
        said = [M.tobytes() for layer in sorted(calibration.K_lgdgd) for M in calibration.of_layer(layer)]
    else:
        said = [read_text(calibration).encode(), str(max_tokens).encode()] if calibration is not None else []
    files = formats.checkpoint_files(Path(path))
    return {
        "format": formats.FORMAT,
        "version": formats.VERSION,
        "files": [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "config": converted.config.to_hf(),
        "tpa": json.loads(json.dumps(converted.tpa.to_dict())),
        "dtype": converted.dtype,
        "calibration": hashlib.sha256(b"\0".join(said)).hexdigest() if said else None,
    }


def resume_folder(target: Path, recipe: dict[str, Any]) -> Path:
    """The partial folder of a target: the one an interrupted conversion left, if it was the same, else a new one."""
    folder = target.absolute().parent / f".{target.name}.partial"
    try:
        if json.loads((folder / RECIPE).read_text("utf-8")) == recipe:
            return folder
    except (OSError, ValueError):
        pass
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    except OSError as problem:
        raise TPAError(f"save: cannot write in {folder.parent}: {problem.strerror or problem}") from None
    return folder


def finished_layers(folder: Path, converted: Any) -> int:
    """How many layers are written (-1: not even the embedding); `converted` learns how they cache."""
    for number in range(converted.config.num_layers + 1):
        file = folder / shard_name(number, converted.config)
        if not file.is_file():
            return number - 1
        if number > 0:
            k, v = (Factorization(**how) for how in json.loads(_factors_file(folder, number - 1).read_text("utf-8")))
            converted.factors[number - 1] = (k, v)
    return converted.config.num_layers


def write_part(folder: Path, number: int, converted: Any, part: dict[str, Any], save_file: Callable) -> None:
    """The finished file of a layer (0: what stands outside of them), whose bases need not be kept after that."""
    if number > 0:
        pair = converted.factors[number - 1]
        described = [{"mode": how.mode, "rank": how.rank, "dtype": how.dtype, "error": how.error} for how in pair]
        _factors_file(folder, number - 1).write_text(json.dumps(described), encoding="utf-8")
        converted.factors[number - 1] = tuple(replace(how, basis=None) for how in pair)
        converted.query_factors[number - 1] = None
    write_shard(folder, number, converted.config, part, save_file)


def write_shard(folder: Path, number: int, config: GemmaConfig, part: dict[str, Any], save_file: Callable) -> None:
    """One file, under its name only when it is complete."""
    file = folder / shard_name(number, config)
    save_file(part, file.with_suffix(".tmp"), {"format": "pt"})
    os.replace(file.with_suffix(".tmp"), file)


def _factors_file(folder: Path, layer: int) -> Path:
    return folder / f"factors-{layer:05d}.json"


def states_file(folder: Path, layer: int) -> Path:
    return folder / f"states-{layer:05d}.safetensors"


def save_states(folder: Path, layer: int, states: list[Any], save_file: Callable) -> None:
    """The hidden states in front of a layer, to go on from; those two layers back are no longer needed."""
    file = states_file(folder, layer)
    save_file({f"{window:06d}": x_bqm for window, x_bqm in enumerate(states)}, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)
    states_file(folder, layer - 2).unlink(missing_ok=True)


def finish_folder(folder: Path, target: Path, converted: Any) -> None:
    """Index, config and tokenizer beside the finished files, nothing else; then the folder takes the target's name."""
    kept = {shard_name(number, converted.config) for number in range(shard_count(converted.config))}
    for file in folder.iterdir():  # what only the work needed, and what a killed library left half-written
        if file.name not in kept:
            file.unlink()
    write_index(folder)
    write_beside(converted, folder)
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


def export(path: str | Path, target: str | Path, progress: Callable = iter) -> Path:
    """A saved TPA model, or a checkpoint of any format, as a dense Hugging Face folder: one file a layer, and an index.

    A conversion leaves the weights as they are, so what comes out is the model that went in.
    """
    found, target = inspect(path), check_folder(target)
    names = [name for name in found.entries if not name.startswith("tpa.")]
    with replacing(target) as temporary:
        temporary.mkdir()
        for number in progress(range(shard_count(found.config))):
            chosen = [name for name in names if shard_of(name, found.config) == number]
            part = {
                stored_name(name, found.config): cast(found.entries[name].read("numpy"), found.stored_dtype)
                for name in chosen
            }
            save_file(part, temporary / shard_name(number, found.config), {"format": "pt"})
        write_index(temporary)
        content = found.config.to_hf() | {"torch_dtype": found.stored_dtype}
        (temporary / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        if found.tokenizer:
            (temporary / "tokenizer.model").write_bytes(found.tokenizer.proto)
    return target
