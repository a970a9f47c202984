#!/usr/bin/env python3
"""Convert a Gemma 3 checkpoint to TPA, save it, and show what that costs and saves: memory, quality, speed, text.

python run_test_tpa_1b.py                                       # the shipped tiny model
python run_test_tpa_1b.py --ckpt /models/gemma-3-1b-pt          # your checkpoint
python run_test_tpa_1b.py --mode latent --k-rank 48 --v-rank 64 --kv-dtype int4 --report out.json --plot out.png
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tpa_ref import __version__
from tpa_ref.cli import options as cli
from tpa_ref.compress.calibrate import read_text
from tpa_ref.errors import TPAError
from tpa_ref.files.checkpoint import check_output
from tpa_ref.gemma import memory
from tpa_ref.gemma.generate import check_sampling, prompt_tokens
from tpa_ref.gemma.tokenizer import BOS

PROMPT = "Return the number of"


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_model_options(parser)
    cli.add_tpa_options(parser)
    cli.add_generation_options(parser)
    group = parser.add_argument_group("measurement and output")
    group.add_argument("--prompt", default=PROMPT)
    group.add_argument("--output", default="tpa_model.pt", help="where to save: .pt, .safetensors, or a folder")
    group.add_argument("--eval-text", metavar="FILE", help="held-out text (default: the shipped one)")
    group.add_argument("--eval-tokens", type=int, metavar="N", help="how much of it is used")
    group.add_argument("--context", type=int, metavar="N", help="where cache bytes are compared (default: 32768)")
    group.add_argument("--report", metavar="FILE.json")
    group.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("--version", action="version", version=f"tpa-gemma3 {__version__}")
    args = parser.parse_args()
    for name in ("context", "eval_tokens", "calibration_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise TPAError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    return args


def main() -> None:
    args = parse_arguments()
    for path in (args.report, args.plot):
        if path:
            cli.check_writable(path)
    check_output(args.output)
    tpa_config = cli.tpa_config(args)
    eval_text = read_text(Path(args.eval_text or cli.TINY / "evaluation.txt"))
    calibration_text = (
        None if args.calibration == "none" else read_text(Path(args.calibration or cli.TINY / "calibration.txt"))
    )
    backend = cli.backend_module(args.backend)

    dense = cli.load_model(backend, args, cli.progress_bar("loading"))
    config, device = dense.config, str(getattr(dense, "device", "cpu"))
    if dense.tokenizer is None:
        raise TPAError(f"{args.ckpt} has no tokenizer, and text needs one; give its file with --tokenizer")
    if dense.tpa is not None:
        raise TPAError(f"{args.ckpt} is already a TPA model; give the dense checkpoint")
    ids = prompt_tokens(dense.tokenizer, args.prompt, args.chat)  # refused now, not after minutes of work
    check_sampling(config, len(ids), args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    large = cli.parameter_count(config) > cli.LARGE
    eval_tokens = args.eval_tokens or (2048 if large and device == "cpu" else 16_384)
    calibration_tokens = args.calibration_tokens or (4096 if large and device == "cpu" else 32_768)
    context = args.context or min(32_768, config.max_positions)
    environment = cli.environment(args.backend, device)
    print(cli.describe_config(config))
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value) + f", {dense.dtype}")

    # convert and save
    start = time.perf_counter()
    with cli.PeakMemory(device) as peak:
        moments = calibration_text and backend.calibrate(
            dense,
            calibration_text,
            max_tokens=calibration_tokens,
            progress=cli.progress_bar("calibrating"),
            predict=args.predict,
        )
        plan = cli.make_plan(backend, dense, moments, args, context)
        tpa = backend.convert(dense, plan.config if plan else tpa_config, calibration=moments)
    conversion_seconds = time.perf_counter() - start
    source = f"{moments.tokens:,} calibration tokens" if moments else "the weights alone"
    print(f"\nconverted in {conversion_seconds:.1f} s, constant factors from {source}")
    if plan:
        print(f"  plan: {plan.message}")
    for line in tpa.notes + cli.describe_factors(tpa):
        print(f"  {line}")
    if config.num_kv_heads == 1 and any(how.mode in ("contextual", "fixed-a") for pair in tpa.factors for how in pair):
        print(
            "  note: this model has one KV head; head-rank factors (contextual, fixed-a) cannot make its cache smaller"
        )
    saved = backend.save(tpa, args.output)
    constants = weights_bytes(dense, tpa)
    print(f"  constant factors {memory.human(constants['tpa'] - constants['dense'])}, once for all texts")
    print(f"  saved to {saved} ({memory.human(size_on_disk(saved))})")

    # memory: what a really filled cache holds, then arithmetic at --context
    speed, measured = measure_speed(backend, dense, tpa, eval_text, synchronizer(device))
    tpa_bytes = tpa.new_cache(1, 1).nbytes_at(context)
    print(
        "\n"
        + memory.table(config, [("measured", measured.max_len, measured.nbytes), ("at --context", context, tpa_bytes)])
    )

    quality = backend.evaluate(
        dense,
        tpa,
        eval_text,
        max_tokens=eval_tokens,
        recall_prompts=2 if large and device == "cpu" else 10,
        progress=cli.progress_bar("evaluating"),
    )
    print_quality(quality)
    print_speed(speed, measured.max_len)

    texts = {}
    for name, model in (("dense", dense), ("TPA", tpa)):
        print(f"\n{name}: {args.prompt}", end="", flush=True)
        pieces = []
        for piece in backend.generate(
            model, args.prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, args.chat
        ):
            print(piece, end="", flush=True)
            pieces.append(piece)
        texts[name.lower()] = "".join(pieces)
        print()

    report = {
        "variant": config.variant,
        "config": config.to_hf(),
        "tpa": {
            "mode": args.mode,
            "ranks_requested": {"q": args.q_rank, "k": args.k_rank, "v": args.v_rank},
            "ranks_used": [
                {
                    side: {"mode": how.mode, "rank": how.rank, "dtype": how.dtype, "bits": sum(how.widths) or None}
                    for side, how in (("k", k), ("v", v))
                }
                for k, v in tpa.factors
            ],
            "rate": tpa.tpa.rate or (2.0 if tpa.tpa.spectral else None),
            "kv_dtype": args.kv_dtype,
            "plan": plan.to_dict() if plan else None,
        },
        "conversion_seconds": conversion_seconds,
        "kv": memory.kv_report(config, measured, context, tpa_bytes),
        "peak_memory_bytes": peak.bytes,
        "weights_bytes": constants,
        "quality": quality,
        "speed": speed,
        "text": {"prompt": args.prompt, **texts},
        "environment": environment,
    }
    if args.report:
        cli.write_json(args.report, report)
        print(f"\nreport written to {args.report}")
    if args.plot:
        plot(args.plot, tpa, report)
        print(f"picture written to {args.plot}")


def synchronizer(device: str) -> Callable[[], None]:
    """What waits until a device has finished."""
    if device.startswith(("cuda", "mps")):
        import torch

        return torch.cuda.synchronize if device.startswith("cuda") else torch.mps.synchronize
    return lambda: None


def measure_speed(
    backend: Any, dense: Any, tpa: Any, text: str, synchronize: Callable[[], None], rounds: int = 3
) -> tuple[dict[str, dict[str, float]], Any]:
    """(tokens per second of both, the filled TPA cache): prefill of real text, then greedy steps; medians."""
    config = dense.config
    new = 32
    length = min(2048, config.max_positions - new, config.max_positions // 2)
    ids = [BOS, *dense.tokenizer.encode(text[: 16 * length], bos=False)][:length]
    prefill_all = importlib.import_module(f"{backend.__name__}.gemma.generate").prefill
    seconds: dict[str, list[tuple[float, float]]] = {"dense": [], "tpa": []}
    for _ in range(rounds if cli.parameter_count(config) < cli.LARGE else 1):
        for name, model in (("dense", dense), ("tpa", tpa)):
            cache = model.new_cache(1, len(ids) + new)
            prefill = cli.timed(lambda m=model, c=cache: prefill_all(m, [ids], c), synchronize)
            decode = cli.timed(lambda m=model, c=cache: greedy_steps(m, c, ids[-1], new), synchronize)
            seconds[name].append((prefill, decode))
    medians = {
        name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in seconds.items()
    }
    return {
        name: {"prefill_tokens_per_s": len(ids) / prefill, "decode_tokens_per_s": new / decode}
        for name, (prefill, decode) in medians.items()
    }, cache


def greedy_steps(model: Any, cache: Any, token: int, steps: int) -> None:
    for _ in range(steps):
        token = int(model([[token]], cache=cache)[0, -1].argmax())


def weights_bytes(dense: Any, tpa: Any) -> dict[str, int]:
    """Bytes of the weights in memory; TPA adds its constant factors and, with a q rank, exchanges W_Q."""
    size = cli.parameter_count(dense.config) * dense.weights.embed_vm.dtype.itemsize
    arrays = [x for pair in tpa.factors for how in pair for x in how.constants().values() if x is not None]
    extra = sum(x.nbytes for x in arrays)
    for query, block in zip(tpa.query_factors, dense.weights.layers, strict=True):
        if query is not None:
            extra += query[0].nbytes + query[1].nbytes - block.WQ_hdm.nbytes
    return {"dense": size, "tpa": size + extra}


def size_on_disk(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def print_quality(quality: dict[str, Any]) -> None:
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
    print(f"\nSpeed, batch 1, {tokens:,} tokens (tokens/s)")
    for kind in ("prefill", "decode"):
        dense, tpa = (speed[name][f"{kind}_tokens_per_s"] for name in ("dense", "tpa"))
        print(f"  {kind:<18} dense {dense:>9,.1f}   TPA {tpa:>9,.1f}   TPA/dense {tpa / dense:.2f}x")


def plot(path: str, tpa: Any, report: dict[str, Any]) -> None:
    """Three panels: memory, recall, speed."""
    from tpa_ref import plots

    figure, (left, middle, right) = plots.new_figure(3)
    empty = tpa.new_cache(1, 1)
    plots.plot_memory(left, tpa, empty.nbytes_at, report["kv"]["context"])
    plots.plot_recall(middle, report["quality"], tpa.config.sliding_window)
    plots.plot_speed(right, report["speed"])
    plots.write(figure, path)


if __name__ == "__main__":
    cli.run(main)
