"""The way back through a layer, in both backends, against finite differences of the reference's way forward."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import part, relative, to, to_numpy

import tpa_ref
from tpa_ref.core.attention import softmax
from tpa_ref.core.norm import rms_norm
from tpa_ref.core.transform import second_moment
from tpa_ref.gemma import backward


def directional(f, x, direction, step=1e-5):
    """Central difference of f at x along a direction."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("layer", [0, 5])
def test_gradients_of_a_block_are_those_of_finite_differences(backend, random_gemma, layer):
    """By the input, by normed K and by V, of a window layer and of a global one, along random directions."""
    gemma = random_gemma(g=2, h=4, scaled=True)
    ref = tpa_ref.load(gemma.path, dtype="float64")
    rng = np.random.default_rng(layer)
    x, dy = rng.standard_normal((2, 1, 20, 48))
    at, text = ref.positions(np.arange(20)[None]), ref.whole_text(1, 20)

    def value(x_bqm=x, K=0.0, V=0.0):
        def moved(name, array):
            return array + (K if name == "attn.K_bkgd" else V if name == "attn.V_bkge" else 0.0)

        return float((ref.block(x_bqm, layer, ref.weights.layers[layer], at, text, moved) * dy).sum())

    dx, dK, dV = gradients(backend, gemma, layer, x, dy)
    for _ in range(3):
        u, k, v = rng.standard_normal(x.shape), *rng.standard_normal((2, *dK.shape))
        np.testing.assert_allclose((dx * u).sum(), directional(lambda z: value(x_bqm=z), x, u), rtol=1e-5)
        np.testing.assert_allclose((dK * k).sum(), directional(lambda z: value(K=z), 0 * k, k), rtol=1e-5)
        np.testing.assert_allclose((dV * v).sum(), directional(lambda z: value(V=z), 0 * v, v), rtol=1e-5)


def gradients(backend, gemma, layer, x, dy):
    """(dx, dK, dV) of a layer as float64 NumPy arrays."""
    model = backend.load(gemma.path, dtype="float64")
    w, positions = model.weights.layers[layer], np.arange(x.shape[1])[None]
    block_backward = part(backend, "gemma.backward").block_backward
    return [to_numpy(d) for d in block_backward(model, to(backend, dy), to(backend, x), layer, w, positions)]


def test_a_wrong_way_back_is_seen(random_gemma, monkeypatch):
    """Without turning back through RoPE the gradient by K fails the same comparison."""
    right, calls = backward.rope.rotate, itertools.count()

    def rotate(x, cos, sin):  # the third and fourth call of a block are the way back; the way forward has its own name
        return x if next(calls) >= 2 else right(x, cos, sin)

    monkeypatch.setattr(backward.rope, "rotate", rotate)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_gradients_of_a_block_are_those_of_finite_differences(tpa_ref, random_gemma, 5)
    assert next(calls) == 4


@pytest.mark.parametrize("layer", [0, 5])
def test_what_calibration_asks_a_model_for(backend, random_gemma, layer):
    """The gradient by the states in front of a layer, the sums of grad grad^T by K and by V over all tokens but the
    first, and the gradient of that one.
    """
    gemma = random_gemma(g=2, h=4, scaled=True)
    x, dy = np.random.default_rng(layer).standard_normal((2, 1, 20, 48))
    dx, dK, dV = gradients(tpa_ref, gemma, layer, x, dy)
    model = backend.load(gemma.path, dtype="float64")
    found = model.back_through_layer(layer, to(backend, x), to(backend, dy))
    first = np.concatenate([dK[0, 0], dV[0, 0]])
    expected_ones = dx, second_moment(dK[:, 1:]), second_moment(dV[:, 1:]), first
    for ours, expected in zip(found, expected_ones, strict=True):
        assert relative(ours, expected) < 1e-10


def test_gradient_of_the_prediction(backend, random_gemma, monkeypatch):
    """By the last state: that of -log p(y), y the token that was drawn; in stretches of a few positions as at once."""
    gemma = random_gemma(g=2, h=4)
    ref, model = tpa_ref.load(gemma.path, dtype="float64"), backend.load(gemma.path, dtype="float64")
    x = np.random.default_rng(1).standard_normal((1, 9, 48))

    def gradient():
        return to_numpy(model.logits_backward(to(backend, x), np.random.default_rng(3)))

    def p(x):
        return softmax(ref.logits(rms_norm(x, ref.weights.final_norm_m, ref.config.rms_eps)))

    y = backward.draw(p(x), np.random.default_rng(3))
    u = np.random.default_rng(2).standard_normal(x.shape)
    expected = directional(lambda z: -np.log(np.take_along_axis(p(z), y[..., None], -1)).sum(), x, u)
    np.testing.assert_allclose((gradient() * u).sum(), expected, rtol=1e-5)
    monkeypatch.setattr(part(backend, "gemma.backward"), "ROWS", 4)
    np.testing.assert_allclose((gradient() * u).sum(), expected, rtol=1e-5)


def test_tokens_are_drawn_by_their_probability(backend):
    """Frequencies of many draws are the probabilities."""
    P = np.tile(np.array([0.5, 0.0, 0.2, 0.3]), (1, 20_000, 1))
    drawn = to_numpy(part(backend, "gemma.backward").draw(to(backend, P), np.random.default_rng(0)))
    np.testing.assert_allclose(np.bincount(drawn.ravel(), minlength=4) / 20_000, P[0, 0], atol=0.02)
