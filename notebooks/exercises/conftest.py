"""The reader's own file, given with --mine, as the fixture `mine`; without it every step is skipped."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tpa_ref need not be installed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mine", help="your own file, for instance mytpa.py")


@pytest.fixture(scope="session")
def mine(request: pytest.FixtureRequest) -> ModuleType:
    """The module in the file that --mine names."""
    path = request.config.getoption("--mine")
    if path is None:
        pytest.skip("no file given: python -m pytest notebooks/exercises --mine mytpa.py")
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec and spec.loader and Path(path).is_file(), f"--mine must name a Python file, got {path}"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
