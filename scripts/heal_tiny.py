#!/usr/bin/env python3
"""Heal conversions of the tiny model and show what it gives: results/heal.json, heal.md and heal.png.

    python scripts/heal_tiny.py       # contextual rank 2 of 4, and three ways at rate 0.5; can be interrupted

Trained on the text that the tiny model was trained on, measured on documents that neither has seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "cuda"), str(ROOT / "scripts")]

import tiny_corpus
import tpa_torch
from tpa_ref import plots
from tpa_ref.cli import options
from tpa_ref.cli.machine import environment
from tpa_ref.cli.report import write_json
from tpa_ref.compress.config import TPAConfig
from tpa_ref.gemma.memory import windowed_bytes
from tpa_ref.gemma.texts import read_text
from tpa_torch.heal import heal

CONTEXT = 128  # every layer holds as much: the hardest text length for the window layers
CONSTANT = TPAConfig(rate=0.5, context=CONTEXT, predict=False, prefer="size")
SETTINGS = {  # with the learning rate, the steps (the less there is to heal, the smaller they must be), and `predict`
    "contextual, rank 2 of 4": (TPAConfig(mode="contextual", k_rank=2, v_rank=2), 0.008, 1500, False),
    "spectral without words, rate 0.5": (CONSTANT, 0.004, 300, False),
    "spectral, rate 0.5": (TPAConfig(rate=0.5, context=CONTEXT, prefer="size"), 0.003, 300, False),
    "spectral without words, rate 0.5, given maps of the words": (CONSTANT, 0.003, 300, True),
}


def main() -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=str(ROOT / "runs" / "heal"), help="where the states of the training lie")
    parser.add_argument("--out", default=str(ROOT / "results" / "heal"), help="without suffix: .json, .md, .png")
    parser.add_argument("--steps", type=int, help="instead of those of each setting")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--eval-tokens", type=int, default=8_192)
    parser.add_argument("--only", type=int, metavar="N", help="train this setting, and write no results")
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    dense = tpa_torch.load(options.TINY)
    moments = tpa_torch.calibrate(dense, read_text(options.TINY / "calibration.txt"), cache_dir=work)
    text, unseen = training_text(work), read_text(options.TINY / "evaluation.txt")
    rows = []
    for number, (name, (config, learning_rate, steps, predict)) in enumerate(SETTINGS.items()):
        steps = args.steps or steps
        if args.only is not None and number != args.only:
            continue
        start = time.perf_counter()
        before = tpa_torch.convert(dense, config, moments)
        healed = heal(
            before,
            dense,
            text,
            steps=steps,
            batch=args.batch,
            learning_rate=learning_rate,
            state=work / f"{number}.pt",
            progress=options.progress_bar(name),
            predict=predict,
        )
        if args.only is not None:
            continue
        rows.append(
            {
                "name": name,
                "ratio_vs_windowed": windowed_bytes(dense.config, CONTEXT) / healed.new_cache(1, CONTEXT).nbytes,
                "before": tpa_torch.evaluate(dense, before, unseen, args.eval_tokens, recall_prompts=4),
                "after": tpa_torch.evaluate(dense, healed, unseen, args.eval_tokens, recall_prompts=4),
                "training_kl": healed.healing.kl,
                "steps": steps,
                "tokens_a_step": args.batch * 512,
                "seconds": time.perf_counter() - start,
            }
        )
        print(line(rows[-1]), flush=True)
    if args.only is None:
        content = {"rows": rows, "context": CONTEXT, "environment": environment("torch", "cpu")}
        write_json(f"{args.out}.json", content)
        Path(f"{args.out}.md").write_text(markdown(content), encoding="utf-8")
        draw(content, f"{args.out}.png")


def training_text(work: Path) -> str:
    """The training documents of the tiny model, collected once."""
    file = work / "train.json"
    if not file.exists():
        file.write_text(json.dumps(list(tiny_corpus.collect()["train"].values())), encoding="utf-8")
    return "\n\n".join(json.loads(file.read_text("utf-8")))


HEADER = (
    "| cache | steps | windowed / TPA | KL before | after | removed | top-1 before | after | recall before | after |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    before, after = row["before"], row["after"]
    removed = 100 * (1 - after["kl"] / before["kl"])
    return (
        f"| {row['name']} | {row['steps']:,} | {row['ratio_vs_windowed']:.1f}x "
        f"| {before['kl']:.4f} | {after['kl']:.4f} | {removed:.0f} % "
        f"| {100 * before['top1']:.1f} % | {100 * after['top1']:.1f} % "
        f"| {100 * before['recall_tpa']:.0f} % | {100 * after['recall_tpa']:.0f} % |"
    )


def markdown(content: dict[str, Any]) -> str:
    first, made = content["rows"][0], content["environment"]
    note = (
        f"Steps of {first['tokens_a_step']:,} tokens of the tiny model's training text; "
        f"{first['before']['tokens']:,} tokens of unseen documents; ratios at {content['context']} tokens, where every "
        f"layer holds as much. torch {made['torch']}, {made['processor']}."
    )
    return "\n".join([HEADER, *(line(row) for row in content["rows"]), "", note, ""])


def draw(content: dict[str, Any], path: str) -> None:
    """KL of the training windows over the steps, smoothed, with the unseen KL before and after."""
    figure, axis = plots.new_figure(1, width=6.4)
    looks = ("-", plots.INK["tpa"]), ("--", plots.INK["full"]), (":", "#5b6a78"), ("-", "#2f6f9f")
    for row, (style, colour) in zip(content["rows"], looks, strict=True):
        kl = row["training_kl"]
        smooth = kl[:1]
        for value in kl[1:]:
            smooth.append(0.9 * smooth[-1] + 0.1 * value)
        axis.plot(range(1, len(kl) + 1), smooth, style, color=colour, label=row["name"])
        axis.plot([0, len(kl)], [row["before"]["kl"], row["after"]["kl"]], "o", color=colour)
    axis.set(yscale="log", xlabel="step", ylabel="KL to the dense model (nats)")
    axis.set_title("Healing; lines: training windows, dots: unseen documents")
    axis.legend(frameon=False)
    plots.write(figure, path)


if __name__ == "__main__":
    options.run(main)
