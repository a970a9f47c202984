"""Conversion of a checkpoint larger than memory, layer by layer. Twin of `tpa_ref.stream`, which explains it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tpa_ref.compress.calibrate import Moments
from tpa_ref.compress.config import TPAConfig
from tpa_ref.files.stream import (
    Steps,
    Work,
    check_folder,
    convert_on_disk,
    export,
    finish_folder,
    finished_layers,
    measure,
    recipe,
    resume_folder,
    shard_of,
    write_part,
    write_shard,
)
from tpa_ref.gemma.config import GemmaConfig

from ..compress.calibrate import THROUGH
from ..compress.convert import convert_layer, layer_spectrum
from .checkpoint import cast, load

__all__ = [
    "Work",
    "export",
    "finish_folder",
    "finished_layers",
    "measure",
    "recipe",
    "resume_folder",
    "shard_of",
    "write_part",
    "write_shard",
]


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
    steps = Steps(THROUGH, layer_spectrum, convert_layer, cast, save_file, load_states, to_numpy, torch.from_numpy)
    return convert_on_disk(steps, dense, path, target, tpa, calibration, max_tokens, progress)


def to_numpy(x: Tensor) -> np.ndarray:
    """A tensor as a NumPy array."""
    return x.cpu().numpy()


def load_states(file: Path, model: Any) -> list[Tensor]:
    """The tensors of a file in the order of their names, on the model's device."""
    return [x.to(model.device) for _, x in sorted(load_file(file).items())]
