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
    ("exact K and V", "int8", "ratio_fastest"),
    ("exact int8 K, spectral V rate 2", "int8", "ratio_fastest"),
    ("exact int8 K, spectral V rate 1", "int8", "ratio_fastest"),
    ("exact K, fixed-b V R=64", "int8", "ratio_fastest"),
    ("latent R=64", "int8", "ratio_fastest"),
    ("spectral rate 2.5", "spectral", "ratio_fastest"),
    ("spectral rate 1", "spectral", "ratio_fastest"),
    ("spectral rate 1, prefer size", "spectral", "ratio_fastest"),
)
# What these caches are called in the table of the tiny model's quality, where they mean the same there: (name, dtype)
QUALITY = {
    ("exact K and V", "int8"): ("dense cache, int8", "int8"),
    ("exact K and V", "int4"): ("dense cache, int4", "int4"),
    ("exact int8 K, spectral V rate 2", "int8"): ("exact int8 K, spectral V", "8, 2 bits"),
    ("exact int8 K, spectral V rate 1", "int8"): ("exact int8 K, spectral V", "8, 1 bits"),
}
MOST_KL = 0.02
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
        f"One decode step of one global layer's attention at {CONTEXT:,} tokens, batch 1, "
        f"{machine['threads']} threads, {machine['clock']}, medians of interleaved runs; above 1 is faster. "
        f"{machine['processor']}, torch {machine['torch']}."
    )
    torchs = " ".join(
        f"{size} {best_of_torch(rows[size, 'dense', 'float32']) / rows[size, 'dense', 'float32']['seconds']:.1f}x,"
        for size in sizes
    )
    note += f" The dense cache itself is read faster than PyTorch's best product does it in float32: {torchs[:-1]}."
    if best := best_at_equal_quality(rows, sizes):
        note += "\n\n" + best
    return "\n".join([*lines, "", note, ""])


def best_of_torch(row: dict) -> float:
    """Seconds of the fastest way to dense attention that is not ours."""
    return min(seconds for way, seconds in row["ways"].items() if way != "ours")


def best_at_equal_quality(rows: dict, sizes: list[str]) -> str:
    """The fastest cache among those that keep the tiny model's predictions, in a sentence."""
    found = common.RESULTS / "tiny_quality.json"
    if not found.is_file():
        return ""
    quality = {(r["name"], r["dtype"]): r for r in json.loads(found.read_text(encoding="utf-8"))["rows"]}
    kl = {cache: quality[name]["kl"] for cache, name in QUALITY.items() if name in quality}
    kept = [cache for cache in kl if kl[cache] <= MOST_KL and all((size, *cache) in rows for size in sizes)]
    if not kept:
        return ""
    ratio = {(name, dtype): [rows[size, name, dtype]["ratio_fastest"] for size in sizes] for name, dtype in kept}
    best = max(kept, key=lambda cache: min(ratio[cache]))
    ratios = ", ".join(f"{size} {times:.2f}x" for size, times in zip(sizes, ratio[best], strict=True))
    others = "; ".join(f"{name}, {dtype}: KL {kl[name, dtype]:.5f}" for name, dtype in kept if (name, dtype) != best)
    return (
        f"**The fastest cache with a KL of at most {MOST_KL} on the tiny model: {best[0]}, {best[1]}** "
        f"(KL {kl[best]:.5f}): {ratios} of the fastest dense. Others within the bound: {others}."
    )


if __name__ == "__main__":
    common.options.run(main)
