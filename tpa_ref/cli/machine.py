"""What figures are measured on, and with: the machine and its memory."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np


def environment(backend: str, device: str) -> dict[str, Any]:
    """What the numbers of a report were measured on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": None,
        "device": device,
        "processor": _said("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "threads": os.cpu_count(),
    }
    if backend == "torch":
        import torch

        found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if device.startswith("cuda"):
            found["processor"] = torch.cuda.get_device_name(device)
    return found


def _said(file: str, name: str) -> str:
    """What a file of the system says of a name; empty where there is no such file or name."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def multiplies_bfloat16() -> bool:
    """Has the processor instructions for it? Without them PyTorch takes four times as long as in float32."""
    flags = _said("/proc/cpuinfo", "flags") or _said("/proc/cpuinfo", "Features")
    return not flags or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


class PeakMemory:
    """Largest anonymous memory of this process while the block runs (mapped file pages apart), in bytes.

    On CUDA the allocator's own peak. Where the system does not tell anonymous memory apart: the largest resident set.
    """

    def __init__(self, device: str = "cpu", interval: float = 0.02):
        self.device, self.interval, self.bytes = device, interval, 0
        self._cuda = importlib.import_module("torch").cuda if device.startswith("cuda") else None
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            self._cuda.reset_peak_memory_stats(self.device)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._cuda:
            self.bytes = self._cuda.max_memory_allocated(self.device)

    def _watch(self) -> None:
        self.bytes = anonymous_memory()
        while not self._stop.wait(self.interval):
            self.bytes = max(self.bytes, anonymous_memory())


def anonymous_memory() -> int:
    """Anonymous resident memory of this process in bytes."""
    if said := _said("/proc/self/status", "RssAnon"):
        return int(said.split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
