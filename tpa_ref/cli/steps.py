"""The steps of both commands, on one path: open a checkpoint, load it, calibrate, plan, convert, save."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compress.calibrate import calibrate
from ..compress.config import TPAConfig
from ..compress.convert import convert
from ..compress.moments import Moments
from ..compress.own_text import own_text
from ..compress.plan import Plan, Trial, by_preference, make_plan
from ..errors import TPAError
from ..files.found import inspect
from ..files.stream import check_folder, convert_on_disk
from ..gemma.texts import read_text, shipped
from .machine import PeakMemory, environment
from .options import ROOT, TINY, fill_defaults, progress_bar, tpa_config, wants_plan
from .report import describe_config, size_on_disk

MOST_COMPARED = 1024  # numbers of K up to which transforms of both kinds take seconds


def backend_module(name: str) -> Any:
    """tpa_torch or tpa_ref; one line where torch is missing."""
    if name == "numpy":
        return importlib.import_module("tpa_ref")
    sys.path.append(str(ROOT / "cuda"))  # a clone that is not installed
    try:
        return importlib.import_module("tpa_torch")
    except ModuleNotFoundError as problem:
        raise TPAError(f"{problem.name} is not installed: pip install -e .[torch], or use --backend numpy") from None


@dataclass
class Converted:
    """A model with a TPA cache, and how it came to be."""

    model: Any
    plan: Plan | None
    calibration_tokens: int
    seconds: float
    peak_bytes: int
    by_preference: dict[str, Trial]  # what either choice of --prefer comes to


class Work:
    """One checkpoint and the options of a command. `args` gets the defaults that the command uses."""

    def __init__(self, args: argparse.Namespace, source: str, uses: Sequence[str]):
        self.args, self.source = args, source
        self.backend = backend_module(args.backend)
        self.device, self.place = "cpu", {}
        if args.backend == "torch":
            self.device = str(importlib.import_module("tpa_torch.files.checkpoint").choose_device(args.device))
            self.place = {"device": self.device}
        elif args.weights != "as-computed":
            raise TPAError(f"--weights {args.weights} needs --backend torch, got {args.backend}")
        self.found = inspect(source, args.variant, args.config, args.tokenizer)
        self.config = self.found.config
        self.environment = environment(args.backend, self.device)
        self._defaults = fill_defaults(args, uses, self.found, self.device)

    def introduce(self) -> None:
        """Say what is worked on, with what, and which defaults were chosen for it."""
        machine = [f"{name} {value}" for name, value in self.environment.items() if value]
        print(describe_config(self.config), ", ".join([*machine, self.args.dtype]), self._defaults, sep="\n")
        for note in self.found.notes:
            print(f"note: {note}")

    def load(self, on_disk: bool = False) -> Any:
        """The model; on_disk: its blocks are read whenever they are needed, and as they are, since they are written."""
        args = self.args
        what = self.source, args.variant, args.config, args.tokenizer, args.dtype
        held = {} if on_disk or args.backend == "numpy" else {"weights": args.weights}
        return self.backend.load(*what, progress_bar("loading"), on_disk, **self.place, **held)

    def calibration_text(self, model: Any = None) -> str | None:
        """The text for the model constants, or None; without a model, None for what it has still to write."""
        given, tokens = self.args.calibration, self.args.calibration_tokens
        if given == "self":
            return own_text(model, tokens, progress=progress_bar("writing")) if model else None
        return None if given == "none" else self.text(given, "calibration")

    def text(self, given: str | None, name: str) -> str:
        """The file that was given, or the shipped text of that name: the tiny model's own, or that for all others."""
        if given:
            return read_text(Path(given))
        tiny = Path(self.source).resolve() == TINY.resolve()
        return read_text(TINY / f"{name}.txt") if tiny else shipped({"evaluation": "prose"}.get(name, name))

    def calibrate(self, dense: Any) -> Moments | None:
        """Moments of the calibration text; None without one."""
        text, bar = self.calibration_text(dense), progress_bar("calibrating")
        tokens, predict = self.args.calibration_tokens, self.args.predict
        return None if text is None else calibrate(dense, text, max_tokens=tokens, progress=bar, predict=predict)

    def choose(self, dense: Any, moments: Moments | None) -> tuple[Plan | None, TPAConfig]:
        """The plan that --kv-budget and --max-kl ask for, if one is given, and the config to convert with."""
        args, config = self.args, tpa_config(self.args)
        if not wants_plan(args):
            return None, config
        if moments is None:
            raise TPAError("--calibration none leaves nothing to plan with: --kv-budget and --max-kl need a text")
        holdout, bar = self.text(args.holdout, "holdout"), progress_bar("planning")
        plan = make_plan(dense, moments, args.kv_budget, args.max_kl, args.context, holdout, config, bar)
        return plan, plan.config

    def convert(self, dense: Any, compare: bool = False) -> Converted:
        """Calibrate, plan if asked to, and convert in memory. compare: also what either choice of --prefer comes to."""
        start = time.perf_counter()
        with PeakMemory(self.device) as peak:
            moments = self.calibrate(dense)
            plan, config = self.choose(dense, moments)
            model = convert(dense, config, moments, progress_bar("converting"))
        seconds = time.perf_counter() - start
        small = self.config.num_kv_heads * self.config.head_dim <= MOST_COMPARED
        both = by_preference(dense, moments, config, self.args.context) if compare and moments and small else {}
        return Converted(model, plan, moments.tokens if moments else 0, seconds, peak.bytes, both)

    def convert_to_folder(self, target: str) -> tuple[Plan | None, dict[str, Any]]:
        """Convert from disk to disk, layer by layer, in the memory of one layer: (plan, report)."""
        args, start, folder = self.args, time.perf_counter(), check_folder(target, self.source)
        with PeakMemory(self.device) as peak:
            dense = self.load(on_disk=True)
            moments = self.calibrate(dense) if wants_plan(args) else None
            plan, config = self.choose(dense, moments)
            writer = self.load() if args.calibration == "self" and moments is None else None
            source, bar = moments or self.calibration_text(writer), progress_bar("converting")
            convert_on_disk(dense, self.source, folder, config, source, args.calibration_tokens, bar)
        return plan, {
            "conversion_seconds": time.perf_counter() - start,
            "peak_memory_bytes": peak.bytes,
            "saved_bytes": size_on_disk(folder),
            "dtype": args.dtype,
            "calibration_tokens": 0 if args.calibration == "none" else args.calibration_tokens,
            "environment": self.environment,
        }
