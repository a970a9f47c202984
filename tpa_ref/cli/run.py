"""Gemma 3 with a TPA cache, any size: convert, save, load again, generate, talk.

tpa --ckpt /models/gemma-3-4b-it --convert --save-tpa tpa-4b          # in a clone: python scripts/run_tpa.py ...
tpa --load-tpa tpa-4b --chat --prompt "Why is the sky blue?"          # generate
tpa --load-tpa tpa-4b --chat                                          # talk, turn by turn
tpa --ckpt model.ckpt --variant 1b --convert --prompts-file many.txt  # a batch of prompts
tpa --load-tpa tpa-4b --export gemma-3-4b-again                       # back to a dense model
tpa --load-tpa tpa-4b --chat --image cat.jpg --prompt "What is this?" # 4b, 12b and 27b
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..compress.config import TPAConfig
from ..errors import TPAError
from ..files.checkpoint import check_output, save
from ..files.stream import export
from ..gemma import memory
from ..gemma.chat import check_system, prompt_tokens
from ..gemma.config import GemmaConfig
from ..gemma.conversation import Conversation
from ..gemma.generate import generate_batch
from ..gemma.images import mark_images, read_images
from ..gemma.texts import read_text
from ..gemma.tokenizer import require_tokenizer
from ..gemma.vision import require_vision
from . import options, report
from .steps import Work

HELP = "/undo removes the last turn, /reset clears the conversation, /quit ends"
HELP_IMAGE = "/image FILE shows an image with the next turn, "


def parse_arguments() -> argparse.Namespace:
    parser = options.shared_parser(__doc__)
    option = parser.add_argument_group("what to do (without a prompt, and nothing to save: talk)").add_argument
    option("--convert", action="store_true", help="give the model a TPA cache (else: dense)")
    option("--save-tpa", "--output", metavar="PATH", help="save the converted model: a folder, .safetensors or .pt")
    option("--load-tpa", metavar="PATH", help="a saved TPA model, instead of --ckpt")
    option("--export", metavar="FOLDER", help="write the model as a dense Hugging Face folder")
    option("--prompt", action="append", default=[], help="may be given several times")
    option("--prompts-file", metavar="FILE", help="one prompt a line, UTF-8")
    option("--image", action="append", default=[], metavar="FILE", help="with every prompt, or with the first turn")
    option("--pan-and-scan", action="store_true", help="long images also as two to four crops")
    option("--report", metavar="FILE.json", help="seconds, peak memory and bytes of the conversion")
    args = parser.parse_args()
    args.to_folder = bool(args.save_tpa) and not Path(args.save_tpa).suffix
    options.check_counts(args)
    check_combination(args)
    return args


def check_combination(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, or that concern something that is not asked for."""
    if args.load_tpa and (args.ckpt or args.convert or args.save_tpa):
        raise TPAError("--load-tpa names a model that is converted already; it excludes --ckpt, --convert, --save-tpa")
    chosen = {name: x for name, x in vars(options.tpa_config(args)).items() if x != getattr(TPAConfig(), name)}
    chosen.pop("context", None)  # which concerns conversations as well
    if chosen and not (args.convert or args.save_tpa):
        raise TPAError(f"--{next(iter(chosen)).replace('_', '-')} concerns a conversion, but --convert is not given")
    if args.save_tpa and args.export and Path(args.save_tpa).absolute() == Path(args.export).absolute():
        raise TPAError(f"--save-tpa and --export must be different places, got {args.export} twice")
    if args.report and not args.to_folder:
        raise TPAError("--report is of a conversion into a folder, but --save-tpa FOLDER is not given")
    if args.pan_and_scan and not args.image:
        raise TPAError("--pan-and-scan concerns images, but --image is not given")
    if args.image and (args.save_tpa or args.export) and not (args.prompt or args.prompts_file):
        raise TPAError("--image goes with a prompt, but --prompt is not given")


def main() -> None:
    args = parse_arguments()
    prompts = args.prompt + (read_prompts(Path(args.prompts_file)) if args.prompts_file else [])
    if args.report:
        report.check_writable(args.report)
    for path in filter(None, (args.save_tpa, args.export)):
        check_output(path, args.load_tpa or args.ckpt)
    converts = ("calibration_tokens",) if args.convert or args.save_tpa else ()
    work = Work(args, args.load_tpa or args.ckpt or str(options.TINY), ("dtype", "context", *converts))
    images = Images(work.config, args.pan_and_scan, args.image)  # what is wrong with them shows before minutes of work
    options.sampling(args).check(work.config, 1, args.max_new_tokens)
    check_texts(work, prompts, images)
    work.introduce()
    if args.export:
        what = args.variant, args.config, args.tokenizer
        written = export(work.source, args.export, options.progress_bar("exporting"), *what)
        print(f"dense model written to {written}")
    if args.to_folder:
        work = saved_folder(work)
    if prompts:
        answer(model_with_cache(work), args, prompts, images)
    elif not (args.save_tpa or args.export):
        talk(model_with_cache(work), args, images)
    elif args.save_tpa and not args.to_folder:
        model_with_cache(work)


def check_texts(work: Work, prompts: list[str], images: Images) -> None:
    """Refuse prompts, or a chat, that this model can do nothing with."""
    args, found = work.args, work.found
    check_system(args.system, args.chat)
    if not prompts and (args.save_tpa or args.export):
        return
    require_tokenizer(found, "generate")
    for prompt in prompts or ["a"]:
        prompt_tokens(found, images.mark(prompt), args.chat, len(images.pixels), args.system)


def saved_folder(work: Work) -> Work:
    """Convert into a folder, say what it took, and go on with what was saved."""
    args = work.args
    plan, found = work.convert_to_folder(args.save_tpa)
    if plan:
        print(f"plan: {plan.message}")
    size, peak = memory.human(found["saved_bytes"]), memory.human(found["peak_memory_bytes"])
    took = f"{found['conversion_seconds']:.1f} s, peak memory {peak}, computed in {args.dtype}"
    print(f"saved to {args.save_tpa} ({size}): {took}")
    if args.report:
        report.write_json(args.report, found)
    args.variant, args.config, args.convert = None, None, False
    return Work(args, args.save_tpa, ())


def model_with_cache(work: Work) -> Any:
    """Load the model, convert it if asked to, say how it caches and what an image takes, and save it if asked to."""
    args, model, plan = work.args, work.load(), None
    to_file = args.save_tpa and not args.to_folder
    if args.convert or (to_file and model.tpa is None):
        done = work.convert(model)
        model, plan = done.model, done.plan
    report.print_conversion(model, plan)
    if model.tpa is not None:
        config, cache = model.config, model.new_cache(1, 1)
        lengths = {"one image": config.vision.tokens_per_image} if config.vision else {}
        lengths["at --context"] = min(args.context, config.max_positions)
        print(memory.table(config, [(label, n, cache.nbytes_at(n)) for label, n in lengths.items()]))
    if to_file:
        print(f"saved to {save(model, args.save_tpa)}")
    return model


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    prompts = [line for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise TPAError(f"--prompts-file: {path} must hold at least one prompt, got none")
    return prompts


class Images:
    """Images that go with the next prompt: pixels [i,c,x,y], and how many crops follow each file's."""

    def __init__(self, config: GemmaConfig, pan_and_scan: bool, files: list[str]):
        self.config, self.pan_and_scan = config, pan_and_scan
        self.pixels: list[np.ndarray] = []
        self.crops: list[int] = []
        for file in files:
            self.add(file)

    def add(self, file: str) -> None:
        pixels, crops = read_images([file], require_vision(self.config), self.pan_and_scan)
        self.pixels += [*pixels]
        self.crops += crops

    def clear(self) -> None:
        self.pixels, self.crops = [], []

    def mark(self, prompt: str) -> str:
        """The prompt with marks where images go."""
        return mark_images(prompt, self.crops) if self.crops else prompt

    def stacked(self) -> np.ndarray | None:
        """Their pixels; says how many tokens they take."""
        if not self.pixels:
            return None
        count, each = len(self.pixels), require_vision(self.config).tokens_per_image
        print(f"{count} image{'s' if count > 1 else ''} in each prompt: {count} x {each} = {count * each:,} tokens")
        return np.stack(self.pixels)


def answer(model: Any, args: argparse.Namespace, prompts: list[str], images: Images) -> None:
    """One prompt streams; several are generated as one batch and shown one after another."""
    start, alone, end = time.perf_counter(), len(prompts) == 1, "\n" if args.chat else ""
    more = vars(options.sampling(args)) | {"chat": args.chat, "system": args.system, "images": images.stacked()}
    marked, bar = [images.mark(prompt) for prompt in prompts], options.progress_bar("prefill")
    batch = generate_batch(model, marked, args.max_new_tokens, **more, progress=bar)
    if alone:
        print(f"\n{prompts[0]}", end=end, flush=True)
        options.stream(piece for _, piece in batch)
        print()
    else:
        texts = [""] * len(prompts)
        for row, piece in batch:
            texts[row] += piece
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"\n{prompt}{end}{text}")
    print(f"\n{len(prompts)} prompt{'' if alone else 's'} in {time.perf_counter() - start:.1f} s")


def talk(model: Any, args: argparse.Namespace, images: Images) -> None:
    """Turns from standard input; what was said stays in the cache. Images go with the next turn."""
    sampling = options.sampling(args)
    sampling.check(model.config, 1, args.max_new_tokens)
    conversation = Conversation(model, args.context, args.chat, args.max_new_tokens, sampling, args.system)
    commands = HELP_IMAGE + HELP if model.config.vision else HELP
    print(f"\n{'Chat' if args.chat else 'Plain text (--chat for a chat)'}: {commands}")
    prompt = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return
        if text == "/quit":
            return
        try:
            turn(conversation, text, images)
        except TPAError as problem:
            print(f"error: {problem}", file=sys.stderr)


def turn(conversation: Conversation, text: str, images: Images) -> None:
    """One line of input. Ctrl-C ends an answer, not the program; images that were shown are taken off the list."""
    if text == "/reset":
        conversation.reset()
        print("conversation cleared")
    elif text == "/undo":
        print("last turn removed" if conversation.undo() else "no turn to remove")
    elif text.startswith("/image "):
        images.add(text.removeprefix("/image ").strip())
    elif text:
        try:
            options.stream(conversation.say(images.mark(text), images.stacked()))
        except KeyboardInterrupt:
            pass
        finally:
            print(flush=True)
        images.clear()


run = partial(options.run, main)  # the command `tpa`
