"""From a dense model to one with a TPA cache: the constant factors of every layer. Written once for both backends.

    spectra      moments and Fisher matrices of a layer -> its transform, for layers with a rate
    bits         all spectra together -> the widths of every coefficient
    factors      moments or spectrum of a layer -> how it caches K and V

All mathematics here is NumPy's, in float64; a model makes its own arrays of what comes out (`Model.constant`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..core import codes
from ..core.banded import band_features, groups_of_heads
from ..core.mode import Mode
from ..core.rope import frequencies
from ..core.transform import (
    Spectrum,
    loss,
    moment_from_weights,
    shrunk,
    spectrum,
    successive,
    truncate_query_heads,
)
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.token_vectors import id_dtype
from . import token_prediction
from .bits import allocate_bits
from .calibrate import calibrate
from .config import DEFAULT_CONTEXT, Choice, FixedRank, Side, Spectral, TPAConfig
from .moments import LayerMoments, SideMoments
from .store import Memory
from .token_prediction import TokenMoments

OF_STRING = 8 + 3.5  # bits: a byte for its scale, and what fills its last byte, on average


def convert(model: Any, tpa: Any = None, calibration: Any = None, progress: Callable = iter) -> Any:
    """The same model with a TPA cache: weights are shared, only the constant factors are new.

    tpa: a `TPAConfig`, a `FixedRank`, a `Spectral`; None: the default. calibration: `Moments` of `calibrate`, or a text
    (or a file's path) to calibrate on; None takes the weights alone. progress: wraps the layers, for instance
    `tqdm.tqdm`.
    """
    converted = begin_conversion(model, tpa)
    if isinstance(calibration, str):
        calibration = calibrate(model, calibration, predict=predicts(converted.tpa, model.config))
    Conversion(converted, calibration, Memory()).run(progress)
    return converted


def begin_conversion(model: Any, tpa: Any = None) -> Any:
    """A copy of a dense model with the choice made for every layer and no layer converted yet."""
    if model.tpa is not None:
        raise TPAError("convert: the model already has a TPA cache; convert the dense model")
    tpa = TPAConfig.of(tpa)
    choices, notes = tpa.resolve(model.config)
    _, q_notes = tpa.resolve_q_rank(model.config)
    # Layers left dense are held in bfloat16, as the baselines are, unless full precision was asked for.
    sides = [side for choice in choices if isinstance(choice, FixedRank) for side in (choice.k, choice.v)]
    exact = any(side.dtype == "float32" for side in sides)
    g, d = model.config.num_kv_heads, model.config.head_dim
    pairs = [model.Pair.dense(g, d, full_precision(model) if exact else "bfloat16")] * model.config.num_layers
    kept = model.stored_dtype, model.side_files
    converted = type(model)(model.config, model.weights, model.tokenizer, tpa, pairs, None, *kept)
    converted.choices, converted.notes = list(choices), notes + q_notes
    return converted


class Conversion:
    """A begun conversion, layer by layer. `store` keeps the transforms, which come first since all share the bits.

    moments: of `calibrate` (or anything with its `of_layer` and `of_tokens`); None: from the weights alone.
    """

    def __init__(self, converted: Any, moments: Any, store: Any):
        self.converted, self.moments, self.store = converted, moments, store
        self.config: GemmaConfig = converted.config
        self.spectral = [layer for layer, choice in enumerate(converted.choices) if isinstance(choice, Spectral)]

    def run(self, progress: Callable = iter, first: int = 0) -> None:
        """All layers from `first` on."""
        self.find_spectra(progress)
        self.spend_bits()
        for layer in progress(range(first, self.config.num_layers)):
            self.convert_layer(layer)
            self.finished(layer)

    def find_spectra(self, progress: Callable = iter) -> None:
        """The transforms of all layers that have a rate."""
        self.guess_strings()
        for layer in progress(self.spectral):
            if not self.store.has("spectrum", layer):
                self.store.put("spectrum", layer, self.spectrum(layer))

    def guess_strings(self) -> None:
        """The bits of banded layers, as if all that is decoded were exact: what is left of V, and of slow K, depends on
        the bits of what stands before.
        """
        choices = self.converted.choices
        asked = [layer for layer in self.spectral if choices[layer].banded]
        if not asked or self.converted.tpa.per_layer is not None:
            return
        found = {layer: self.spectrum(layer)["variance"] for layer in asked}
        for layer, choice in enumerate(allocated(self.config, self.converted.tpa, found)):
            if choice is not None:
                choices[layer] = choice

    def finished(self, layer: int) -> None:
        """A layer is converted."""
        self.store.trim("spectrum", layer, 0)

    def spectrum(self, layer: int) -> dict[str, np.ndarray]:
        """The transform of one layer, in the precision in which constant factors are kept."""
        if token_prediction.knows(layer, self.converted.tpa, self.config, self.converted.choices[layer]):
            return first_layer(self.converted)
        text = of_tokens(self.converted.tpa, self.moments)
        found = layer_spectrum(self.moments_of(layer), self.converted.choices[layer], text, thetas(self.config, layer))
        arrays = {"encoder": found.encoder_sgd, "basis": found.basis_sgd, "mean": found.mean_gd}
        if found.predictor_zgd is not None:
            arrays["predictor"] = found.predictor_zgd
        full = full_precision(self.converted)
        return {name: np.ascontiguousarray(x, full) for name, x in arrays.items()} | {"variance": found.variance_s}

    def spend_bits(self) -> None:
        """Choose the widths of all layers at the rate of the configuration, where they are not chosen yet."""
        tpa = self.converted.tpa
        if not self.spectral or tpa.per_layer is not None:
            return
        found = self.variances()
        predicted = any("predictor" in arrays for arrays in found.values())
        choices = allocated(self.config, tpa, {layer: x["variance"] for layer, x in found.items()}, predicted)
        self.converted.choices, self.converted.tpa = list(choices), replace(tpa, per_layer=choices)

    def variances(self) -> dict[int, dict[str, Any]]:
        """The arrays of every transform; what is needed of them are the variances, and whether there is a predictor."""
        return {layer: self.store.get("spectrum", layer) for layer in self.spectral}

    def convert_layer(self, layer: int) -> None:
        """Give one layer its factors, in place."""
        model, choice = self.converted, self.converted.choices[layer]
        if isinstance(choice, Spectral):
            model.pairs[layer] = self.spectral_pair(layer, choice)
        elif choice is not None:
            k, v = self.moments_of(layer, choice).sides
            model.pairs[layer] = model.Pair(self.fitted(choice.k, k), self.fitted(choice.v, v))
        q_rank, _ = model.tpa.resolve_q_rank(self.config)
        if q_rank < self.config.num_heads:
            A_rh, W_rdm, _ = truncate_query_heads(model.to_numpy(model.weights.layers[layer].WQ_hdm), q_rank)
            model.query_factors[layer] = model.array(A_rh), model.array(W_rdm)

    def spectral_pair(self, layer: int, choice: Spectral) -> Any:
        """K in two bands with V behind it, K and V as one vector, or V alone beside a K of fixed rank."""
        model, arrays, g = self.converted, self.store.get("spectrum", layer), self.config.num_kv_heads
        if choice.banded:
            return model.Banded(*(self.banded(arrays, choice, side, thetas(self.config, layer)) for side in "kv"))
        if choice.k is None:
            return model.Joint(*(self.coded(arrays, choice, at) for at in (slice(0, g), slice(g, None))))
        moments = self.moments_of(layer, FixedRank(choice.k, choice.k)).sides[0]
        return model.Pair(self.fitted(choice.k, moments), self.coded(arrays, choice, slice(0, None)))

    def coded(self, arrays: dict[str, np.ndarray], choice: Spectral, heads: slice) -> Mode:
        """Some heads of a transform, with the coefficients that have any bits."""
        model, rank = self.converted, len(choice.widths)
        kept = {name: arrays[name][:rank, heads] for name in ("basis", "encoder")} | {"mean": arrays["mean"][heads]}
        if "predictor" in arrays:
            kept["predictor"] = arrays["predictor"][:, heads]
        if "k_norm" in arrays and not heads.start:
            kept["k_norm"] = arrays["k_norm"]
        constants: dict[str, Any] = {name: model.constant(x) for name, x in kept.items()}
        (g, d), lost = kept["mean"].shape, loss([arrays["variance"]], rank)
        return model.CodedLatent(g, d, rank, "spectral", lost, widths=choice.widths, **constants)

    def banded(self, arrays: dict[str, np.ndarray], choice: Spectral, side: str, theta_p: np.ndarray) -> Mode:
        """K, or V behind it, with the coefficients that have any bits."""
        model, g, given = self.converted, self.config.num_kv_heads, choice.of_strings
        groups = groups_of(self.config, choice)
        starts = np.cumsum([0, *string_sizes(theta_p, g // groups)])
        rows = [start + np.arange(len(widths)) for start, widths in zip(starts, given, strict=False)]
        own, heads = (rows[:-1], slice(0, g)) if side == "k" else (rows[-1:], slice(g, None))
        read = np.concatenate(rows[:-1] if side == "k" else rows)
        kept = {"basis": arrays["basis"][read, heads], "encoder": arrays["encoder"][np.concatenate(own), heads]}
        kept |= {"mean": arrays["mean"][heads]} | ({"theta": theta_p} if side == "k" else {})
        constants: dict[str, Any] = {name: model.constant(x) for name, x in kept.items()}
        strings = given[:-1] if side == "k" else given[-1:]
        rank, before = sum(map(len, strings)), len(read) - sum(map(len, strings))
        lost = loss(np.split(arrays["variance"], starts[1:-1]), rank)
        sizes: dict[str, Any] = {"strings": tuple(map(len, strings)), "before": before, "groups": groups}
        return model.BandedLatent(
            g, self.config.head_dim, rank, "spectral", lost, widths=sum(strings, ()), **sizes, **constants
        )

    def fitted(self, side: Side, moments: SideMoments) -> Mode:
        """How K (or V) of one layer is cached by itself."""
        model, (g, d) = self.converted, moments.mean_gd.shape
        dtype = full_precision(model) if side.dtype == "float32" else side.dtype
        made: Mode = model.MODES[side.mode].fit(g, d, side.rank or 0, dtype, *moments)
        return made.with_arrays({name: None if x is None else model.constant(x) for name, x in made.arrays().items()})

    def moments_of(self, layer: int, choice: Choice | None = None) -> LayerMoments:
        """Moments of one layer: measured, or from its weights."""
        if self.moments is None:
            return moments_from_weights(self.converted, layer, choice)
        found: LayerMoments = self.moments.of_layer(layer)
        return found if self.converted.tpa.exact_tokens[0] else found.with_first()


def first_layer(model: Any) -> dict[str, np.ndarray]:
    """What stands for the transform of the first layer: K and V follow from the token, and nothing is left to code.

    Its input is the row of the embedding table at rms 1, e(t), times the gains of its norm: K = norm(W_K e), V = W_V e.
    """
    w, full = model.weights.layers[0], full_precision(model)
    gain_m = 1 + model.double(w.attn_norm_m)
    W_xdm = np.concatenate([model.double(w.WK_gdm), model.double(w.WV_gem)]) * gain_m
    x, d, m = W_xdm.shape
    predictor_zxd = np.concatenate([W_xdm.transpose(2, 0, 1), np.zeros((m, x, d))])  # of the token, of the one before
    arrays = {"encoder": np.zeros((0, x, d)), "basis": np.zeros((0, x, d)), "mean": np.zeros((x, d))}
    arrays |= {"predictor": predictor_zxd, "k_norm": model.double(w.k_norm_d)}
    return {name: np.ascontiguousarray(array, full) for name, array in arrays.items()} | {"variance": np.zeros(0)}


def full_precision(model: Any) -> str:
    """The dtype of constant factors."""
    return "float64" if model.dtype == "float64" else "float32"


def moments_from_weights(model: Any, layer: int, choice: Choice | None = None) -> LayerMoments:
    """Second moment of K and V of one layer from its weights alone, which know nothing of K beside V.

    choice: how they are cached; where no constant factors depend on K and V, the moments are zeros.
    """
    w, sides = model.weights.layers[layer], (choice.k, choice.v) if isinstance(choice, FixedRank) else ()
    g, d = w.WK_gdm.shape[:2]
    M_gdgd = np.zeros((2 * g, d, 2 * g, d))
    if not sides or any(model.MODES[side.mode](g, d, side.rank or 0).needs_moments() for side in sides):
        norm_m, k_norm_d = model.to_numpy(w.attn_norm_m), model.to_numpy(w.k_norm_d)
        M_gdgd[:g, :, :g] = moment_from_weights(model.to_numpy(w.WK_gdm), norm_m, k_norm_d)
        M_gdgd[g:, :, g:] = moment_from_weights(model.to_numpy(w.WV_gem), norm_m)
    return LayerMoments(M_gdgd, np.zeros((2 * g, d)))


def thetas(config: GemmaConfig, layer: int) -> np.ndarray:
    """RoPE's frequencies in a layer."""
    return frequencies(config.head_dim, *config.rope(config.is_global[layer]))


def string_sizes(theta_p: np.ndarray, heads: int) -> list[int]:
    """How many numbers of a group of heads fast K, slow K and V have."""
    fast, slow = band_features(theta_p)
    return [heads * n for n in (len(fast), len(slow), 2 * len(theta_p))]


def banded_spectrum(
    moments: LayerMoments, strings: tuple[tuple[int, ...], ...], theta_p: np.ndarray, groups: int
) -> Spectrum:
    """The transform of fast K, slow K behind it, and V behind both, of each group of heads by itself.

    Row s of encoder and basis [.,2g,d] is coefficient s of every group; its variance is the sum of theirs. strings: the
    widths; none: as if exact.
    """
    g, d = len(moments.mean_gd) // 2, len(theta_p) * 2
    index_gd = np.arange(g // groups * d).reshape(-1, d)
    blocks = [index_gd[:, band].reshape(-1) for band in band_features(theta_p)] + [index_gd.size + index_gd.reshape(-1)]
    distortions = [np.full(len(block), 0.0 if not strings else 1.0) for block in blocks[:-1]]
    for D_s, widths in zip(distortions, strings, strict=False):
        D_s[: len(widths)] = codes.DISTORTION[np.array(widths, int)]
    numbers = 2 * index_gd.size
    encoder_sgd, basis_sgd, variance_s = np.zeros((numbers, 2 * g, d)), np.zeros((numbers, 2 * g, d)), np.zeros(numbers)
    for heads in np.arange(g).reshape(groups, -1):
        both = np.concatenate([heads, g + heads])
        F = [F_gdgd if F_gdgd is None else F_gdgd[heads][:, :, heads] for F_gdgd in moments.F]
        found = successive(moments.M_gdgd[both][:, :, both], moments.mean_gd[both], F, blocks, distortions)
        encoder_sgd[:, both], basis_sgd[:, both] = found.encoder_sgd, found.basis_sgd
        variance_s += found.variance_s
    return Spectrum(encoder_sgd, basis_sgd, moments.mean_gd, variance_s)


def layer_spectrum(
    moments: LayerMoments, choice: Spectral, text: TokenMoments | None = None, theta_p: np.ndarray | None = None
) -> Spectrum:
    """The spectral transform of K and V of one layer, or of V alone.

    text: moments of the token vectors, where K and V are predicted from them. theta: RoPE's frequencies, for bands.
    """
    F_k, F_v = (None if F_gdgd is None else shrunk(F_gdgd) for F_gdgd in moments.F)
    moments = replace(moments, F=(F_k, F_v))
    if choice.banded:
        assert theta_p is not None
        g, d = len(moments.mean_gd) // 2, 2 * len(theta_p)
        return banded_spectrum(moments, choice.strings, theta_p, groups_of_heads(g, d))
    if choice.k is not None:
        V = moments.sides[1]
        return spectrum(V.M_gdgd, V.mean_gd, [V.F_gdgd])
    M_gdgd, mean_gd, W_zgd = moments.M_gdgd, moments.mean_gd, None
    if text is not None and moments.N_gdz is not None:
        M_gdgd, mean_gd, W_zgd = token_prediction.without_tokens(M_gdgd, mean_gd, moments.F, moments.N_gdz, text)
    return replace(spectrum(M_gdgd, mean_gd, moments.F), predictor_zgd=W_zgd)


def predicts(tpa: TPAConfig, config: GemmaConfig) -> bool:
    """Are K and V to be predicted from the tokens?"""
    choice = tpa.choice
    return isinstance(choice, Spectral) and choice.joint and token_prediction.wanted(tpa.predict, config)


def of_tokens(tpa: TPAConfig, moments: Any) -> TokenMoments | None:
    """The moments of the token vectors, if K and V are to be predicted from them."""
    found = moments.of_tokens if moments else None
    if tpa.predict and found is None:
        raise TPAError("convert: predict wants moments of the tokens: calibrate on a text, with predict=True")
    joint = isinstance(tpa.choice, Spectral) and tpa.choice.joint
    return None if tpa.predict is False or not joint else found


def allocated(
    config: GemmaConfig, tpa: TPAConfig, variances: dict[int, np.ndarray], predicted: bool = False
) -> tuple[Choice | None, ...]:
    """The choice of every layer with its widths at the rate of a configuration; None for a layer that stays dense.

    variances: of the coefficients of every layer that is converted. predicted: the text is kept, and paid for.
    """
    context = tpa.context or min(DEFAULT_CONTEXT, config.max_positions)
    layers, choice = sorted(variances), tpa.choice
    assert isinstance(choice, Spectral)
    of_token = (2 if choice.k is None else 1) * config.num_kv_heads * config.head_dim
    numbers = sum(config.slots(layer, context) for layer in layers) * of_token
    text = 8 * context * id_dtype(config.vocab_size).itemsize if predicted else 0
    strings = [(layer, part) for layer in layers for part in parts_of(config, choice, layer, variances[layer])]
    held = [config.slots(layer, context) * groups_of(config, choice) for layer, _ in strings]
    coded = sum(n for n, (_, part) in zip(held, strings, strict=True) if len(part))
    bits = max(0, choice.rate * numbers - text - OF_STRING * coded)
    widths = allocate_bits([part for _, part in strings], held, bits)
    given: dict[int, list[tuple[int, ...]]] = {layer: [] for layer in layers}
    for (layer, _), found in zip(strings, widths, strict=True):
        given[layer].append(tuple(width for width in found if width))
    choices, _ = tpa.resolve(config)
    return tuple(with_widths(asked, given[layer]) if asked else None for layer, asked in enumerate(choices))


def parts_of(config: GemmaConfig, choice: Spectral, layer: int, variance_s: np.ndarray) -> list[np.ndarray]:
    """The variances of each string of codes of a layer."""
    if not choice.banded:
        return [variance_s]
    sizes = string_sizes(thetas(config, layer), config.num_kv_heads // groups_of(config, choice))
    return np.split(variance_s, np.cumsum(sizes)[:-1])


def groups_of(config: GemmaConfig, choice: Spectral) -> int:
    """How many groups of heads a token has, each with strings of the same widths."""
    return groups_of_heads(config.num_kv_heads, config.head_dim) if choice.banded else 1


def with_widths(choice: Choice, widths: list[tuple[int, ...]]) -> Choice:
    """A choice with the widths of its strings."""
    assert isinstance(choice, Spectral)
    return replace(choice, strings=tuple(widths)) if choice.banded else replace(choice, widths=widths[0])
