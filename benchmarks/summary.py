"""results/speed.md and speed_summary.md from what the three benchmarks wrote: python benchmarks/summary.py"""

from __future__ import annotations

import json

import common

# (cache, dtype, ratio) of the summary: against the best dense of the same dtype, or the fastest of either
CHOSEN = (
    ("contextual R=1", "float32", "ratio_same"),
    ("contextual R=2", "float32", "ratio_same"),
    ("fixed-a R=2", "float32", "ratio_same"),
    ("contextual R=2", "bfloat16", "ratio_fastest"),
    ("fixed-a R=2", "bfloat16", "ratio_fastest"),
    ("exact K, fixed-b V R=64", "int8", "ratio_fastest"),
    ("exact int8 K, spectral V rate 2", "int8", "ratio_fastest"),
    ("latent R=64", "int8", "ratio_fastest"),
    ("spectral rate 1", "spectral", "ratio_fastest"),
)
CONTEXT = 32_768


def main() -> None:
    parts = ["# Speed\n", "Written by `make benchmarks`; every ratio was measured in one interleaved run.\n"]
    for name in ("decode_attention", "end_to_end", "serving"):
        for suffix in ("", "_gpu"):
            path = common.RESULTS / f"{name}{suffix}.md"
            if path.is_file():
                parts.append(path.read_text(encoding="utf-8"))
    target = common.RESULTS / "speed.md"
    target.write_text("\n".join(parts).replace("\n### ", "\n## "), encoding="utf-8")
    print(f"written: {target}")
    found = common.RESULTS / "decode_attention.json"
    if found.is_file():
        short = common.RESULTS / "speed_summary.md"
        short.write_text(summary(json.loads(found.read_text(encoding="utf-8"))), encoding="utf-8")
        print(f"written: {short}")


def summary(content: dict) -> str:
    """How many times faster than the best dense attention, by size."""
    rows = {(r["variant"], r["setting"], r["dtype"]): r for r in content["rows"] if r["context"] == CONTEXT}
    sizes = list(dict.fromkeys(variant for variant, _, _ in rows))
    lines = [f"| cache | compared with the best dense | {' | '.join(sizes)} |", "|---|---|" + "---|" * len(sizes)]
    for setting, dtype, ratio in CHOSEN:
        cells = [rows.get((size, setting, dtype), {}).get(ratio) for size in sizes]
        if any(cell is not None for cell in cells):
            shown = " | ".join("" if cell is None else f"{cell:.2f}x" for cell in cells)
            against = "in float32" if ratio == "ratio_same" else "in either dtype"
            lines.append(f"| {setting}, {dtype} | {against} | {shown} |")
    machine = content["machine"]
    note = (
        f"One decode step of one global layer's attention at {CONTEXT:,} tokens, batch 1, CPU seconds of one thread, "
        f"medians of interleaved runs; above 1 is faster. {machine['processor']}, torch {machine['torch']}."
    )
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    common.cli.run(main)
