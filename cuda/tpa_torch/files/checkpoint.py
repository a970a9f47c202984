"""Models from disk. Formats, checks and saving are those of `tpa_ref.files`; what differs is where tensors go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpa_ref.compress.config import TPAConfig
from tpa_ref.compress.moments import Moments
from tpa_ref.errors import TPAError
from tpa_ref.files import checkpoint as reference
from tpa_ref.files.found import Found, inspect
from tpa_ref.files.pairs import is_basis
from tpa_ref.files.stream import check_folder, convert_on_disk
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.weights import EMBED, HEAD

from ..fast.int8 import Int8
from ..gemma.model import Model


def load(
    path: str | Path,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    progress: Callable[[Iterable], Iterable] = iter,
    on_disk: bool = False,
    device: str | torch.device = "cpu",
    weights: str = "as-computed",
) -> Model:
    """`tpa_ref.load` onto a device ("auto": the best one). dtype: what is computed in, also bfloat16. weights: how they
    are held, in that dtype or in "int8" (`fast.int8`), in half the bytes of bfloat16.
    """
    if weights not in WEIGHTS:
        raise TPAError(f"load: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if dtype not in ("float32", "bfloat16", "float64"):
        raise TPAError(f"load: dtype must be one of float32, bfloat16, float64, got {dtype!r}")
    place = choose_device(device)
    if place.type == "mps" and dtype == "float64":
        raise TPAError("load: float64 does not exist on Apple GPUs; use device cpu or dtype float32")
    return Loader(inspect(path, variant, config, tokenizer), dtype, place, weights).model(progress, on_disk)


WEIGHTS = ("as-computed", "int8")


class Loader(reference.Loader):
    """The tensors of a checkpoint by name, on a device, in the dtype that is computed in."""

    model_class = Model

    def __init__(self, found: Found, dtype: str, device: torch.device, weights: str = "as-computed"):
        super().__init__(found, dtype)
        self.device, self.weights = device, weights

    def read(self, name: str) -> Tensor | Int8:  # type: ignore[override]
        """One tensor; infinities and NaN are named and refused."""
        entry, dtype = self.found.entries[name], getattr(torch, self.dtype)
        if not (self.weights == "int8" and is_matrix(name) and Int8.fits(entry.shape)):
            return self.tensor(name, dtype)
        if (stored := entry.codes()) is None:
            whole = Int8.of(self.tensor(name, torch.float32), dtype)
        else:
            whole = Int8(torch.from_numpy(stored[0]), torch.from_numpy(stored[1]), dtype)
        check_finite(name, whole.scale_ns)
        return Int8(whole.codes_nm.to(self.device), whole.scale_ns.to(self.device), dtype)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor as it is computed with."""
        x = self.found.entries[name].read("pt")
        too_wide = x.dtype == torch.float64 and self.device.type not in ("cpu", "cuda")  # Apple GPUs know no float64
        x = x if is_basis(name) and not too_wide else x.to(dtype)
        check_finite(name, x)
        return x.to(self.device)


def is_matrix(name: str) -> bool:
    """Is this a matrix of the text model, if it is a matrix?"""
    return name.startswith("model.layers.") or name in (EMBED, HEAD)


def check_finite(name: str, x: Tensor) -> None:
    """Infinities and NaN are named and refused."""
    if x.is_floating_point() and x.numel() and not torch.isfinite(torch.stack(torch.aminmax(x))).all():
        count = int((~torch.isfinite(x)).sum())
        raise TPAError(f"load: {name} must be finite, got {count} NaN or infinite numbers")


def choose_device(device: str | torch.device) -> torch.device:
    """A torch device; "auto" is cuda, else mps, else cpu."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).tolist()  # a device that holds no data is none
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        first_line = str(problem).split("\n", 1)[0]
        raise TPAError(f"load: device {str(device)!r} is not usable here: {first_line}") from None


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
    progress: Callable[[Any], Any] = iter,
    device: str | torch.device = "cpu",
) -> Path:
    """`tpa_ref.convert_checkpoint`, computed on a device."""
    target = check_folder(target, path)
    dense = load(path, variant, config, tokenizer, dtype, on_disk=True, device=device)
    return convert_on_disk(dense, path, target, tpa, calibration, max_tokens, progress)
