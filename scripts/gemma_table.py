#!/usr/bin/env python3
"""What every setting costs and saves on the real Gemma 3 270M: results/gemma_settings.json and .md.

    make gemma-table        # 15 minutes on two cores; settings that were measured before are not measured again

Computed in float32. Constant factors come from the shipped calibration text; KL, top-1 agreement, perplexity and recall
are measured on the shipped evaluation text, which shares no document with it, in windows of 2,048 tokens. Ratios are
against `windowed`, everything counted; bits are planned for 32,768 tokens. `measure` is what `tests/real` checks
against the written file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "cuda")]

from get_gemma import TARGET
from tpa_ref.cli import options
from tpa_ref.cli.machine import environment
from tpa_ref.cli.report import write_json
from tpa_ref.compress.config import TPAConfig
from tpa_ref.compress.evaluate import evaluate, recall_accuracy
from tpa_ref.gemma.memory import windowed_bytes
from tpa_ref.gemma.texts import read_text

WINDOW = 2048
CALIBRATION = 8192
EVALUATION, RECALL = 2048, 1
TESTED = {"calibration": 2048, "evaluation": 1024, "recall": 0}  # what `make test-gemma` measures, in two minutes
DENSE: dict[str, Any] = {"mode": "fixed-a", "k_rank": 1, "v_rank": 1}  # one KV head: the dense cache, written as TPA
SETTINGS: dict[str, TPAConfig] = {
    "dense, int8": TPAConfig(**DENSE, kv_dtype="int8"),
    "dense, int4": TPAConfig(**DENSE, kv_dtype="int4"),
    **{
        f"spectral, rate {rate}{', predicted' if predict else ''}": TPAConfig(rate=float(rate), predict=predict)
        for rate in (4, 3, 2, 1)
        for predict in (None, True)
    },
}


def measure(dense: Any, moments: Any, name: str, tokens: int, recall: int) -> dict[str, Any]:
    """The figures of one setting."""
    from tpa_torch import convert

    setting = SETTINGS[name]
    moments = moments if setting.predict else replace(moments, of_tokens=None)  # only the first layer is predicted
    model = convert(dense, setting, moments)
    text = read_text(options.TINY / "evaluation.txt")
    figures = evaluate(dense, model, text, tokens, WINDOW, recall_prompts=0)
    figures["recall_tpa"] = recalled(model, recall)
    return figures | ratios(model)


def ratios(model: Any) -> dict[str, float]:
    """How many times smaller than `windowed` its cache is, at the windows' length and at the longest text."""
    config, cache = model.config, model.new_cache(1, 1)
    lengths = {"ratio": WINDOW, "ratio_longest": config.max_positions}
    return {name: windowed_bytes(config, n) / cache.nbytes_at(n) for name, n in lengths.items()}


def recalled(model: Any, prompts: int) -> float | None:
    """The share of recall questions answered right, so many for each distance."""
    filler = model.tokenizer.encode(read_text(options.TINY / "evaluation.txt"), bos=False)
    found = recall_accuracy(model, filler, prompts)
    return sum(found.values()) / len(found) if found else None


def calibrated(checkpoint: Path, tokens: int) -> tuple[Any, Any]:
    """(the dense model in float32, moments of so much of the shipped calibration text)."""
    from tpa_torch import calibrate, load

    dense = load(checkpoint, dtype="float32")
    text = read_text(options.TINY / "calibration.txt")
    return dense, calibrate(dense, text, max_tokens=tokens, predict=True, progress=options.progress_bar("calibrating"))


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| cache | smaller at 2,048 | at 32,768 tokens | KL mean (nats) | KL 99 % | top-1 | perplexity | recall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(found["settings"].values()))
    dense = f"{first['ppl_dense']:.3f} | {100 * found['recall_dense']:.0f} %"
    lines.append(f"| dense, bfloat16 (`windowed`) | 1.0x | 1.0x | 0 | 0 | 100.0 % | {dense} |")
    for name in SETTINGS:
        figures = found["settings"][name]
        cells = [
            name, f"{figures['ratio']:.1f}x", f"{figures['ratio_longest']:.1f}x", f"{figures['kl']:.4f}",
            f"{figures['kl_p99']:.3f}", f"{100 * figures['top1']:.1f} %", f"{figures['ppl_tpa']:.3f}",
            f"{100 * figures['recall_tpa']:.0f} %",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    said = found["environment"]
    lines += [
        "",
        f"Gemma 3 270M in float32; {found['calibration']:,} tokens of calibration text, {found['evaluation']:,} of "
        f"evaluation text in windows of {WINDOW:,}; {said['processor']}, {said['threads']} threads, "
        f"torch {said['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=TARGET)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gemma_settings.json", help="figures so far")
    args = parser.parse_args()
    args.work.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.work.read_text()) if args.work.is_file() else {}
    found = {"calibration": CALIBRATION, "evaluation": EVALUATION, "environment": environment("torch", "cpu")} | found
    for part, tokens, sizes in (
        ("tested", TESTED["calibration"], (TESTED["evaluation"], TESTED["recall"])),
        ("settings", CALIBRATION, (EVALUATION, RECALL)),
    ):
        held = found.setdefault(part, {})
        if held.keys() >= SETTINGS.keys():
            continue
        dense, moments = calibrated(args.ckpt, tokens)
        if part == "settings":
            found["recall_dense"] = recalled(dense, RECALL)
        for name in SETTINGS:
            if name in held:
                continue
            start = time.perf_counter()
            held[name] = measure(dense, moments, name, *sizes)
            write_json(args.work, found)
            print(f"{part}: {name}: KL {held[name]['kl']:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    write_json(args.out / "gemma_settings.json", found)
    (args.out / "gemma_settings.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    options.run(main)
