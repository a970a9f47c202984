"""What calibration finds: for each layer the moments of K and V, and how much the model feels their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..atomic import replacing
from ..errors import TPAError
from .token_prediction import TokenMoments


class SideMoments(NamedTuple):
    """K or V of one layer, heads flattened: E[x x^T], E[x] and, where it was measured, the Fisher matrix."""

    M_gdgd: Any
    mean_gd: Any
    F_gdgd: Any


@dataclass(frozen=True)
class LayerMoments:
    """K and V of one layer side by side, K's g heads before V's, and the Fisher matrices of each where measured.

    N: E[x z^T] with the token vectors, where they were asked for.
    """

    M_gdgd: Any  # [2g,d,2g,d]
    mean_gd: Any  # [2g,d]
    F: tuple[Any, Any] = (None, None)  # [g,d,g,d] each
    N_gdz: Any = None  # [2g,d,2m]

    @property
    def sides(self) -> tuple[SideMoments, SideMoments]:
        """(moments of K, moments of V)."""
        g = len(self.mean_gd) // 2
        blocks = slice(0, g), slice(g, None)
        k, v = (SideMoments(self.M_gdgd[at, :, at], self.mean_gd[at], F) for at, F in zip(blocks, self.F, strict=True))
        return k, v

    def arrays(self) -> dict[str, Any]:
        """What there is of it, by name."""
        named = {"M": self.M_gdgd, "mean": self.mean_gd, "F.k": self.F[0], "F.v": self.F[1], "N": self.N_gdz}
        return {name: x for name, x in named.items() if x is not None}

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> LayerMoments:
        """The inverse of `arrays`."""
        return cls(arrays["M"], arrays["mean"], (arrays.get("F.k"), arrays.get("F.v")), arrays.get("N"))


@dataclass
class Moments:
    """What `calibrate` found: moments of layers and of the token vectors; `tokens` is how many they average."""

    layers: dict[int, LayerMoments] = field(default_factory=dict)
    tokens: int = 0
    of_tokens: TokenMoments | None = None

    def of_layer(self, layer: int) -> LayerMoments:
        if layer not in self.layers:
            raise TPAError(f"calibrate: layer {layer} was not calibrated, got layers {sorted(self.layers)}")
        return self.layers[layer]

    def save(self, path: str | Path) -> None:
        named = {f"{layer}.{name}": x for layer, found in self.layers.items() for name, x in found.arrays().items()}
        if self.of_tokens is not None:
            # "words": what these arrays have always been called in files
            named |= {"words.mean": self.of_tokens.mean_z, "words.S": self.of_tokens.S_zz}
        tensors = {name: np.ascontiguousarray(x) for name, x in named.items()}
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, {"format": "tpa-moments", "tokens": str(self.tokens)})

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        try:
            with safe_open(path, "numpy") as file:
                tokens = int((file.metadata() or {})["tokens"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            by_layer: dict[str, dict[str, np.ndarray]] = {}
            for name, x in found.items():
                of, _, rest = name.partition(".")
                by_layer.setdefault(of, {})[rest] = x
            text = by_layer.pop("words", None)
            of_tokens = TokenMoments(text["mean"], text["S"], tokens) if text else None
            return cls({int(layer): LayerMoments.of(by_layer[layer]) for layer in by_layer}, tokens, of_tokens)
        except (OSError, SafetensorError, KeyError, ValueError) as problem:
            raise TPAError(f"calibrate: {path} holds no moments: {problem}") from None
