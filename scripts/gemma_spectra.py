#!/usr/bin/env python3
"""What K and V of the real Gemma 3 270M look like: assets/gemma3_270m_spectra.json, which notebook 5 draws.

Of every layer, in the coordinates of the damage: variances of coefficients (at some ranks), sizes of coefficients on
unseen text beside those of normal numbers, and the share that BOS has in the trace of the Fisher matrix. Two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "cuda")]

import numpy as np

from get_gemma import TARGET
from tpa_ref.atomic import replacing
from tpa_ref.cli import options
from tpa_ref.compress.config import Spectral
from tpa_ref.compress.convert import layer_spectrum
from tpa_ref.gemma.texts import shipped, text_windows

CALIBRATION, UNSEEN = 16_384, 1_024
SHARES = (0.5, 0.9, 0.99, 0.999, 0.9999)  # of coefficients that are smaller


def of_layer(layer: int, moments: Any, K_bkgd: Any, V_bkge: Any) -> dict[str, Any]:
    """What is kept of one layer."""
    found, plain = layer_spectrum(moments, Spectral(1.0)), moments.with_first()
    X_tx = np.concatenate([K_bkgd, V_bkge], 2)[0, 1:].reshape(K_bkgd.shape[1] - 1, -1)  # without BOS
    C_ts = (X_tx - found.mean_gd.ravel()) @ found.encoder_sgd.reshape(len(found.variance_s), -1).T
    trace = sum(np.einsum("gdgd->", F) for F in plain.F)
    without = sum(np.einsum("gdgd->", F) for F in moments.F)
    share = moments.first.share[1]
    ranks = sorted({*np.unique(np.geomspace(1, len(found.variance_s), 40).astype(int)) - 1})
    return {
        "layer": layer,
        "ranks": [int(rank) for rank in ranks],
        "variances": [float(f"{found.variance_s[rank]:.3g}") for rank in ranks],
        "sizes": [float(f"{x:.3g}") for x in np.quantile(np.abs(C_ts), SHARES)],
        "token_size_largest": float(f"{np.sqrt(np.square(C_ts).mean(1)).max():.3g}"),
        "bos": float(f"{1 - (1 - share) * without / trace:.3g}"),
        "k_mean_largest": float(f"{np.abs(moments.mean_gd[: len(moments.mean_gd) // 2]).max():.3g}"),
    }


def main() -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=TARGET)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "gemma3_270m_spectra.json")
    args = parser.parse_args()
    from tpa_torch import calibrate, load

    model = load(args.ckpt)
    moments = calibrate(model, shipped("calibration"), max_tokens=CALIBRATION, predict=False)
    (window,) = list(text_windows(model, shipped("prose"), UNSEEN - 1, UNSEEN))
    x_bqm, layers = model.embed(np.array([window])), []
    for layer in range(model.config.num_layers):
        x_bqm, K_bkgd, V_bkge = model.through_layer(layer, x_bqm)
        layers.append(of_layer(layer, moments.of_layer(layer), model.double(K_bkgd), model.double(V_bkge)))
    gains = [(1 + model.double(w.k_norm_d)).tolist() for w in model.weights.layers]
    content = {
        "model": "google/gemma-3-270m", "calibration_tokens": CALIBRATION, "unseen_tokens": UNSEEN,
        "global": [layer for layer, is_global in enumerate(model.config.is_global) if is_global],
        "shares": SHARES, "layers": layers,
        "k_gain_largest": [float(f"{max(map(abs, gain)):.3g}") for gain in gains],
        "k_gain_median": [float(f"{np.median(np.abs(gain)):.3g}") for gain in gains],
    }  # fmt: skip
    with replacing(args.out) as file:
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    options.run(main)
