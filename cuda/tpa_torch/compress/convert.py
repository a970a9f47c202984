"""From a dense model to one with a TPA cache. Twin of `tpa_ref.compress.convert`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpa_ref.compress.calibrate import LayerMoments, Moments, SideMoments
from tpa_ref.compress.config import LayerConfig, TPAConfig
from tpa_ref.compress.convert import (
    allocated,
    begin_conversion,
    codes_v_alone,
    converted_by,
    joint_layers,
    predicts,
    spectral_factors,
    spend_bits,
    wants_bits,
    words_of,
)
from tpa_ref.compress.token_prediction import WordMoments
from tpa_ref.compress.transform import Spectrum
from tpa_ref.core.factorize import Factorization

from ..core import cache as kv
from ..core import factorize
from ..gemma.model import Model, QueryFactors
from . import token_prediction as words
from . import transform as spectral
from .calibrate import calibrate

__all__ = [
    "allocated",
    "begin_conversion",
    "converted_by",
    "joint_layers",
    "predicts",
    "spectral_factors",
    "spend_bits",
    "wants_bits",
    "words_of",
]


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
    w, device = model.weights.layers[layer], eigen_device(model)
    g, d = w.WK_gdm.shape[:2]
    norm = w.attn_norm_m.to(device)
    M_gdgd = torch.zeros((2 * g, d, 2 * g, d), dtype=torch.float64, device=device)
    if choice is None or choice.learns(model.config):
        M_gdgd[:g, :, :g] = factorize.moment_from_weights(w.WK_gdm.to(device), norm, w.k_norm_d.to(device))
        M_gdgd[g:, :, g:] = factorize.moment_from_weights(w.WV_gem.to(device), norm)
    return LayerMoments(M_gdgd, torch.zeros((2 * g, d), dtype=torch.float64, device=device))


def eigen_device(model: Model) -> torch.device:
    """Where eigenvectors are found: they want float64, which Apple's GPUs lack."""
    return model.device if model.device.type == "cuda" else torch.device("cpu")


def on_device(x: Any, device: torch.device) -> Any:
    """An array of either backend as a tensor."""
    return None if x is None else torch.as_tensor(x, device=device)


@torch.no_grad()
def layer_spectrum(model: Model, layer: int, moments: LayerMoments | None, text: WordMoments | None = None) -> Spectrum:
    """The spectral transform of K and V of one layer, or of V alone. moments None: from the weights alone.

    text: moments of the words, where K and V are predicted from them.
    """
    device, moments = eigen_device(model), moments or layer_moments(model, layer)
    if codes_v_alone(model, layer):
        V = moments.sides[1]
        return spectral.spectrum(
            on_device(V.M_gdgd, device), on_device(V.mean_gd, device), [on_device(V.F_gdgd, device)]
        )
    M_gdgd, mean_gd, W_zgd = moments.M_gdgd, moments.mean_gd, None
    if text is not None and moments.N_gdz is not None:
        M_gdgd, mean_gd, W_zgd = words.without_words(M_gdgd, mean_gd, moments.F, moments.N_gdz, text)
    F = [on_device(F_gdgd, device) for F_gdgd in moments.F]
    found = spectral.spectrum(on_device(M_gdgd, device), on_device(mean_gd, device), F)
    return replace(found, predictor_zgd=on_device(W_zgd, device))


@torch.no_grad()
def layer_factors(
    model: Model, layer: int, choice: LayerConfig, moments: LayerMoments | None, spectrum: Spectrum | None = None
) -> kv.LayerFactors:
    """How one converted layer caches K and V, with its constant factors. What was not measured comes from weights."""
    full = "float64" if model.dtype == "float64" else "float32"
    if choice.v_dtype == "shared":
        g, constant = model.config.num_kv_heads, partial(constant_array, full=full)
        whole = spectrum or layer_spectrum(model, layer, moments)
        k = spectral_factors(whole, slice(0, g), "spectral", choice.k_widths, constant)
        v = spectral_factors(whole, slice(g, None), "shared", choice.k_widths, constant)
    else:
        sides = [
            SideMoments(*(on_device(x, eigen_device(model)) for x in (side.M_gdgd, side.mean_gd, side.F_gdgd)))
            for side in (moments or layer_moments(model, layer, choice)).sides
        ]
        k = side_factors(choice.k_mode, choice.k_rank, choice.k_dtype, choice.k_widths, sides[0], full)
        if spectrum is None:
            v = side_factors(choice.v_mode, choice.v_rank, choice.v_dtype, choice.v_widths, sides[1], full)
        else:
            constant = partial(constant_array, full=full)
            v = spectral_factors(spectrum, slice(0, None), "spectral", choice.v_widths, constant)
    return placed(k, model.device), placed(v, model.device)


def placed(how: Factorization, device: torch.device) -> Factorization:
    """The same with its constant arrays on a device."""
    arrays: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in how.constants().items()}
    return replace(how, **arrays)


def constant_array(x: Tensor, full: str) -> Tensor:
    """An array as it is kept, one piece in full precision."""
    return x.to(getattr(torch, full)).contiguous()


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


@torch.no_grad()
def truncated_queries(model: Model, layer: int, rank: int) -> QueryFactors:
    """W_Q of one layer at a head-mixing rank, in the model's dtype."""
    WQ_hdm = model.weights.layers[layer].WQ_hdm
    A_rh, W_rdm, _ = factorize.truncate_query_heads(WQ_hdm.cpu(), rank)
    return A_rh.to(WQ_hdm.dtype).to(WQ_hdm.device), W_rdm.to(WQ_hdm.dtype).to(WQ_hdm.device)
