"""The planner: budgets by arithmetic, bounds by measurement, and what it says when there is no such cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import submodule

import tpa_ref
from tpa_ref.cli import options as cli
from tpa_ref.compress.calibrate import read_text
from tpa_ref.compress.config import TPAConfig
from tpa_ref.compress.plan import Trial, next_damage
from tpa_ref.errors import TPAError
from tpa_ref.gemma.memory import windowed_bytes

torch = pytest.importorskip("torch")
import tpa_torch

plan = submodule(tpa_torch, "plan")


@pytest.fixture(scope="module")
def tiny():
    """The tiny model in torch, its moments, and text that calibration has not seen."""
    torch.set_num_threads(1)
    model = tpa_torch.load(cli.TINY)
    text = read_text(cli.TINY / "calibration.txt")
    moments = tpa_torch.calibrate(model, text, max_tokens=8192, sensitivity_tokens=4096)
    return model, moments, read_text(cli.TINY / "holdout.txt")[:12_000]


@pytest.mark.parametrize(("budget", "context"), [(8, 128), (8, 32_768), (20, 32_768), (33.3, 3600)])
def test_a_budget_is_kept_and_used(tiny, budget, context):
    """A cache made by the plan is at least so many times smaller at that context, and not much more."""
    model, moments, _ = tiny
    config = tpa_torch.plan(model, moments, kv_budget=budget, context=context)
    tpa = tpa_torch.convert(model, config, moments)
    ratio = windowed_bytes(model.config, context) / tpa.new_cache(1, 1).nbytes_at(context)
    assert budget <= ratio < 1.02 * budget
    assert tpa_torch.plan(model, moments, kv_budget=budget, context=context) == config  # deterministic


def test_twins_plan_the_same(tiny):
    """Equal moments give equal widths in both backends."""
    model, moments, _ = tiny
    reference = tpa_ref.load(cli.TINY)
    ours, theirs = (
        backend.plan(m, moments, kv_budget=12, context=2048)
        for backend, m in ((tpa_torch, model), (tpa_ref, reference))
    )
    assert ours == theirs


def test_a_bound_is_kept(tiny):
    """Measured on the text it was given, just below the bound; and near it on other text."""
    model, moments, holdout = tiny
    found = plan.make_plan(model, moments, max_kl=0.02, context=2048, holdout=holdout)
    assert found.met and 0.9 * 0.02 < found.chosen.kl <= 0.02
    tpa = tpa_torch.convert(model, found.config, moments)
    other = read_text(cli.TINY / "evaluation.txt")
    kl = tpa_torch.evaluate(model, tpa, other, 4096, recall_prompts=0)["kl"]
    assert kl < 1.2 * 0.02
    assert json.loads(json.dumps(found.to_dict()))["met"] is True


def test_both_bounds(tiny):
    """The smallest cache within both; where there is none it says so and gives the one of the budget."""
    model, moments, holdout = tiny
    both = plan.make_plan(model, moments, kv_budget=4, max_kl=0.03, context=2048, holdout=holdout)
    assert both.met and both.chosen.kl <= 0.03 and both.chosen.ratio_vs_windowed >= 4
    neither = plan.make_plan(model, moments, kv_budget=40, max_kl=0.001, context=2048, holdout=holdout)
    assert not neither.met and neither.chosen.ratio_vs_windowed >= 40 and neither.chosen.kl > 0.001
    assert "cannot be met" in neither.message and "40x" in neither.message


def test_a_plan_is_saved_with_its_model(tiny, tmp_path):
    """per_layer, rate, context and sinks come back; the table names every layer."""
    model, moments, _ = tiny
    config = tpa_torch.plan(model, moments, kv_budget=10, context=2048)
    tpa = tpa_torch.convert(model, config, moments)
    assert tpa_torch.load(tpa_torch.save(tpa, tmp_path / "tpa")).tpa == config
    found = plan.make_plan(model, moments, kv_budget=10, context=2048)
    assert len(plan.table(found, model.config).splitlines()) == 13


def test_a_plan_for_global_layers_only(tiny):
    """The other layers stay dense and are counted so."""
    model, moments, _ = tiny
    config = tpa_torch.plan(model, moments, kv_budget=3, context=2048, base=TPAConfig(layers="global", rate=1.0))
    assert [choice is not None for choice in config.per_layer] == list(model.config.is_global)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ("kv_budget", "max_kl")),
        ({"kv_budget": 0}, ("kv_budget", "0")),
        ({"max_kl": float("nan"), "holdout": "x"}, ("max_kl", "nan")),
        ({"max_kl": 0.1}, ("holdout",)),
        ({"kv_budget": 8, "context": 0}, ("context", "0")),
        ({"kv_budget": 1e6}, ("kv_budget", "cannot be reached")),
    ],
)
def test_wrong_arguments_are_one_line(tiny, arguments, words):
    """Nothing asked for, numbers that mean nothing, and sizes that even no bits at all do not reach."""
    model, moments, _ = tiny
    with pytest.raises(TPAError) as caught:
        plan.make_plan(model, moments, **arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_search_follows_a_power_law():
    """Two trials on KL = 3 damage^1.2 tell where KL = goal."""
    trials = [Trial(1.0, 1, 1.0, 1.0, damage, 3 * damage**1.2) for damage in (0.1, 0.02)]
    np.testing.assert_allclose(3 * next_damage(trials, 0.05) ** 1.2, 0.05, rtol=1e-6)
    assert next_damage([], 0.05) == 0.05
