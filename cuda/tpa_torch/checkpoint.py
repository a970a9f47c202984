"""Models from disk and back. Twin of `tpa_ref.checkpoint`, whose format and checks it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tpa_ref.checkpoint import (
    assemble,
    check_factors,
    check_output,
    check_tensors,
    config_json,
    inspect,
    is_basis,
    named_tensors,
    our_name,
    replacing,
    save_pt,
    write_safetensors,
)
from tpa_ref.config import GemmaConfig
from tpa_ref.errors import TPAError

from .model import Model

__all__ = [
    "assemble",
    "check_factors",
    "check_output",
    "check_tensors",
    "config_json",
    "inspect",
    "is_basis",
    "named_tensors",
    "our_name",
]

DTYPES = ("float32", "bfloat16", "float64")


def load(
    path: str | Path,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    progress: Callable[[Iterable], Iterable] = iter,
    device: str | torch.device = "cpu",
) -> Model:
    """A model from a Hugging Face folder, a .safetensors file or a saved TPA model, on a device ("auto": the best one).

    variant: 270m, 1b, 4b, 12b, 27b, to be checked against what is found. config: a GemmaConfig, or the path of a
    Hugging Face config.json, where the checkpoint carries none. tokenizer: path of a tokenizer.model. dtype: float32,
    bfloat16 or float64. progress: wraps the tensors being read, for instance `tqdm.tqdm`.
    """
    if dtype not in DTYPES:
        raise TPAError(f"load: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = choose_device(device)
    if place.type == "mps" and dtype == "float64":
        raise TPAError("load: float64 does not exist on Apple GPUs; use device cpu or dtype float32")
    found = inspect(path, variant, config, tokenizer)
    tensors = {
        name: widen(name, value, None if is_basis(name) else dtype).to(place)
        for name, value in progress(found.tensors("pt"))
    }
    return assemble(Model, found, tensors)


def choose_device(device: str | torch.device) -> torch.device:
    """A torch device; "auto" is cuda, else mps, else cpu."""
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        first_line = str(problem).split("\n", 1)[0]
        raise TPAError(f"load: device {str(device)!r} is not usable here: {first_line}") from None
    return chosen


def widen(name: str, value: Tensor, dtype: str | None) -> Tensor:
    """A stored tensor in the dtype that is computed in (None: as it is); infinities and NaN are named and refused."""
    value = value if dtype is None else value.to(getattr(torch, dtype))
    if not torch.isfinite(value).all():
        raise TPAError(
            f"load: {name} must be finite, got {int((~torch.isfinite(value)).sum())} NaN or infinite numbers"
        )
    return value


def save(model: Model, path: str | Path) -> Path:
    """Write a model, dense or TPA, atomically; the suffix decides: .pt, .safetensors, none for a folder."""
    path = check_output(path)
    tensors = {name: value.cpu().contiguous() for name, value in named_tensors(model, cast).items()}
    with replacing(path) as temporary:
        if path.suffix == ".pt":
            save_pt(model, tensors, temporary)
        else:
            write_safetensors(model, tensors, temporary, save_file, single=path.suffix == ".safetensors")
    return path


def cast(value: Tensor, dtype: str) -> Tensor:
    """A tensor in the dtype it is stored in."""
    return value.to(getattr(torch, dtype))
