"""What calibration finds: for each layer the moments of K and V, and how much the model feels their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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


class FirstToken(NamedTuple):
    """K and V of the first token of every text, its gradients in each window that went backwards, and the share that
    first tokens have in all tokens, and in those that went backwards.
    """

    x_gd: Any  # [2g,d]
    G_wgd: Any  # [w,2g,d]
    share: Any  # [2]


@dataclass(frozen=True)
class LayerMoments:
    """K and V of one layer side by side, K's g heads before V's, and the Fisher matrices of each where measured.

    N: E[x z^T] with the token vectors, where they were asked for. first: what is known of the first token, which is
    left out of all others: K and V of BOS are the same for every text, far from all others, and most of what errors
    cost. A cache that keeps it exactly need not code it.
    """

    M_gdgd: Any  # [2g,d,2g,d]
    mean_gd: Any  # [2g,d]
    F: tuple[Any, Any] = (None, None)  # [g,d,g,d] each
    N_gdz: Any = None  # [2g,d,2m]
    first: FirstToken | None = None

    def with_first(self) -> LayerMoments:
        """The moments of all tokens, for a cache that codes the first one as well."""
        if self.first is None:
            return self
        x_gd, (share, of_gradients) = self.first.x_gd, self.first.share
        M_gdgd = (1 - share) * self.M_gdgd + share * np.multiply.outer(x_gd, x_gd)
        mean_gd, g = (1 - share) * self.mean_gd + share * x_gd, len(x_gd) // 2
        F = self.F
        if self.first.G_wgd is not None and F[0] is not None:
            halves = self.first.G_wgd[:, :g], self.first.G_wgd[:, g:]
            outer = (np.einsum("wgd,wjc->gdjc", G, G, optimize=True) / len(G) for G in halves)
            F = tuple((1 - of_gradients) * F + of_gradients * new for F, new in zip(F, outer, strict=True))
        return replace(self, M_gdgd=M_gdgd, mean_gd=mean_gd, F=F, first=None)

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
        if self.first is not None:
            named |= {"first.x": self.first.x_gd, "first.G": self.first.G_wgd, "first.share": self.first.share}
        return {name: x for name, x in named.items() if x is not None}

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> LayerMoments:
        """The inverse of `arrays`."""
        first = None
        if "first.x" in arrays:
            first = FirstToken(arrays["first.x"], arrays.get("first.G"), arrays["first.share"])
        return cls(arrays["M"], arrays["mean"], (arrays.get("F.k"), arrays.get("F.v")), arrays.get("N"), first)


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
