#!/usr/bin/env python3
"""What every cache costs and saves on the real Gemma 3 270M: results/gemma_settings.json, .md and .png.

    make gemma-table                                 # an hour on two cores; what was measured is not measured again
    python scripts/gemma_table.py --device cuda      # minutes

Computed in float32. Constant factors come from the shipped calibration text; KL, top-1 agreement and perplexity are
measured on 8,192 tokens of prose and of code, in windows of 2,048 and of 8,192 tokens, and for bits planned for 32,768
tokens on whole texts of 16,384. Ratios are against `windowed`, everything counted, bits planned for that length.
What others do is simulated (`other_caches`). `measure` is what `tests/real` checks against the written file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "cuda")]

import numpy as np

from get_gemma import TARGET
from other_caches import bits_per_number, kivi_like, turboquant_like
from tpa_ref import plots
from tpa_ref.cli import options
from tpa_ref.cli.machine import environment
from tpa_ref.cli.report import write_json
from tpa_ref.compress.config import DEFAULT_RATE, TPAConfig
from tpa_ref.compress.convert import convert
from tpa_ref.compress.evaluate import evaluate, recall_accuracy
from tpa_ref.compress.plan import Curve
from tpa_ref.gemma.memory import windowed_bytes
from tpa_ref.gemma.texts import shipped

CALIBRATION, EVALUATION = 16_384, 8_192
TEXTS, LENGTHS = ("prose", "code"), (2_048, 8_192)
LONG, PLANNED = 16_384, 32_768  # whole texts, and what their bits are planned for
LONG_RATES = (2.0, 0.8)
DISTANCES = (150, 300, 450, 700, 1_000, 1_800)  # tokens; the window is 512
RECALL = 3  # questions for each
TESTED = {"calibration": 2_048, "evaluation": 1_024}  # what `make test-gemma` measures, in two minutes
RATES = {"speed": (4.0, DEFAULT_RATE), "size": (4.0, 3.0, 2.6, 2.0, 1.0)}  # by what is preferred
SPECTRAL = {
    f"rate {rate:g}{', size' if prefer == 'size' else ''}": (prefer, rate) for prefer in RATES for rate in RATES[prefer]
}
DENSE: dict[str, Any] = {"mode": "fixed-a", "k_rank": 1, "v_rank": 1}  # one KV head: the dense cache, written as TPA
OTHERS: dict[str, Callable[[Any], Any]] = {
    **{f"dense, {dtype}": lambda dense, dtype=dtype: convert(dense, TPAConfig(**DENSE, kv_dtype=dtype))  # type: ignore
       for dtype in ("int8", "int4")},
    **{f"like KIVI, {bits} bits": partial(kivi_like, bits=bits) for bits in (4, 2)},
    **{f"like TurboQuant, {bits} bits": partial(turboquant_like, bits=bits) for bits in (4, 3)},
}  # fmt: skip
SETTINGS = [*OTHERS, *SPECTRAL]
KINDS = {"rate": plots.INK["tpa"], "size": "C4", "KIVI": "C1", "TurboQuant": "C2", "dense": "C7"}
LABELS = {"rate": "TPA, prefer speed", "size": "TPA, prefer size", "dense": "int8, int4"}


class Bench:
    """The dense model, moments of the calibration text, and transforms for each length that bits are planned for."""

    def __init__(self, checkpoint: Path, tokens: int, device: str = "cpu"):
        from tpa_torch import calibrate, load

        self.dense = load(checkpoint, dtype="float32", device=device)
        bar = options.progress_bar("calibrating")
        self.moments = calibrate(self.dense, shipped("calibration"), max_tokens=tokens, predict=True, progress=bar)
        self.curves: dict[Any, Curve] = {}

    def curve(self, name: str, context: int) -> Curve:
        prefer, rate = SPECTRAL.get(name) or ("size", 1.0)
        key = prefer, rate if prefer == "speed" else 0.0, context  # of bands, what is left hangs on the bits before it
        if key not in self.curves:
            config = TPAConfig(rate=rate, context=context, prefer=prefer)
            self.curves[key] = Curve(self.dense, self.moments, config, context)
        return self.curves[key]

    def cache(self, name: str, context: int) -> tuple[Any, dict[str, float]]:
        """(a model with the cache of a setting, its ratio and, where it is known, predicted damage)."""
        if name in OTHERS:
            model = OTHERS[name](self.dense)
            bits = bits_per_number(model)
            return model, {"ratio": 16 / bits if bits else ratio(model, context)}
        curve = self.curve(name, context)
        rate = SPECTRAL[name][1] if name in SPECTRAL else float(name.split()[1].strip(","))
        model = curve.converted(rate)
        return model, {"ratio": ratio(model, context), "predicted": curve.trial(rate).predicted}

    def measure(self, name: str, text: str, length: int, tokens: int, context: int | None = None) -> dict[str, Any]:
        """The figures of one setting on one text."""
        model, known = self.cache(name, context or length)
        return evaluate(self.dense, model, shipped(text), tokens, length, recall_prompts=0) | known

    def recall(self, model: Any) -> dict[int, float]:
        """The share of recall questions answered right, by distance."""
        filler = model.tokenizer.encode(shipped("prose"), bos=False)
        return recall_accuracy(model, filler, RECALL, DISTANCES)


def ratio(model: Any, length: int) -> float:
    """How many times smaller than `windowed` the cache is at a length."""
    return windowed_bytes(model.config, length) / model.new_cache(1, 1).nbytes_at(length)


def measured(bench: Bench, name: str) -> dict[str, Any]:
    """All figures of one setting."""
    found = {f"{text} {length}": bench.measure(name, text, length, EVALUATION) for text in TEXTS for length in LENGTHS}
    return found | {"recall": bench.recall(bench.cache(name, LENGTHS[0])[0])}


def whole_texts(bench: Bench, name: str) -> dict[str, Any]:
    """Figures of texts in one piece, with the bits of longer ones."""
    return {text: bench.measure(name, text, LONG, LONG, PLANNED) for text in TEXTS}


# ---- table and picture ----


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| cache | smaller | KL, prose | median | 99 % | KL, code | top-1 | perplexity, prose | recall in the window, "
        "beyond | KL at 8,192 tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    settings = found["settings"]
    first = settings[SETTINGS[0]]["prose 2048"]
    lines.append(
        f"| dense, bfloat16 (`windowed`) | 1.0x | 0 | 0 | 0 | 0 | 100.0 % | {first['ppl_dense']:.2f} | "
        f"{recall_cell(found['recall_dense'])} | 0 |"
    )
    for name in SETTINGS:
        of = settings[name]
        prose, code = of["prose 2048"], of["code 2048"]
        longer = [of[f"{text} 8192"]["kl"] for text in TEXTS]
        shown = f"**{name}, the default**" if name == f"rate {DEFAULT_RATE:g}" else name
        cells = [
            shown, f"{prose['ratio']:.1f}x", f"{prose['kl']:.4f}", f"{prose['kl_median']:.4f}",
            f"{prose['kl_p99']:.3f}", f"{code['kl']:.4f}", f"{100 * (prose['top1'] + code['top1']) / 2:.1f} %",
            f"{prose['ppl_tpa']:.2f}", recall_cell(of["recall"]), f"{longer[0]:.4f}, {longer[1]:.4f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    said = found["environment"]
    long = "; ".join(
        f"{of['prose']['ratio']:.1f}x: KL {of['prose']['kl']:.4f} on prose, {of['code']['kl']:.4f} on code"
        for of in found["long"].values()
    )
    where = said.get("gpu") or said["processor"]
    return "\n".join([
        *lines, "",
        f"KL in nats, windows of 2,048 tokens but for the last column. Bits planned for {PLANNED:,} tokens, on whole "
        f"texts of {LONG:,}: {long}.", "",
        f"Gemma 3 270M in float32; {found['calibration']:,} tokens to calibrate on, {found['evaluation']:,} of each "
        f"text; {where}, torch {said['torch']}.", "",
    ])  # fmt: skip


def kind_of(name: str) -> str:
    """Which line of the picture a setting belongs to."""
    found = next(kind for kind in KINDS if kind in name)
    return "size" if name.endswith("size") else found


def recall_cell(recall: dict[Any, float]) -> str:
    """Shares inside the window of 512 tokens and beyond."""
    shares = [
        np.mean([share for distance, share in recall.items() if (int(distance) > 512) == beyond])
        for beyond in (False, True)
    ]
    return ", ".join(f"{100 * share:.0f} %" for share in shares)


def picture(found: dict[str, Any], path: Path) -> None:
    """Left: KL against size. Right: the KL that calibration predicts against the measured one."""
    figure, (size, truth) = plots.new_figure(2, width=4.6, height=3.8)
    settings = found["settings"]
    for kind, color in KINDS.items():
        names = [name for name in SETTINGS if kind_of(name) == kind]
        for text, style in (("prose", "o-"), ("code", "s--")):
            points = sorted((settings[n][f"{text} 2048"]["ratio"], settings[n][f"{text} 2048"]["kl"]) for n in names)
            label = LABELS.get(kind, f"like {kind}")
            size.plot(*zip(*points, strict=True), style, color=color, label=label if text == "prose" else None, ms=4)
    size.set(xscale="log", yscale="log", xlabel="times smaller than the dense cache", ylabel="KL in nats")
    size.set_title("solid: prose, dashed: code", fontsize=9)
    size.set_xticks([2, 3, 4, 6, 8, 16], ["2", "3", "4", "6", "8", "16"])
    size.minorticks_off()
    size.legend(fontsize=7, loc="lower right")
    for key, style in (("prose 2048", "o"), ("code 2048", "s"), ("prose 8192", "v"), ("code 8192", "^")):
        of = [settings[name][key] for name in SPECTRAL]
        truth.plot([x["predicted"] for x in of], [x["kl"] for x in of], style, label=key, markersize=4)
    line = np.array([2e-4, 0.2])
    truth.plot(line, line, color="0.5", linewidth=1)
    truth.fill_between(line, line / 2, line * 2, color="0.9", label="within a factor of 2")
    truth.set(xscale="log", yscale="log", xlabel="damage predicted by calibration", ylabel="measured KL in nats")
    truth.legend(fontsize=7)
    plots.write(figure, path)


def main() -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=TARGET)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gemma_settings.json", help="figures so far")
    args = parser.parse_args()
    args.work.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.work.read_text()) if args.work.is_file() else {}
    said = environment("torch", args.device)
    if args.device.startswith("cuda"):
        import torch

        said["gpu"] = torch.cuda.get_device_name()
    found = {"calibration": CALIBRATION, "evaluation": EVALUATION, "environment": said} | found

    def fill(part: str, names: list[str], run: Callable[[str], Any]) -> None:
        """What is missing of one part."""
        held = found.setdefault(part, {})
        for name in names:
            if name not in held:
                start = time.perf_counter()
                held[name] = run(name)
                write_json(args.work, found)
                print(f"{part}: {name}, {time.perf_counter() - start:.0f} s", flush=True)

    bench = cache(lambda tokens: Bench(args.ckpt, tokens, args.device))
    if "recall_dense" not in found:
        found["recall_dense"] = bench(CALIBRATION).recall(bench(CALIBRATION).dense)
    fill("settings", SETTINGS, lambda name: measured(bench(CALIBRATION), name))
    long = [f"rate {rate:g}, size" for rate in LONG_RATES]
    fill("long", long, lambda name: whole_texts(bench(CALIBRATION), name))
    tokens = TESTED["evaluation"]
    fill("tested", SETTINGS, lambda name: bench(TESTED["calibration"]).measure(name, "prose", tokens, tokens))
    write_json(args.out / "gemma_settings.json", found)
    (args.out / "gemma_settings.md").write_text(table(found), encoding="utf-8")
    picture(found, args.out / "gemma_settings.png")


if __name__ == "__main__":
    options.run(main)
