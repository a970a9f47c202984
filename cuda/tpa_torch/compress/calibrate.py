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

from tpa_ref.compress.calibrate import (
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
)
from tpa_ref.trace import Watch

from ..core.factorize import second_moment
from . import sensitivity
from . import token_prediction as words

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
    predict: bool | None = None,
) -> Moments:
    """Run the dense model over a text in windows that each begin with BOS, forwards and backwards.

    layers: which ones are kept ("all", "global", "local", "5,11"). seed: of the tokens drawn for the sensitivity.
    max_tokens: how much of the text is used; sensitivity_tokens: how much of it also backwards (0: not at all).
    progress: wraps the layers, for instance `tqdm.tqdm`. cache_dir: a folder where the result is kept under a hash of
    model, text and arguments, and found again. predict: also how K and V follow from the words (default: where that
    is affordable, see `words`).
    """
    return calibrated(
        THROUGH, model, text_or_path, layers, seed, max_tokens, sensitivity_tokens, progress, cache_dir, predict
    )


def begin(model: Any, windows: Iterable[list[int]]) -> list[Tensor]:
    """Embedded windows [1,q,m]: the states in front of layer 0."""
    return [model.embed(np.array([window])) for window in windows]


@torch.no_grad()
def through_layer(
    model: Any, layer: int, states: list[Tensor], texts: list[Tensor] | None = None
) -> tuple[list[Tensor], LayerMoments]:
    """(states behind a layer, moments of its normed K before RoPE and of its V). texts: the words of each window."""
    sums: dict[str, np.ndarray] = {}
    held: dict[str, Tensor] = {}

    def add(name: str, found: Tensor) -> None:
        total = found.cpu().numpy().astype(np.float64)
        sums[name] = sums[name] + total if name in sums else total

    watch = Watch({"attn.K_bkgd": held.__setitem__, "attn.V_bkge": held.__setitem__})
    block = model.weights.layers[layer]
    views = {length: model.views(np.arange(length)[None]) for length in {x_bqm.shape[1] for x_bqm in states}}
    behind = []
    for index, x_bqm in enumerate(states):
        behind.append(model.block(x_bqm, layer, block, views[x_bqm.shape[1]], None, watch).contiguous())
        X_bkgd = torch.cat([held["attn.K_bkgd"], held["attn.V_bkge"]], 2)
        X_bkgd = X_bkgd if X_bkgd.dtype == torch.float64 else X_bkgd.float()
        add("M", second_moment(X_bkgd))
        add("mean", X_bkgd[0].sum(0))
        if texts is not None:
            Z_qz = texts[index][0].to(X_bkgd.dtype)
            add("N", (X_bkgd[0].flatten(1).mT @ Z_qz).unflatten(0, X_bkgd.shape[2:]))
    tokens = sum(x_bqm.shape[1] for x_bqm in states)
    return behind, LayerMoments.of({name: total / tokens for name, total in sums.items()})


THROUGH = Through(
    begin,
    words.window_words,
    words.word_moments,
    through_layer,
    sensitivity.begin_backward,
    sensitivity.back_through_layer,
)
