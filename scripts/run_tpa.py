#!/usr/bin/env python3
"""Gemma 3 with a TPA cache, any size: convert, save, load again, generate, talk.

python scripts/run_tpa.py --ckpt /models/gemma-3-4b-it --convert --save_tpa tpa-4b          # convert and save
python scripts/run_tpa.py --load_tpa tpa-4b --chat --prompt "Why is the sky blue?"          # generate
python scripts/run_tpa.py --load_tpa tpa-4b --chat                                          # talk, turn by turn
python scripts/run_tpa.py --ckpt model.ckpt --variant 1b --convert --prompts-file many.txt  # a batch of prompts
python scripts/run_tpa.py --load_tpa tpa-4b --export gemma-3-4b-again                       # back to a dense model
python scripts/run_tpa.py --load_tpa tpa-4b --chat --image cat.jpg --prompt "What is this?" # 4b, 12b and 27b
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tpa_ref import __version__
from tpa_ref.cli import options as cli
from tpa_ref.compress.calibrate import read_text
from tpa_ref.compress.config import DEFAULT_CONTEXT, TPAConfig
from tpa_ref.errors import TPAError
from tpa_ref.files.checkpoint import check_output, inspect
from tpa_ref.gemma import memory
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.conversation import Conversation
from tpa_ref.gemma.generate import check_sampling
from tpa_ref.gemma.images import mark_images, read_images
from tpa_ref.gemma.vision import require_vision

CALIBRATION_TOKENS = 4096
HELP = "/undo takes the last turn back, /reset forgets everything, /quit ends"
HELP_IMAGE = "/image FILE shows an image with the next turn, "


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_model_options(parser)
    cli.add_tpa_options(parser)
    cli.add_generation_options(parser)
    group = parser.add_argument_group("what to do (without a prompt, and nothing to save: talk)")
    group.add_argument("--convert", action="store_true", help="give the model a TPA cache (else: dense)")
    group.add_argument("--save-tpa", metavar="PATH", help="save the converted model: a folder, .safetensors or .pt")
    group.add_argument("--load-tpa", metavar="PATH", help="a saved TPA model, instead of --ckpt")
    group.add_argument("--export", metavar="FOLDER", help="write the model as a dense Hugging Face folder")
    group.add_argument("--prompt", action="append", default=[], help="may be given several times")
    group.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, UTF-8")
    group.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="goes with every prompt, or with the first turn; may be given several times",
    )
    group.add_argument("--pan-and-scan", action="store_true", help="long images also as two to four crops")
    group.add_argument("--context", type=int, metavar="N", help="tokens a conversation may have (default: 32768)")
    group.add_argument("--report", metavar="FILE.json", help="seconds, peak memory and bytes of the conversion")
    parser.add_argument("--version", action="version", version=f"tpa-gemma3 {__version__}")
    args = parser.parse_args()
    if args.context is not None and args.context < 1:
        raise TPAError(f"--context must be >= 1, got {args.context}")
    if args.load_tpa and (args.ckpt or args.convert or args.save_tpa):
        raise TPAError("--load-tpa names a model that is converted already; it excludes --ckpt, --convert, --save-tpa")
    tpa_options = [name for name, value in vars(cli.tpa_config(args)).items() if value != getattr(TPAConfig(), name)]
    tpa_options = [name for name in tpa_options if name != "context"]  # which concerns conversations as well
    if tpa_options and not (args.convert or args.save_tpa):
        raise TPAError(f"--{tpa_options[0].replace('_', '-')} concerns a conversion, but --convert is not given")
    if args.report and not (args.save_tpa and not Path(args.save_tpa).suffix):
        raise TPAError("--report is of a conversion into a folder, but --save-tpa FOLDER is not given")
    if args.pan_and_scan and not args.image:
        raise TPAError("--pan-and-scan concerns images, but --image is not given")
    if args.image and (args.save_tpa or args.export) and not (args.prompt or args.prompts_file):
        raise TPAError("--image goes with a prompt, but --prompt is not given")
    return args


def main() -> None:
    args = parse_arguments()
    source = args.load_tpa or args.ckpt or str(cli.TINY)
    prompts = args.prompt + (read_prompts(Path(args.prompts_file)) if args.prompts_file else [])
    if args.report:
        cli.check_writable(args.report)
    for path in (args.save_tpa, args.export):
        if path:
            check_output(path)
    backend = cli.backend_module(args.backend)
    args.dtype = cli.choose_dtype(args, source)
    shown = []
    if args.image:  # read now: what is wrong with them shows before minutes of work
        found = inspect(source, args.variant, args.config, args.tokenizer).config
        shown = [Shown.read(args.image, found, args.pan_and_scan)]
    if args.export:
        backend.export(source, args.export, progress=cli.progress_bar("exporting"))
        print(f"dense model written to {args.export}")
    if args.save_tpa and not Path(args.save_tpa).suffix:
        save_folder(backend, args, source)
        source, args.variant, args.config, args.convert = args.save_tpa, None, None, False
    if not prompts and (args.save_tpa or args.export) and not Path(args.save_tpa or "folder").suffix:
        return
    args.ckpt = source
    model = cli.load_model(backend, args, cli.progress_bar("loading"))
    print(cli.describe_config(model.config))
    if args.convert or (args.save_tpa and model.tpa is None):
        model = convert(backend, model, args)
    for line in model.notes + cli.describe_factors(model):
        print(f"  {line}")
    context = min(args.context or 32_768, model.config.max_positions)
    if model.tpa is not None:
        print(memory.table(model.config, memory_rows(model, context)))
    if args.save_tpa and Path(args.save_tpa).suffix:
        print(f"saved to {backend.save(model, args.save_tpa)}")
    if prompts:
        answer(backend, model, args, prompts, shown)
    elif not (args.save_tpa or args.export):
        talk(backend, model, args, context, shown)


@dataclass
class Shown:
    """Images that go with a prompt: pixels [i,c,x,y], how many crops follow each file's, and their tokens each."""

    pixels: np.ndarray
    crops: list[int]
    tokens: int

    @classmethod
    def read(cls, files: list[str], config: GemmaConfig, pan_and_scan: bool = False) -> Shown:
        vision = require_vision(config)
        return cls(*read_images(files, vision, pan_and_scan), vision.tokens_per_image)


def with_images(text: str, shown: list[Shown]) -> tuple[str, np.ndarray | None]:
    """(the text with marks where images go, their pixels)."""
    if not shown:
        return text, None
    pixels = np.concatenate([part.pixels for part in shown])
    return mark_images(text, [count for part in shown for count in part.crops]), pixels


def count_images(shown: list[Shown]) -> None:
    """Say how many tokens the images of a prompt take."""
    if shown:
        count, each = sum(len(part.pixels) for part in shown), shown[0].tokens
        print(f"{count} image{'s' if count > 1 else ''} in each prompt: {count} x {each} = {count * each:,} tokens")


def memory_rows(model: Any, context: int) -> list[tuple[str, int, int]]:
    """Rows of the memory table; a model that reads images has one for what an image takes."""
    cache, vision = model.new_cache(1, 1), model.config.vision
    rows = [("one image", vision.tokens_per_image, cache.nbytes_at(vision.tokens_per_image))] if vision else []
    return [*rows, ("at --context", context, cache.nbytes_at(context))]


def save_folder(backend: Any, args: argparse.Namespace, source: str) -> None:
    """Convert from disk to disk, layer by layer: memory for one layer is enough."""
    options, device = {}, "cpu"
    if args.backend == "torch":
        device = str(importlib.import_module("tpa_torch.files.checkpoint").choose_device(args.device))
        options = {"device": device}
    start = time.perf_counter()
    with cli.PeakMemory(device) as peak:
        config, calibration = planned(backend, args, source, options)
        backend.convert_checkpoint(
            source,
            args.save_tpa,
            config,
            calibration,
            args.variant,
            args.config,
            args.tokenizer,
            args.dtype,
            args.calibration_tokens or CALIBRATION_TOKENS,
            cli.progress_bar("converting"),
            **options,
        )
    report = {
        "conversion_seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak.bytes,
        "saved_bytes": sum(file.stat().st_size for file in Path(args.save_tpa).iterdir()),
        "dtype": args.dtype,
        "calibration_tokens": 0 if args.calibration == "none" else args.calibration_tokens or CALIBRATION_TOKENS,
        "environment": cli.environment(args.backend, device),
    }
    print(
        f"saved to {args.save_tpa} ({memory.human(report['saved_bytes'])}): {report['conversion_seconds']:.1f} s, "
        f"peak memory {memory.human(report['peak_memory_bytes'])}, computed in {args.dtype}"
    )
    if args.report:
        cli.write_json(args.report, report)


def planned(backend: Any, args: argparse.Namespace, source: str, options: dict[str, Any]) -> tuple[TPAConfig, Any]:
    """(configuration, calibration) of a conversion from disk to disk; a plan needs the model, a block at a time."""
    if args.kv_budget is None and args.max_kl is None:
        return cli.tpa_config(args), calibration_text(args)
    dense = backend.load(source, args.variant, args.config, args.tokenizer, args.dtype, on_disk=True, **options)
    moments = calibrated(backend, dense, args)
    return chosen_config(backend, dense, moments, args), moments


def convert(backend: Any, model: Any, args: argparse.Namespace) -> Any:
    """Calibrate, plan if asked to, and convert in memory."""
    moments = calibrated(backend, model, args)
    config = chosen_config(backend, model, moments, args)
    return backend.convert(model, config, moments, progress=cli.progress_bar("converting"))


def calibrated(backend: Any, model: Any, args: argparse.Namespace) -> Any:
    """Moments of the calibration text; None without one."""
    text = calibration_text(args)
    tokens, bar = args.calibration_tokens or CALIBRATION_TOKENS, cli.progress_bar("calibrating")
    return text and backend.calibrate(model, text, max_tokens=tokens, progress=bar, predict=args.predict)


def chosen_config(backend: Any, model: Any, moments: Any, args: argparse.Namespace) -> TPAConfig:
    """The configuration that the options mean, or that the plan finds, which is printed."""
    context = min(args.context or DEFAULT_CONTEXT, model.config.max_positions)
    plan = cli.make_plan(backend, model, moments, args, context)
    if plan is None:
        return cli.tpa_config(args)
    print(f"plan: {plan.message}")
    return plan.config


def calibration_text(args: argparse.Namespace) -> str | None:
    return None if args.calibration == "none" else read_text(Path(args.calibration or cli.TINY / "calibration.txt"))


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    prompts = [line for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise TPAError(f"--prompts-file: {path} must hold at least one prompt, got none")
    return prompts


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}


def answer(backend: Any, model: Any, args: argparse.Namespace, prompts: list[str], shown: list[Shown]) -> None:
    """One prompt streams; several are generated as one batch and shown one after another."""
    batch = importlib.import_module(f"{backend.__name__}.gemma.generate").generate_batch
    start = time.perf_counter()
    pieces: list[list[str]] = [[] for _ in prompts]
    bar = cli.progress_bar("prefill")
    count_images(shown)
    marked = [with_images(prompt, shown) for prompt in prompts]
    options = sampling(args) | {"chat": args.chat, "progress": bar, "images": marked[0][1]}
    if len(prompts) == 1:
        print(f"\n{prompts[0]}", end="\n" if args.chat else "", flush=True)
    for row, piece in batch(model, [prompt for prompt, _ in marked], args.max_new_tokens, **options):
        pieces[row].append(piece)
        if len(prompts) == 1:
            print(piece, end="", flush=True)
    if len(prompts) == 1:
        print()
    else:
        for prompt, said in zip(prompts, pieces, strict=True):
            print(f"\n{prompt}{chr(10) if args.chat else ''}{''.join(said)}")
    print(f"\n{len(prompts)} prompt{'s' if len(prompts) > 1 else ''} in {time.perf_counter() - start:.1f} s")


def talk(backend: Any, model: Any, args: argparse.Namespace, context: int, shown: list[Shown]) -> None:
    """Turns from standard input; what was said stays in the cache. Images go with the next turn."""
    generate_tokens = importlib.import_module(f"{backend.__name__}.gemma.generate").generate_tokens
    check_sampling(model.config, 1, args.max_new_tokens, **sampling(args))
    conversation = Conversation(model, generate_tokens, context, args.chat, args.max_new_tokens, **sampling(args))
    interactive = sys.stdin.isatty()
    commands = HELP_IMAGE + HELP if model.config.vision else HELP
    print(f"\n{'Chat' if args.chat else 'Plain text (--chat for a chat)'}: {commands}")
    while True:
        try:
            text = input("\n> " if interactive else "").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
            print("forgotten")
        elif text == "/undo":
            print("taken back" if conversation.undo() else "nothing to take back")
        elif text.startswith("/image "):
            try:
                shown.append(Shown.read([text.removeprefix("/image ").strip()], model.config, args.pan_and_scan))
            except TPAError as problem:
                print(f"error: {problem}", file=sys.stderr)
        elif text:
            speak(conversation, text, shown)


def speak(conversation: Conversation, text: str, shown: list[Shown]) -> None:
    """One turn; Ctrl-C ends the answer, not the program, and what cannot be said is one line. The images that went with
    it are taken off the list.
    """
    try:
        count_images(shown)
        for piece in conversation.say(*with_images(text, shown)):
            print(piece, end="", flush=True)
        shown.clear()
    except KeyboardInterrupt:
        shown.clear()
    except TPAError as problem:
        print(f"error: {problem}", end="", file=sys.stderr)
    print(flush=True)


if __name__ == "__main__":
    cli.run(main)
