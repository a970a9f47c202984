#!/usr/bin/env python3
"""KV cache bytes of every Gemma 3 size against context: results/kv_memory.md, .json and .png. No weights are needed.

    python scripts/kv_memory.py

Full and windowed are dense bf16 caches; the spectral ones are `nbytes_at` of a cache at that rate, sinks and packing
counted. How the bits are spread over layers and coefficients changes the quality, not the bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tpa_ref import plots
from tpa_ref.cli import options
from tpa_ref.cli.report import write_json
from tpa_ref.compress.config import DEFAULT_SINKS, Spectral
from tpa_ref.compress.plan import planned_pair
from tpa_ref.core.cache import Exact, cache_bytes
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.memory import full_bytes, human, windowed_bytes

VARIANTS = ("270m", "1b", "4b", "12b", "27b")
RATES = (2.0, 1.0, 0.5)
CONTEXTS = (8_192, 32_768, 131_072)


def main() -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "results" / "kv_memory"), help="without suffix")
    args = parser.parse_args()
    configs = [GemmaConfig.of_variant(name) for name in VARIANTS]
    rows = [row(config, n) for config in configs for n in CONTEXTS if n <= config.max_positions]
    write_json(f"{args.out}.json", {"rows": rows, "sinks": DEFAULT_SINKS})
    Path(f"{args.out}.md").write_text(markdown(rows), encoding="utf-8")
    draw(f"{args.out}.png")
    print(markdown(rows))


def spectral_bytes(config: GemmaConfig, rate: float, n: int) -> int:
    """A cache of n tokens at a rate: that share of the coefficients in 4 bits."""
    numbers = 2 * config.num_kv_heads * config.head_dim
    widths = (4,) * round((rate * numbers - 8) / 4)  # a byte is the scale
    pairs = [planned_pair(Spectral(rate, widths=widths), config)] * config.num_layers
    return cache_bytes(pairs, config.windows, n, exact=Exact(DEFAULT_SINKS))


def row(config: GemmaConfig, n: int) -> dict[str, Any]:
    return {
        "variant": config.variant,
        "context": n,
        "full": full_bytes(config, n),
        "windowed": windowed_bytes(config, n),
        "spectral": {str(rate): spectral_bytes(config, rate, n) for rate in RATES},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | context | full | windowed | " + " | ".join(f"rate {rate:g}" for rate in RATES) + " |",
        "|---|---|---|---|" + "---|" * len(RATES),
    ]
    for found in rows:
        cells = [
            f"{human(size)} ({found['windowed'] / size:.1f}x, {found['full'] / size:.0f}x)"
            for size in found["spectral"].values()
        ]
        lines.append(
            f"| {found['variant']} | {found['context']:,} | {human(found['full'])} | {human(found['windowed'])} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join([*lines, "", "In brackets: times smaller than `windowed`, and than `full`. Batch 1.", ""])


def draw(path: str) -> None:
    """Cache bytes against context, log-log, one panel a size."""
    figure, axes = plots.new_figure(len(VARIANTS), width=2.6, height=3.2)
    for axis, name in zip(axes, VARIANTS, strict=True):
        config = GemmaConfig.of_variant(name)
        contexts = [2**power for power in range(8, config.max_positions.bit_length())]
        MiB = 2**20
        for label, style, colour, size in (
            ("full", ":", plots.INK["full"], full_bytes),
            ("windowed", "--", plots.INK["windowed"], windowed_bytes),
            ("rate 2", "-", plots.INK["tpa"], lambda c, n: spectral_bytes(c, 2.0, n)),
            ("rate 0.5", "-.", plots.INK["tpa"], lambda c, n: spectral_bytes(c, 0.5, n)),
        ):
            axis.plot(contexts, [size(config, n) / MiB for n in contexts], style, color=colour, label=label)
        axis.set(xscale="log", yscale="log", xlabel="context (tokens)", title=name, ylim=(0.1, 1e5))
    axes[0].set_ylabel("KV cache (MiB)")
    axes[0].legend(frameon=False, fontsize=8)
    plots.write(figure, path)


if __name__ == "__main__":
    options.run(main)
