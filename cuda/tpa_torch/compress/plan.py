"""The planner. Twin of `tpa_ref.plan`, which explains it and whose search it uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpa_ref.compress.calibrate import Moments
from tpa_ref.compress.config import DEFAULT_CONTEXT, TPAConfig
from tpa_ref.compress.plan import (
    Curve,
    Plan,
    Trial,
    bits_per_token,
    check_bounds,
    next_damage,
    planned,
    search,
    spectral_layer,
    table,
)

from .convert import convert, layer_spectrum
from .evaluate import evaluate

__all__ = [
    "Curve",
    "Plan",
    "Trial",
    "bits_per_token",
    "check_bounds",
    "next_damage",
    "planned",
    "search",
    "spectral_layer",
    "table",
]


def plan(
    model: Any,
    moments: Moments,
    kv_budget: float | None = None,
    max_kl: float | None = None,
    context: int = DEFAULT_CONTEXT,
    holdout: str | Path | None = None,
    base: TPAConfig | None = None,
    progress: Callable = iter,
) -> TPAConfig:
    """A TPAConfig with `per_layer` filled. See `make_plan`, which also tells how it was found."""
    return make_plan(model, moments, kv_budget, max_kl, context, holdout, base, progress).config


def make_plan(
    model: Any,
    moments: Moments,
    kv_budget: float | None = None,
    max_kl: float | None = None,
    context: int = DEFAULT_CONTEXT,
    holdout: str | Path | None = None,
    base: TPAConfig | None = None,
    progress: Callable = iter,
) -> Plan:
    """Plan the cache of a dense model.

    kv_budget: at least so many times smaller than `windowed` at `context` tokens. max_kl: at most this mean KL to the
    dense model, in nats, on the text `holdout` (or its path). Both: the smallest cache within both; where there is
    none, the one of the budget. base: layers, sinks and newest tokens to plan with. progress: wraps the trials.
    """
    return planned(
        convert, evaluate, layer_spectrum, model, moments, kv_budget, max_kl, context, holdout, base, progress
    )
