"""What the commands print, and the report: descriptions, tables, JSON, the picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .. import plots
from ..atomic import replacing
from ..compress.config import widths_of
from ..core.mode import Mode
from ..errors import TPAError
from ..files.pairs import describe, is_joint
from ..gemma.config import GemmaConfig
from ..gemma.memory import parameter_count

# ---- one line each ----


def describe_config(config: GemmaConfig) -> str:
    """A model in one line."""
    line = (
        f"Gemma 3 {config.variant}: {config.num_layers} layers ({config.num_global} global), "
        f"width {config.hidden_size}, {config.num_heads} query and {config.num_kv_heads} KV heads of "
        f"{config.head_dim}, window {config.sliding_window}, {parameter_count(config) / 1e6:,.1f} M parameters"
    )
    side, vision = config.vision and config.vision.image_size, config.vision
    return f"{line}, images of {side} x {side} as {vision.tokens_per_image} tokens" if vision else line


def describe_environment(environment: dict[str, Any]) -> str:
    """A machine in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items() if value)


def describe_pairs(model: Any) -> list[str]:
    """One line for each run of layers that cache in the same way."""
    shown = [_describe_pair(pair) for pair in model.pairs]
    starts = [layer for layer in range(len(shown)) if layer == 0 or shown[layer] != shown[layer - 1]]
    runs = zip(starts, [*starts[1:], len(shown)], strict=True)
    return [
        f"layer{'s' if end - start > 1 else ''} {start}{f'-{end - 1}' if end - start > 1 else ''}: {shown[start]}"
        for start, end in runs
    ]


def _describe_pair(pair: Any) -> str:
    if is_joint(pair):
        return f"K and V {_describe_mode(pair.k, 2)}"
    return f"K {_describe_mode(pair.k)}, V {_describe_mode(pair.v)}"


def _describe_mode(mode: Mode, sides: int = 1) -> str:
    if not hasattr(mode, "widths"):
        return f"{mode.name}{f' R={mode.rank}' if mode.rank else ''} {mode.dtype}"
    numbers = sides * mode.g * mode.d
    rest = ", the rest predicted from tokens" if mode.arrays()["predictor"] is not None else ""
    return f"{sum(mode.widths) / numbers:.2f} bits/number; {mode.rank} of {numbers} coefficients coded{rest}"


def print_conversion(model: Any, plan: Any = None) -> None:
    """The plan, what had to be clamped, how every layer caches, and what does not help."""
    planned = [f"plan: {plan.message}"] if plan else []
    for line in planned + model.notes + describe_pairs(model):
        print(f"  {line}")
    names = {mode.name for pair in model.pairs for mode in pair.modes}
    if model.config.num_kv_heads == 1 and names & {"contextual", "fixed-a"}:
        print(
            "  note: this model has one KV head; head-rank factors (contextual, fixed-a) cannot make its cache smaller"
        )


def print_quality(quality: dict[str, Any]) -> None:
    """The figures of `evaluate`."""
    print(f"\nQuality on {quality['tokens']:,} tokens of held-out text")
    print(
        f"  KL(dense || TPA)   mean {quality['kl']:.5f}   95 % {quality['kl_p95']:.4f}   "
        f"99 % {quality['kl_p99']:.4f}   max {quality['kl_max']:.3f} nats"
    )
    by_position = [f"{value:.4f} from {start}" for start, value in quality["kl_by_position"].items()]
    print(f"  KL by position     {', '.join(by_position)}")
    print(f"  top-1 agreement    {100 * quality['top1']:.2f} %")
    print(f"  perplexity         dense {quality['ppl_dense']:.3f}   TPA {quality['ppl_tpa']:.3f}")
    if quality["recall_dense"] is not None:
        distances = list(quality["recall_dense_by_distance"])
        print(
            f"  recall             dense {100 * quality['recall_dense']:.0f} %"
            f"   TPA {100 * quality['recall_tpa']:.0f} %   (facts {distances[0]} to {distances[-1]} tokens back)"
        )


def print_speed(speed: dict[str, dict[str, float]], tokens: int) -> None:
    """Prefill and decode, dense beside TPA."""
    print(f"\nSpeed, batch 1, {tokens:,} tokens (tokens/s)")
    for kind in ("prefill", "decode"):
        dense, tpa = (speed[name][f"{kind}_tokens_per_s"] for name in ("dense", "tpa"))
        print(f"  {kind:<18} dense {dense:>9,.1f}   TPA {tpa:>9,.1f}   TPA/dense {tpa / dense:.2f}x")


# ---- figures ----


def ranks_used(model: Any) -> list[dict[str, dict[str, Any]]]:
    """Of every layer's K and V: mode, rank, dtype, and the bits of a token's coefficients."""
    return [
        {
            side: {name: entry[name] for name in ("mode", "rank", "dtype")}
            | {"bits": sum(widths_of(entry.get("widths", ()))) or None}
            for side, entry in zip("kv", describe(pair), strict=True)
        }
        for pair in model.pairs
    ]


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of everything in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# ---- files ----


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write a report under a temporary name, then rename."""
    with replacing(check_writable(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_writable(path: str) -> Path:
    """Refuse early, before minutes of work, a file that cannot be written."""
    target = Path(path)
    parent = target.absolute().parent
    if not parent.is_dir():
        raise TPAError(f"output: the folder of {target} does not exist: {parent}")
    if target.is_dir():
        raise TPAError(f"output: {target} is a folder, a file was expected")
    if not os.access(parent, os.W_OK):
        raise TPAError(f"output: no permission to write in {parent}")
    return target


def plot(path: str, tpa: Any, report: dict[str, Any]) -> None:
    """Three panels: memory, recall, speed."""
    figure, (left, middle, right) = plots.new_figure(3)
    plots.plot_memory(left, tpa.config, tpa.new_cache(1, 1).nbytes_at, report["kv"]["context"])
    plots.plot_recall(middle, report["quality"], tpa.config.sliding_window)
    plots.plot_speed(right, report["speed"])
    plots.write(figure, path)
