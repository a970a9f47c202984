"""What figures are measured on, and with: the machine, its memory, its clock."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable
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
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _lines(file: str) -> list[str]:
    """The lines of a file of the system; none where there is no such file."""
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []


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
    for line in _lines("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def synchronizer(device: str) -> Callable[[], None]:
    """What waits until a device has finished."""
    if device.startswith(("cuda", "mps")):
        import torch

        return torch.cuda.synchronize if device.startswith("cuda") else torch.mps.synchronize
    return lambda: None


def timed(work: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """Seconds that `work` takes, with the device finished."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start
