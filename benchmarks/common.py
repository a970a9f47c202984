"""What the benchmarks share: interleaved timing, what the machine can do at best, tables, plots."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "cuda"), str(ROOT / "scripts")]

import torch

from tpa_ref import plots
from tpa_ref.cli import options
from tpa_ref.cli.machine import environment
from tpa_ref.cli.report import write_json
from tpa_ref.errors import TPAError

RESULTS = ROOT / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    found = options.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cpu")
    found.add_argument("--out", metavar="FOLDER", default=str(RESULTS), help="where .json, .md and .png go")
    found.add_argument("--threads", type=int, help="threads of torch (default: as many as it chooses)")
    found.add_argument("--repeats", type=int, default=5, help="runs of everything, of which the median is taken")
    found.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds of this thread, for a machine that others use too; wants --threads 1",
    )
    return found


class Clock:
    """Seconds on a device."""

    def __init__(self, args: argparse.Namespace):
        if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
            raise TPAError("--clock cpu counts one thread of a CPU: it wants --threads 1 and --device cpu")
        if args.repeats < 1:
            raise TPAError(f"--repeats must be >= 1, got {args.repeats}")
        if args.threads:
            torch.set_num_threads(args.threads)
        self.device, self.repeats = args.device, args.repeats
        self._now = time.thread_time if args.clock == "cpu" else time.perf_counter
        self.name = "CPU seconds of one thread" if args.clock == "cpu" else "wall clock"

    def __call__(self, work: Callable[[], Any]) -> float:
        """Seconds of one run."""
        self._wait()
        start = self._now()
        work()
        self._wait()
        return self._now() - start

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def medians(self, works: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each; one run of each after the other, so that all see the same machine."""
        for work in works.values():
            work()
        found: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.repeats):
            for name, work in works.items():
                found[name].append(self(work))
        return {name: statistics.median(seconds) for name, seconds in found.items()}


def machine(clock: Clock) -> dict[str, Any]:
    """Where it runs, and what can be reached there: bytes/s read by a sum, copied, and FLOP/s of matrix products."""
    on = {"device": clock.device}
    large, square = torch.ones(1 << 26, **on), torch.ones(2048, 2048, **on)
    target, half = torch.empty_like(large), square.bfloat16()
    seconds = clock.medians(
        {
            "read": lambda: large.sum(),
            "copy": lambda: target.copy_(large),
            "float32": lambda: square @ square,
            "bfloat16": lambda: half @ half,
        }
    )
    flop = 2 * 2048**3
    return environment("torch", clock.device) | {
        "clock": clock.name,
        "read_bytes_per_s": large.nbytes / seconds["read"],
        "copy_bytes_per_s": 2 * large.nbytes / seconds["copy"],
        "float32_flop_per_s": flop / seconds["float32"],
        "bfloat16_flop_per_s": flop / seconds["bfloat16"],
    }


def describe(found: Mapping[str, Any]) -> str:
    """The machine in a sentence."""
    return (
        f"{found['processor']}, {found['threads']} threads, torch {found['torch']}, {found['clock']}. Measured there: "
        f"{found['read_bytes_per_s'] / 1e9:.1f} GB/s read, {found['copy_bytes_per_s'] / 1e9:.1f} GB/s copied, "
        f"{found['float32_flop_per_s'] / 1e9:,.0f} GFLOP/s in float32, "
        f"{found['bfloat16_flop_per_s'] / 1e9:,.0f} in bfloat16."
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def publish(name: str, args: Any, content: dict[str, Any], text: str, draw: Callable[[Any], None]) -> None:
    """Print, and write NAME.json, .md and .png; results of a GPU lie beside those of a CPU."""
    target = Path(args.out) / (name if args.device == "cpu" else f"{name}_gpu")
    print(text)
    write_json(f"{target}.json", content)
    Path(f"{target}.md").write_text(text, encoding="utf-8")
    figure, axes = plots.new_figure(width=6.4)
    draw(axes)
    plots.write(figure, f"{target}.png")
    print(f"written: {target}.json, .md, .png")


def fill(cache: Any, length: int) -> None:
    """Make a cache of ours as if it had read `length` tokens: random numbers in every array."""
    for layer in cache.layers:
        for ring in layer.rings.values():
            for name, array in ring.arrays.items():
                if array.dtype in (torch.int8, torch.uint8):
                    array.random_(0, 127)
                else:
                    array.uniform_(0.001, 0.01) if name.endswith(".scale") else array.normal_()
    cache.reach(cache.lengths_b * 0 + length)
