"""Codecs for a small random model, and the table of what works, printed at the end."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import helpers
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", "4.57")

from small_hf import WORKS, Words, random_model

passed: set[str] = set()


@pytest.fixture(scope="module")
def hf() -> Any:
    return random_model()


@pytest.fixture(scope="module")
def codecs(hf: Any) -> Any:
    """exact: the dense cache in float32: whatever differs is a mistake. coded: four bits a number,
    predicted; plain: in two bands.
    """
    from tpa_torch.hf import calibrate_cache

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    common: dict[str, Any] = {"text": helpers.CALIBRATION, "tokens": 600, "sensitivity_tokens": 300}
    exact: dict[str, Any] = {"mode": "fixed-a", "k_rank": 2, "v_rank": 2}
    return SimpleNamespace(
        exact=calibrate_cache(hf, Words(), **common, **exact, kv_dtype="float32"),
        int8=calibrate_cache(hf, Words(), **common, **exact, kv_dtype="int8"),
        coded=calibrate_cache(hf, Words(), **common, rate=4.0, context=64, prefer="size"),
        plain=calibrate_cache(hf, Words(), **common, rate=4.0, context=64, predict=False),
    )


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" and report.passed:
        passed.add(report.nodeid.split("::")[-1].split("[")[0])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What of the table was tried just now."""
    if passed & set(WORKS.values()):
        terminalreporter.section(f"works with TPACache in transformers {transformers.__version__}")
        for what, test in WORKS.items():
            terminalreporter.write_line(f"{'yes' if test in passed else 'not tried':<10} {what}")
