"""Models from disk and back. Twin of `tpa_ref.checkpoint`, whose format and checks it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tpa_ref.atomic import replacing, writing
from tpa_ref.errors import TPAError
from tpa_ref.files.checkpoint import (
    Found,
    assemble,
    check_factors,
    check_output,
    check_tensors,
    config_json,
    constant_shapes,
    describe,
    factorization,
    inspect,
    is_basis,
    layer_part,
    outer_part,
    parts,
    save_pt,
    shard_count,
    shard_name,
    stored_bytes,
    vision_part,
    write_beside,
    write_index,
    write_safetensors,
)
from tpa_ref.gemma.config import GemmaConfig

from ..gemma.model import Model

__all__ = [
    "assemble",
    "check_factors",
    "check_output",
    "check_tensors",
    "config_json",
    "constant_shapes",
    "describe",
    "factorization",
    "inspect",
    "is_basis",
    "layer_part",
    "outer_part",
    "parts",
    "shard_count",
    "shard_name",
    "stored_bytes",
    "vision_part",
    "write_beside",
    "write_index",
    "writing",
]

DTYPES = ("float32", "bfloat16", "float64")


def load(
    path: str | Path,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    progress: Callable[[Iterable], Iterable] = iter,
    on_disk: bool = False,
    device: str | torch.device = "cpu",
) -> Model:
    """A model from any of the formats of `tpa_ref.formats`, on a device ("auto": the best one).

    variant: 270m, 1b, 4b, 12b, 27b, to be checked against what is found; where there is no config.json it is guessed
    from the tensors. config: a GemmaConfig, or the path of a Hugging Face config.json, for sizes that were never
    published. tokenizer: path of a tokenizer.model. dtype: float32, bfloat16 or float64. progress: wraps the tensors
    being read, for instance `tqdm.tqdm`. on_disk: every block is read anew whenever it is needed, so that no more than
    one is in memory. A multimodal checkpoint comes with its image tower where config and tensors have one.
    """
    if dtype not in DTYPES:
        raise TPAError(f"load: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = choose_device(device)
    if place.type == "mps" and dtype == "float64":
        raise TPAError("load: float64 does not exist on Apple GPUs; use device cpu or dtype float32")
    found = inspect(path, variant, config, tokenizer)
    return assemble(Model, found, lambda name: read(found, name, dtype, place), progress, on_disk)


def read(found: Found, name: str, dtype: str, device: str | torch.device = "cpu") -> Tensor:
    """One tensor, in the dtype that is computed in."""
    return widen(name, found.entries[name].read("pt"), None if is_basis(name) else dtype).to(device)


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
    # Both ends show what is not finite, without the temporary arrays of a test of every number.
    if value.is_floating_point() and value.numel() and not torch.isfinite(torch.stack(torch.aminmax(value))).all():
        count = int((~torch.isfinite(value)).sum())
        raise TPAError(f"load: {name} must be finite, got {count} NaN or infinite numbers")
    return value


def save(model: Model, path: str | Path) -> Path:
    """Write a model, dense or TPA, atomically; the suffix decides: .pt, .safetensors, none for a folder.

    A folder above 4 GB gets one file for each layer, and an index.
    """
    path = check_output(path)
    with replacing(path) as temporary:
        if path.suffix == ".pt":
            save_pt(model, {name: value for part in parts(model, cast) for name, value in part.items()}, temporary)
        else:
            write_safetensors(model, parts(model, cast), temporary, save_file)
    return path


def cast(value: Tensor, dtype: str | None) -> Tensor:
    """A tensor in the dtype it is stored in (None: its own), on the CPU."""
    kind = value.dtype if dtype is None else getattr(torch, dtype)
    return value.cpu().to(kind).contiguous()
