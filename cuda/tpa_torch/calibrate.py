"""What a text tells of K and V, layer by layer. Twin of `tpa_ref.calibrate`, which explains it; the way through the
layers is the same code.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.calibrate import (
    SENSITIVITY_TOKENS,
    WINDOW,
    LayerMoments,
    Moments,
    SideMoments,
    Through,
    calibrated,
    check_dense,
    fingerprint,
    read_text,
    sensitivity_windows,
    text_windows,
    with_fisher,
)
from tpa_ref.trace import Watch

from . import sensitivity
from .factorize import second_moment

__all__ = [
    "WINDOW",
    "LayerMoments",
    "Moments",
    "SideMoments",
    "Through",
    "calibrated",
    "check_dense",
    "fingerprint",
    "read_text",
    "sensitivity_windows",
    "text_windows",
    "with_fisher",
]


def calibrate(
    model: Any,
    text_or_path: str | Path,
    layers: str = "all",
    seed: int = 0,
    max_tokens: int = 32_768,
    sensitivity_tokens: int = SENSITIVITY_TOKENS,
    progress: Any = iter,
    cache_dir: str | Path | None = None,
) -> Moments:
    """Run the dense model over a text in windows that each begin with BOS, forwards and backwards.

    layers: which ones are kept ("all", "global", "local", "5,11"). seed: of the tokens drawn for the sensitivity.
    max_tokens: how much of the text is used; sensitivity_tokens: how much of it also backwards (0: not at all).
    progress: wraps the layers, for instance `tqdm.tqdm`. cache_dir: a folder where the result is kept under a hash of
    model, text and arguments, and found again.
    """
    return calibrated(THROUGH, model, text_or_path, layers, seed, max_tokens, sensitivity_tokens, progress, cache_dir)


def begin(model: Any, windows: Iterable[list[int]]) -> list[Tensor]:
    """Embedded windows [1,q,m]: the states in front of layer 0."""
    return [model.embed(np.array([window])) for window in windows]


@torch.no_grad()
def through_layer(model: Any, layer: int, states: list[Tensor]) -> tuple[list[Tensor], LayerMoments]:
    """(states behind a layer, moments of its normed K before RoPE and of its V)."""
    sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def collect(name: str, array: Tensor) -> None:
        flat = array.flatten(0, 1)
        total = flat.sum(0, dtype=torch.float64 if flat.dtype == torch.float64 else torch.float32)
        found = tuple(x.cpu().numpy().astype(np.float64) for x in (second_moment(array), total))
        sums[name] = tuple(a + b for a, b in zip(sums[name], found)) if name in sums else found  # type: ignore[assignment]

    watch, block = Watch({"attn.K_bkgd": collect, "attn.V_bkge": collect}), model.weights.layers[layer]
    views = {length: model.views(np.arange(length)[None]) for length in {x_bqm.shape[1] for x_bqm in states}}
    behind = [model.block(x_bqm, layer, block, views[x_bqm.shape[1]], None, watch).contiguous() for x_bqm in states]
    tokens = sum(x_bqm.shape[1] for x_bqm in states)
    k, v = (SideMoments(*(total / tokens for total in sums[name])) for name in ("attn.K_bkgd", "attn.V_bkge"))
    return behind, (k, v)


THROUGH = Through(begin, through_layer, sensitivity.begin_backward, sensitivity.back_through_layer)
