"""Conversion of a checkpoint larger than memory, layer by layer. Twin of `tpa_ref.stream`, which explains it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tpa_ref.calibrate import WINDOW, Moments, text_windows
from tpa_ref.checkpoint import layer_part, outer_part, vision_part, writing
from tpa_ref.config import GemmaConfig, TPAConfig
from tpa_ref.model import begin_conversion
from tpa_ref.stream import (
    check_folder,
    export,
    finish_folder,
    finished_layers,
    recipe,
    resume_folder,
    save_states,
    shard_of,
    states_file,
    write_part,
    write_shard,
)

from .calibrate import begin, through_layer
from .checkpoint import cast, load
from .model import convert_layer

__all__ = ["export", "shard_of"]


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
    device: str | torch.device = "cpu",
) -> Path:
    """Convert a dense checkpoint of any format into a saved TPA folder, in bounded memory.

    The result is that of load, convert, save. calibration: a text (or its path), `Moments`, or None for the weights
    alone; max_tokens of the text are used. dtype: what is computed in; weights are stored as they were. Called again
    after an interruption with the same arguments, it goes on where it was.
    """
    target = check_folder(target)
    dense = load(path, variant, config, tokenizer, dtype, on_disk=True, device=device)
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
            states = [x.to(dense.device) for _, x in sorted(load_file(states_file(folder, first)).items())]
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
