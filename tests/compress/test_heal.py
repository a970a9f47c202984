"""Healing: the differentiable cache is the real one, training lowers the KL, goes on after a stop, and is saved.

What the KL does is measured on the tiny model, in short windows; the rest on a small random model.
"""

from __future__ import annotations

import sys

import helpers
import numpy as np
import pytest
from helpers import CALIBRATION, refused, relative, to_numpy

from tpa_ref.cli.options import TINY
from tpa_ref.compress.config import TPAConfig
from tpa_ref.gemma.texts import read_text

torch = pytest.importorskip("torch")
import tpa_torch
from tpa_torch.heal import heal, schedule
from tpa_torch.student import Projector, Student, losses

CONFIGS = {
    "contextual": TPAConfig(mode="contextual", k_rank=2, v_rank=2),
    "fixed-a": TPAConfig(mode="fixed-a", k_rank=3, v_rank=3),
    "fixed-b": TPAConfig(mode="fixed-b", k_rank=12, v_rank=12, kv_dtype="int8"),
    "latent": TPAConfig(mode="latent", k_rank=56, v_rank=56, kv_dtype="int4"),  # no number lies between two codes
    "spectral": TPAConfig(rate=0.5, context=128, prefer="size"),
    "banded": TPAConfig(rate=1.0, context=128),
    "not predicted": TPAConfig(rate=0.5, context=128, predict=False, prefer="size"),
    "V alone": TPAConfig(k_mode="fixed-a", rate=0.5, context=128),
}
TEXT = read_text(TINY / "calibration.txt")[:1500]


@pytest.fixture
def short_windows(monkeypatch):
    """Windows of 128 tokens, so that a few steps see the whole text."""
    module = sys.modules["tpa_torch.heal"]  # `tpa_torch.heal` is the function
    monkeypatch.setattr(module, "WINDOW", 128)
    monkeypatch.setattr(module, "CHECKS", 2)


@pytest.fixture
def pair(small):
    """(a spectral conversion, its dense model), both small."""
    dense, moments = small(tpa_torch, dtype="float32")
    return tpa_torch.convert(dense, TPAConfig(rate=1.5, context=60), moments), dense


def measured_kl(dense, tpa):
    """Mean KL on the text of the healing."""
    return tpa_torch.evaluate(dense, tpa, TEXT, 512, recall_prompts=0)["kl"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_the_real_cache(tiny, name):
    """Before any step, the KL of the differentiable student is the KL of the converted model."""
    dense, moments = tiny
    tpa = tpa_torch.convert(dense, CONFIGS[name], moments)
    ids = dense.tokenizer.encode(TEXT)[:200]
    kl, _ = losses(Student(tpa), dense, ids)
    P, Q = (torch.log_softmax(model([ids]), -1) for model in (dense, tpa))
    expected = float((P.exp() * (P - Q)).sum(-1).mean())
    np.testing.assert_allclose(float(kl.detach()), expected, rtol=0.08)  # factors in bf16 are not trained with


@pytest.mark.parametrize("name, learning_rate", [("contextual", 0.01), ("not predicted", 0.002)])
def test_healing_lowers_the_kl(tiny, short_windows, name, learning_rate, tmp_path):
    """A few steps on a little text lower the KL on that text; the healed model is saved and loaded like others."""
    dense, moments = tiny
    tpa = tpa_torch.convert(dense, CONFIGS[name], moments)
    healed = heal(tpa, dense, TEXT, steps=8, batch=1, learning_rate=learning_rate)
    before, after = (measured_kl(dense, model) for model in (tpa, healed))
    assert after < 0.95 * before
    assert len(healed.healing.kl) == 8 and [step for step, _ in healed.healing.checked] == [0, 4, 8]
    assert healed.tpa == tpa.tpa and healed.choices == tpa.choices
    ids = np.array([dense.tokenizer.encode(TEXT)[:40]])
    loaded = tpa_torch.load(tpa_torch.save(healed, tmp_path / "h.pt"))
    assert relative(to_numpy(loaded(ids)), to_numpy(healed(ids))) < 0.1  # weights are stored in bfloat16


def test_healing_begins_with_maps_of_the_tokens(tiny, short_windows):
    """Constant means become maps of the tokens: that alone takes most of the KL, and the text is kept from then on."""
    dense, moments = tiny
    tpa = tpa_torch.convert(dense, CONFIGS["not predicted"], moments)
    healed = heal(tpa, dense, TEXT, steps=1, batch=1, learning_rate=1e-4, predict=True)
    before, after = (measured_kl(dense, model) for model in (tpa, healed))
    assert after < 0.6 * before
    assert tpa.tpa.predict is False and healed.tpa.predict
    assert all(mode.predictor is not None for pair in healed.pairs for mode in pair.modes)
    fixed = tpa_torch.convert(dense, CONFIGS["contextual"], moments)
    refused(lambda: heal(fixed, dense, TEXT, steps=1, predict=True), "predict", "spectral")


def test_healing_goes_on_where_it_was_stopped(pair, tmp_path):
    """Stopped after its state was written and called again: the same weights as in one go, from the two steps left."""
    tpa, dense = pair
    options, state = {"steps": 22, "batch": 1, "learning_rate": 0.005}, tmp_path / "s.pt"
    text = CALIBRATION[:120] + "\n"  # so short that no window is kept aside, and the last weights are the best

    def stopped(steps):
        for step in steps:
            if step == 21:
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        heal(tpa, dense, text, **options, state=state, progress=stopped)
    assert len(torch.load(state, weights_only=True)["history"]["kl"]) == 20
    resumed, once = heal(tpa, dense, text, **options, state=state), heal(tpa, dense, text, **options)
    assert len(resumed.healing.kl) == 22
    assert resumed.healing.kl == pytest.approx(once.healing.kl, rel=1e-4)
    assert relative(resumed.pairs[5].k.basis, once.pairs[5].k.basis) < 1e-3
    assert relative(once.pairs[5].k.basis, tpa.pairs[5].k.basis) > 1e-2
    refused(lambda: heal(tpa, dense, text, steps=23, batch=1, state=state), "another healing", state)
    other = tpa_torch.convert(dense, TPAConfig(rate=1.0))
    refused(lambda: heal(other, dense, text, **options, state=state), "another healing", state)


def test_the_best_state_is_kept(pair):
    """Steps that are far too large make the windows kept aside worse: what comes back is the model as it was."""
    tpa, dense = pair
    healed = heal(tpa, dense, CALIBRATION[:600] + "\n", steps=2, batch=1, learning_rate=0.5)
    (_, before), *later = healed.healing.checked
    assert later and min(kl for _, kl in later) > before
    assert relative(healed.pairs[5].k.basis, tpa.pairs[5].k.basis) == 0


def test_steps_warm_up_and_fall_to_zero():
    """The learning rate of each step, relative to the largest."""
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[4] == max(rates) == 1.0 and rates[-1] == pytest.approx(0, abs=1e-12)
    assert (np.diff(rates[:5]) > 0).all() and (np.diff(rates[5:]) < 0).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_gradient_of_the_projection(rank):
    """Against finite differences, for matrices whose eigenvalues lie apart; without its terms it is another one."""
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(3, 4, 8, generator=rng, dtype=torch.float64) * torch.tensor([8.0, 4, 2, 1])[:, None]
    G, direction = X @ X.mT, torch.randn(3, 4, 4, generator=rng, dtype=torch.float64)
    direction, weight = direction + direction.mT, torch.randn(3, 4, 4, generator=rng, dtype=torch.float64)

    def value(step):
        return float((Projector.apply(G + step * direction, rank) * weight).sum())

    leaf = G.clone().requires_grad_()
    soft, Projector.SOFT = Projector.SOFT, 0.0
    try:
        (Projector.apply(leaf, rank) * weight).sum().backward()
    finally:
        Projector.SOFT = soft
    numeric = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float((leaf.grad * direction).sum()) == pytest.approx(numeric, rel=1e-4)
    assert abs(numeric) > 1e-4


def test_wrong_arguments_are_one_line(pair, tmp_path):
    """Models in the wrong order or of two configs, no steps, and a state that is none."""
    tpa, dense = pair
    other = helpers.model(tpa_torch)
    other.tokenizer = dense.tokenizer
    refused(lambda: heal(dense, tpa, CALIBRATION), "order")
    refused(lambda: heal(tpa, other, CALIBRATION), "one config")
    refused(lambda: heal(tpa, dense, CALIBRATION, steps=0), "steps", "0")
    refused(lambda: heal(tpa, dense, CALIBRATION, batch=0), "batch", "0")
    refused(lambda: heal(tpa, dense, CALIBRATION, learning_rate=2.0), "learning_rate", "2.0")
    (tmp_path / "s.pt").write_bytes(b"nothing")
    refused(lambda: heal(tpa, dense, CALIBRATION, steps=1, state=tmp_path / "s.pt"), "no state", tmp_path / "s.pt")
