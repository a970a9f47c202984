"""One decode step of one layer's attention: every TPA mode and dtype against the best dense one, and against the floor.

    python benchmarks/decode_attention.py                                  # the shapes of 1b to 27b at 4k and 32k
    python benchmarks/decode_attention.py --variants 27b --contexts 131072 --memory-gb 12
    python benchmarks/decode_attention.py --threads 1 --clock cpu          # on a machine that is not idle

Caches are random and full, batch 1, queries in float32 for a float32 cache and in bfloat16 for the others. "Best dense"
is the fastest of four ways in the same precision: torch's fused attention with shared heads, the same with the queries
of a head folded into one matrix, two matrix products, and this project's. The floor is the larger of bytes / measured
read bandwidth and FLOPs / measured matrix rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import Clock, describe, publish, table
from torch import Tensor

from tpa_ref import plots
from tpa_ref.compress import transform as spectral
from tpa_ref.core.cache import token_bytes
from tpa_ref.core.factorize import Factorization
from tpa_ref.errors import TPAError
from tpa_ref.gemma.config import GemmaConfig
from tpa_torch.core import cache as kv
from tpa_torch.fast import decode

DTYPES = ("float32", "bfloat16", "int8", "int4")
# How K and V are cached: (mode, rank or rate). Rank "g" is full.
SETTINGS: dict[str, tuple[tuple[str, Any], tuple[str, Any], tuple[str, ...]]] = {
    "contextual R=1": (("contextual", 1), ("contextual", 1), DTYPES),
    "contextual R=2": (("contextual", 2), ("contextual", 2), DTYPES),
    "fixed-a R=1": (("fixed-a", 1), ("fixed-a", 1), DTYPES),
    "fixed-a R=2": (("fixed-a", 2), ("fixed-a", 2), DTYPES),
    "fixed-b R=64": (("fixed-b", 64), ("fixed-b", 64), DTYPES[:3]),
    "latent R=64": (("latent", 64), ("latent", 64), DTYPES[:3]),
    "exact K and V": (("fixed-a", "g"), ("fixed-a", "g"), DTYPES[2:]),
    "exact K, fixed-b V R=64": (("fixed-a", "g"), ("fixed-b", 64), DTYPES[:3]),
    "exact int8 K, spectral V rate 2": (("fixed-a", "g"), ("spectral", 2.0), ("int8",)),
    "exact int8 K, spectral V rate 1": (("fixed-a", "g"), ("spectral", 1.0), ("int8",)),
    "spectral rate 1": (("spectral", 1.0), ("shared", None), ("spectral",)),
}


def one_layer(variant: str) -> GemmaConfig:
    """A global layer of a published shape."""
    return replace(GemmaConfig.of_variant(variant), num_layers=1, is_global=(True,))


def pair(k: tuple[str, Any], v: tuple[str, Any], dtype: str, config: GemmaConfig, device: str) -> kv.LayerFactors:
    """A random way to cache K and V."""
    if v[0] != "shared":
        return side(*k, dtype, config, device), side(*v, dtype, config, device)
    how_k = side(k[0], k[1], dtype, config, device, sides=2)
    return how_k, replace(how_k, dtype="shared", basis=torch.randn_like(how_k.basis), widths=())


def side(mode: str, rank: Any, dtype: str, config: GemmaConfig, device: str, sides: int = 1) -> Factorization:
    """A random way to cache K or V. Spectral: variances that fall exponentially, a factor of 1000 over all numbers, of
    K and V together where V shares the coefficients.
    """
    g, d = config.num_kv_heads, config.head_dim
    if mode == "spectral":
        variance = np.exp(-np.linspace(0, np.log(1000), sides * g * d))
        (widths,) = spectral.allocate([variance], [1], rank * sides * g * d)
        widths = tuple(width for width in widths if width)
        basis = torch.randn(len(widths), g, d, device=device)
        return Factorization("latent", len(widths), "spectral", basis, 0.0, basis, basis[0], widths)
    rank = g if rank == "g" else rank
    shape = {"fixed-a": (rank, g, d), "fixed-b": (g, rank, d), "latent": (rank, g, d)}.get(mode)
    basis = torch.randn(*shape, device=device) if shape else None
    if mode == "fixed-a" and rank == g:
        basis = g * torch.eye(g, device=device)
    return Factorization(mode, rank, dtype, basis, 0.0)


def filled(config: GemmaConfig, how: kv.LayerFactors, context: int, device: str) -> kv.LayerCache:
    """A cache that is full of random numbers."""
    layer = kv.Cache(config, [how], 1, context, device=device).layers[0]
    for stored in layer.stored:
        for fields in stored.values():
            for name, array in fields.items():
                if array.dtype in (torch.int8, torch.uint8):
                    array.random_(0, 127)
                else:
                    array.uniform_(0.001, 0.01) if name == "scale" else array.normal_()
    return layer


def flops(how: Factorization, config: GemmaConfig, is_key: bool) -> float:
    """Of one cached token, all heads: its score, or its share in the output."""
    g, h, d, rank = config.num_kv_heads, config.num_heads, config.head_dim, how.rank
    if how.mode == "dense" or (how.mode == "fixed-a" and rank == g):
        return 2 * h * d
    if how.mode in ("contextual", "fixed-a"):
        return 2 * h * d * rank
    return 2 * g * d * rank + 2 * h * d if is_key else 2 * h * rank


def dense_ways(Q_bqhd: Tensor, layer: kv.LayerCache, ours: Callable[[], Tensor]) -> dict[str, Callable[[], Any]]:
    """Four ways to the same numbers."""
    K_bgkd, V_bgke = (side["X"]["x"].transpose(1, 2) for side in layer.stored)
    g = K_bgkd.shape[1]
    Q_bhqd = Q_bqhd.transpose(1, 2)
    Q_bgnd = Q_bqhd[:, 0].unflatten(1, (g, -1))

    def two_products() -> Tensor:
        P_bgnk = torch.softmax((Q_bgnd @ K_bgkd.mT).float(), -1)
        return P_bgnk.to(V_bgke.dtype) @ V_bgke

    return {
        "fused, shared heads": lambda: F.scaled_dot_product_attention(Q_bhqd, K_bgkd, V_bgke, enable_gqa=True),
        "fused, folded": lambda: F.scaled_dot_product_attention(Q_bgnd, K_bgkd, V_bgke),
        "two products": two_products,
        "ours": ours,
    }


def measure(
    variant: str, context: int, settings: dict, dtypes: list[str], clock: Clock, machine: dict, limit: float
) -> list[dict[str, Any]]:
    """Rows of one shape and length: everything in one interleaved run."""
    config, device = one_layer(variant), clock.device
    g, h, d = config.num_kv_heads, config.num_heads, config.head_dim
    turns_bkp = torch.ones(1, context, d // 2, dtype=torch.complex64, device=device)
    scratch = decode.Scratch()
    works: dict[tuple[str, str, str], Callable[[], Any]] = {}
    hows: dict[tuple[str, str], kv.LayerFactors] = {}
    held = 0

    def step(how: kv.LayerFactors, model_dtype: str) -> tuple[kv.LayerCache, Tensor, Callable[[], Tensor]]:
        layer = filled(config, how, context, device)
        Q_bqhd = torch.randn(1, 1, h, d, device=device, dtype=getattr(torch, model_dtype))
        keys = [decode.Keys(layer.stored, how, turns_bkp, None)]
        return layer, Q_bqhd, partial(decode.attend, Q_bqhd, keys, g, config.query_scale, scratch)

    for dtype in ("float32", "bfloat16"):
        how = (Factorization("dense", dtype=dtype),) * 2
        held += context * 2 * token_bytes(how[0], config)
        if held > limit:
            raise TPAError(f"--memory-gb: {variant} at {context} tokens needs more than {limit / 1e9:.0f} GB")
        hows["dense", dtype] = how
        layer, Q_bqhd, ours = step(how, dtype)
        works |= {("dense", dtype, way): work for way, work in dense_ways(Q_bqhd, layer, ours).items()}
    for name, (k, v, own_dtypes) in settings.items():
        for dtype in own_dtypes:
            if dtype not in dtypes and dtype in DTYPES:
                continue
            how = pair(k, v, dtype, config, device)
            held += context * sum(token_bytes(one, config) for one in how)
            if held > limit:
                print(f"{variant}, {context} tokens: left out {name}, {dtype}, which does not fit into --memory-gb")
                continue
            hows[name, dtype] = how
            works[name, dtype, "ours"] = step(how, "float32" if dtype == "float32" else "bfloat16")[2]
    seconds = clock.medians(works)  # type: ignore[arg-type]
    return [row(variant, context, key, how, seconds, config, machine) for key, how in hows.items()]


def row(
    variant: str, context: int, key: tuple[str, str], how: kv.LayerFactors, seconds: dict, config: Any, machine: dict
) -> dict[str, Any]:
    """One setting: its time, its floor, and its ratio to dense."""
    name, dtype = key
    ways = {way: found for (n, t, way), found in seconds.items() if (n, t) == key}
    best = {t: min(found for (n, d, _), found in seconds.items() if (n, d) == ("dense", t)) for t in DTYPES[:2]}
    took = min(ways.values())
    size = context * sum(token_bytes(one, config) for one in how)
    flop = context * sum(flops(one, config, is_key) for one, is_key in zip(how, (True, False), strict=True))
    rate = machine["float32_flop_per_s" if dtype == "float32" else "bfloat16_flop_per_s"]
    floor = max(size / machine["read_bytes_per_s"], flop / rate)
    return {
        "variant": variant,
        "context": context,
        "setting": name,
        "dtype": dtype,
        "bytes": size,
        "flop": flop,
        "seconds": took,
        "ways": ways,
        "floor_seconds": floor,
        "bound": "bytes" if size / machine["read_bytes_per_s"] >= flop / rate else "FLOPs",
        "ratio_same": best["float32"] / took if dtype == "float32" else None,
        "ratio_fastest": min(best.values()) / took,
    }


def text(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """A table for every shape and length."""
    parts = ["### One decode step of one layer's attention, batch 1\n", describe(machine) + "\n"]
    for variant, context in dict.fromkeys((r["variant"], r["context"]) for r in rows):
        here = [r for r in rows if (r["variant"], r["context"]) == (variant, context)]
        lines = [
            [
                r["setting"],
                r["dtype"],
                f"{r['bytes'] / 1e6:,.1f}",
                f"{1000 * r['seconds']:,.2f}",
                f"{1000 * r['floor_seconds']:,.2f} ({r['bound']})",
                f"{100 * r['floor_seconds'] / r['seconds']:.0f} %",
                f"{r['ratio_same']:.2f}" if r["ratio_same"] else "",
                f"{r['ratio_fastest']:.2f}",
            ]
            for r in here
        ]
        header = ["cache", "dtype", "MB", "ms", "floor ms", "of floor", "x float32 dense", "x fastest dense"]
        ways = ", ".join(
            f"{r['dtype']} {way} {1000 * s:.1f}"
            for r in here
            if r["setting"] == "dense"
            for way, s in r["ways"].items()
        )
        parts += [f"**{variant}, {context:,} tokens** (dense, ms: {ways})\n", table(header, lines)]
    return "\n".join(parts)


def draw(rows: list[dict[str, Any]], axis: Any) -> None:
    """Speed-up over the fastest dense at the longest context, by shape."""
    context = max(r["context"] for r in rows)
    here = [r for r in rows if r["context"] == context and r["setting"] != "dense"]
    variants = list(dict.fromkeys(r["variant"] for r in here))
    names = list(dict.fromkeys(r["setting"] for r in here))
    shades = ("#c8501e", "#5b6a78", "#000000", "#b0b8c0")
    for number, variant in enumerate(variants):
        best = {
            name: max((r["ratio_fastest"] for r in here if (r["variant"], r["setting"]) == (variant, name)), default=0)
            for name in names
        }
        at = np.arange(len(names)) + 0.8 * (number - (len(variants) - 1) / 2) / len(variants)
        axis.barh(at, list(best.values()), 0.8 / len(variants), color=shades[number % 4], label=variant)
    axis.axvline(1, color=plots.INK["full"], lw=0.8)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="times as fast as the fastest dense")
    axis.set_title(f"Decode attention of one layer, {context:,} tokens")
    axis.invert_yaxis()
    axis.legend(frameon=False)


@torch.inference_mode()
def main() -> None:
    options = common.parser(__doc__ or "")
    options.add_argument("--variants", nargs="+", default=["1b", "4b", "12b", "27b"])
    options.add_argument("--contexts", nargs="+", type=int, default=[4096, 32768])
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options.add_argument("--settings", nargs="+", metavar="NAME", help=f"of: {', '.join(SETTINGS)}")
    options.add_argument("--memory-gb", type=float, default=4.0, help="what caches may take at a time")
    args = options.parse_args()
    for name in args.settings or []:
        if name not in SETTINGS:
            raise TPAError(f"--settings: {name!r} is not one of {', '.join(SETTINGS)}")
    clock = Clock(args)
    machine = common.machine(clock)
    settings = {name: SETTINGS[name] for name in args.settings or SETTINGS}
    rows = []
    for variant in args.variants:
        for context in args.contexts:
            rows += measure(variant, context, settings, args.dtypes, clock, machine, 1e9 * args.memory_gb)
            print(f"measured {variant} at {context:,} tokens", flush=True)
    content = {"machine": machine, "rows": rows}
    publish("decode_attention", args, content, text(rows, machine), partial(draw, rows))


if __name__ == "__main__":
    common.cli.run(main)
