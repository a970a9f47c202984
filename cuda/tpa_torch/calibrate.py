"""Second moments of K and V over a text. Twin of `tpa_ref.calibrate`, which explains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tpa_ref.calibrate import WINDOW, Moments, read_text, text_windows

__all__ = ["Moments", "read_text", "text_windows"]


def calibrate(model: Any, text_or_path: str | Path, max_tokens: int = 32_768, progress: Any = iter) -> Moments:
    """Run the dense model over a text in windows that each begin with BOS, and average k k^T and v v^T.

    max_tokens: how much of the text is used. progress: wraps the windows, for instance `tqdm.tqdm`.
    """
    sums: dict[tuple[str, int], np.ndarray] = {}

    def collect(name: str, array: Any) -> Any:
        prefix, _, stage = name.partition(".attn.")
        if stage in ("K_bkgd", "V_bkge"):
            key = (stage, int(prefix.removeprefix("layers.")))
            sums[key] = sums.get(key, 0) + second_moment(array).cpu().numpy().astype(np.float64)
        return array

    tokens = 0
    for window in progress(list(text_windows(model, text_or_path, max_tokens, WINDOW))):
        model.hidden(np.array([window]), trace=collect)
        tokens += len(window)
    layers = range(model.config.num_layers)
    return Moments(
        {layer: sums["K_bkgd", layer] / tokens for layer in layers},
        {layer: sums["V_bkge", layer] / tokens for layer in layers},
        tokens,
    )


def second_moment(X_bkgd: Tensor) -> Tensor:
    """Sum over tokens of x x^T for the flattened heads of each token: [b,k,g,d] -> [g,d,g,d], at least float32."""
    g, d = X_bkgd.shape[2:]
    X_tx = X_bkgd.reshape(-1, g * d)
    X_tx = X_tx if X_tx.dtype.itemsize == 8 else X_tx.float()
    return (X_tx.mT @ X_tx).reshape(g, d, g, d)
