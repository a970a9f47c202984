"""Second moments of K and V over a text. Twin of `tpa_ref.calibrate`, which explains it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.calibrate import WINDOW, Moments, read_text, text_windows

__all__ = ["Moments", "read_text", "text_windows"]


def calibrate(model: Any, text_or_path: str | Path, max_tokens: int = 32_768, progress: Any = iter) -> Moments:
    """Run the dense model over a text in windows that each begin with BOS, and average k k^T and v v^T.

    max_tokens: how much of the text is used. progress: wraps the layers, for instance `tqdm.tqdm`.
    """
    states = begin(model, text_windows(model, text_or_path, max_tokens, WINDOW))
    moments = Moments(tokens=sum(x_bqm.shape[1] for x_bqm in states))
    for layer in progress(range(model.config.num_layers)):
        states, (moments.K_lgdgd[layer], moments.V_lgege[layer]) = through_layer(model, layer, states)
    return moments


def begin(model: Any, windows: Iterable[list[int]]) -> list[Tensor]:
    """Embedded windows [1,q,m]: the states in front of layer 0."""
    return [model.embed(np.array([window])) for window in windows]


@torch.inference_mode()
def through_layer(model: Any, layer: int, states: list[Tensor]) -> tuple[list[Tensor], tuple[np.ndarray, np.ndarray]]:
    """(states behind a layer, (E[k k^T], E[v v^T]) of its normed K before RoPE and of its V)."""
    sums: dict[str, np.ndarray] = {}

    def collect(name: str, array: Any) -> Any:
        if name in ("attn.K_bkgd", "attn.V_bkge"):
            sums[name] = sums.get(name, 0) + second_moment(array).cpu().numpy().astype(np.float64)
        return array

    block = model.weights.layers[layer]
    views = {length: model.views(np.arange(length)[None]) for length in {x_bqm.shape[1] for x_bqm in states}}
    behind = [model.block(x_bqm, layer, block, views[x_bqm.shape[1]], None, collect).contiguous() for x_bqm in states]
    tokens = sum(x_bqm.shape[1] for x_bqm in states)
    return behind, (sums["attn.K_bkgd"] / tokens, sums["attn.V_bkge"] / tokens)


def second_moment(X_bkgd: Tensor) -> Tensor:
    """Sum over tokens of x x^T for the flattened heads of each token: [b,k,g,d] -> [g,d,g,d], at least float32."""
    g, d = X_bkgd.shape[2:]
    X_tx = X_bkgd.reshape(-1, g * d)
    X_tx = X_tx if X_tx.dtype.itemsize == 8 else X_tx.float()
    return (X_tx.mT @ X_tx).reshape(g, d, g, d)
