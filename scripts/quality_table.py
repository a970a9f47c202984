#!/usr/bin/env python3
"""What every kind of cache costs and saves on the tiny model, measured; the tables and pictures of the README.

    python scripts/quality_table.py        # results/tiny_quality.*, claims.md, pareto.png, bits.png; 10 minutes

Nothing is healed, every layer is compressed, and everything that a cache holds is counted. Constant factors come from
calibration text that the evaluation text shares no document with; plans are made on a third text. Settings that were
measured before are kept in --work and not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from tpa_ref import plots
from tpa_ref.cli import options
from tpa_ref.cli.report import write_json
from tpa_ref.cli.steps import Work
from tpa_ref.compress.config import TPAConfig
from tpa_ref.compress.plan import make_plan
from tpa_ref.gemma.memory import full_bytes, windowed_bytes
from tpa_ref.gemma.texts import read_text

CONTEXT = 1024  # where ratios of the table are taken: what the text windows fill
# (mode, K and V rank, dtype); g = 4, d = 32, so the exact ranks are 4, 4, 32 and 128.
FIXED = [
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
BESIDE = (3.0, 2.0, 1.0)  # rates of V alone, beside exact K in int8
BUDGETS = (4, 8, 12, 16, 24, 32, 48, 64)  # spectral, planned to be so many times smaller than windowed at CONTEXT
# (label, context, kv budget, KL that is asked for)
CLAIMS = [
    ("all layers full (128 tokens)", 128, 8, 0.012),
    ("all layers full (128 tokens)", 128, 16, 0.07),
    ("4B's share of window layers at 32k (3,600 tokens)", 3_600, 16, 0.03),
    ("32,768 tokens", 32_768, 20, 0.02),
    ("32,768 tokens", 32_768, 32, None),
]


def main() -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_model_options(parser)
    parser.add_argument("--out", default=str(ROOT / "results"), help="a folder")
    parser.add_argument("--work", default=str(ROOT / "runs" / "quality"), help="what was measured already")
    parser.add_argument("--eval-tokens", type=int, default=8_192)
    parser.add_argument("--recall-prompts", type=int, default=4, help="questions for each distance")
    args = parser.parse_args()
    out, work = Path(args.out), Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args, work)
    print(HEADER)
    fixed = [bench.fixed(*setting) for setting in FIXED]
    fixed += [bench.beside(rate) for rate in BESIDE]
    spectral = [bench.planned(CONTEXT, budget, predict) for predict in (False, True) for budget in BUDGETS]
    claims = [
        bench.planned(context, budget) | {"label": label, "budget": budget, "asked": kl}
        for label, context, budget, kl in CLAIMS
    ]
    bounded = bench.bounded(2048, 0.02)
    content = {
        "context": CONTEXT,
        "rows": fixed + spectral,
        "claims": claims,
        "bounded": bounded,
        "bound": bench.bound(BUDGETS),
        "transformers": transformers_cache(),
        "environment": bench.environment,
    }
    write_json(str(out / "tiny_quality.json"), content)
    (out / "tiny_quality.md").write_text(markdown(content), encoding="utf-8")
    (out / "claims.md").write_text(claims_markdown(content), encoding="utf-8")
    draw_pareto(content, str(out / "pareto.png"))
    draw_bits(claims, bench.dense.config, str(out / "bits.png"))
    print(f"\nwritten: tiny_quality.json, tiny_quality.md, claims.md, pareto.png and bits.png in {out}")


class Bench:
    """The tiny model, its moments and texts; every setting is measured once and kept in a file."""

    def __init__(self, args: argparse.Namespace, work: Path):
        opened = Work(args, args.ckpt or str(options.TINY), ("dtype",))
        self.backend, self.environment, self.dense = opened.backend, opened.environment, opened.load()
        self.args, self.work = args, work
        self.text = read_text(options.TINY / "evaluation.txt")
        self.holdout = read_text(options.TINY / "holdout.txt")
        self.moments = self.backend.calibrate(
            self.dense, read_text(options.TINY / "calibration.txt"), max_tokens=32_768, cache_dir=work
        )

    def fixed(self, mode: str, rank: int, dtype: str) -> dict[str, Any]:
        name = NAMES.get((mode, rank, dtype), mode)
        config = TPAConfig(mode=mode, k_rank=rank, v_rank=rank, kv_dtype=dtype)
        return self._measured(config, CONTEXT, {"name": name, "mode": mode, "rank": rank, "dtype": dtype})

    def beside(self, rate: float) -> dict[str, Any]:
        about = {"name": "exact int8 K, spectral V", "mode": "latent", "rank": None, "dtype": f"8, {rate:g} bits"}
        return self._measured(TPAConfig(k_mode="fixed-a", rate=rate, context=CONTEXT), CONTEXT, about)

    def planned(self, context: int, budget: float, predict: bool = True) -> dict[str, Any]:
        base = TPAConfig(rate=1.0, predict=predict, prefer="size")
        plan = make_plan(self.dense, self.moments, kv_budget=budget, context=context, base=base)
        name = "spectral" if predict else "spectral without prediction"
        about: dict[str, Any] = {"name": name, "mode": "latent", "rank": None, "dtype": f"{plan.chosen.rate:.2f} bits"}
        about |= {"predicted": plan.chosen.predicted, "bound": plan.bound_damage, "rate": plan.chosen.rate}
        return self._measured(plan.config, context, about)

    def bounded(self, context: int, max_kl: float) -> dict[str, Any]:
        """A plan for a bound on KL, and what it gives on text that the planner has not seen."""
        file = self.work / f"bounded-{context}-{max_kl}.json"
        if not file.exists():
            plan = make_plan(self.dense, self.moments, max_kl=max_kl, context=context, holdout=self.holdout)
            row = self._measured(plan.config, context, {"name": f"--max-kl {max_kl}"})
            write_json(str(file), row | {"plan": plan.to_dict()})
        return json.loads(file.read_text())

    def bound(self, budgets: tuple[float, ...]) -> list[list[float]]:
        """(ratio, predicted damage, least damage of any Gaussian code with as many bits) along the rates."""
        trials = []
        for budget in budgets:
            plan = make_plan(self.dense, self.moments, kv_budget=budget, context=CONTEXT)
            trials.append([plan.chosen.ratio_vs_windowed, plan.chosen.predicted, plan.bound_damage])
        return trials

    def _measured(self, config: TPAConfig, context: int, about: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps([config.to_dict(), context, self.args.eval_tokens, self.args.recall_prompts])
        file = self.work / f"{abs(hash_of(key)):x}.json"
        if not file.exists():
            start = time.perf_counter()
            tpa = self.backend.convert(self.dense, config, calibration=self.moments)
            quality = self.backend.evaluate(
                self.dense, tpa, self.text, self.args.eval_tokens, recall_prompts=self.args.recall_prompts
            )
            held = tpa.new_cache(1, context).nbytes
            model = self.dense.config
            row = {
                "context": context,
                "bytes": held,
                "ratio_vs_full": full_bytes(model, context) / held,
                "ratio_vs_windowed": windowed_bytes(model, context) / held,
                "bits": [sum(getattr(pair.k, "widths", ())) for pair in tpa.pairs],
                "ranks": [pair.k.rank for pair in tpa.pairs],
                **quality,
                "seconds": time.perf_counter() - start,
            }
            write_json(str(file), row)
        row = about | json.loads(file.read_text())
        print(line(row), flush=True)
        return row


def hash_of(text: str) -> int:
    """A hash that is the same in every run."""
    import hashlib

    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def transformers_cache() -> dict[str, Any]:
    """Bytes of the bf16 cache of `transformers` after CONTEXT tokens, and what its quantized cache says to Gemma 3."""
    try:
        import torch
        import transformers
    except ImportError:
        return {}
    model = transformers.Gemma3ForCausalLM.from_pretrained(options.TINY, dtype=torch.bfloat16)
    cache: Any = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.full((1, CONTEXT), 5), past_key_values=cache)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    try:
        transformers.QuantizedCache("quanto", model.config)
        refusal = ""
    except Exception as problem:
        refusal = f"{type(problem).__name__}: {problem}"
    return {"version": transformers.__version__, "bytes": held, "quantized": refusal}


HEADER = (
    "| cache | rank | stored as | full / TPA | windowed / TPA | KL (nats) | top-1 | perplexity | recall |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['name']} | {row.get('rank') or ''} | {row.get('dtype', '')} | {row['ratio_vs_full']:.2f}x "
        f"| {row['ratio_vs_windowed']:.2f}x | {row['kl']:.5f} | {100 * row['top1']:.1f} % | {row['ppl_tpa']:.2f} "
        f"| {100 * row['recall_tpa']:.0f} % |"
    )


def machine(environment: dict[str, Any]) -> str:
    return (
        f"Python {environment['python']}, torch {environment['torch']}, {environment['processor']}, "
        f"{environment['threads']} threads, float32."
    )


def markdown(content: dict[str, Any]) -> str:
    """The table as it stands in the README."""
    first = content["rows"][0]
    note = (
        f"At {content['context']:,} tokens, {first['tokens']:,} tokens of unseen documents, dense perplexity "
        f"{first['ppl_dense']:.2f}, dense recall {100 * first['recall_dense']:.0f} %. {machine(content['environment'])}"
    )
    theirs = content["transformers"]
    if theirs:
        dense = first["ratio_vs_windowed"] * first["bytes"]
        times = dense / theirs["bytes"]
        note += (
            f" The bf16 cache of transformers {theirs['version']} (`DynamicCache(config=...)`) holds "
            f"{theirs['bytes']:,} bytes there, {times:.2f}x by the same measure; its `QuantizedCache` refuses Gemma 3: "
            f'"{theirs["quantized"].split(". We")[0]}".'
        )
    return "\n".join([HEADER, *(line(row) for row in content["rows"]), "", note, ""])


def claims_markdown(content: dict[str, Any]) -> str:
    """What was asked for, and what is measured."""
    lines = [
        "| planned for | asked | windowed / TPA | full / TPA | KL (nats) | 99 % | top-1 | recall (dense) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in content["claims"]:
        asked = f">= {row['budget']}x" + (f", KL <= {row['asked']}" if row["asked"] else "")
        lines.append(
            f"| {row['label']} | {asked} | {row['ratio_vs_windowed']:.2f}x | {row['ratio_vs_full']:.1f}x "
            f"| {row['kl']:.4f} | {row['kl_p99']:.3f} | {100 * row['top1']:.1f} % "
            f"| {100 * row['recall_tpa']:.0f} % ({100 * row['recall_dense']:.0f} %) |"
        )
    bounded = content["bounded"]
    measured = bounded["plan"]["chosen"]["kl"]
    note = (
        f"No newest-token window; nothing healed. `--max-kl 0.02` at {bounded['context']:,} tokens: "
        f"{bounded['ratio_vs_windowed']:.1f}x, KL {measured:.4f} on the planner's text and {bounded['kl']:.4f} "
        f"on text it has not seen. {machine(content['environment'])}"
    )
    return "\n".join([*lines, "", note, ""])


# ---- pictures ----


def draw_pareto(content: dict[str, Any], path: str) -> None:
    """KL against ratio for every cache, with the prediction and the rate-distortion bound of the spectral one."""
    figure, axis = plots.new_figure(1, width=6.8, height=4.6)
    groups = {
        "dense cache": ("s", "#000000"),
        "contextual": ("^", "#5b6a78"),
        "fixed-a": ("v", "#8a97a3"),
        "fixed-b": ("D", "#2f6f9f"),
        "latent": ("o", "#7a5195"),
        "exact int8 K": ("X", "#a3be8c"),
        "spectral without prediction": ("P", "#d08770"),
        "spectral": ("*", plots.INK["tpa"]),
    }
    for name, (marker, colour) in groups.items():
        rows = [row for row in content["rows"] if row["name"].split(",")[0] == name and row["kl"] > 1e-6]
        points = np.array([[row["ratio_vs_windowed"], row["kl"]] for row in rows])
        size = {"*": 11, "P": 7}.get(marker, 5)
        joined = "-" if marker in "*PX" else ""
        label = "exact int8 K, spectral V" if name == "exact int8 K" else name
        axis.plot(*points.T, marker + joined, color=colour, label=label, ms=size, lw=1.2)
    ratio, predicted, bound = np.array(content["bound"]).T
    axis.plot(ratio, predicted, "--", color=plots.INK["tpa"], lw=1, label="spectral, predicted damage")
    axis.plot(ratio, bound, ":", color="#000000", lw=1.2, label="Gaussian rate-distortion bound")
    axis.set(xscale="log", yscale="log", xlabel="times smaller than the windowed bf16 cache", ylabel="KL (nats)")
    axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axis.set_ylim(1e-5, 3)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(f"Tiny model, {content['context']:,} tokens, unseen documents")
    plots.write(figure, path)


def draw_bits(claims: list[dict[str, Any]], config: Any, path: str) -> None:
    """Bits per number of K and V, and how many coefficients have any, layer by layer, of each plan."""
    figure, axes = plots.new_figure(2, width=4.8, height=2.9)
    numbers = 2 * config.num_kv_heads * config.head_dim
    labels = [f"{row['budget']}x at {row['context']:,}" for row in claims]
    bits = np.array([row["bits"] for row in claims]) / numbers
    ranks = np.array([row["ranks"] for row in claims])
    pictures = (bits, "{:.1f}", "bits per number of K and V"), (ranks, "{}", f"coefficients stored, of {numbers}")
    for axis, (values, form, title) in zip(axes, pictures, strict=True):
        image = axis.imshow(values, cmap="cividis", vmin=0, aspect="auto")
        for (row, layer), value in np.ndenumerate(values):
            colour = "white" if value < values.max() / 2 else "black"
            axis.text(layer, row, form.format(value), ha="center", va="center", fontsize=6, color=colour)
        axis.set_yticks(range(len(labels)), labels)
        names = [f"{i}{'*' if is_global else ''}" for i, is_global in enumerate(config.is_global)]
        axis.set_xticks(range(config.num_layers), names)
        axis.set(title=title, xlabel="layer (* global)")
        figure.colorbar(image, ax=axis, shrink=0.8)
    plots.write(figure, path)


if __name__ == "__main__":
    options.run(main)
