"""What a text tells of K and V, layer by layer: means, second moments, and how much the model feels their errors.

All windows go through one layer before the next, first forwards, then backwards (`sensitivity`), so only one layer's
weights need be in memory, and what is kept are a few matrices per layer, whatever the length of the text. K is taken
after QK-norm and before RoPE: that is what `factorize` encodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..core.factorize import second_moment
from ..errors import TPAError
from ..gemma.tokenizer import BOS
from ..trace import Watch
from . import sensitivity
from . import token_prediction as words
from .config import chosen_layers
from .token_prediction import WordMoments

einsum = partial(np.einsum, optimize=True)

WINDOW = 1024  # tokens of a calibration window: beyond the tiny model's sliding window, so that long range counts
SENSITIVITY_TOKENS = 8_192  # how much of the text also goes backwards, which costs twice a forward pass


@dataclass(frozen=True)
class SideMoments:
    """K or V of one layer, heads flattened: E[x x^T], E[x] and, where it was measured, the Fisher matrix."""

    M_gdgd: Any
    mean_gd: Any
    F_gdgd: Any = None


@dataclass(frozen=True)
class LayerMoments:
    """K and V of one layer side by side, K's g heads before V's, and the Fisher matrices of each where measured.

    N: E[x z^T] with the words, where they were asked for.
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
    """What `calibrate` found: per layer the moments of K and V, and those of the words; `tokens` is how many they
    average.
    """

    layers: dict[int, LayerMoments] = field(default_factory=dict)
    tokens: int = 0
    words: WordMoments | None = None

    def of_layer(self, layer: int) -> LayerMoments:
        """Moments of one layer."""
        if layer not in self.layers:
            raise TPAError(f"calibrate: layer {layer} was not calibrated, got layers {sorted(self.layers)}")
        return self.layers[layer]

    def save(self, path: str | Path) -> None:
        """Write them as one safetensors file."""
        from ..atomic import replacing

        named = {f"{layer}.{name}": x for layer, found in self.layers.items() for name, x in found.arrays().items()}
        if self.words is not None:
            named |= {"words.mean": self.words.mean_z, "words.S": self.words.S_zz}
        tensors = {name: np.ascontiguousarray(x) for name, x in named.items()}
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, {"format": "tpa-moments", "tokens": str(self.tokens)})

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """The inverse of `save`."""
        try:
            with safe_open(path, "numpy") as file:
                tokens = int((file.metadata() or {})["tokens"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            by_layer: dict[str, dict[str, np.ndarray]] = {}
            for name, x in found.items():
                of, _, rest = name.partition(".")
                by_layer.setdefault(of, {})[rest] = x
            text = by_layer.pop("words", None)
            words = WordMoments(text["mean"], text["S"], tokens) if text else None
            return cls({int(layer): LayerMoments.of(by_layer[layer]) for layer in by_layer}, tokens, words)
        except (OSError, SafetensorError, KeyError, ValueError) as problem:
            raise TPAError(f"calibrate: {path} holds no moments: {problem}") from None


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


@dataclass(frozen=True)
class Through:
    """The steps that a backend brings: into the layers, to the words, and through each layer and back."""

    begin: Callable
    window_words: Callable
    word_moments: Callable
    through_layer: Callable
    begin_backward: Callable
    back_through_layer: Callable


def calibrated(
    through: Through,
    model: Any,
    text_or_path: str | Path,
    layers: str,
    seed: int,
    max_tokens: int,
    sensitivity_tokens: int,
    progress: Any,
    cache_dir: str | Path | None,
    predict: bool | None = None,
) -> Moments:
    """`calibrate` for either backend."""
    check_dense(model)
    windows = list(text_windows(model, text_or_path, max_tokens, WINDOW))
    kept = chosen_layers(layers, model.config)
    predict = words.wanted(predict, model.config)
    name = f"moments-{fingerprint(model, windows, sorted(kept), seed, sensitivity_tokens, predict)}.safetensors"
    file = Path(cache_dir) / name if cache_dir else None
    if file and file.is_file():
        return Moments.load(file)
    moments = Moments(tokens=sum(map(len, windows)))
    order = range(model.config.num_layers)
    backwards = sensitivity_windows(windows, sensitivity_tokens)
    states = through.begin(model, windows)
    texts = [through.window_words(x_bqm) for x_bqm in states] if predict else None
    moments.words = through.word_moments(texts) if texts else None
    in_front = {}
    gradients = None
    for layer, back in progress(
        [(layer, False) for layer in order] + [(layer, True) for layer in order[::-1] if backwards]
    ):
        if not back:
            in_front[layer] = states[:backwards]
            states, found = through.through_layer(model, layer, states, texts)
        else:
            gradients = gradients or through.begin_backward(model, states[:backwards], seed)
            gradients, found = through.back_through_layer(model, layer, in_front.pop(layer), gradients)
            found = replace(moments.layers[layer], F=found) if layer in kept else None
        if layer in kept:
            moments.layers[layer] = found
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        moments.save(file)
    return moments


def check_dense(model: Any) -> None:
    """Moments are those of the dense model."""
    if model.tpa is not None:
        raise TPAError("calibrate: the model already has a TPA cache; calibrate the dense model")


def fingerprint(model: Any, windows: list[list[int]], *arguments: Any) -> str:
    """A hash of everything that decides what `calibrate` finds: config, some weights, the tokens, the arguments."""
    digest = hashlib.sha256(json.dumps([model.config.to_hf(), model.dtype, windows, arguments]).encode())
    for weight in (model.weights.final_norm_m, *(block.k_norm_d for block in model.weights.layers)):
        digest.update(np.asarray(weight.tolist(), np.float64).tobytes())
    digest.update(np.asarray(model.weights.embed_vm[:64].tolist(), np.float64).tobytes())
    return digest.hexdigest()[:16]


def sensitivity_windows(windows: list[list[int]], tokens: int) -> int:
    """How many of the windows go backwards: as many as `tokens` fill, at least one if any.

    >>> sensitivity_windows([[2] * 1024] * 4, 2048), sensitivity_windows([[2] * 10], 1), sensitivity_windows([[2]], 0)
    (2, 1, 0)
    """
    if tokens < 1:
        return 0
    return max(1, int(np.searchsorted(np.cumsum([len(window) for window in windows]), tokens, side="right")))


def begin(model: Any, windows: Iterable[list[int]]) -> list[np.ndarray]:
    """Embedded windows [1,q,m]: the states in front of layer 0."""
    return [model.embed(np.array([window])) for window in windows]


def through_layer(
    model: Any, layer: int, states: list[np.ndarray], texts: list[np.ndarray] | None = None
) -> tuple[list[np.ndarray], LayerMoments]:
    """(states behind a layer, moments of its normed K before RoPE and of its V). texts: the words of each window."""
    sums: dict[str, np.ndarray] = {}
    held: dict[str, np.ndarray] = {}

    def add(name: str, found: np.ndarray) -> None:
        sums[name] = sums[name] + found if name in sums else found

    watch = Watch({"attn.K_bkgd": held.__setitem__, "attn.V_bkge": held.__setitem__})
    block = model.weights.layers[layer]
    behind = []
    for index, x_bqm in enumerate(states):
        positions_bq = np.arange(x_bqm.shape[1])[None]
        behind.append(np.ascontiguousarray(model.block(x_bqm, layer, block, positions_bq, None, watch)))
        X_bkgd = np.concatenate([held["attn.K_bkgd"], held["attn.V_bkge"]], 2).astype(np.float64)
        add("M", second_moment(X_bkgd))
        add("mean", X_bkgd[0].sum(0))
        if texts is not None:
            add("N", einsum("bkgd,bkz->gdz", X_bkgd, texts[index].astype(np.float64)))
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
