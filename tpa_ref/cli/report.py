"""What the commands print, and their reports."""

from __future__ import annotations

import json
import os
from itertools import groupby
from pathlib import Path
from typing import Any

from ..atomic import replacing
from ..compress.config import widths_of
from ..core.banded import Banded
from ..core.mode import Mode
from ..core.pair import Joint
from ..errors import TPAError
from ..files.pairs import describe
from ..gemma.config import GemmaConfig
from ..gemma.memory import parameter_count

QUALITY = """
Quality on {tokens:,} tokens of held-out text
  KL(dense || TPA)   mean {kl:.5f}   95 % {kl_p95:.4f}   99 % {kl_p99:.4f}   max {kl_max:.3f} nats
  KL by position     {positions}
  top-1 agreement    {percent:.2f} %
  perplexity         dense {ppl_dense:.3f}   TPA {ppl_tpa:.3f}"""


def describe_config(config: GemmaConfig) -> str:
    """A model in one line."""
    vision = config.vision
    line = (
        f"Gemma 3 {config.variant}: {config.num_layers} layers ({config.num_global} global), "
        f"width {config.hidden_size}, {config.num_heads} query and {config.num_kv_heads} KV heads of "
        f"{config.head_dim}, window {config.sliding_window}, {parameter_count(config) / 1e6:,.1f} M parameters"
    )
    if vision is None:
        return line
    return f"{line}, images of {vision.image_size} x {vision.image_size} as {vision.tokens_per_image} tokens"


def describe_pairs(model: Any) -> list[str]:
    """One line for each run of layers that cache in the same way."""
    lines, start = [], 0
    for shown, run in groupby(map(_describe_pair, model.pairs)):
        end = start + len(list(run))
        lines.append(f"layer {start}: {shown}" if end == start + 1 else f"layers {start}-{end - 1}: {shown}")
        start = end
    return lines


def _describe_pair(pair: Any) -> str:
    if isinstance(pair, Joint) and pair.is_exact:
        return "K and V follow from the token, nothing is stored"
    if isinstance(pair, Joint):
        return f"K and V {_describe_mode(pair.k, 2)}"
    if isinstance(pair, Banded):
        (fast, slow), (last,) = pair.k.strings, pair.v.strings  # type: ignore[attr-defined]
        groups, bits = pair.k.groups, sum(pair.k.widths) + sum(pair.v.widths)  # type: ignore[attr-defined]
        numbers, each = pair.k.g // groups * pair.k.d, f", in each of {groups} groups of heads" if groups > 1 else ""
        coded = f"{fast} + {slow} of {numbers} coefficients of K (fast pairs, slow ones) and {last} of V coded{each}"
        return f"banded, {bits / (2 * numbers):.2f} bits/number; {coded}"
    return f"K {_describe_mode(pair.k)}, V {_describe_mode(pair.v)}"


def _describe_mode(mode: Mode, sides: int = 1) -> str:
    if not hasattr(mode, "widths"):
        return f"{mode.name}{f' R={mode.rank}' if mode.rank else ''} {mode.dtype}"
    numbers = sides * mode.g * mode.d
    rest = ", the rest predicted from tokens" if mode.arrays()["predictor"] is not None else ""
    return f"{sum(mode.widths) / numbers:.2f} bits/number; {mode.rank} of {numbers} coefficients coded{rest}"


def print_conversion(model: Any, plan: Any = None) -> None:
    """The plan, what had to be clamped, how every layer caches, and what does not help."""
    lines = [f"plan: {plan.message}"] if plan else []
    lines += (model.notes if model.tpa else []) + describe_pairs(model)
    names = {mode.name for pair in model.pairs for mode in pair.modes}
    if model.config.num_kv_heads == 1 and names & {"contextual", "fixed-a"}:
        what = "head-rank factors (contextual, fixed-a) cannot make its cache smaller"
        lines.append(f"note: this model has one KV head; {what}")
    for line in lines:
        print(f"  {line}")


def print_preferences(found: dict[str, Any], chosen: str) -> None:
    """What either choice of --prefer comes to at this rate: bytes, and the damage that calibration predicts."""
    for prefer, trial in found.items():
        size = f"{trial.ratio_vs_windowed:.1f}x smaller than windowed, predicted loss {trial.predicted:.4f} nats"
        print(f"  --prefer {prefer:<5} at this rate: {size}{', chosen' if prefer == chosen else ''}")


def print_quality(quality: dict[str, Any]) -> None:
    """The figures of `evaluate`."""
    positions = ", ".join(f"{value:.4f} from {start}" for start, value in quality["kl_by_position"].items())
    print(QUALITY.format(**quality, positions=positions, percent=100 * quality["top1"]))
    if quality["recall_dense"] is not None:
        dense, tpa = 100 * quality["recall_dense"], 100 * quality["recall_tpa"]
        facts = list(quality["recall_dense_by_distance"])
        back = f"(facts {facts[0]} to {facts[-1]} tokens back)"
        print(f"  recall             dense {dense:.0f} %   TPA {tpa:.0f} %   {back}")


def print_speed(speed: dict[str, dict[str, float]], tokens: int) -> None:
    """Prefill and decode, dense beside TPA."""
    print(f"\nSpeed, batch 1, {tokens:,} tokens (tokens/s)")
    for kind in ("prefill", "decode"):
        dense, tpa = (speed[name][f"{kind}_tokens_per_s"] for name in ("dense", "tpa"))
        print(f"  {kind:<18} dense {dense:>9,.1f}   TPA {tpa:>9,.1f}   TPA/dense {tpa / dense:.2f}x")


def ranks_used(model: Any) -> list[dict[str, dict[str, Any]]]:
    """Of every layer's K and V: mode, rank, dtype, and the bits of a token's coefficients."""

    def used(entry: dict[str, Any]) -> dict[str, Any]:
        bits = sum(map(sum, map(widths_of, strings_of(entry["widths"])))) if "widths" in entry else None
        return {name: entry[name] for name in ("mode", "rank", "dtype")} | {"bits": bits}

    return [dict(zip("kv", map(used, describe(pair)), strict=True)) for pair in model.pairs]


def strings_of(counts: list[Any]) -> list[Any]:
    """The counts of widths of each string of codes."""
    return counts if counts and isinstance(counts[0], list) else [counts]


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of everything in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


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
