"""Second moments of K and V over a text, from which the constant factors are made.

All windows go through one layer before the next, so that only one layer's weights need be in memory.

What is kept is one matrix per layer and side, whatever the length of the text. K is taken after QK-norm and before
RoPE: that is what `factorize` encodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import TPAError
from .tokenizer import BOS

WINDOW = 512  # tokens of a calibration window: moments of K before RoPE do not depend on position


@dataclass
class Moments:
    """Per layer E[k k^T] and E[v v^T] of the flattened heads, [g,d,g,d]; `tokens` is how many they average."""

    K_lgdgd: dict[int, np.ndarray] = field(default_factory=dict)
    V_lgege: dict[int, np.ndarray] = field(default_factory=dict)
    tokens: int = 0

    def of_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(moment of K, moment of V) of one layer."""
        if layer not in self.K_lgdgd:
            raise TPAError(f"calibrate: layer {layer} was not calibrated, got layers {sorted(self.K_lgdgd)}")
        return self.K_lgdgd[layer], self.V_lgege[layer]


def calibrate(model: Any, text_or_path: str | Path, max_tokens: int = 32_768, progress: Any = iter) -> Moments:
    """Run the dense model over a text in windows that each begin with BOS, and average k k^T and v v^T.

    max_tokens: how much of the text is used. progress: wraps the layers, for instance `tqdm.tqdm`.
    """
    states = begin(model, text_windows(model, text_or_path, max_tokens, WINDOW))
    moments = Moments(tokens=sum(x_bqm.shape[1] for x_bqm in states))
    for layer in progress(range(model.config.num_layers)):
        states, (moments.K_lgdgd[layer], moments.V_lgege[layer]) = through_layer(model, layer, states)
    return moments


def begin(model: Any, windows: Iterable[list[int]]) -> list[np.ndarray]:
    """Embedded windows [1,q,m]: the states in front of layer 0."""
    return [model.embed(np.array([window])) for window in windows]


def through_layer(
    model: Any, layer: int, states: list[np.ndarray]
) -> tuple[list[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(states behind a layer, (E[k k^T], E[v v^T]) of its normed K before RoPE and of its V)."""
    sums: dict[str, np.ndarray] = {}

    def collect(name: str, array: Any) -> Any:
        if name in ("attn.K_bkgd", "attn.V_bkge"):
            sums[name] = sums.get(name, 0) + second_moment(array)
        return array

    block = model.weights.layers[layer]
    behind = [
        np.ascontiguousarray(model.block(x_bqm, layer, block, np.arange(x_bqm.shape[1])[None], None, collect))
        for x_bqm in states
    ]
    tokens = sum(x_bqm.shape[1] for x_bqm in states)
    return behind, (sums["attn.K_bkgd"] / tokens, sums["attn.V_bkge"] / tokens)


def second_moment(X_bkgd: np.ndarray) -> np.ndarray:
    """Sum over tokens of x x^T for the flattened heads of each token: [b,k,g,d] -> [g,d,g,d]."""
    g, d = X_bkgd.shape[2:]
    X_tx = X_bkgd.reshape(-1, g * d).astype(np.float64)
    return (X_tx.T @ X_tx).reshape(g, d, g, d)


def read_text(text_or_path: str | Path) -> str:
    """A text, or the content of the UTF-8 file of that name. A single line that names a file is taken as a path."""
    if isinstance(text_or_path, Path) or ("\n" not in text_or_path and len(text_or_path) < 4096):
        path = Path(text_or_path)
        try:
            if isinstance(text_or_path, Path) or path.is_file():
                return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as problem:
            raise TPAError(
                f"text: {path} is not UTF-8: byte {problem.start} is {problem.object[problem.start]:#x}"
            ) from None
        except OSError as problem:
            if isinstance(text_or_path, Path):
                raise TPAError(f"text: cannot read {path}: {problem.strerror or problem}") from None
    return str(text_or_path)


def text_windows(
    model: Any, text_or_path: str | Path, max_tokens: int, length: int | None = None
) -> Iterator[list[int]]:
    """The text as token windows of at most `length` (default: 1024 or the model's positions), BOS on every one."""
    if model.tokenizer is None:
        raise TPAError(
            "text: the model has no tokenizer, and text needs one; give its file with tokenizer= (--tokenizer)"
        )
    length = min(length or 1024, model.config.max_positions)
    ids = model.tokenizer.encode(read_text(text_or_path), bos=False)[:max_tokens]
    if not ids:
        raise TPAError("text: at least one token is needed, got an empty text")
    for start in range(0, len(ids), length - 1):
        yield [BOS, *ids[start : start + length - 1]]
