"""Conversion of a checkpoint larger than memory: layer by layer from disk to disk, and on after an interruption.

    forwards   read layer l -> run the calibration text through it -> its moments
    backwards  read layer l -> run the gradients back through it -> its sensitivity
    spectra    moments and sensitivity of layer l -> its spectral transform
    factors    read layer l -> its factors -> write its file

Never more than the embedding, one layer and the text's hidden states are held. What is finished lies in a folder
`.NAME.partial` beside the target, which takes the target's name at the end; the same call goes on where one was killed.
Everything that touches no array is shared with the torch backend, which brings its own `Steps`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..atomic import replacing, writing
from ..compress.calibrate import (
    SENSITIVITY_TOKENS,
    THROUGH,
    WINDOW,
    LayerMoments,
    Moments,
    Through,
    read_text,
    sensitivity_windows,
    text_windows,
)
from ..compress.config import TPAConfig
from ..compress.convert import (
    begin_conversion,
    codes_v_alone,
    convert_layer,
    joint_layers,
    layer_spectrum,
    predicts,
    spend_bits,
    wants_bits,
    words_of,
)
from ..compress.token_prediction import WordMoments
from ..compress.transform import Spectrum
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.weights import is_vision, stored_name
from . import formats
from .checkpoint import (
    cast,
    check_output,
    describe,
    factorization,
    inspect,
    layer_part,
    load,
    outer_part,
    shard_count,
    shard_name,
    vision_part,
    write_beside,
    write_index,
)

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
    steps = Steps(THROUGH, layer_spectrum, convert_layer, cast, save_file, load_states)
    return convert_on_disk(steps, dense, path, target, tpa, calibration, max_tokens, progress)


# ---- shared by both backends ----


@dataclass(frozen=True)
class Steps:
    """What a backend brings: calibration through one layer, its transform and its factors, and its files."""

    through: Through
    layer_spectrum: Callable
    convert_layer: Callable
    cast: Callable
    save_file: Callable
    load_states: Callable  # (file, model) -> the arrays of a file, in the order of their names
    to_numpy: Callable = np.asarray
    from_numpy: Callable = np.asarray


def convert_on_disk(
    steps: Steps,
    dense: Any,
    path: str | Path,
    target: Path,
    tpa: TPAConfig | None,
    calibration: Moments | str | Path | None,
    max_tokens: int,
    progress: Callable,
) -> Path:
    """`convert_checkpoint` for either backend, once the dense model is opened."""
    converted = begin_conversion(dense, tpa)
    folder = resume_folder(target, recipe(path, converted, calibration, max_tokens))
    with writing(target, folder):
        work = Work(folder, steps)
        if not (folder / shard_name(0, dense.config)).is_file():
            write_part(folder, 0, converted, outer_part(converted, steps.cast), steps.save_file)
        if calibration is None or isinstance(calibration, Moments):
            moments_of = calibration.of_layer if calibration else lambda layer: None
            text = words_of(converted.tpa, calibration)
        else:
            windows = list(text_windows(dense, calibration, max_tokens, WINDOW))
            measure(steps, work, dense, windows, predicts(converted), progress)
            moments_of, text = work.moments, work.words() if predicts(converted) else None
        joint = joint_layers(converted)
        for layer in progress(joint):
            if not work.has("spectrum", layer):
                work.put_spectrum(layer, steps.layer_spectrum(converted, layer, moments_of(layer), text), converted)
        if wants_bits(converted.tpa):
            predicted = any(work.predicted(layer) for layer in joint)
            spend_bits(converted, {layer: work.variance(layer) for layer in joint}, predicted)
        first = finished_layers(folder, converted)
        per_layer, _ = converted.tpa.resolve(dense.config)
        for layer in progress(range(first, dense.config.num_layers)):
            if per_layer[layer] is None:
                steps.convert_layer(converted, layer, None)
            elif layer in joint:
                of_k = moments_of(layer) if codes_v_alone(converted, layer) else None
                steps.convert_layer(converted, layer, of_k, work.spectrum(layer))
            else:
                steps.convert_layer(converted, layer, moments_of(layer))
            write_part(folder, layer + 1, converted, layer_part(converted, layer, steps.cast), steps.save_file)
        if dense.config.vision:
            tower = vision_part(dense, steps.cast)
            write_shard(folder, dense.config.num_layers + 1, dense.config, tower, steps.save_file)
        finish_folder(folder, target, converted)
    return target


def measure(steps: Steps, work: Work, dense: Any, windows: list[list[int]], predict: bool, progress: Callable) -> None:
    """`calibrate` from disk to disk: the states in front of every layer, then the gradients, lie in files."""
    layers = range(dense.config.num_layers)
    backwards = sensitivity_windows(windows, SENSITIVITY_TOKENS)
    if not work.has("states", 0):
        work.put("states", 0, steps.through.begin(dense, windows))
    missing = [layer for layer in layers if not work.has("moments", layer)]
    texts = None
    if predict and missing:
        texts = [steps.through.window_words(x_bqm) for x_bqm in work.get("states", 0, dense)]
    if texts and not work.has("words", 0):
        work.put_words(steps.through.word_moments(texts))
    for layer in progress(layers):
        if layer in missing:
            states, found = steps.through.through_layer(dense, layer, work.get("states", layer, dense), texts)
            work.put("states", layer + 1, states)
            work.put_moments("moments", layer, found.arrays())
    if not work.has("gradients", len(layers)):
        states = work.get("states", len(layers), dense)[:backwards]
        work.put("gradients", len(layers), steps.through.begin_backward(dense, states, 0))
    for layer in progress(layers[::-1]):
        if not work.has("fisher", layer):
            states = work.get("states", layer, dense)[:backwards]
            gradients = work.get("gradients", layer + 1, dense)
            gradients, fisher = steps.through.back_through_layer(dense, layer, states, gradients)
            work.put("gradients", layer, gradients)
            work.put_moments("fisher", layer, dict(zip(("F.k", "F.v"), fisher, strict=True)))


class Work:
    """The files of an unfinished conversion: what was found for each layer, complete wherever it has its name."""

    def __init__(self, folder: Path, steps: Steps):
        self.folder, self.steps = folder, steps

    def file(self, kind: str, layer: int) -> Path:
        return self.folder / f"{kind}-{layer:05d}.safetensors"

    def has(self, kind: str, layer: int) -> bool:
        return self.file(kind, layer).is_file()

    def _write(self, kind: str, layer: int, tensors: dict[str, Any], save: Callable) -> None:
        temporary = self.file(kind, layer).with_suffix(".tmp")
        save(tensors, temporary)
        os.replace(temporary, self.file(kind, layer))

    def put(self, kind: str, layer: int, arrays: list[Any]) -> None:
        """One array a window."""
        named = {f"{window:06d}": self.steps.cast(x, None) for window, x in enumerate(arrays)}
        self._write(kind, layer, named, self.steps.save_file)

    def get(self, kind: str, layer: int, model: Any) -> list[Any]:
        return self.steps.load_states(self.file(kind, layer), model)

    def put_moments(self, kind: str, layer: int, found: dict[str, Any]) -> None:
        """Arrays by name."""
        self._write(kind, layer, {name: np.ascontiguousarray(x) for name, x in found.items()}, save_file)

    def moments(self, layer: int) -> LayerMoments:
        return LayerMoments.of(load_file(self.file("moments", layer)) | load_file(self.file("fisher", layer)))

    def put_words(self, found: WordMoments) -> None:
        self.put_moments("words", 0, {"mean": found.mean_z, "S": found.S_zz, "tokens": np.array([found.tokens])})

    def words(self) -> WordMoments:
        found = load_file(self.file("words", 0))
        return WordMoments(found["mean"], found["S"], int(found["tokens"][0]))

    def put_spectrum(self, layer: int, found: Spectrum, model: Any) -> None:
        """The transform of one layer, in the precision in which constant factors are stored."""
        full = "float64" if model.dtype == "float64" else "float32"
        arrays = {"encoder": found.encoder_sgd, "basis": found.basis_sgd, "mean": found.mean_gd}
        if found.predictor_zgd is not None:
            arrays["predictor"] = found.predictor_zgd
        tensors = {name: np.ascontiguousarray(self.steps.to_numpy(x), full) for name, x in arrays.items()}
        self._write("spectrum", layer, tensors | {"variance": found.variance_s}, save_file)

    def spectrum(self, layer: int) -> Spectrum:
        found: dict[str, Any] = load_file(self.file("spectrum", layer))
        variance_s = found.pop("variance")
        found = {name: self.steps.from_numpy(x) for name, x in found.items()}
        return Spectrum(found["encoder"], found["basis"], found["mean"], variance_s, found.get("predictor"))

    def variance(self, layer: int) -> np.ndarray:
        with safe_open(self.file("spectrum", layer), "numpy") as file:
            return file.get_tensor("variance")

    def predicted(self, layer: int) -> bool:
        """Is K or V of this layer predicted from the words?"""
        with safe_open(self.file("spectrum", layer), "numpy") as file:
            return "predictor" in file.keys()  # noqa: SIM118 (not a dict)


def check_folder(target: str | Path) -> Path:
    """A place for a saved model that is a folder."""
    target = check_output(target)
    if target.suffix:
        raise TPAError(f"save: a conversion layer by layer writes a folder, without suffix, got {target}")
    return target


def recipe(path: str | Path, converted: Any, calibration: Any, max_tokens: int) -> dict[str, Any]:
    """Everything that decides what a conversion writes; a partial folder with another recipe is begun anew."""
    if isinstance(calibration, Moments):
        said = [x.tobytes() for _, found in sorted(calibration.layers.items()) for x in found.arrays().values()]
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
    """How many layers are written; `converted` learns how they cache."""
    for layer in range(converted.config.num_layers):
        if not (folder / shard_name(layer + 1, converted.config)).is_file():
            return layer
        k, v = (factorization(how, {}) for how in json.loads(_factors_file(folder, layer).read_text("utf-8")))
        converted.factors[layer] = (k, v)
    return converted.config.num_layers


def write_part(folder: Path, number: int, converted: Any, part: dict[str, Any], save_file: Callable) -> None:
    """One finished file, under its name only when it is complete; the layer's constants need not be kept after that."""
    if number > 0:
        pair = converted.factors[number - 1]
        _factors_file(folder, number - 1).write_text(json.dumps([describe(how) for how in pair]), encoding="utf-8")
        converted.factors[number - 1] = tuple(replace(how, **dict.fromkeys(how.constants())) for how in pair)
        converted.query_factors[number - 1] = None
    write_shard(folder, number, converted.config, part, save_file)


def write_shard(folder: Path, number: int, config: GemmaConfig, part: dict[str, Any], save_file: Callable) -> None:
    """One file, under its name only when it is complete."""
    file = folder / shard_name(number, config)
    save_file(part, file.with_suffix(".tmp"), {"format": "pt"})
    os.replace(file.with_suffix(".tmp"), file)


def _factors_file(folder: Path, layer: int) -> Path:
    return folder / f"factors-{layer:05d}.json"


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


def load_states(file: Path, model: Any) -> list[np.ndarray]:
    """The arrays of a file in the order of their names."""
    return [x for _, x in sorted(load_file(file).items())]


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
