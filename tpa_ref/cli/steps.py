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
from ..compress.config import DEFAULT_RATE
from ..compress.convert import convert
from ..compress.moments import Moments
from ..compress.plan import Plan, make_plan
from ..errors import TPAError
from ..files.found import inspect
from ..files.stream import check_folder, convert_on_disk
from ..gemma.texts import read_text
from .machine import PeakMemory, environment
from .options import ROOT, TINY, Defaults, progress_bar, tpa_config, wants_plan
from .report import describe_config, describe_environment


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
    seconds: float = 0.0
    peak_bytes: int = 0

    def report(self, args: argparse.Namespace) -> dict[str, Any]:
        """What was asked for, and what was chosen, as JSON can hold it."""
        tpa = self.model.tpa
        return {
            "mode": args.mode,
            "ranks_requested": {"q": args.q_rank, "k": args.k_rank, "v": args.v_rank},
            "rate": tpa.rate or (DEFAULT_RATE if tpa.spectral else None),
            "kv_dtype": args.kv_dtype,
            "plan": self.plan.to_dict() if self.plan else None,
        }


class Work:
    """One checkpoint and the options of a command. `args` gets the defaults that the command uses."""

    def __init__(self, args: argparse.Namespace, source: str, uses: Sequence[str]):
        self.args, self.source = args, source
        self.backend = backend_module(args.backend)
        self.device, self.place = "cpu", {}
        if args.backend == "torch":
            self.device = str(importlib.import_module("tpa_torch.files.checkpoint").choose_device(args.device))
            self.place = {"device": self.device}
        self.found = inspect(source, args.variant, args.config, args.tokenizer)
        self.config = self.found.config
        self.environment = environment(args.backend, self.device)
        self._defaults = Defaults.of(self.found, args.backend, self.device).fill(args, uses)

    def introduce(self) -> None:
        """Say what is worked on, with what, and which defaults were chosen for it."""
        print(describe_config(self.config))
        print(f"{describe_environment(self.environment)}, {self.args.dtype}")
        print(self._defaults)

    def load(self, on_disk: bool = False) -> Any:
        """The model; on_disk: its blocks are read whenever they are needed."""
        args, bar = self.args, progress_bar("loading")
        return self.backend.load(
            self.source, args.variant, args.config, args.tokenizer, args.dtype, bar, on_disk, **self.place
        )

    def calibration_text(self) -> str | None:
        """The text for the model constants, or None."""
        given = self.args.calibration
        return None if given == "none" else read_text(Path(given or TINY / "calibration.txt"))

    def calibrate(self, dense: Any) -> Moments | None:
        """Moments of the calibration text; None without one."""
        text, bar = self.calibration_text(), progress_bar("calibrating")
        tokens, predict = self.args.calibration_tokens, self.args.predict
        return None if text is None else calibrate(dense, text, max_tokens=tokens, progress=bar, predict=predict)

    def plan(self, dense: Any, moments: Moments | None) -> Plan | None:
        """The plan that --kv-budget and --max-kl ask for; None if neither is given."""
        args = self.args
        if not wants_plan(args):
            return None
        if moments is None:
            raise TPAError("--calibration none leaves nothing to plan with: --kv-budget and --max-kl need a text")
        holdout, bar = read_text(Path(args.holdout or TINY / "holdout.txt")), progress_bar("planning")
        return make_plan(dense, moments, args.kv_budget, args.max_kl, args.context, holdout, tpa_config(args), bar)

    def convert(self, dense: Any) -> Converted:
        """Calibrate, plan if asked to, and convert in memory."""
        start = time.perf_counter()
        with PeakMemory(self.device) as peak:
            moments = self.calibrate(dense)
            plan = self.plan(dense, moments)
            config = plan.config if plan else tpa_config(self.args)
            model = convert(dense, config, moments, progress_bar("converting"))
        tokens = moments.tokens if moments else 0
        return Converted(model, plan, tokens, time.perf_counter() - start, peak.bytes)

    def convert_to_folder(self, target: str) -> tuple[Plan | None, dict[str, Any]]:
        """Convert from disk to disk, layer by layer, in the memory of one layer: (plan, report)."""
        args, plan, start = self.args, None, time.perf_counter()
        folder = check_folder(target)
        with PeakMemory(self.device) as peak:
            dense, calibration = self.load(on_disk=True), self.calibration_text()
            moments = self.calibrate(dense) if wants_plan(args) else None
            plan = self.plan(dense, moments)
            config, bar = plan.config if plan else tpa_config(args), progress_bar("converting")
            convert_on_disk(dense, self.source, folder, config, moments or calibration, args.calibration_tokens, bar)
        return plan, {
            "conversion_seconds": time.perf_counter() - start,
            "peak_memory_bytes": peak.bytes,
            "saved_bytes": sum(file.stat().st_size for file in Path(target).iterdir()),
            "dtype": args.dtype,
            "calibration_tokens": 0 if args.calibration == "none" else args.calibration_tokens,
            "environment": self.environment,
        }
