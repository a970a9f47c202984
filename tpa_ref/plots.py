"""The pictures: memory against context, recall against distance, speed. Readable in grey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .atomic import replacing
from .gemma.memory import full_bytes, windowed_bytes

INK = {"full": "#000000", "windowed": "#5b6a78", "tpa": "#c8501e"}  # dark, middle, warm: apart in grey as well
MODELS = (("dense", "dense", INK["windowed"]), ("tpa", "TPA", INK["tpa"]))  # name in a report, label, colour


def new_figure(columns: int = 1, width: float = 4.6, height: float = 3.6) -> tuple[Any, Any]:
    """(figure, axes) without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained")


def write(figure: Any, path: str | Path) -> None:
    """PNG (or what the suffix says) under a temporary name, then renamed."""
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")


def plot_memory(axis: Any, config: Any, cache_of: Any, context: int) -> None:
    """Cache bytes against context, log-log, both baselines and TPA; cache_of: tokens -> bytes."""
    lengths = sorted({context, *(2**power for power in range(6, max(8, context.bit_length())))})
    for label, style, width, size in (
        ("full", ":", 1.5, lambda n: full_bytes(config, n)),
        ("windowed", "--", 1.5, lambda n: windowed_bytes(config, n)),
        ("TPA", "-", 2, cache_of),
    ):
        axis.plot(lengths, [size(n) / 2**20 for n in lengths], style, color=INK[label.lower()], lw=width, label=label)
    axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="KV cache (MiB)", title="Memory, batch 1")
    axis.legend(frameon=False)


def plot_recall(axis: Any, quality: dict[str, Any], window: int) -> None:
    """Recall against distance, dense and TPA."""
    for (name, label, colour), style in zip(MODELS, ("s--", "o-"), strict=True):
        found = quality.get(f"recall_{name}_by_distance") or {}
        axis.plot([int(x) for x in found], [100 * y for y in found.values()], style, color=colour, label=label)
    axis.axvline(window, color="#999999", lw=0.8)
    axis.text(window, 3, " window", color="#666666", fontsize=8)
    axis.set(xlabel="distance of the fact (tokens)", ylabel="answered right (%)", ylim=(0, 105), xlim=(0, None))
    axis.set_title(f"Recall; KL {quality['kl']:.4f} nats, top-1 {100 * quality['top1']:.1f} %")
    axis.legend(frameon=False)


def plot_speed(axis: Any, speed: dict[str, dict[str, float]]) -> None:
    """Prefill and decode tokens per second, dense and TPA."""
    kinds = ("prefill_tokens_per_s", "decode_tokens_per_s")
    for offset, (name, label, colour) in enumerate(MODELS):
        heights, hatch = [speed[name][kind] for kind in kinds], "//" if name == "dense" else ""
        bars = axis.bar([x + 0.38 * offset for x in range(2)], heights, 0.36, color=colour, hatch=hatch, label=label)
        axis.bar_label(bars, [f"{height:,.0f}" for height in heights], padding=2, fontsize=8)
    axis.set(yscale="log", ylabel="tokens per second", title="Speed, batch 1")
    axis.set_xticks([0.19, 1.19], ["prefill", "decode"])
    axis.legend(frameon=False)


def write_report(path: str, tpa: Any, report: dict[str, Any]) -> None:
    """Three panels: memory, recall, speed."""
    figure, (left, middle, right) = new_figure(3)
    plot_memory(left, tpa.config, tpa.new_cache(1, 1).nbytes_at, report["kv"]["context"])
    plot_recall(middle, report["quality"], tpa.config.sliding_window)
    plot_speed(right, report["speed"])
    write(figure, path)
