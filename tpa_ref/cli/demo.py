"""Convert a Gemma 3 checkpoint to TPA, save it, and show what that costs and saves: memory, quality, speed, text.

tpa-demo                                       # the shipped tiny model; in a clone: python run_test_tpa_1b.py
tpa-demo --ckpt /models/gemma-3-1b-pt          # your checkpoint
tpa-demo --mode latent --k-rank 48 --v-rank 64 --kv-dtype int4 --report out.json --plot out.png
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .. import plots
from ..compress.config import DEFAULT_RATE
from ..compress.evaluate import evaluate
from ..errors import TPAError
from ..files.checkpoint import check_output, save
from ..gemma import memory
from ..gemma.chat import prompt_tokens
from ..gemma.generate import generate, prefill
from . import options, report
from .steps import Converted, Work

PROMPT = "Return the number of"
USES = ("dtype", "calibration_tokens", "eval_tokens", "recall_prompts", "timing_rounds", "context")
NEW = 32  # tokens whose decoding is timed


def parse_arguments() -> argparse.Namespace:
    parser = options.shared_parser(__doc__)
    option = parser.add_argument_group("measurement and output").add_argument
    option("--prompt", default=PROMPT)
    places = "where to save: .pt, .safetensors, folder"
    option("--output", "--save-tpa", metavar="PATH", default="tpa_model.pt", help=places)
    option("--eval-text", metavar="FILE", help="held-out text (default: the shipped one)")
    option("--eval-tokens", type=int, metavar="N", help="how much of it is used")
    option("--recall-prompts", type=int, metavar="N", help="recall questions for each distance; 0: none")
    option("--timing-rounds", type=int, metavar="N", help="the medians of so many runs are the speeds")
    option("--report", metavar="FILE.json", help="all figures")
    option("--plot", metavar="FILE.png", help="memory, recall and speed as a picture")
    args = parser.parse_args()
    options.check_counts(args)
    return args


def main() -> None:
    args = parse_arguments()
    for path in filter(None, (args.report, args.plot)):
        report.check_writable(path)
    if args.plot and Path(args.plot).suffix not in (".png", ".svg", ".pdf", ".jpg"):
        raise TPAError(f"--plot must end in .png, .svg, .pdf or .jpg, got {args.plot}")
    check_output(args.output, args.ckpt)
    options.tpa_config(args)  # what is wrong with the options shows now, not after minutes of work
    work = Work(args, args.ckpt or str(options.TINY), USES)
    text = work.text(args.eval_text, "evaluation")
    work.calibration_text()
    check_prompt(work)
    work.introduce()
    dense = work.load()
    done = work.convert(dense, compare=True)
    weights = show_conversion(done, dense, save(done.model, args.output))
    figures = measure(work, dense, done, text) | {"weights_bytes": weights, "text": {"prompt": args.prompt}}
    for name, model in (("dense", dense), ("TPA", done.model)):
        print(f"\n{name}: {args.prompt}", end="", flush=True)
        sampling = vars(options.sampling(args))
        pieces = generate(model, args.prompt, args.max_new_tokens, **sampling, chat=args.chat, system=args.system)
        figures["text"][name.lower()] = options.stream(pieces)
        print()
    figures["environment"] = work.environment
    if args.report:
        report.write_json(args.report, figures)
        print(f"\nreport written to {args.report}")
    if args.plot:
        plots.write_report(args.plot, done.model, figures)
        print(f"picture written to {args.plot}")


def check_prompt(work: Work) -> None:
    """Refuse a checkpoint or a prompt that this command can do nothing with."""
    args, found = work.args, work.found
    if found.tokenizer is None:
        raise TPAError(f"{work.source} has no tokenizer, and text needs one; give its file with --tokenizer")
    if found.tpa is not None:
        raise TPAError(f"{work.source} is already a TPA model; give the dense checkpoint")
    ids = prompt_tokens(found, args.prompt, args.chat, system=args.system)
    options.sampling(args).check(found.config, len(ids), args.max_new_tokens)


def show_conversion(done: Converted, dense: Any, saved: Path) -> dict[str, int]:
    """Say what was converted, and to what; the bytes of the weights of both models."""
    source = f"{done.calibration_tokens:,} calibration tokens" if done.calibration_tokens else "the weights alone"
    print(f"\nconverted in {done.seconds:.1f} s, model constants from {source}")
    report.print_conversion(done.model, done.plan)
    report.print_preferences(done.by_preference, done.model.tpa.choice.prefer if done.by_preference else "")
    weights = memory.weights_bytes(dense, done.model)
    print(f"  model constants {memory.human(weights['tpa'] - weights['dense'])} (shared by all sequences)")
    print(f"  saved to {saved} ({memory.human(report.size_on_disk(saved))})")
    return weights


def measure(work: Work, dense: Any, done: Converted, text: str) -> dict[str, Any]:
    """Print and return figures: memory (what a really filled cache holds, then arithmetic), quality, speed."""
    args, config, tpa = work.args, work.config, done.model
    speed, cache = measure_speed(dense, tpa, text, args.timing_rounds)
    tpa_bytes = tpa.new_cache(1, 1).nbytes_at(args.context)
    rows = [("measured", cache.max_len, cache.nbytes), ("at --context", args.context, tpa_bytes)]
    print("\n" + memory.table(config, rows))
    bar = options.progress_bar("evaluating")
    quality = evaluate(dense, tpa, text, args.eval_tokens, recall_prompts=args.recall_prompts, progress=bar)
    report.print_quality(quality)
    report.print_speed(speed, cache.max_len)
    return {
        "variant": config.variant,
        "config": config.to_hf(),
        "tpa": {
            "mode": args.mode,
            "ranks_requested": {"q": args.q_rank, "k": args.k_rank, "v": args.v_rank},
            "rate": tpa.tpa.rate or (DEFAULT_RATE if tpa.tpa.spectral else None),
            "kv_dtype": args.kv_dtype,
            "plan": done.plan.to_dict() if done.plan else None,
            "by_preference": {prefer: vars(trial) for prefer, trial in done.by_preference.items()},
            "ranks_used": report.ranks_used(tpa),
        },
        "conversion_seconds": done.seconds,
        "kv": memory.kv_report(config, cache, args.context, tpa_bytes),
        "peak_memory_bytes": done.peak_bytes,
        "quality": quality,
        "speed": speed,
    }


def measure_speed(dense: Any, tpa: Any, text: str, rounds: int) -> tuple[dict[str, dict[str, float]], Any]:
    """(tokens per second of both, the filled TPA cache): prefill of real text, then greedy steps; medians."""
    length = min(2048, dense.config.max_positions - NEW, dense.config.max_positions // 2)
    ids = dense.tokenizer.encode(text[: 16 * length])[:length]
    seconds: dict[str, list[tuple[float, float]]] = {"dense": [], "tpa": []}
    for _ in range(rounds):
        for name, model in (("dense", dense), ("tpa", tpa)):
            cache = model.new_cache(1, len(ids) + NEW)
            prefilled = timed(prefill, model, [ids], cache)
            seconds[name].append((prefilled, timed(greedy_steps, model, cache, ids[-1])))
    speed = {}
    for name, runs in seconds.items():
        prefilled, decoded = map(statistics.median, zip(*runs))
        speed[name] = {"prefill_tokens_per_s": len(ids) / prefilled, "decode_tokens_per_s": NEW / decoded}
    return speed, cache


def timed(work: Callable, *arguments: Any) -> float:
    """Seconds. Here all work ends with numbers that leave the device, so it has finished."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def greedy_steps(model: Any, cache: Any, token: int) -> None:
    for _ in range(NEW):
        token = int(model([[token]], cache=cache, last_only=True).argmax())


run = partial(options.run, main)  # the command `tpa-demo`
