"""Healing: the differentiable cache is the real one, training lowers the KL, goes on after a stop, and is saved."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import relative, to_numpy

from tpa_ref.cli import options as cli
from tpa_ref.compress.calibrate import read_text
from tpa_ref.compress.config import TPAConfig
from tpa_ref.errors import TPAError

torch = pytest.importorskip("torch")
import tpa_torch
from tpa_torch.heal import Projector, Student, heal, losses

CONFIGS = {
    "contextual": TPAConfig(mode="contextual", k_rank=2, v_rank=2),
    "fixed-a": TPAConfig(mode="fixed-a", k_rank=3, v_rank=3),
    "fixed-b": TPAConfig(mode="fixed-b", k_rank=12, v_rank=12, kv_dtype="int8"),
    "latent": TPAConfig(mode="latent", k_rank=48, v_rank=48, kv_dtype="int4"),
    "spectral": TPAConfig(rate=0.5, context=128),
    "spectral without words": TPAConfig(rate=0.5, context=128, predict=False),
}


@pytest.fixture(scope="module")
def tiny():
    """(dense model, moments, a little training text)."""
    torch.set_num_threads(1)
    model = tpa_torch.load(cli.TINY)
    text = read_text(cli.TINY / "calibration.txt")
    return model, tpa_torch.calibrate(model, text, max_tokens=4096, sensitivity_tokens=2048), text[:9_000]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_the_real_cache(tiny, name):
    """Before any step, the KL of the differentiable student is the KL of the converted model."""
    dense, moments, text = tiny
    tpa = tpa_torch.convert(dense, CONFIGS[name], moments)
    ids = dense.tokenizer.encode(text)[:200]
    kl, _ = losses(Student(tpa), dense, ids)
    P, Q = (torch.log_softmax(model([ids]), -1) for model in (dense, tpa))
    expected = float((P.exp() * (P - Q)).sum(-1).mean())
    np.testing.assert_allclose(
        float(kl.detach()), expected, rtol=0.02
    )  # storage of factors in bf16 is not trained with


@pytest.mark.parametrize("name, learning_rate", [("contextual", 0.01), ("spectral without words", 0.003)])
def test_healing_lowers_the_kl(tiny, name, learning_rate, tmp_path):
    """A few steps on a little text lower the KL on that text; the healed model is saved and loaded like others."""
    dense, moments, text = tiny
    tpa = tpa_torch.convert(dense, CONFIGS[name], moments)
    healed = heal(tpa, dense, text, steps=10, batch=1, learning_rate=learning_rate)
    before, after = (tpa_torch.evaluate(dense, model, text, 1024, recall_prompts=0)["kl"] for model in (tpa, healed))
    assert after < 0.95 * before
    assert len(healed.healing.kl) == 10 and healed.tpa == tpa.tpa
    ids = np.array([dense.tokenizer.encode(text)[:40]])
    assert (
        relative(to_numpy(tpa_torch.load(tpa_torch.save(healed, tmp_path / "h.pt"))(ids)), to_numpy(healed(ids)))
        < 0.05  # weights are stored in bfloat16
    )


def test_healing_begins_with_maps_of_the_words(tiny):
    """Constant means become maps of the words: that alone takes most of the KL, and the text is kept from then on."""
    dense, moments, text = tiny
    tpa = tpa_torch.convert(dense, CONFIGS["spectral without words"], moments)
    healed = heal(tpa, dense, text, steps=1, batch=1, learning_rate=1e-4, words=True)
    before, after = (tpa_torch.evaluate(dense, model, text, 1024, recall_prompts=0)["kl"] for model in (tpa, healed))
    assert after < 0.6 * before
    assert tpa.tpa.predict is False and healed.tpa.predict and healed.factors[5][0].predictor is not None
    with pytest.raises(TPAError, match="spectral"):
        heal(tpa_torch.convert(dense, CONFIGS["contextual"], moments), dense, text, steps=1, words=True)


def test_healing_goes_on_where_it_was_stopped(tiny, tmp_path):
    """Stopped after its state was written and called again: the same weights as in one go."""
    dense, moments, text = tiny
    tpa = tpa_torch.convert(dense, CONFIGS["spectral"], moments)
    options = {"steps": 22, "batch": 1, "learning_rate": 0.005}
    text = text[:600]

    def stopped(steps):
        for step in steps:
            if step == 21:
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        heal(tpa, dense, text, **options, state=tmp_path / "s.pt", progress=stopped)
    resumed = heal(tpa, dense, text, **options, state=tmp_path / "s.pt")
    once = heal(tpa, dense, text, **options)
    assert resumed.healing.kl == pytest.approx(once.healing.kl, rel=1e-4)
    assert relative(resumed.factors[5][0].basis, once.factors[5][0].basis) < 1e-3


def test_the_best_state_is_kept(tiny):
    """Steps that are far too large make the windows kept aside worse: what comes back is the model as it was."""
    dense, moments, text = tiny
    tpa = tpa_torch.convert(dense, CONFIGS["spectral"], moments)
    healed = heal(tpa, dense, text, steps=2, batch=1, learning_rate=0.5)
    (_, before), *later = healed.healing.checked
    assert later and min(kl for _, kl in later) > before
    assert relative(healed.factors[5][0].basis, tpa.factors[5][0].basis) == 0


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


def test_wrong_arguments_are_one_line(tiny, tmp_path):
    """Models in the wrong order, no steps, and a state that is none or another's."""
    dense, moments, text = tiny
    tpa = tpa_torch.convert(dense, CONFIGS["spectral"], moments)
    for call, word in (
        (lambda: heal(dense, tpa, text), "order"),
        (lambda: heal(tpa, dense, text, steps=0), "steps"),
        (lambda: heal(tpa, dense, text, learning_rate=2.0), "learning_rate"),
    ):
        with pytest.raises(TPAError, match=word):
            call()
    (tmp_path / "s.pt").write_bytes(b"nothing")
    with pytest.raises(TPAError, match="no state"):
        heal(tpa, dense, text, steps=1, state=tmp_path / "s.pt")
