"""The planner: budgets by arithmetic, bounds by measurement, and what it says when there is no such cache.

Figures are the tiny model's, in torch; that both backends plan the same is shown on one budget.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import refused

import tpa_ref
from tpa_ref.cli.options import TINY
from tpa_ref.compress.config import TPAConfig
from tpa_ref.compress.plan import Trial, by_preference, make_plan, next_damage, table
from tpa_ref.gemma.memory import windowed_bytes
from tpa_ref.gemma.texts import read_text

HOLDOUT = read_text(TINY / "holdout.txt")[:3_000]


@pytest.mark.parametrize(("budget", "context"), [(8, 128), (8, 32_768), (20, 32_768), (33.3, 3600)])
def test_a_budget_is_kept_and_used(tiny, budget, context):
    """A cache made by the plan is at least so many times smaller at that context, and not much more."""
    model, moments = tiny
    config = tpa_ref.plan(model, moments, kv_budget=budget, context=context)
    tpa = tpa_ref.convert(model, config, moments)
    ratio = windowed_bytes(model.config, context) / tpa.new_cache(1, 1).nbytes_at(context)
    assert budget <= ratio < 1.03 * budget


def test_twins_plan_the_same(tiny):
    """Equal moments give equal widths in both backends, and once more in the same one; the table names every layer."""
    model, moments = tiny
    found = make_plan(model, moments, kv_budget=12, context=2048)
    for again in (model, tpa_ref.load(TINY)):
        assert found.config == tpa_ref.plan(again, moments, kv_budget=12, context=2048)
    assert len(table(found, model.config).splitlines()) == 13


def test_a_plan_is_saved_with_its_model(tiny, tmp_path):
    """per_layer, rate, context and sinks come back."""
    model, moments = tiny
    config = tpa_ref.plan(model, moments, kv_budget=10, context=2048)
    tpa = tpa_ref.convert(model, config, moments)
    assert tpa_ref.load(tpa_ref.save(tpa, tmp_path / "tpa")).tpa == tpa.tpa == config
    assert config.context == 2048 and config.rate and config.exact_tokens == (1, 0)


def test_a_bound_is_kept(tiny):
    """Measured on the text it was given, just below the bound; and near it on other text."""
    model, moments = tiny
    found = make_plan(model, moments, max_kl=0.02, context=2048, holdout=HOLDOUT)
    assert found.met and 0.85 * 0.02 < found.chosen.kl <= 0.02
    tpa = tpa_ref.convert(model, found.config, moments)
    other = read_text(TINY / "evaluation.txt")
    kl = tpa_ref.evaluate(model, tpa, other, 1024, recall_prompts=0)["kl"]
    assert kl < 1.2 * 0.02
    assert json.loads(json.dumps(found.to_dict()))["met"] is True


def test_both_bounds(tiny):
    """The smallest cache within both; where there is none it says so and gives the one of the budget."""
    model, moments = tiny
    both = make_plan(model, moments, kv_budget=4, max_kl=0.03, context=2048, holdout=HOLDOUT)
    assert both.met and both.chosen.kl <= 0.03 and both.chosen.ratio_vs_windowed >= 4
    neither = make_plan(model, moments, kv_budget=40, max_kl=0.001, context=2048, holdout=HOLDOUT)
    assert not neither.met and neither.chosen.ratio_vs_windowed >= 40 and neither.chosen.kl > 0.001
    assert "cannot be met" in neither.message and "40x" in neither.message


def test_a_plan_for_global_layers_only(tiny):
    """The other layers stay dense and are counted so."""
    model, moments = tiny
    config = tpa_ref.plan(model, moments, kv_budget=3, context=2048, base=TPAConfig(layers="global", rate=1.0))
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
    refused(lambda: make_plan(*tiny, **arguments), *words)


def test_the_search_follows_a_power_law():
    """Two trials on KL = 3 damage^1.2 tell where KL = goal."""
    trials = [Trial(1.0, 1, 1.0, 1.0, damage, 3 * damage**1.2) for damage in (0.1, 0.02)]
    np.testing.assert_allclose(3 * next_damage(trials, 0.05) ** 1.2, 0.05, rtol=1e-6)
    assert next_damage([], 0.05) == 0.05


def test_both_choices_of_prefer(tiny):
    """Nearly the same bytes at a rate, less predicted loss for size; nothing to choose for factors of fixed rank."""
    dense, moments = tiny
    found = by_preference(dense, moments, TPAConfig(rate=2.0), 1024)
    assert found["speed"].nbytes == pytest.approx(found["size"].nbytes, rel=0.05)
    assert found["size"].predicted < found["speed"].predicted < 10 * found["size"].predicted
    for prefer, trial in found.items():
        made = tpa_ref.convert(dense, TPAConfig(rate=2.0, context=1024, prefer=prefer), moments)
        assert made.new_cache(1, 1).nbytes_at(1024) == pytest.approx(trial.nbytes, rel=0.01)
    assert by_preference(dense, moments, TPAConfig(mode="latent"), 1024) == {}
    assert by_preference(dense, moments, TPAConfig(k_mode="fixed-a", rate=2.0), 1024) == {}
