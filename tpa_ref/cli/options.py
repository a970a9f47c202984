"""What the scripts share: options, one-line errors, peak memory, and the report. No torch is imported here."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import replacing
from ..compress.calibrate import read_text
from ..compress.config import FORM, KV_DTYPES, MODES, TPAConfig
from ..compress.plan import check_bounds
from ..errors import TPAError
from ..files.checkpoint import inspect
from ..gemma.config import VARIANTS, GemmaConfig

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "assets" / "tiny-gemma3"
LARGE = 100_000_000  # parameters from which on defaults change, to end in minutes on a CPU


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that takes --k_rank for --k-rank."""

    def error(self, message: str):
        raise TPAError(f"{self.prog}: {message}")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        given = sys.argv[1:] if args is None else list(args)
        return super().parse_args([_hyphens(argument) for argument in given], namespace)


def _hyphens(argument: str) -> str:
    """The hyphen spelling of an option.

    >>> _hyphens("--k_rank=2"), _hyphens("a_b")
    ('--k-rank=2', 'a_b')
    """
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def run(main: Callable[[], None]) -> None:
    """Call a script's main: what the user gave wrong is one line on stderr and exit code 2, never a traceback."""
    try:
        main()
    except TPAError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt", metavar="PATH", help="checkpoint: Hugging Face folder, gemma_pytorch .ckpt or folder, .safetensors"
    )
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model, where the checkpoint has none")
    group.add_argument("--variant", choices=[name for name in VARIANTS if name != "tiny"], help="what --ckpt must be")
    group.add_argument("--config", metavar="FILE", help="a Hugging Face config.json, where the checkpoint has none")
    group.add_argument("--backend", choices=("torch", "numpy"), default="torch")
    group.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), cpu, cuda, cuda:1, mps")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float64"),
        help="what is computed in (default: float32; bfloat16 from 100 M parameters on, where they are stored so)",
    )


def add_tpa_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TPA (nothing given: --rate 2, spectral latent, 8x smaller)")
    group.add_argument("--rate", type=float, metavar="BITS", help="bits per number of dense K and V, in (0, 8]")
    group.add_argument("--kv-budget", type=float, metavar="X", help="plan: at least X times smaller than windowed")
    group.add_argument("--max-kl", type=float, metavar="NATS", help="plan: at most this KL to the dense model")
    group.add_argument("--holdout", metavar="FILE", help="text --max-kl is measured on (default: the shipped one)")
    group.add_argument("--sinks", type=int, metavar="N", help="first tokens that global layers keep exactly")
    group.add_argument("--recent", type=int, default=0, metavar="N", help="newest tokens that they keep exactly")
    group.add_argument(
        "--predict",
        action=argparse.BooleanOptionalAction,
        help="code only what the words do not tell of K and V (default: up to a hidden size of 512, without images)",
    )
    group.add_argument("--mode", choices=MODES, help="for K and V, instead of a rate")
    group.add_argument("--k-mode", choices=MODES)
    group.add_argument("--v-mode", choices=MODES)
    group.add_argument("--q-rank", type=int, metavar="R", help="head-mixing rank of Q; saves no cache")
    group.add_argument("--k-rank", type=int, metavar="R")
    group.add_argument("--v-rank", type=int, metavar="R")
    group.add_argument("--kv-dtype", choices=KV_DTYPES, help="how factors are stored")
    group.add_argument("--k-dtype", choices=KV_DTYPES)
    group.add_argument("--v-dtype", choices=KV_DTYPES)
    group.add_argument("--layers", default="all", help="all, global, local, or numbers like 5,11; others stay dense")
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="text for the constant factors (default: the shipped one); 'none': weights alone",
    )
    group.add_argument("--calibration-tokens", type=int, metavar="N", help="how much of it is used")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument("--max-new-tokens", type=int, default=48, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--chat", action="store_true", help="put the prompt into Gemma's chat template")


def tpa_config(args: argparse.Namespace) -> TPAConfig:
    """The TPAConfig that the options mean."""
    names = [*FORM, "q_rank", "layers", "rate", "sinks", "recent", "predict"]
    chosen = {name: getattr(args, name) for name in names} | {"context": getattr(args, "context", None)}
    if args.kv_budget is not None or args.max_kl is not None:
        given = [name for name in (*FORM, "rate") if chosen[name] is not None]
        if given:
            raise TPAError(f"--{given[0].replace('_', '-')} and a plan (--kv-budget, --max-kl) exclude each other")
        check_bounds(args.kv_budget, args.max_kl, args.context or 1, "the shipped one")
        chosen["rate"] = 1.0  # to plan from
    elif args.holdout:
        raise TPAError("--holdout is the text of --max-kl, which is not given")
    return TPAConfig(**chosen)


def make_plan(backend: Any, dense: Any, moments: Any, args: argparse.Namespace, context: int) -> Any:
    """The plan that --kv-budget and --max-kl ask for; None if neither is given."""
    if args.kv_budget is None and args.max_kl is None:
        return None
    if moments is None:
        raise TPAError("--calibration none leaves nothing to plan with: --kv-budget and --max-kl need a text")
    holdout = read_text(Path(args.holdout or TINY / "holdout.txt"))
    planner = importlib.import_module(f"{backend.__name__}.compress.plan")
    bar = progress_bar("planning")
    return planner.make_plan(dense, moments, args.kv_budget, args.max_kl, context, holdout, tpa_config(args), bar)


def backend_module(name: str) -> Any:
    """tpa_torch or tpa_ref; one line where torch is missing."""
    if name == "numpy":
        return importlib.import_module("tpa_ref")
    sys.path.append(str(ROOT / "cuda"))  # an uninstalled clone
    try:
        return importlib.import_module("tpa_torch")
    except ModuleNotFoundError as problem:
        raise TPAError(f"{problem.name} is not installed: pip install -e .[torch], or use --backend numpy") from None


def choose_dtype(args: argparse.Namespace, path: str) -> str:
    """The --dtype given, else float32, or bfloat16 for a large model that is stored in it and run by torch."""
    if args.dtype or args.backend != "torch":
        return args.dtype or "float32"
    found = inspect(path, args.variant, args.config, args.tokenizer)
    return "bfloat16" if parameter_count(found.config) > LARGE and found.stored_dtype == "bfloat16" else "float32"


def load_model(backend: Any, args: argparse.Namespace, progress: Callable = iter) -> Any:
    """The model of --ckpt (default: the shipped tiny one) with the options that concern it."""
    path = args.ckpt or str(TINY)
    options: dict[str, Any] = {"dtype": choose_dtype(args, path), "progress": progress}
    if args.backend == "torch":
        options["device"] = args.device
    return backend.load(path, args.variant, args.config, args.tokenizer, **options)


def progress_bar(label: str) -> Callable:
    """Wraps a list in a tqdm bar that shows only on a terminal."""
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=label, leave=False, disable=None)


def parameter_count(config: GemmaConfig) -> int:
    """Numbers in all weights.

    >>> parameter_count(GemmaConfig.tiny())
    7549952
    """
    from ..gemma.weights import hf_names

    return sum(int(np.prod(shape)) for shape in hf_names(config).values())


def describe_config(config: GemmaConfig) -> str:
    vision = config.vision
    images = (
        f", images of {vision.image_size} x {vision.image_size} as {vision.tokens_per_image} tokens" if vision else ""
    )
    return (
        f"Gemma 3 {config.variant}: {config.num_layers} layers ({config.num_global} global), "
        f"width {config.hidden_size}, {config.num_heads} query and {config.num_kv_heads} KV heads of "
        f"{config.head_dim}, window {config.sliding_window}, {parameter_count(config) / 1e6:,.1f} M parameters{images}"
    )


def describe_factors(model: Any) -> list[str]:
    """One line for each run of layers that cache in the same way."""
    lines: list[str] = []
    start = 0
    numbers = model.config.num_kv_heads * model.config.head_dim
    shown = [_describe_pair(k, v, numbers).replace(" R=0", "") for k, v in model.factors]
    for layer in range(1, len(shown) + 1):
        if layer == len(shown) or shown[layer] != shown[start]:
            name = f"layer {start}" if layer - start == 1 else f"layers {start}-{layer - 1}"
            lines.append(f"{name}: {shown[start]}")
            start = layer
    return lines


def _describe_pair(k: Any, v: Any, numbers: int) -> str:
    if v.dtype != "shared":
        return f"K {_describe_side(k, numbers)}, V {_describe_side(v, numbers)}"
    rest = "" if k.predictor is None else ", the rest from the words"
    return f"K and V {_describe_side(k, 2 * numbers)}{rest}"


def _describe_side(how: Any, numbers: int) -> str:
    if how.dtype == "spectral":
        return f"{sum(how.widths) / numbers:.2f} bits in {how.rank} of {numbers} coefficients"
    return f"{how.mode} R={how.rank} {how.dtype}"


def environment(backend: str, device: str) -> dict[str, Any]:
    """What the numbers of a report were measured on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": None,
        "device": device,
        "processor": _processor(),
        "threads": os.cpu_count(),
    }
    if backend == "torch":
        import torch

        found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if device.startswith("cuda"):
            found["processor"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class PeakMemory:
    """Largest anonymous memory of this process while the block runs (mapped file pages apart), in bytes.

    On CUDA the allocator's own peak. Where the system does not tell anonymous memory apart: the largest resident set.
    """

    def __init__(self, device: str = "cpu", interval: float = 0.02):
        self.device, self.interval, self.bytes = device, interval, 0
        self._stop = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.device.startswith("cuda"):
            import torch

            self.bytes = torch.cuda.max_memory_allocated(self.device)

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous_memory())
            if self._stop.wait(self.interval):
                return


def anonymous_memory() -> int:
    """Anonymous resident memory of this process in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(work: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """Seconds that `work` takes, with the device finished."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


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
