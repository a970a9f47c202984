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
from common import Clock, describe, fill, options, publish, table
from torch import Tensor

import tpa_torch
from tpa_ref import plots
from tpa_ref.compress.bits import allocate_bits
from tpa_ref.compress.convert import string_sizes
from tpa_ref.core.banded import NODES, TILE, band_features, groups_of_heads
from tpa_ref.core.rope import frequencies
from tpa_ref.errors import TPAError
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.weights import Weights
from tpa_torch.core.cache import Keys, Segment
from tpa_torch.core.contextual import Contextual
from tpa_torch.core.dense import Dense
from tpa_torch.core.fixed_a import FixedA
from tpa_torch.core.fixed_b import FixedB
from tpa_torch.core.latent import Latent
from tpa_torch.core.pair import Joint, Pair
from tpa_torch.core.spectral import CodedLatent
from tpa_torch.fast import decode
from tpa_torch.fast.banded import Banded
from tpa_torch.fast.spectral import BandedLatent

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
    "spectral rate 1, prefer size": (("spectral", 1.0), ("shared", None), ("spectral",)),
    "spectral rate 2.5": (("banded", 2.5), ("behind", None), ("spectral",)),
    "spectral rate 1": (("banded", 1.0), ("behind", None), ("spectral",)),
}


def one_layer(variant: str) -> GemmaConfig:
    """A global layer of a published shape."""
    return replace(GemmaConfig.of_variant(variant), num_layers=1, is_global=(True,))


def pair(k: tuple[str, Any], v: tuple[str, Any], dtype: str, config: GemmaConfig, device: str) -> Pair:
    """A random way to cache K and V."""
    if k[0] == "banded":
        return banded(k[1], config, device)
    if v[0] != "shared":
        return Pair(side(*k, dtype, config, device), side(*v, dtype, config, device))
    mode_k = side(*k, dtype, config, device, sides=2)
    return Joint(mode_k, replace(mode_k, basis=torch.randn_like(mode_k.basis)))


def banded(rate: float, config: GemmaConfig, device: str) -> Pair:
    """The same in two bands, with V behind them: variances of each string fall as those of all numbers."""
    g, d, theta_p = config.num_kv_heads, config.head_dim, frequencies(config.head_dim, *config.rope(True))
    groups = groups_of_heads(g, d)
    variances = [np.exp(-np.linspace(0, np.log(1000), size)) for size in string_sizes(theta_p, g // groups)]
    found = allocate_bits(variances, [1, 1, 1], rate * 2 * (g // groups) * d)
    strings = [tuple(width for width in widths if width) for widths in found]
    ranks = [len(widths) for widths in strings]
    before, theta = sum(ranks[:2]), torch.from_numpy(theta_p).float()
    basis, encoder = (torch.randn(sum(ranks), g, d, device=device) / d**0.5 for _ in "be")
    own = {"encoder": encoder[:before], "mean": encoder[0], "widths": strings[0] + strings[1], "groups": groups}
    k = BandedLatent(g, d, before, basis=basis[:before], strings=tuple(ranks[:2]), theta=theta, **own)
    own = {"encoder": encoder[before:], "mean": encoder[0], "widths": strings[2], "groups": groups}
    return Banded(k, BandedLatent(g, d, ranks[2], basis=basis, strings=(ranks[2],), before=before, **own))


def side(mode: str, rank: Any, dtype: str, config: GemmaConfig, device: str, sides: int = 1) -> Any:
    """A random way to cache K or V. Spectral: variances that fall exponentially, a factor of 1000 over all numbers, of
    K and V together where V shares the coefficients.
    """
    g, d = config.num_kv_heads, config.head_dim
    if mode == "spectral":
        variance = np.exp(-np.linspace(0, np.log(1000), sides * g * d))
        (widths,) = allocate_bits([variance], [1], rank * sides * g * d)
        widths = tuple(width for width in widths if width)
        basis = torch.randn(len(widths), g, d, device=device)
        return CodedLatent(g, d, len(widths), "spectral", 0.0, basis, basis, basis[0], widths)
    if mode == "contextual":
        return Contextual(g, d, rank, dtype)
    if mode == "fixed-a":
        exact = rank == "g"
        basis = g * torch.eye(g, device=device) if exact else torch.randn(rank, g, d, device=device)
        return FixedA(g, d, len(basis), dtype, basis=basis)
    if mode == "fixed-b":
        return FixedB(g, d, rank, dtype, basis=torch.randn(g, rank, d, device=device))
    return Latent(g, d, rank, dtype, basis=torch.randn(rank, g, d, device=device))


def filled(config: GemmaConfig, how: Pair, context: int, device: str, dtype: str) -> tuple[Keys, Any]:
    """(what the newest token reads in a cache that is full of random numbers, a model without weights)."""
    embed_vm = torch.zeros(1, 1, device=device, dtype=getattr(torch, dtype))
    model = tpa_torch.Model(config, Weights(embed_vm, [], embed_vm[0], None), pairs=[how])
    cache = model.new_cache(1, context)
    fill(cache, context)
    ring = cache.layers[0].rings["coded"]
    _, at = model.positions(np.array([[context - 1]]))
    stored, positions_bk = ring.read(cache.lengths_b)
    segment = Segment("coded", how, stored, positions_bk, at.tokens(positions_bk, "coded"))
    return Keys([segment], at, cache.layers[0], cache.lengths_b), model


def flops(mode: Any, config: GemmaConfig, is_key: bool) -> float:
    """Of one cached token, all heads: its score, or its share in the output."""
    g, h, d, rank = config.num_kv_heads, config.num_heads, config.head_dim, mode.rank
    if isinstance(mode, Dense) or (isinstance(mode, FixedA) and rank == g):
        return 2 * h * d
    if isinstance(mode, Contextual | FixedA):
        return 2 * h * d * rank
    if isinstance(mode, BandedLatent):  # fast pairs rebuilt, the others absorbed at the nodes of each tile
        fast, slow = map(len, band_features(mode.theta.numpy())) if is_key else (0, 0)
        absorbed = NODES * h * (rank + slow * rank / TILE)
        return 2 * g * fast * mode.strings[0] + 2 * absorbed if is_key else 2 * h * (rank + mode.before)
    return 2 * g * d * rank + 2 * h * d if is_key else 2 * h * rank


def dense_ways(Q_bqhd: Tensor, keys: Keys, ours: Callable[[], Tensor]) -> dict[str, Callable[[], Any]]:
    """Four ways to the same numbers."""
    K_bgkd, V_bgke = (keys.segments[0].stored[f"{side}.X.x"].transpose(1, 2) for side in "kv")
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
    works: dict[tuple[str, str, str], Callable[[], Any]] = {}
    hows: dict[tuple[str, str], Pair] = {}
    held = 0

    def step(how: Pair, dtype: str) -> tuple[Keys, Tensor, Callable[[], Tensor]]:
        keys, model = filled(config, how, context, device, dtype)
        Q_bqhd = torch.randn(1, 1, h, d, device=device, dtype=getattr(torch, dtype))
        return keys, Q_bqhd, partial(decode.attend, Q_bqhd, keys, config.query_scale, model.scratch)

    for dtype in ("float32", "bfloat16"):
        how = Pair.dense(g, d, dtype)
        held += context * how.token_bytes
        if held > limit:
            raise TPAError(f"--memory-gb: {variant} at {context} tokens needs more than {limit / 1e9:.0f} GB")
        hows["dense", dtype] = how
        keys, Q_bqhd, ours = step(how, dtype)
        works |= {("dense", dtype, way): work for way, work in dense_ways(Q_bqhd, keys, ours).items()}
    for name, (k, v, own_dtypes) in settings.items():
        for dtype in own_dtypes:
            if dtype not in dtypes and dtype in DTYPES:
                continue
            how = pair(k, v, dtype, config, device)
            held += context * how.token_bytes
            if held > limit:
                print(f"{variant}, {context} tokens: left out {name}, {dtype}, which does not fit into --memory-gb")
                continue
            hows[name, dtype] = how
            works[name, dtype, "ours"] = step(how, "float32" if dtype == "float32" else "bfloat16")[2]
    seconds = clock.medians(works)  # type: ignore[arg-type]
    return [row(variant, context, key, how, seconds, config, machine) for key, how in hows.items()]


def row(
    variant: str, context: int, key: tuple[str, str], how: Pair, seconds: dict, config: Any, machine: dict
) -> dict[str, Any]:
    """One setting: its time, its floor, and its ratio to dense."""
    name, dtype = key
    ways = {way: found for (n, t, way), found in seconds.items() if (n, t) == key}
    best = {t: min(found for (n, d, _), found in seconds.items() if (n, d) == ("dense", t)) for t in DTYPES[:2]}
    took = min(ways.values())
    size = context * how.token_bytes
    flop = context * (flops(how.k, config, True) + flops(how.v, config, False))
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
    parser = common.parser(__doc__ or "")
    parser.add_argument("--variants", nargs="+", default=["1b", "4b", "12b", "27b"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--settings", nargs="+", metavar="NAME", help=f"of: {', '.join(SETTINGS)}")
    parser.add_argument("--memory-gb", type=float, default=4.0, help="what caches may take at a time")
    args = parser.parse_args()
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
    options.run(main)
