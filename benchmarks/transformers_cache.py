"""`TPACache` beside the `DynamicCache` of `transformers`: bytes, peak memory and speed of decoding, in one run.

    python benchmarks/transformers_cache.py --work /tmp/full-size     # results/transformers.json and .md, minutes

A model of 1B's size with random weights in bfloat16 (memory and speed do not depend on them). Caches are filled with
random keys and values, as if so many tokens had been read; then new tokens are decoded, one cache after the other in
turns, and the medians are compared. Peak is the anonymous memory of the process above that before the cache was made,
the steps included.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import RESULTS, parser, write_json
from end_to_end import checkpoint

from tpa_ref.cli import options
from tpa_ref.cli.machine import PeakMemory, anonymous_memory, environment
from tpa_ref.gemma.texts import shipped
from tpa_torch.hf import TPACache, calibrate_cache

CONTEXTS = (2_048, 8_192, 32_000)
PIECE, STEPS = 1_024, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "rate 4, K in int8": {"k_mode": "fixed-a", "rate": 4.0},
    "rate 3, the default": {},
    "rate 2.6, prefer size": {"rate": 2.6, "prefer": "size", "predict": False},
    "rate 2.6, predicted": {"rate": 2.6, "predict": True},
    "int8": {"mode": "fixed-a", "k_rank": 1, "v_rank": 1, "kv_dtype": "int8"},
}


def filled(make: Any, model: Any, tokens: int) -> tuple[Any, int]:
    """(a cache that holds random keys and values of so many tokens, the largest memory meanwhile)."""
    config, rng = model.config, torch.Generator().manual_seed(0)
    trim()
    before = anonymous_memory()
    with PeakMemory() as peak, torch.no_grad():
        cache = make()
        for start in range(0, tokens, PIECE):
            q = min(PIECE, tokens - start)
            if isinstance(cache, TPACache):
                ids = torch.randint(3, 1000, (1, q), generator=rng)
                ids[0, 0] = 2  # BOS
                cache.begin({"input_ids": ids})
            for layer in range(config.num_hidden_layers):
                shape = 1, config.num_key_value_heads, q, config.head_dim
                K, V = (torch.randn(shape, generator=rng).to(model.dtype) for _ in "KV")
                cache.update(K, V, layer)
        step(model, cache)
    return cache, max(0, peak.bytes - before)


def trim() -> None:
    """Give freed memory back to the system, where it can be asked for that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def step(model: Any, cache: Any) -> float:
    """Seconds of one new token."""
    start = time.perf_counter()
    model(torch.tensor([[7]]), past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - start


def held(cache: Any) -> int:
    """Bytes of a cache."""
    if isinstance(cache, TPACache):
        return cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def compared(model: Any, codecs: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """All caches at one length."""
    makers = {"DynamicCache": lambda: transformers.DynamicCache(config=model.config)}
    makers |= {name: lambda codec=codec: TPACache(codec, model) for name, codec in codecs.items()}  # type: ignore[misc]
    caches: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name, make in makers.items():
        caches[name], peak = filled(make, model, tokens)
        rows.append({"cache": name, "tokens": tokens, "bytes": held(caches[name]), "peak_bytes": peak})
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(STEPS):
        for name, cache in caches.items():
            times[name].append(step(model, cache))
    for row in rows:
        row["tokens_per_s"] = 1 / statistics.median(times[str(row["cache"])])
    return rows


def table(rows: list[dict[str, Any]], said: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| tokens | cache | MiB | smaller | peak, MiB | tokens/s | of DynamicCache |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = {row["tokens"]: row for row in rows if row["cache"] == "DynamicCache"}
    for row in rows:
        first = dense[row["tokens"]]
        cells = [
            f"{row['tokens']:,}", row["cache"], f"{row['bytes'] / 2**20:.1f}", f"{first['bytes'] / row['bytes']:.1f}x",
            f"{row['peak_bytes'] / 2**20:.0f}", f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s'] / first['tokens_per_s']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    where = f"{said['processor']}, {said['threads']} threads, torch {said['torch']}"
    made = f"1B with random weights in bfloat16, batch 1, transformers {transformers.__version__}; {where}."
    return "\n".join([*lines, "", made, ""])


def main() -> None:
    options_of = parser(__doc__ or "")
    options_of.add_argument("--work", metavar="FOLDER", required=True, help="where the random weights lie, or come to")
    options_of.add_argument("--model", default="1b", choices=("270m", "1b"))
    args = options_of.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = checkpoint(args.model, args.work)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    class Words:
        bos_token_id = 2

        def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, Any]:
            return {"input_ids": np.random.default_rng(0).integers(3, 1000, 2_000).tolist()}

    text = shipped("prose")
    codecs = {
        name: calibrate_cache(model, Words(), text, tokens=1_024, sensitivity_tokens=256, **choice)
        for name, choice in SETTINGS.items()
    }
    rows: list[dict[str, Any]] = []
    for tokens in CONTEXTS:
        rows += compared(model, codecs, tokens)
        print(*rows[-len(SETTINGS) - 1 :], sep="\n", flush=True)
    said = environment("torch", "cpu")
    out = Path(args.out or RESULTS)
    write_json(str(out / "transformers.json"), {"environment": said, "rows": rows})
    (out / "transformers.md").write_text(table(rows, said), encoding="utf-8")


if __name__ == "__main__":
    options.run(main)
