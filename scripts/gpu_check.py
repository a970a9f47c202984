"""What a CUDA device makes of the decode kernels, in one command: are they right, and how near memory's speed are they?

    python scripts/gpu_check.py                 # minutes; writes results/gpu.json
    python scripts/gpu_check.py --tune          # also tries other tile sizes, and names the best

1) every mode and storage against PyTorch in float32, at the head sizes of 27b and 4b, in a ring too; 2) decode of one
global layer at 32k tokens x batch 16 beside the measured copy bandwidth (and matrix product rate); 3) tokens per second
of a model of 1b's size with random weights, one graph a token, beside the time that reading its bytes takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "cuda")]

import numpy as np
import torch

import tpa_torch
from tpa_ref.cli.machine import environment
from tpa_ref.compress.config import PREFER, TPAConfig
from tpa_ref.core.banded import NODES, band_features, groups_of_heads
from tpa_ref.core.codes import SCALES
from tpa_ref.core.rope import frequencies
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.generate import prefill
from tpa_ref.gemma.weights import Weights, from_named, hf_names
from tpa_torch.core.banded import Banded, BandedLatent
from tpa_torch.core.contextual import Contextual
from tpa_torch.core.dense import Dense
from tpa_torch.core.fixed_a import FixedA
from tpa_torch.core.fixed_b import FixedB
from tpa_torch.core.latent import Latent
from tpa_torch.core.mode import Mode
from tpa_torch.core.pair import Pair
from tpa_torch.core.spectral import CodedLatent
from tpa_torch.fast import graph, kernels
from tpa_torch.gemma.model import StaticModel

RANKS = {"dense": 0, "contextual": 2, "fixed-a": 2, "fixed-b": 64, "latent": 256}
STORES = ("bfloat16", "int8", "int4")
WIDTHS = tuple([8] * 8 + [6] * 16 + [5] * 32 + [4] * 64 + [3] * 64 + [2] * 96 + [1] * 40)  # about rate 1 at 4b
CASES = [(mode, store) for mode in RANKS for store in STORES] + [("latent", "spectral"), ("banded", "spectral")]
STRINGS = WIDTHS[::5], WIDTHS[1::2], WIDTHS[::2]  # of fast K, slow K and V
AVERAGE = int(np.searchsorted(SCALES, 1.0))  # the first byte of a token of average size
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
INTERPOLATED = 1e-3  # what is read between the nodes of a tile


def two_layers(variant: str) -> GemmaConfig:
    """A window layer and a global one of a published size."""
    return replace(GemmaConfig.of_variant(variant), num_layers=2, is_global=(False, True), vision=None)


def random_mode(mode: str, store: str, config: GemmaConfig, device: str) -> Mode:
    """One side of a cache with random constants."""
    g, d, rank = config.num_kv_heads, config.head_dim, len(WIDTHS) if store == "spectral" else RANKS[mode]

    def basis(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device) / rank**0.5

    if store == "spectral":
        mean = torch.randn((g, d), device=device)
        return CodedLatent(g, d, rank, store, basis=basis(rank, g, d), mean=mean, widths=WIDTHS)
    if mode == "dense":
        return Dense(g, d, dtype=store)
    if mode == "contextual":
        return Contextual(g, d, rank, store)
    if mode == "fixed-b":
        return FixedB(g, d, rank, store, basis=basis(g, rank, d))
    return (FixedA if mode == "fixed-a" else Latent)(g, d, rank, store, basis=basis(rank, g, d))


def random_pair(mode: str, store: str, config: GemmaConfig, is_global: bool, device: str) -> Pair:
    """K and V of a layer with random constants."""
    if mode != "banded":
        one = random_mode(mode, store, config, device)
        return Pair(one, one)
    g, d = config.num_kv_heads, config.head_dim

    def side(strings: tuple[tuple[int, ...], ...], before: int, theta: Any = None) -> BandedLatent:
        widths = sum(strings, ())
        basis = torch.randn((before + len(widths), g, d), device=device) / (before + len(widths)) ** 0.5
        mean, sizes = torch.randn((g, d), device=device), tuple(map(len, strings))
        constants: dict[str, Any] = {"basis": basis, "mean": mean, "theta": theta}
        constants |= {"groups": groups_of_heads(g, d)}
        return BandedLatent(g, d, len(widths), store, widths=widths, strings=sizes, before=before, **constants)

    theta_p = frequencies(d, *config.rope(is_global))
    k = side(STRINGS[:-1], 0, torch.from_numpy(theta_p).to(device))
    k.basis[len(STRINGS[0]) :, :, band_features(theta_p)[0]] = 0  # slow coefficients say nothing of fast pairs
    return Banded(k, side(STRINGS[-1:], k.rank))


def two_full_layers(
    variant: str, mode: str, store: str, device: str, dtype: torch.dtype, batch: int, length: int
) -> tuple[Any, Any]:
    """(model without weights, cache filled with random codes)."""
    config = two_layers(variant)
    pairs = [random_pair(mode, store, config, kind, device) for kind in config.is_global]
    embed_vm = torch.zeros((1, 1), dtype=dtype, device=device)
    model = tpa_torch.Model(config, Weights(embed_vm, [], embed_vm[0], None), pairs=pairs)
    cache = model.new_cache(batch, length)
    for layer in cache.layers:
        for name, array in layer.rings["coded"].arrays.items():
            fill(array)
            if store == "spectral":  # else random scales make a few keys outshine all others
                array[..., starts_of_strings(getattr(layer.pair, name[0]))] = AVERAGE
    return model, cache


def starts_of_strings(mode: Any) -> list[int]:
    """The bytes of a token that hold scales."""
    starts, groups = np.cumsum([0, *mode.string_bytes[:-1]]), getattr(mode, "groups", 1)
    return [int(start) + group * sum(mode.string_bytes) for group in range(groups) for start in starts]


def fill(array: torch.Tensor) -> None:
    """Random numbers, codes and (float16) scales of a plausible size."""
    if array.dtype == torch.float16:
        array.uniform_(0.005, 0.02)
    elif array.is_floating_point():
        array.normal_()
    else:
        array.random_()


def newest(model: Any, layer: int, lengths: list[int], most: int) -> graph.NewTokens:
    """The last tokens of rows of some lengths."""
    lengths_b = torch.tensor(lengths, device=model.device)
    return graph.NewTokens(model, model.config.is_global[layer], most, lengths_b - 1, torch.ones_like(lengths_b) > 0)


def queries(config: GemmaConfig, batch: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn((batch, 1, config.num_heads, config.head_dim), device=device).to(dtype)


@torch.inference_mode()
def wrong(variant: str, mode: str, store: str, device: str, dtype: torch.dtype, length: int = 1500) -> float:
    """max |kernel - PyTorch in float32| / max |PyTorch|, of a ring and of a global layer, two rows."""
    model, cache = two_full_layers(variant, mode, store, device, dtype, 2, length)
    scale, worst = model.config.query_scale, 0.0
    for layer, held in enumerate(cache.layers):
        Q_bqhd = queries(model.config, 2, device, dtype)
        at = newest(model, layer, [length - 2, length // 3 + 1], length)
        found = kernels.decode(Q_bqhd, held, at.step, model.rope_table(at.is_global, length), scale).float()
        right = graph.attend_in_torch(Q_bqhd.float(), held, at, scale).float()
        worst = max(worst, float((found - right).abs().max() / right.abs().max()))
    return worst if np.isfinite(worst) else float("inf")


# ---- speed ----


def seconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of one replay of what `run` starts, captured as a graph."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        captured.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds(lambda: y.copy_(x))


def matmul_rate() -> float:
    """FLOP per second of a bfloat16 product of 8192 x 8192."""
    x = torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / seconds(lambda: x @ x)


def rebuild_flops(k: Mode, config: GemmaConfig) -> int:
    """FLOP per cached token that forming K again takes, or its fast pairs and reading the others at the nodes."""
    if isinstance(k, BandedLatent):
        features = len(band_features(k.theta.cpu().numpy())[0])
        return 2 * (k.strings[0] * k.g * features + k.rank * config.num_heads * NODES)
    return 2 * k.rank * k.g * k.d if isinstance(k, FixedB | Latent | CodedLatent) else 0


@torch.inference_mode()
def decode_speed(variant: str, mode: str, store: str, bandwidth: float, rate: float, tune: bool) -> dict:
    """One global layer at 32k x 16: microseconds, and the share of its floor, bytes at copy bandwidth or products."""
    batch, length, config = 16, 32768, two_layers(variant)
    model, cache = two_full_layers(variant, mode, store, "cuda", torch.bfloat16, batch, length)
    held, Q_bqhd = cache.layers[1], queries(config, batch, "cuda", torch.bfloat16)
    step, tables = newest(model, 1, [length] * batch, length).step, model.rope_table(True, length)

    def run(tile: Any = None) -> Callable[[], Any]:
        return lambda: kernels.decode(Q_bqhd, held, step, tables, config.query_scale, None, tile)

    taken = seconds(run())
    floors = held.nbytes / bandwidth, rebuild_flops(held.pair.k, config) * batch * length / rate
    found = {
        "variant": variant, "mode": mode, "store": store, "bytes": held.nbytes, "microseconds": 1e6 * taken,
        "floor_microseconds": 1e6 * max(floors), "bandwidth_fraction": floors[0] / taken,
        "floor_fraction": max(floors) / taken,
    }  # fmt: skip
    return found | ({"tiles": tuned(run)} if tune else {})


def tuned(run: Callable[[Any], Callable[[], Any]]) -> list[dict]:
    """Microseconds of other tile sizes, the best first; those that do not fit are left out."""
    from triton.runtime.errors import OutOfResources

    from tpa_torch.fast.kernels.launch import Tile

    found = []
    for tokens in (16, 32, 64, 128):
        for warps, stages in ((4, 2), (4, 3), (8, 2), (8, 3)):
            try:
                taken = seconds(run(Tile(tokens, 512, 32, warps, stages)), 10)
            except OutOfResources:
                continue
            found.append({"tokens": tokens, "warps": warps, "stages": stages, "microseconds": 1e6 * taken})
    return sorted(found, key=lambda each: each["microseconds"])


@torch.inference_mode()
def model_speed(
    tpa: TPAConfig | None,
    bandwidth: float,
    config: GemmaConfig,
    device: str = "cuda",
    prompt: int = 512,
    steps: int = 128,
) -> dict:
    """Tokens per second of random weights in bfloat16, batch 1: one graph a token, and the ordinary way."""
    made = {
        name: torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02 for name, shape in hf_names(config).items()
    }
    model = tpa_torch.Model(config, from_named(made, config), stored_dtype="bfloat16")
    model = tpa_torch.convert(model, tpa) if tpa else model
    weights = sum(x.nbytes for x in made.values())
    ids = np.random.default_rng(0).integers(3, min(1000, config.vocab_size), prompt).tolist()
    cache = model.new_cache(1, prompt + 2 * steps + 10)
    L_bv = torch.from_numpy(prefill(model, [ids], cache))
    decoder = graph.GraphDecoder(StaticModel(model), cache)
    decoder.stop_s.fill_(-7)  # random weights may say anything
    decoder.begin(L_bv)
    captured = per_step(decoder.step, steps, device)
    decoder.settle()
    token = np.array([[5]])
    ordinary = per_step(lambda: model(token, cache=cache), steps // 4, device)
    floor = (weights + cache.nbytes) / bandwidth
    return {
        "tpa": "dense" if tpa is None else f"{tpa.prefer}, rate {tpa.rate}",
        "weights_bytes": weights, "kv_bytes": cache.nbytes, "tokens_per_s": 1 / captured,
        "ordinary_tokens_per_s": 1 / ordinary, "floor_tokens_per_s": 1 / floor, "floor_fraction": floor / captured,
    }  # fmt: skip


def per_step(step: Callable[[], Any], steps: int, device: str) -> float:
    """Seconds of one of `steps` in a row."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps


# ---- the report ----


def attempt(row: dict, run: Callable[[], dict]) -> dict:
    """A row of the report; what fails says so and does not stop the others."""
    try:
        row = row | run()
    except Exception as error:
        row = row | {"error": f"{type(error).__name__}: {error}"}
    print("  ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values() if not isinstance(x, list)))
    return row


def check(variant: str, mode: str, store: str, dtype: torch.dtype) -> dict:
    """One row of the first part: how far apart, and is that right?"""
    found = wrong(variant, mode, store, "cuda", dtype)
    return {"error_of_output": found, "ok": found < max(TOLERANCE[dtype], INTERPOLATED if mode == "banded" else 0)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu.json")
    parser.add_argument("--tune", action="store_true", help="also try other tile sizes")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check: needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    if not kernels.has_triton():
        print("gpu_check: needs Triton: pip install triton", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, products {rate / 1e12:.0f} TF/s")
    report: dict[str, Any] = {
        "environment": environment("tpa_torch", "cuda") | {"gpu": torch.cuda.get_device_name()},
        "copy_bytes_per_s": bandwidth,
        "matmul_flop_per_s": rate,
        "correct": [
            attempt(
                {"variant": variant, "mode": mode, "store": store, "dtype": str(dtype)},
                partial(check, variant, mode, store, dtype),
            )
            for variant in ("27b", "4b")
            for dtype in TOLERANCE
            for mode, store in CASES
        ],
        "decode": [
            attempt(
                {"variant": variant, "mode": mode, "store": store},
                partial(decode_speed, variant, mode, store, bandwidth, rate, args.tune),
            )
            for variant in ("27b", "4b")
            for mode, store in CASES
        ],
        "model_1b": [
            attempt({}, partial(model_speed, tpa, bandwidth, GemmaConfig.gemma3_1b()))
            for tpa in (None, *(TPAConfig(rate=2.0, predict=False, prefer=prefer) for prefer in PREFER))
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    rows = [row for part in ("correct", "decode", "model_1b") for row in report[part]]
    bad = sum("error" in row or row.get("ok") is False for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} right; written to {args.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
