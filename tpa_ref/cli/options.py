"""The options of both commands, what they mean, and the defaults that depend on a model's size. No torch here."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..compress.config import DEFAULT_CONTEXT, FORM, KV_DTYPES, MODES, PREFER, TPAConfig
from ..compress.plan import check_bounds
from ..errors import TPAError
from ..files.found import Found
from ..gemma.config import VARIANTS
from ..gemma.generate import Sampling
from ..gemma.memory import parameter_count
from .machine import multiplies_bfloat16

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent  # of a clone
INSTALLED = (PACKAGE / "tiny").is_dir()  # or else a clone
TINY = PACKAGE / "tiny" if INSTALLED else ROOT / "assets" / "tiny-gemma3"
LARGE = 100_000_000  # parameters from which on a CPU gets smaller defaults, to finish in minutes
VERY_LARGE = 2_000_000_000  # parameters from which on memory matters more than what a CPU is fast in

# Help texts that are long
CHECKPOINT = "checkpoint: Hugging Face folder, .gguf, gemma_pytorch .ckpt or folder, .safetensors"
DTYPE = "compute dtype (default: float32; bfloat16 for large models stored in it, where the device is fast in it)"
WEIGHTS = "how weights are held in memory: in the compute dtype, or in int8 with a scale for 32 (torch)"
PREDICT = "predict K and V from token embeddings and code the rest (default: up to a hidden size of 640, no images)"
CALIBRATION = "text for the model constants (default: the shipped one); self: the model writes it; none: no text"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that takes --k_rank for --k-rank."""

    def error(self, message: str):
        raise TPAError(f"{self.prog}: {message}")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        given = sys.argv[1:] if args is None else args
        hyphens = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), argument) for argument in given]
        return super().parse_args(hyphens, namespace)


def run(main: Callable[[], None]) -> None:
    """Call a command's main: invalid input prints one line and exits with 2, never with a traceback."""
    try:
        main()
    except TPAError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except UnicodeError as problem:
        print(f"error: text that the input or output encoding cannot hold: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def stream(pieces: Iterable[str]) -> str:
    """Print a text as it comes; the whole of it."""
    said = []
    for piece in pieces:
        print(piece, end="", flush=True)
        said.append(piece)
    return "".join(said)


def progress_bar(label: str) -> Callable:
    """Wraps a list in a tqdm bar that shows only on a terminal."""
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=label, leave=False, disable=None)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("model").add_argument
    option("--ckpt", metavar="PATH", help=CHECKPOINT)
    option("--tokenizer", metavar="FILE", help="tokenizer.model, where the checkpoint has none")
    option("--variant", choices=[name for name in VARIANTS if name != "tiny"], help="what --ckpt must be")
    option("--config", metavar="FILE", help="a Hugging Face config.json, where the checkpoint has none")
    option("--backend", choices=("torch", "numpy"), default="torch")
    option("--device", default="auto", help="auto (cuda, mps, cpu), cpu, cuda, cuda:1, mps")
    option("--dtype", choices=("float32", "bfloat16", "float64"), help=DTYPE)
    option("--weights", choices=("as-computed", "int8"), default="as-computed", help=WEIGHTS)


def shared_parser(description: str | None) -> Parser:
    """A parser with the options that both commands have."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"tpa-gemma3 {__version__}")
    add_model_options(parser)
    option = parser.add_argument_group("TPA (nothing given: --rate 3, spectral, 5x smaller)").add_argument
    option("--rate", type=float, metavar="BITS", help="bits per number of dense K and V, in (0, 8]")
    option("--kv-budget", type=float, metavar="X", help="plan: at least X times smaller than windowed")
    option("--max-kl", type=float, metavar="NATS", help="plan: at most this KL to the dense model")
    option("--holdout", metavar="FILE", help="text --max-kl is measured on (default: the shipped one)")
    option("--sinks", type=int, metavar="N", help="first tokens that converted layers keep exactly")
    option("--recent", type=int, default=0, metavar="N", help="newest tokens that they keep exactly")
    option("--prefer", choices=PREFER, help="speed (default): K in two bands, decodes fast; size: fewer bytes, slower")
    option("--predict", action=argparse.BooleanOptionalAction, help=PREDICT)
    option("--mode", choices=tuple(MODES), help="for K and V, instead of a rate")
    option("--k-mode", choices=tuple(MODES))
    option("--v-mode", choices=tuple(MODES))
    option("--q-rank", type=int, metavar="R", help="head-mixing rank of Q; saves no cache")
    option("--k-rank", type=int, metavar="R")
    option("--v-rank", type=int, metavar="R")
    option("--kv-dtype", choices=KV_DTYPES, help="how factors are stored")
    option("--k-dtype", choices=KV_DTYPES)
    option("--v-dtype", choices=KV_DTYPES)
    option("--layers", default="all", help="all, global, local, or numbers like 5,11; the others stay dense")
    option("--calibration", metavar="FILE", help=CALIBRATION)
    option("--calibration-tokens", type=int, metavar="N", help="how much of it is used")
    option("--context", type=int, metavar="N", help="tokens that bytes are compared at, or a conversation has room for")
    option = parser.add_argument_group("text").add_argument
    option("--max-new-tokens", type=int, default=48, metavar="N")
    option("--temperature", type=float, default=0.0, help="0: greedy")
    option("--top-k", type=int, metavar="K")
    option("--top-p", type=float, metavar="P")
    option("--seed", type=int, default=0)
    option("--chat", action="store_true", help="put the prompt into the model's chat template")
    option("--system", metavar="TEXT", help="what a chat begins with, before the first prompt")
    return parser


def check_counts(args: argparse.Namespace) -> None:
    """Numbers of tokens and rounds are above zero, and no option is an empty text (an unset variable of a shell)."""
    for name, value in vars(args).items():
        if value == "" and name != "prompt":
            raise TPAError(f"--{name.replace('_', '-')} must not be empty")
    if (getattr(args, "recall_prompts", None) or 0) < 0:
        raise TPAError(f"--recall-prompts must be >= 0, got {args.recall_prompts}")
    for name in ("context", "eval_tokens", "calibration_tokens", "timing_rounds"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise TPAError(f"--{name.replace('_', '-')} must be >= 1, got {value}")


def wants_plan(args: argparse.Namespace) -> bool:
    return args.kv_budget is not None or args.max_kl is not None


def tpa_config(args: argparse.Namespace) -> TPAConfig:
    """The TPAConfig that the options mean."""
    names = [*FORM, "q_rank", "layers", "rate", "sinks", "recent", "predict", "prefer", "context"]
    chosen = {name: getattr(args, name) for name in names}
    if wants_plan(args):
        given = [name for name in (*FORM, "rate") if chosen[name] is not None]
        if given:
            raise TPAError(f"--{given[0].replace('_', '-')} and a plan (--kv-budget, --max-kl) exclude each other")
        check_bounds(args.kv_budget, args.max_kl, args.context or 1, "the shipped one")
        chosen["rate"] = 1.0  # to plan from
    elif args.holdout:
        raise TPAError("--holdout is the text of --max-kl, which is not given")
    return TPAConfig(**chosen)


def sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p, args.seed)


def fill_defaults(args: argparse.Namespace, names: Sequence[str], found: Found, device: str) -> str:
    """Give the options that are not given what suits the model's size and the device; the line that says which."""
    parameters = parameter_count(found.config)
    large = parameters > LARGE
    slow = large and device == "cpu"
    fast = device != "cpu" or multiplies_bfloat16() or parameters > VERY_LARGE
    narrow = large and fast and args.backend == "torch" and found.stored_dtype == "bfloat16"
    defaults: dict[str, Any] = {
        "dtype": "bfloat16" if narrow else "float32",
        "calibration_tokens": (4096 if parameters > VERY_LARGE else 16_384) if slow else 32_768,
        "eval_tokens": 2048 if slow else 16_384,
        "recall_prompts": 2 if slow else 10,
        "timing_rounds": 1 if large else 3,
        "context": min(DEFAULT_CONTEXT, found.config.max_positions),
    }
    filled = {name: defaults[name] for name in names if getattr(args, name, None) is None}
    vars(args).update(filled)
    shown = [value if name == "dtype" else f"{name.replace('_', ' ')} {value:,}" for name, value in filled.items()]
    return f"defaults for {found.config.variant or 'this model'} on {device}: {', '.join(shown)}"
