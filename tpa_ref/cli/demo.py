"""Convert a Gemma 3 checkpoint to TPA, save it, and show what that costs and saves: memory, quality, speed, text.

tpa-demo                                       # the shipped tiny model; in a clone: python run_test_tpa_1b.py
tpa-demo --ckpt /models/gemma-3-1b-pt          # your checkpoint
tpa-demo --mode latent --k-rank 48 --v-rank 64 --kv-dtype int4 --report out.json --plot out.png
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from ..compress.evaluate import evaluate
from ..errors import TPAError
from ..files.checkpoint import check_output, save
from ..gemma import memory
from ..gemma.generate import generate, prefill, prompt_tokens
from ..gemma.sampling import Sampling
from ..gemma.texts import read_text
from ..gemma.tokenizer import BOS
from . import options, report
from .machine import synchronizer, timed
from .steps import Converted, Work

PROMPT = "Return the number of"
USES = ("dtype", "calibration_tokens", "eval_tokens", "recall_prompts", "timing_rounds", "context")
NEW = 32  # tokens whose decoding is timed


def parse_arguments() -> argparse.Namespace:
    parser = options.shared_parser(__doc__)
    option = parser.add_argument_group("measurement and output").add_argument
    option("--prompt", default=PROMPT)
    option(
        "--output",
        "--save-tpa",
        metavar="PATH",
        default="tpa_model.pt",
        help="where to save: .pt, .safetensors, folder",
    )
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
    for path in (args.report, args.plot):
        if path:
            report.check_writable(path)
    check_output(args.output)
    options.tpa_config(args)  # what is wrong with the options shows now, not after minutes of work
    text = read_text(Path(args.eval_text or options.TINY / "evaluation.txt"))
    work = Work(args, args.ckpt or str(options.TINY), USES)
    work.calibration_text()
    check_prompt(work)
    work.introduce()
    dense = work.load()
    done = work.convert(dense)
    constants = memory.weights_bytes(dense, done.model)
    show_conversion(done, constants, save(done.model, args.output))
    figures = measure(work, dense, done, text) | {"weights_bytes": constants}
    figures["text"] = {"prompt": args.prompt}
    for name, model in (("dense", dense), ("TPA", done.model)):
        figures["text"][name.lower()] = show_text(name, model, args)
    figures["environment"] = work.environment
    if args.report:
        report.write_json(args.report, figures)
        print(f"\nreport written to {args.report}")
    if args.plot:
        report.plot(args.plot, done.model, figures)
        print(f"picture written to {args.plot}")


def check_prompt(work: Work) -> None:
    """Refuse a checkpoint or a prompt that this command can do nothing with."""
    args, found = work.args, work.found
    if found.tokenizer is None:
        raise TPAError(f"{work.source} has no tokenizer, and text needs one; give its file with --tokenizer")
    if found.tpa is not None:
        raise TPAError(f"{work.source} is already a TPA model; give the dense checkpoint")
    ids = prompt_tokens(found.tokenizer, args.prompt, args.chat)
    Sampling(**options.sampling(args)).check(found.config, len(ids), args.max_new_tokens)


def show_conversion(done: Converted, constants: dict[str, int], saved: Path) -> None:
    """What was converted, and to what."""
    source = f"{done.calibration_tokens:,} calibration tokens" if done.calibration_tokens else "the weights alone"
    print(f"\nconverted in {done.seconds:.1f} s, model constants from {source}")
    report.print_conversion(done.model, done.plan)
    print(f"  model constants {memory.human(constants['tpa'] - constants['dense'])} (shared by all sequences)")
    print(f"  saved to {saved} ({memory.human(report.size_on_disk(saved))})")


def measure(work: Work, dense: Any, done: Converted, text: str) -> dict[str, Any]:
    """Print and return figures: memory (what a really filled cache holds, then arithmetic), quality, speed."""
    args, config, tpa = work.args, work.config, done.model
    speed, cache = measure_speed(dense, tpa, text, work.device, args.timing_rounds)
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
        "tpa": done.report(args) | {"ranks_used": report.ranks_used(tpa)},
        "conversion_seconds": done.seconds,
        "kv": memory.kv_report(config, cache, args.context, tpa_bytes),
        "peak_memory_bytes": done.peak_bytes,
        "quality": quality,
        "speed": speed,
    }


def measure_speed(dense: Any, tpa: Any, text: str, device: str, rounds: int) -> tuple[dict[str, dict[str, float]], Any]:
    """(tokens per second of both, the filled TPA cache): prefill of real text, then greedy steps; medians."""
    length = min(2048, dense.config.max_positions - NEW, dense.config.max_positions // 2)
    ids = [BOS, *dense.tokenizer.encode(text[: 16 * length], bos=False)][:length]
    seconds: dict[str, list[tuple[float, float]]] = {"dense": [], "tpa": []}
    wait = synchronizer(device)
    for _ in range(rounds):
        for name, model in (("dense", dense), ("tpa", tpa)):
            cache = model.new_cache(1, len(ids) + NEW)
            prefilled = timed(lambda m=model, c=cache: prefill(m, [ids], c), wait)  # type: ignore[misc]
            decoded = timed(lambda m=model, c=cache: greedy_steps(m, c, ids[-1]), wait)  # type: ignore[misc]
            seconds[name].append((prefilled, decoded))
    medians = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in seconds.items()}
    return {
        name: {"prefill_tokens_per_s": len(ids) / prefilled, "decode_tokens_per_s": NEW / decoded}
        for name, (prefilled, decoded) in medians.items()
    }, cache


def greedy_steps(model: Any, cache: Any, token: int) -> None:
    """Decode some tokens, one at a time."""
    for _ in range(NEW):
        token = int(model([[token]], cache=cache)[0, -1].argmax())


def show_text(name: str, model: Any, args: argparse.Namespace) -> str:
    """The continuation of the prompt, printed as it comes."""
    print(f"\n{name}: {args.prompt}", end="", flush=True)
    pieces = []
    for piece in generate(model, args.prompt, args.max_new_tokens, **options.sampling(args), chat=args.chat):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def run() -> None:
    """The command `tpa-demo`."""
    options.run(main)
