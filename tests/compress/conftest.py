"""What the tests of this folder share: calibrated models, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import helpers
import pytest
from helpers import CALIBRATION, Bytes

from tpa_ref.cli.options import TINY
from tpa_ref.gemma.texts import read_text

HEADS = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 8}


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """The tiny model in torch and its moments, from a little text."""
    pytest.importorskip("torch").set_num_threads(1)
    import tpa_torch

    model = tpa_torch.load(TINY)
    text = read_text(TINY / "calibration.txt")
    return model, tpa_torch.calibrate(model, text, max_tokens=4096, sensitivity_tokens=2048)


@pytest.fixture(scope="session")
def small() -> Callable[..., tuple[Any, Any]]:
    """Makes (a small random model of a backend, its moments), once for equal arguments."""

    @functools.cache
    def make(backend: Any, max_tokens: int = 300, dtype: str = "float64", **more: Any) -> tuple[Any, Any]:
        if helpers.is_torch(backend):
            pytest.importorskip("torch").set_num_threads(1)
        model = helpers.model(backend, helpers.config(**HEADS), dtype=dtype)
        model.tokenizer = Bytes()
        return model, backend.calibrate(model, CALIBRATION, max_tokens=max_tokens, **more)

    return make
