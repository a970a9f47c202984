"""Many texts at once in a given memory: the largest batch that fits, dense and TPA, and tokens/s there.

    python benchmarks/serving.py                                          # the shipped tiny model, 16 MB of cache
    python benchmarks/serving.py --ckpt /models/gemma-3-1b-pt --dtype bfloat16 --memory-gb 40 --device cuda \\
        --contexts 32000

The rows of the batch are of different length, between half of the context and all of it. Memory is that of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import common
import numpy as np
import torch
from common import Clock, describe, fill, options, publish, table
from end_to_end import SETTINGS as WHOLE
from end_to_end import STEPS

import tpa_torch
from tpa_ref import plots
from tpa_ref.errors import TPAError

SETTINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "contextual R=2 int8": {"mode": "contextual", "k_rank": 2, "v_rank": 2, "kv_dtype": "int8"},
    "fixed-a R=2 int8": {"mode": "fixed-a", "k_rank": 2, "v_rank": 2, "kv_dtype": "int8"},
    "exact int8 K and V": WHOLE["exact int8 K and V"],
    "exact int8 K, spectral V rate 2": WHOLE["exact int8 K, spectral V rate 2"],
    "exact int8 K, latent int8 V": WHOLE["fixed-a int8 K, latent int8 V"],
    "spectral rate 2": WHOLE["spectral rate 2"],
    "spectral rate 1": {"rate": 1.0},
}


def largest_batch(model: Any, context: int, memory: float, most: int) -> int:
    """How many texts of a length fit."""
    one = model.new_cache(1, 1).nbytes_at(context + STEPS)
    return min(most, int(memory // one))


def step(model: Any, batch: int, context: int) -> tuple[Any, Callable[[], Any]]:
    """(cache, one token of every row)."""
    cache = model.new_cache(batch, context + STEPS)
    fill(cache, context)
    cache.lengths_b[:] = np.linspace(context // 2, context, batch).astype(int)
    tokens_bq = np.full((batch, 1), 5)
    return cache, lambda: model.logits(model.hidden(tokens_bq, cache))


def measure(models: dict[str, Any], context: int, args: Any, clock: Clock) -> list[dict[str, Any]]:
    """A row a setting: batch, bytes, tokens/s."""
    rows, works = [], {}
    for name, model in models.items():
        batch = largest_batch(model, context, 1e9 * args.memory_gb, args.most)
        if batch:
            cache, works[name] = step(model, batch, context)
            rows.append({"setting": name, "context": context, "batch": batch, "bytes": cache.nbytes})
        else:
            rows.append({"setting": name, "context": context, "batch": 0, "bytes": 0, "seconds": None})
    for name, seconds in clock.medians(works).items():
        next(row for row in rows if row["setting"] == name)["seconds"] = seconds
    return rows


def text(content: dict[str, Any]) -> str:
    """One table."""
    lines = [
        [
            f"{row['context']:,}",
            row["setting"],
            f"{row['batch']:,}",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{1000 * row['seconds']:,.0f}" if row["batch"] else "",
            f"{row['batch'] / row['seconds']:,.1f}" if row["batch"] else "does not fit",
        ]
        for row in content["rows"]
    ]
    header = ["context", "cache", "largest batch", "MB", "ms a step", "tokens/s of all"]
    return (
        f"### Largest batch in {content['memory_gb'] * 1000:,.0f} MB of cache: "
        f"{content['model']}, {content['dtype']}\n\n" + describe(content["machine"]) + "\n\n" + table(header, lines)
    )


def draw(rows: list[dict[str, Any]], axis: Any) -> None:
    """Batch and tokens/s of each setting at the longest context."""
    here = [row for row in rows if row["context"] == max(r["context"] for r in rows) and row["batch"]]
    for row in here:
        colour = plots.INK["windowed" if row["setting"] == "dense" else "tpa"]
        at = row["batch"], row["batch"] / row["seconds"]
        axis.plot(*at, "o", color=colour)
        axis.annotate(f" {row['setting']}", at, fontsize=8)
    axis.set(xscale="log", xlabel="largest batch", ylabel="tokens/s of all rows", ylim=(0, None))
    axis.set_title(f"The same memory, {here[0]['context'] if here else 0:,} tokens a row")


@torch.inference_mode()
def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--ckpt", metavar="PATH", default=str(options.TINY))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1900])
    parser.add_argument("--memory-gb", type=float, default=0.016)
    parser.add_argument("--most", type=int, default=512, help="no larger batch than this")
    args = parser.parse_args()
    clock = Clock(args)
    dense = tpa_torch.load(args.ckpt, device=args.device, dtype=args.dtype)
    for context in args.contexts:
        if context + STEPS > dense.config.max_positions:
            raise TPAError(f"--contexts: {context} + {STEPS} tokens are more than the model's positions")
    models = {
        name: dense if choices is None else tpa_torch.convert(dense, tpa_torch.TPAConfig(**choices))
        for name, choices in SETTINGS.items()
    }
    content: dict[str, Any] = {
        "machine": common.machine(clock),
        "model": dense.config.variant,
        "dtype": args.dtype,
        "memory_gb": args.memory_gb,
        "rows": [],
    }
    for context in args.contexts:
        content["rows"] += measure(models, context, args, clock)
    publish("serving", args, content, text(content), partial(draw, content["rows"]))


if __name__ == "__main__":
    options.run(main)
