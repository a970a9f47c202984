"""From a dense model to one with a TPA cache: the constant factors of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..core import cache as kv
from ..core import factorize
from ..core.factorize import Factorization
from ..errors import TPAError
from ..gemma.config import GemmaConfig
from ..gemma.model import Model, QueryFactors, dense_layer
from . import token_prediction as words
from . import transform as spectral
from .calibrate import LayerMoments, Moments, SideMoments, calibrate
from .config import DEFAULT_CONTEXT, DEFAULT_RATE, LayerConfig, TPAConfig
from .token_prediction import WordMoments
from .transform import Spectrum


def convert(
    model: Model, tpa: TPAConfig | None = None, calibration: Moments | str | None = None, progress: Any = iter
) -> Model:
    """The same model with a TPA cache: weights are shared, only the constant factors are new.

    calibration: `Moments` of `calibrate`, or a text (or a file's path) to calibrate on; None takes the weights alone.
    progress: wraps the layers, for instance `tqdm.tqdm`.
    """
    converted = begin_conversion(model, tpa)
    if isinstance(calibration, str):
        calibration = calibrate(model, calibration, predict=predicts(converted))
    return converted_by(layer_spectrum, convert_layer, converted, calibration, progress)


def converted_by(
    layer_spectrum: Callable, convert_layer: Callable, converted: Any, moments: Moments | None, progress: Any
) -> Any:
    """A begun conversion of either backend, finished."""
    spectra: dict[int, Spectrum] = {}
    text = words_of(converted.tpa, moments)
    for layer in progress(joint_layers(converted)):  # all layers share the bits, so all spectra come first
        spectra[layer] = layer_spectrum(converted, layer, moments.of_layer(layer) if moments else None, text)
    if wants_bits(converted.tpa):
        predicted = any(found.predictor_zgd is not None for found in spectra.values())
        spend_bits(converted, {layer: found.variance_s for layer, found in spectra.items()}, predicted)
    per_layer, _ = converted.tpa.resolve(converted.config)
    for layer in progress(range(converted.config.num_layers)):
        of_layer = moments.of_layer(layer) if moments and per_layer[layer] else None
        convert_layer(converted, layer, of_layer, spectra.pop(layer, None))
    return converted


def joint_layers(converted: Any) -> list[int]:
    """The layers that need a spectral transform, of K and V as one vector or of V alone."""
    per_layer, _ = converted.tpa.resolve(converted.config)
    return [layer for layer, choice in enumerate(per_layer) if choice and choice.v_dtype in ("shared", "spectral")]


def codes_v_alone(model: Any, layer: int) -> bool:
    """Is only V of a layer spectral?"""
    if model.tpa is None:
        return False
    choice = model.tpa.resolve(model.config)[0][layer]
    return choice is not None and choice.v_dtype == "spectral"


def wants_bits(tpa: TPAConfig) -> bool:
    """Must the widths of the spectral coefficients still be chosen?"""
    return tpa.spectral and tpa.per_layer is None


def spend_bits(converted: Any, variances: dict[int, np.ndarray], predicted: bool) -> None:
    """Choose the widths of all layers at the rate of the configuration."""
    converted.tpa = replace(converted.tpa, per_layer=allocated(converted.config, converted.tpa, variances, predicted))


def allocated(
    config: GemmaConfig, tpa: TPAConfig, variances: dict[int, np.ndarray], predicted: bool = False
) -> tuple[LayerConfig | None, ...]:
    """One choice a layer at the rate of a configuration, by `spectral.allocate`; None for a layer that stays dense.

    variances: of the coefficients of every layer that is converted. predicted: the text is kept, and paid for.
    """
    context = tpa.context or min(DEFAULT_CONTEXT, config.max_positions)
    layers = sorted(variances)
    entries = [config.slots(layer, context) for layer in layers]
    sides = 1 if tpa.codes_v_alone else 2
    numbers = sum(entries) * sides * config.num_kv_heads * config.head_dim
    text = 8 * context * words.token_bytes(config.vocab_size) if predicted else 0
    bits = max(0, (tpa.rate or DEFAULT_RATE) * numbers - text)
    widths = spectral.allocate([variances[layer] for layer in layers], entries, bits)
    given = {layer: tuple(width for width in found if width) for layer, found in zip(layers, widths, strict=True)}
    per_layer, _ = replace(tpa, per_layer=None).resolve(config)
    return tuple(choice and choice.with_widths(given[layer]) for layer, choice in enumerate(per_layer))


def begin_conversion(model: Any, tpa: TPAConfig | None = None) -> Any:
    """A copy of a dense model of either backend with the choice made for every layer and no layer converted yet."""
    if model.tpa is not None:
        raise TPAError("convert: the model already has a TPA cache; convert the dense model")
    tpa = tpa or TPAConfig()
    per_layer, notes = tpa.resolve(model.config)
    _, q_notes = tpa.resolve_q_rank(model.config)
    # Layers left dense are held in bfloat16, as the baselines are, unless full precision was asked for.
    full = "float64" if model.dtype == "float64" else "float32"
    exact = any("float32" in (choice.k_dtype, choice.v_dtype) for choice in per_layer if choice)
    factors = [dense_layer(full if exact else "bfloat16")] * model.config.num_layers
    converted = type(model)(model.config, model.weights, model.tokenizer, tpa, factors, None, model.stored_dtype)
    converted.notes = notes + q_notes
    return converted


def convert_layer(converted: Model, layer: int, moments: LayerMoments | None, spectrum: Spectrum | None = None) -> None:
    """Give one layer of a begun conversion its factors, in place. moments None: from the weights alone."""
    assert converted.tpa is not None
    per_layer, _ = converted.tpa.resolve(converted.config)
    q_rank, _ = converted.tpa.resolve_q_rank(converted.config)
    choice = per_layer[layer]
    if choice is not None:
        converted.factors[layer] = layer_factors(converted, layer, choice, moments, spectrum)
    if q_rank < converted.config.num_heads:
        converted.query_factors[layer] = truncated_queries(converted, layer, q_rank)


def layer_moments(model: Model, layer: int, choice: LayerConfig | None = None) -> LayerMoments:
    """Second moment of K and V of one layer from its weights alone, which know nothing of K beside V.

    choice: of how they are cached; where that makes nothing of the moments, they are zeros.
    """
    w = model.weights.layers[layer]
    g, d = w.WK_gdm.shape[:2]
    M_gdgd = np.zeros((2 * g, d, 2 * g, d))
    if choice is None or choice.learns(model.config):
        M_gdgd[:g, :, :g] = factorize.moment_from_weights(w.WK_gdm, w.attn_norm_m, w.k_norm_d)
        M_gdgd[g:, :, g:] = factorize.moment_from_weights(w.WV_gem, w.attn_norm_m)
    return LayerMoments(M_gdgd, np.zeros((2 * g, d)))


def layer_spectrum(model: Model, layer: int, moments: LayerMoments | None, text: WordMoments | None = None) -> Spectrum:
    """The spectral transform of K and V of one layer, or of V alone. moments None: from the weights alone.

    text: moments of the words, where K and V are predicted from them.
    """
    moments = moments or layer_moments(model, layer)
    if codes_v_alone(model, layer):
        V = moments.sides[1]
        return spectral.spectrum(V.M_gdgd, V.mean_gd, [V.F_gdgd])
    M_gdgd, mean_gd, W_zgd = moments.M_gdgd, moments.mean_gd, None
    if text is not None and moments.N_gdz is not None:
        M_gdgd, mean_gd, W_zgd = words.without_words(M_gdgd, mean_gd, moments.F, moments.N_gdz, text)
    return replace(spectral.spectrum(M_gdgd, mean_gd, moments.F), predictor_zgd=W_zgd)


def predicts(converted: Any) -> bool:
    """Are K and V to be predicted from the words?"""
    tpa = converted.tpa
    return tpa.spectral and not tpa.codes_v_alone and words.wanted(tpa.predict, converted.config)


def words_of(tpa: TPAConfig, moments: Moments | None) -> WordMoments | None:
    """The moments of the words, if K and V are to be predicted from them."""
    found = moments.words if moments else None
    if tpa.predict and found is None:
        raise TPAError("convert: predict wants moments of the words: calibrate on a text, with predict=True")
    return None if tpa.predict is False or tpa.codes_v_alone else found


def layer_factors(
    model: Model, layer: int, choice: LayerConfig, moments: LayerMoments | None, spectrum: Spectrum | None = None
) -> kv.LayerFactors:
    """How one converted layer caches K and V, with its constant factors. What was not measured comes from weights."""
    full = "float64" if model.dtype == "float64" else "float32"
    if choice.v_dtype == "shared":
        g, constant = model.config.num_kv_heads, partial(constant_array, full=full)
        whole = spectrum or layer_spectrum(model, layer, moments)
        return (
            spectral_factors(whole, slice(0, g), "spectral", choice.k_widths, constant),
            spectral_factors(whole, slice(g, None), "shared", choice.k_widths, constant),
        )
    k, v = (moments or layer_moments(model, layer, choice)).sides
    how_k = side_factors(choice.k_mode, choice.k_rank, choice.k_dtype, choice.k_widths, k, full)
    if spectrum is None:
        return how_k, side_factors(choice.v_mode, choice.v_rank, choice.v_dtype, choice.v_widths, v, full)
    constant = partial(constant_array, full=full)
    return how_k, spectral_factors(spectrum, slice(0, None), "spectral", choice.v_widths, constant)


def spectral_factors(
    spectrum: Spectrum, heads: slice, dtype: str, widths: tuple[int, ...], constant: Callable[[Any], Any]
) -> Factorization:
    """The heads of K, or of V, of a transform, with the coefficients that have any bits.

    constant: makes of a backend's array the one that is kept.
    """
    rank, W_zgd = len(widths), spectrum.predictor_zgd
    return Factorization(
        "latent",
        rank,
        dtype,
        constant(spectrum.basis_sgd[:rank, heads]),
        spectral.loss([spectrum.variance_s], rank),
        constant(spectrum.encoder_sgd[:rank, heads]),
        constant(spectrum.mean_gd[heads]),
        () if dtype == "shared" else tuple(widths),
        None if W_zgd is None else constant(W_zgd[:, heads]),
    )


def constant_array(x: np.ndarray, full: str) -> np.ndarray:
    """An array as it is kept, one piece in full precision."""
    return np.ascontiguousarray(x, full)


def side_factors(
    mode: str, rank: int, dtype: str, widths: tuple[int, ...], moments: SideMoments, full: str
) -> Factorization:
    """How K (or V) of one layer is cached by itself. full: the dtype of constant factors."""
    M_gdgd, mean_gd, F_gdgd = moments.M_gdgd, moments.mean_gd, moments.F_gdgd
    g, d = mean_gd.shape
    constant = partial(constant_array, full=full)
    if dtype == "spectral":
        return spectral_factors(spectral.spectrum(M_gdgd, mean_gd, [F_gdgd]), slice(0, g), dtype, widths, constant)
    encoder: Any = None
    mean: Any = None
    basis: Any
    if mode in ("fixed-b", "latent") and F_gdgd is not None and rank < {"fixed-b": d, "latent": g * d}[mode]:
        encoder, basis, error = spectral.truncate_weighted(mode, rank, M_gdgd, mean_gd, F_gdgd)
        mean = mean_gd
    else:
        basis, error = factorize.constant_basis(mode, rank, M_gdgd)
    basis, encoder, mean = (None if x is None else constant(x) for x in (basis, encoder, mean))
    return Factorization(mode, rank, full if dtype == "float32" else dtype, basis, error, encoder, mean)


def truncated_queries(model: Model, layer: int, rank: int) -> QueryFactors:
    A_rh, W_rdm, _ = factorize.truncate_query_heads(model.weights.layers[layer].WQ_hdm, rank)
    return A_rh.astype(model.dtype), W_rdm.astype(model.dtype)
