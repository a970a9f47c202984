#!/usr/bin/env python3
"""The table of the tiny model: mode x rank x dtype -> ratio to both baselines, KL, top-1, perplexity, recall.

    python scripts/quality_table.py                 # writes results/tiny_quality.json and .md (about five minutes)

Nothing is healed, every layer is compressed, and everything that a cache holds is counted. Constant factors come from
calibration text that the evaluation text shares no document with.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tpa_ref import command_line as cli  # noqa: E402
from tpa_ref.calibrate import read_text  # noqa: E402
from tpa_ref.config import TPAConfig  # noqa: E402
from tpa_ref.memory import full_bytes, windowed_bytes  # noqa: E402

# (mode, K and V rank, dtype); g = 4, d = 32, so the exact ranks are 4, 4, 32 and 128.
SETTINGS = [
    ("fixed-a", 4, "bfloat16"),  # the dense cache, written as TPA
    ("fixed-a", 4, "int8"),
    ("fixed-a", 4, "int4"),
    ("contextual", 4, "float32"),
    ("contextual", 3, "bfloat16"),
    ("contextual", 2, "bfloat16"),
    ("contextual", 1, "bfloat16"),
    ("fixed-a", 3, "bfloat16"),
    ("fixed-a", 2, "bfloat16"),
    ("fixed-b", 24, "bfloat16"),
    ("fixed-b", 16, "bfloat16"),
    ("fixed-b", 16, "int8"),
    ("fixed-b", 8, "bfloat16"),
    ("latent", 128, "int8"),
    ("latent", 128, "int4"),
    ("latent", 96, "int8"),
    ("latent", 96, "int4"),
    ("latent", 64, "bfloat16"),
    ("latent", 64, "int8"),
    ("latent", 64, "int4"),
    ("latent", 32, "int8"),
    ("latent", 16, "int8"),
]
NAMES = {
    ("fixed-a", 4, "bfloat16"): "dense cache, bf16",
    ("fixed-a", 4, "int8"): "dense cache, int8",
    ("fixed-a", 4, "int4"): "dense cache, int4",
}


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_model_options(parser)
    parser.add_argument("--out", default=str(ROOT / "results" / "tiny_quality"), help="without suffix: .json and .md")
    parser.add_argument("--context", type=int, default=1024, help="where ratios are taken: what the text windows fill")
    parser.add_argument("--eval-tokens", type=int, default=8_192)
    parser.add_argument("--recall-prompts", type=int, default=4, help="questions for each distance")
    args = parser.parse_args()
    backend = cli.backend_module(args.backend)
    dense = cli.load_model(backend, args)
    text = read_text(cli.TINY / "evaluation.txt")
    moments = backend.calibrate(dense, read_text(cli.TINY / "calibration.txt"), max_tokens=32_768)
    rows = []
    print(HEADER)
    for mode, rank, dtype in cli.progress_bar("settings")(SETTINGS):
        start = time.perf_counter()
        tpa = backend.convert(
            dense, TPAConfig(mode=mode, k_rank=rank, v_rank=rank, kv_dtype=dtype), calibration=moments
        )
        quality = backend.evaluate(dense, tpa, text, args.eval_tokens, recall_prompts=args.recall_prompts)
        held = tpa.new_cache(1, args.context).nbytes
        rows.append(
            {
                "mode": mode,
                "rank": rank,
                "dtype": dtype,
                "bytes": held,
                "ratio_vs_full": full_bytes(dense.config, args.context) / held,
                "ratio_vs_windowed": windowed_bytes(dense.config, args.context) / held,
                **quality,
                "seconds": time.perf_counter() - start,
            }
        )
        print(line(rows[-1]), flush=True)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = cli.environment(args.backend, str(getattr(dense, "device", "cpu")))
    content = {"context": args.context, "rows": rows, "environment": environment}
    cli.write_json(f"{out}.json", content)
    out.with_suffix(".md").write_text(markdown(content), encoding="utf-8")
    print(f"\nwritten: {out}.json and {out}.md")


HEADER = (
    "| cache | rank | dtype | full / TPA | windowed / TPA | KL (nats) | top-1 | perplexity | recall |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    name = NAMES.get((row["mode"], row["rank"], row["dtype"]), row["mode"])
    return (
        f"| {name} | {row['rank']} | {row['dtype']} | {row['ratio_vs_full']:.2f}x | {row['ratio_vs_windowed']:.2f}x "
        f"| {row['kl']:.5f} | {100 * row['top1']:.1f} % | {row['ppl_tpa']:.2f} | {100 * row['recall_tpa']:.0f} % |"
    )


def markdown(content: dict[str, Any]) -> str:
    """The table as it stands in the README."""
    first = content["rows"][0]
    environment = content["environment"]
    note = (
        f"At {content['context']:,} tokens, {first['tokens']:,} tokens of unseen documents, dense perplexity "
        f"{first['ppl_dense']:.2f}, dense recall {100 * first['recall_dense']:.0f} %. Python {environment['python']}, "
        f"torch {environment['torch']}, {environment['processor']}, {environment['threads']} threads, float32."
    )
    return "\n".join([HEADER, *(line(row) for row in content["rows"]), "", note, ""])


if __name__ == "__main__":
    cli.run(main)
