"""Convert random checkpoints of the published sizes and measure seconds and peak memory.

    python scripts/full_size.py --work /tmp/full-size                      # 1b whole, 4b conversion: CPU, two cores
    python scripts/full_size.py --work /tmp/full-size --device cuda --whole 1b 4b 12b --variants 1b 4b 12b

Needs the disk for one checkpoint and its conversion at a time (4b: 17 GB). `--whole` sizes also run
`run_test_tpa_1b.py`: prefill of 2,048 tokens, decode of 32, report. Writes results/full_size.json and .md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tpa_ref.cli import options as cli
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.weights import hf_names

GB = 1e9


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


def bound_bytes(config: GemmaConfig) -> int:
    """Largest layer + embedding in bf16 + 1 GB: what a conversion may take."""
    sizes = {name: 2 * _product(shape) for name, shape in hf_names(config).items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    return layer + sizes["model.embed_tokens.weight"] + 1_000_000_000


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def measure(variant: str, form: str, work: Path, device: str, whole: bool) -> dict:
    """The figures of one size; its files are removed again."""
    source, target, report = work / f"random-{variant}", work / f"tpa-{variant}", work / "report.json"
    for folder in (source, target):
        shutil.rmtree(folder, ignore_errors=True)
    spectra = ["--spectra"] if variant == "1b" else []
    run("scripts/random_checkpoint.py", "--variant", variant, "--format", form, "--out", str(source), *spectra)
    convert = ["--ckpt", str(source), "--convert", "--save-tpa", str(target), "--device", device]
    run("scripts/run_tpa.py", *convert, "--report", str(report))
    figures = json.loads(report.read_text())
    figures["checkpoint_bytes"] = sum(file.stat().st_size for file in source.iterdir())
    figures["bound_bytes"] = bound_bytes(GemmaConfig.of_variant(variant))
    figures |= {"variant": variant, "format": form}
    shutil.rmtree(target)
    if whole:
        options = ["--ckpt", str(source), "--device", device, "--report", str(report), "--output", str(target)]
        run("run_test_tpa_1b.py", *options)
        content = json.loads(report.read_text())
        figures["whole"] = {name: content[name] for name in ("speed", "kv", "conversion_seconds", "peak_memory_bytes")}
        shutil.rmtree(target)
    shutil.rmtree(source)
    return figures


def markdown(rows: list[dict]) -> str:
    """Two tables: conversions, and whole runs."""
    environment = rows[0]["environment"]
    lines = [
        "| model | format | checkpoint | converted in | peak memory | layer + embedding + 1 GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['variant']} | {row['format']} | {row['checkpoint_bytes'] / GB:.1f} GB "
            f"| {row['conversion_seconds']:.0f} s | {row['peak_memory_bytes'] / GB:.2f} GB "
            f"| {row['bound_bytes'] / GB:.2f} GB |"
        )
    lines += [
        "",
        f"From disk to disk with `run_tpa.py --convert --save-tpa`, {rows[0]['calibration_tokens']:,} calibration "
        f"tokens, computed in {rows[0]['dtype']}, on {environment['processor']}, {environment['threads']} threads, "
        f"torch {environment['torch']}. "
        "Peak memory is anonymous memory: weights that are used in the dtype they are stored in stay pages of the "
        "mapped file, which the system drops when it needs room.",
        "",
        "| model | prefill dense | prefill TPA | decode dense | decode TPA | windowed | TPA cache | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if whole := row.get("whole"):
            speed = whole["speed"]
            lines.append(
                f"| {row['variant']} "
                + "".join(
                    f"| {speed[name][f'{kind}_tokens_per_s']:,.1f} tokens/s "
                    for kind in ("prefill", "decode")
                    for name in ("dense", "tpa")
                )
                + f"| {whole['kv']['windowed_bytes'] / 1e6:,.0f} MB | {whole['kv']['tpa_bytes'] / 1e6:,.0f} MB "
                f"| {whole['peak_memory_bytes'] / GB:.2f} GB |"
            )
    lines += ["", "`run_test_tpa_1b.py` in memory; prefill of 2,048 tokens, caches at 32,768 tokens."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", metavar="FOLDER", required=True, help="where there is room for checkpoints")
    parser.add_argument("--variants", nargs="+", default=["1b", "4b"])
    parser.add_argument("--whole", nargs="*", default=["1b"], help="sizes that also run in memory")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    forms = {"270m": "hf", "1b": "ckpt"}  # Kaggle's file; the larger ones as Hugging Face has them
    rows = [
        measure(variant, forms.get(variant, "hf-multimodal"), work, args.device, variant in args.whole)
        for variant in args.variants
    ]
    name = "full_size" if args.device == "cpu" else "full_size_gpu"
    (ROOT / "results" / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (ROOT / "results" / f"{name}.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    cli.run(main)
