"""What a text tells of K and V, layer by layer: means, second moments, and how much the model feels their errors.

If the normed K (or V) of one token is wrong by a small n, the prediction moves by

    KL(p || p') = 1/2 n^T F n,       F = E[grad grad^T],   grad = d log p(y) / d K,   y drawn from p itself,

summed over all positions that read this token. F, the Fisher matrix, needs only first derivatives: one pass forwards
and one backwards (`gemma.backward` writes the chain rule out). The gradient of a key contains the queries that read it,
that of a value contains W_O: F weighs a basis of K by its queries and one of V by W_O, and the layers against each
other.

All windows go through one layer before the next, first forwards, then backwards, so only one layer's weights need be in
memory, and what is kept are a few matrices per layer, whatever the length of the text. K is taken after QK-norm and
before RoPE: that is what is factorized.

BOS, which begins every window, is kept apart (`moments.FirstToken`): its K and V are constants of the model, 8 to 91 %
of the trace of F in Gemma 3 270M, and would distort both moments.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TPAError
from ..gemma.texts import text_windows
from ..gemma.token_vectors import numbered
from . import token_prediction
from .config import chosen_layers
from .moments import LayerMoments, Moments
from .store import Arrays, Memory
from .token_prediction import TokenMoments

WINDOW = 1024  # tokens of a calibration window: beyond the tiny model's sliding window, so that long range counts
LEAST_BACKWARDS = 2_048  # tokens; more of them change little, and each costs six times what it costs forwards


def calibrate(
    model: Any,
    text_or_path: str | Path,
    layers: str = "all",
    seed: int = 0,
    max_tokens: int = 32_768,
    sensitivity_tokens: int | None = None,
    progress: Callable = iter,
    cache_dir: str | Path | None = None,
    predict: bool | None = None,
) -> Moments:
    """Run the dense model over a text in windows that each begin with BOS, forwards and backwards.

    layers: which ones are kept ("all", "global", "local", "5,11"). seed: of the tokens drawn for the sensitivity.
    max_tokens: how much of the text is used; sensitivity_tokens: how much of it also goes backwards (0: nothing;
    default: an eighth, at least 2,048).
    progress: wraps the layers, for instance `tqdm.tqdm`. cache_dir: a folder where the result is kept under a hash of
    model, text and arguments, and found again. predict: also find out how K and V follow from the tokens (default:
    where that is affordable, see `token_prediction`).
    """
    if model.tpa is not None:
        raise TPAError("calibrate: the model already has a TPA cache; calibrate the dense model")
    windows = list(text_windows(model, text_or_path, max_tokens, WINDOW))
    kept = sorted(chosen_layers(layers, model.config))
    predict = token_prediction.wanted(predict, model.config)
    backwards = sensitivity_windows(windows, sensitivity_tokens)
    name = f"moments-{fingerprint(model, windows, kept, seed, backwards, predict)}.safetensors"
    file = Path(cache_dir) / name if cache_dir else None
    if file and file.is_file():
        return Moments.load(file)
    found = Calibration(model, windows, Memory(), seed, sensitivity_tokens, predict)
    found.run(progress)
    moments = Moments({layer: found.of_layer(layer) for layer in kept}, found.tokens, found.of_tokens)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        moments.save(file)
    return moments


class Calibration:
    """The way through all layers and back. `store` keeps what is found; what it has already is not computed again."""

    def __init__(
        self,
        model: Any,
        windows: list[list[int]],
        store: Any,
        seed: int = 0,
        sensitivity_tokens: int | None = None,
        predict: bool = False,
    ):
        self.model, self.windows, self.store, self.seed, self.predict = model, windows, store, seed, predict
        self.backwards = sensitivity_windows(windows, sensitivity_tokens)
        self.tokens = max(1, sum(len(window) - 1 for window in windows))  # without the first of each
        self.num_layers: int = model.config.num_layers

    def run(self, progress: Callable = iter) -> None:
        """Forwards through every layer, backwards through every layer."""
        layers = range(self.num_layers)
        steps = [(layer, False) for layer in layers] + [(layer, True) for layer in layers[::-1] if self.backwards]
        if not self.store.has("states", 0) and not self.store.has("fisher", 0):
            self.store.put("states", 0, named([self.model.embed(np.array([window])) for window in self.windows]))
        for layer, back in progress(steps):
            if not self.store.has("fisher" if back else "moments", layer):
                step = self._backwards if back else self._forwards
                step(layer)

    def _forwards(self, layer: int) -> None:
        """The states after a layer, and the moments of its K and V."""
        after: list[Any] = []
        sums: Arrays = {}
        for index, x_bqm in enumerate(self._held("states", layer)):
            y_bqm, K_bkgd, V_bkge = self.model.through_layer(layer, x_bqm)
            after.append(y_bqm)
            Z_bkz = self.token_vectors[index][:, 1:] if self.predict else None
            add(sums, self.model.moments(K_bkgd[:, 1:], V_bkge[:, 1:], Z_bkz))
        found = {name: total / self.tokens for name, total in sums.items()}
        found["first.x"] = self.model.moments(K_bkgd[:, :1], V_bkge[:, :1])["mean"]
        found["first.share"] = np.array([share(self.windows), share(self.windows[: self.backwards])])
        self.store.put("states", layer + 1, named(after))
        self.store.put("moments", layer, found)
        self.store.trim("states", layer, self.backwards)

    def _backwards(self, layer: int) -> None:
        """The gradients before a layer, and the Fisher matrices of its K and V."""
        states = self._held("states", layer)[: self.backwards]
        if layer + 1 == self.num_layers and not self.store.has("gradients", layer + 1):
            rng = np.random.default_rng(self.seed)
            last = self._held("states", layer + 1)[: self.backwards]
            self.store.put("gradients", layer + 1, named([self.model.logits_backward(x_bqm, rng) for x_bqm in last]))
        before: list[Any] = []
        of_first: list[np.ndarray] = []
        sums: Arrays = {}
        for x_bqm, dy_bqm in zip(states, self._held("gradients", layer + 1), strict=True):
            dx_bqm, F_k, F_v, G_gd = self.model.back_through_layer(layer, x_bqm, dy_bqm)
            before.append(dx_bqm)
            of_first.append(G_gd)
            add(sums, {"F.k": F_k, "F.v": F_v})
        tokens = max(1, sum(x_bqm.shape[1] - 1 for x_bqm in states))
        found = {name: total / tokens for name, total in sums.items()} | {"first.G": np.stack(of_first)}
        self.store.put("gradients", layer, named(before))
        self.store.put("fisher", layer, found)
        self.store.trim("gradients", layer + 1, 0)
        self.store.trim("states", layer + 1, 0)

    def _held(self, kind: str, layer: int) -> list[Any]:
        return [self.model.array(x_bqm) for x_bqm in self.store.get(kind, layer).values()]

    @cached_property
    def token_vectors(self) -> list[Any]:
        """z of every window, [1,q,2m]."""
        texts = [numbered(np.array([window]), np.ones((1, len(window)), bool)) for window in self.windows]
        return [self.model.token_vectors(text_bt, np.arange(text_bt.shape[1])[None]) for text_bt in texts]

    def of_layer(self, layer: int) -> LayerMoments:
        fisher = self.store.get("fisher", layer) if self.store.has("fisher", layer) else {}
        return LayerMoments.of(self.store.get("moments", layer) | fisher)

    @cached_property
    def of_tokens(self) -> TokenMoments | None:
        if not self.predict:
            return None
        if not self.store.has("tokens", 0):
            sums: Arrays = {}
            for Z_bqz in self.token_vectors:
                add(sums, dict(zip(("mean", "S"), self.model.token_moments(Z_bqz[:, 1:]), strict=True)))
            self.store.put("tokens", 0, {name: total / self.tokens for name, total in sums.items()})
        found = self.store.get("tokens", 0)
        return TokenMoments(found["mean"], found["S"], self.tokens)


def share(windows: list[list[int]]) -> float:
    """The share that the first tokens of windows have in all of their tokens.

    >>> share([[2, 5, 6, 7], [2]])
    0.4
    """
    return len(windows) / max(1, sum(map(len, windows)))


def named(arrays: list[Any]) -> Arrays:
    """Arrays of windows by names that sort in their order."""
    return {f"{window:06d}": x for window, x in enumerate(arrays)}


def add(sums: Arrays, found: Arrays) -> None:
    for name, x in found.items():
        sums[name] = sums[name] + x if name in sums else x


def fingerprint(model: Any, windows: list[list[int]], *arguments: Any) -> str:
    """A hash of everything that decides what `calibrate` finds: config, some weights, the tokens, the arguments."""
    digest = hashlib.sha256(json.dumps([model.config.to_hf(), model.dtype, windows, arguments]).encode())
    for weight in (model.weights.final_norm_m, *(block.k_norm_d for block in model.weights.layers)):
        digest.update(np.asarray(weight.tolist(), np.float64).tobytes())
    digest.update(np.asarray(model.weights.embed_vm[:64].tolist(), np.float64).tobytes())
    return digest.hexdigest()[:16]


def sensitivity_windows(windows: list[list[int]], tokens: int | None) -> int:
    """How many of the windows go backwards: as many as `tokens` fill, at least one if any. None: an eighth of the text.

    >>> sensitivity_windows([[2] * 1024] * 4, 2048), sensitivity_windows([[2] * 10], 1), sensitivity_windows([[2]], 0)
    (2, 1, 0)
    >>> sensitivity_windows([[2] * 1024] * 32, None), sensitivity_windows([[2] * 1024] * 8, None)
    (4, 2)
    """
    lengths = np.cumsum([len(window) for window in windows])
    tokens = max(LEAST_BACKWARDS, sum(map(len, windows)) // 8) if tokens is None else tokens
    if tokens < 1:
        return 0
    return max(1, int(np.searchsorted(lengths, tokens, side="right")))
