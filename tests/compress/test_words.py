"""What the text tells of K and V: the words, the fit, and a cache that codes only what they do not tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import relative, run_cached, submodule, to_numpy
from test_spectral import RATE, TEXT, Bytes

import tpa_ref
from tpa_ref.cli.options import TINY
from tpa_ref.compress import token_prediction as words
from tpa_ref.compress.calibrate import read_text
from tpa_ref.compress.config import TPAConfig
from tpa_ref.errors import TPAError
from tpa_ref.gemma.config import GemmaConfig


@pytest.fixture
def converted(random_gemma):
    """A spectral model of a backend in float64, predicted from its words, and its tokens."""

    def make(backend, predict=True, **choices):
        gemma = random_gemma(2, 4, 16, 11)
        model = backend.load(gemma.path, dtype="float64")
        model.tokenizer = Bytes()
        moments = backend.calibrate(model, TEXT, max_tokens=900, predict=predict)
        return backend.convert(model, TPAConfig(**RATE | choices), moments), gemma.tokens_bq

    return make


# ---- the fit ----


def some_text(n=400, x=6, z=5, seed=0):
    """x that follows from z up to noise of variance 1/4, and what is measured of them."""
    rng = np.random.default_rng(seed)
    Z, W = rng.standard_normal((n, z)) + 0.5, rng.standard_normal((x, z))
    X = Z @ W.T + 0.5 * rng.standard_normal((n, x)) + 3
    moments = words.WordMoments(Z.mean(0), Z.T @ Z / n, n)
    return X, Z, W, moments


def without(X, Z, moments, F=(None,)):
    shape = (1, X.shape[1])
    M = (X.T @ X / len(X)).reshape(*shape, *shape)
    N = (X.T @ Z / len(X)).reshape(*shape, -1)
    return words.without_words(M, X.mean(0).reshape(shape), F, N, moments)


def test_the_map_is_the_regression_and_the_rest_is_its_residual():
    """Against NumPy's least squares: nearly the same map (the ridge is small), and the moments of what is left."""
    X, Z, _, moments = some_text()
    M, mean, W_zgd = without(X, Z, moments)
    design = np.concatenate([Z, np.ones((len(Z), 1))], 1)
    least_squares = np.linalg.lstsq(design, X, rcond=None)[0]
    np.testing.assert_allclose(W_zgd[:, 0], least_squares[:-1], atol=0.01)
    left = X - Z @ W_zgd[:, 0]
    np.testing.assert_allclose(mean[0], left.mean(0), atol=1e-9)
    covariance = M[0, :, 0] - np.outer(mean[0], mean[0])
    inflation = covariance.trace() / np.cov(left.T, bias=True).trace()
    np.testing.assert_allclose(covariance, inflation * np.cov(left.T, bias=True), atol=1e-9)
    assert 1 < inflation < 1.05


def test_residuals_of_other_text_are_foreseen():
    """With few tokens the fit flatters itself; the inflated variance is that of text it has not seen."""
    ratios, flattering = [], []
    for seed in range(30):
        X, Z, W, moments = some_text(n=60, z=20, seed=seed)
        M, mean, W_zgd = without(X, Z, moments)
        foreseen = np.trace(M[0, :, 0] - np.outer(mean[0], mean[0]))
        rng = np.random.default_rng(1000 + seed)
        fresh = rng.standard_normal((4000, 20)) + 0.5
        X_fresh = fresh @ W.T + 0.5 * rng.standard_normal((4000, 6)) + 3
        seen = np.square(X_fresh - fresh @ W_zgd[:, 0] - mean[0]).sum(1).mean()
        ratios.append(foreseen / seen)
        flattering.append(np.square(X - Z @ W_zgd[:, 0] - mean[0]).sum(1).mean() / seen)
    assert 0.85 < np.mean(ratios) < 1.15
    assert np.mean(flattering) < 0.6


def test_nothing_is_predicted_from_noise():
    """Where z tells nothing, no map does less damage than none, and the moments stay what they were."""
    rng = np.random.default_rng(0)
    X, Z = rng.standard_normal((200, 6)), rng.standard_normal((200, 40))
    moments = words.WordMoments(Z.mean(0), Z.T @ Z / 200, 200)
    M, _, W_zgd = without(X, Z, moments)
    assert W_zgd is None
    np.testing.assert_array_equal(M[0, :, 0], X.T @ X / 200)


def test_damage_decides_on_the_ridge():
    """Directions that hurt count: where they follow from z and the others are noise, a map is found by damage."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((300, 100))
    X = 10 * rng.standard_normal((300, 6))
    X[:, 0] = Z[:, 0] + 0.1 * rng.standard_normal(300)
    moments = words.WordMoments(Z.mean(0), Z.T @ Z / 300, 300)
    F = np.diag([1.0, *[1e-8] * 5]).reshape(1, 6, 1, 6)
    assert without(X, Z, moments)[2] is None and without(X, Z, moments, (F,))[2] is not None


# ---- in the model ----


def test_words_are_rows_of_the_embedding(backend):
    """By hand: own row, row before, nothing before the first token, at an image, or at padding."""
    model = backend.load(TINY)
    embed = np.asarray(to_numpy(model.weights.embed_vm), np.float64)
    e = embed / np.sqrt(np.square(embed).mean(1, keepdims=True))
    text_bt = np.array([[6, 8, 0, 10]])  # tokens 5, 7, an image, 9
    positions_bk = np.array([[3, 2, 1, 0, -1]])
    if backend is tpa_ref:
        Z = model.words(text_bt, positions_bk)
    else:
        Z = model.views(np.zeros((1, 1), int), None, text_bt).words(0, positions_bk, "keys")()
    zero = np.zeros(256)
    rows = [(e[9], zero), (zero, e[7]), (e[7], e[5]), (e[5], zero), (zero, zero)]
    np.testing.assert_allclose(to_numpy(Z)[0], [np.concatenate(pair) for pair in rows], atol=2e-3)


def test_twins_agree_and_read_the_text_from_the_cache(converted):
    """Whole text, chunks, tokens one by one and both backends: the same logits; the ids are counted."""
    pytest.importorskip("torch").set_num_threads(1)
    import tpa_torch

    logits = []
    for backend in (tpa_ref, tpa_torch):
        model, tokens_bq = converted(backend)
        assert all(how.predictor is not None for pair in model.factors for how in pair)
        whole = to_numpy(model(tokens_bq))
        for chunks in ((1,), (30, 3, 20), (13,)):
            cache, found = run_cached(model, tokens_bq, chunks)
            assert relative(found, whole) < 1e-9
            assert cache.nbytes == cache.nbytes_at(cache.max_len, cache.batch)
            assert cache.nbytes > sum(layer.nbytes for layer in cache.layers)
            np.testing.assert_array_equal(cache.text_bt[:, : tokens_bq.shape[1]], tokens_bq + 1)
        logits.append(whole)
    assert relative(logits[1], logits[0]) < 1e-9


def test_rows_of_different_length(backend, converted):
    """A padded batch gives each row what it gets alone, and so does the next token."""
    model, tokens_bq = converted(backend)
    lengths_b, q = np.array([9, 21]), 21
    batch = np.tile(tokens_bq[:1, :q], (2, 1))
    cache = model.new_cache(2, 40)
    model(batch, cache, lengths_b)
    together = to_numpy(model(tokens_bq[:1, lengths_b].T, cache))
    for row, length in enumerate(lengths_b):
        alone = to_numpy(model(tokens_bq[:1, : length + 1]))
        assert relative(together[row, 0], alone[0, -1]) < 1e-9


def test_a_word_at_the_wrong_place_is_seen(converted, monkeypatch):
    """Seeded mistake: the token after, instead of the one before. Whole text and chunks no longer agree."""
    model, tokens_bq = converted(tpa_ref)
    right = words.with_previous

    def wrong(text_bt, positions_bk):
        own_bk, _ = right(text_bt, positions_bk)
        following_bk, _ = right(text_bt, np.minimum(positions_bk + 1, text_bt.shape[1] - 1))
        return own_bk, following_bk

    monkeypatch.setattr(words, "with_previous", wrong)
    assert relative(run_cached(model, tokens_bq, (13,))[1], model(tokens_bq)) > 1e-3


def test_words_save_bits_on_text_never_seen():
    """On the tiny model, at the same bytes with the ids counted: several times less KL."""
    model = tpa_ref.load(TINY)
    moments = tpa_ref.calibrate(model, read_text(TINY / "calibration.txt"), max_tokens=4096, sensitivity_tokens=2048)
    kl = []
    for predict in (None, False):
        tpa = tpa_ref.convert(model, TPAConfig(rate=1.0, context=128, predict=predict, sinks=0), moments)
        figures = tpa_ref.evaluate(model, tpa, read_text(TINY / "evaluation.txt"), 1024, recall_prompts=0)
        kl.append(figures["kl"])
        assert 0.97 < tpa.new_cache(1, 128).nbytes / (128 * 12 * 32) < 1.03  # 1 bit for each of 256 numbers
    assert kl[0] < kl[1] / 2


def test_predict_needs_moments_of_the_words(backend, random_gemma):
    """It is an error where nothing was measured, and without a rate; by default there is no prediction then."""
    gemma = random_gemma(2, 4, 16, 11)
    model = backend.load(gemma.path)
    with pytest.raises(TPAError, match="predict wants moments of the words"):
        backend.convert(model, TPAConfig(rate=1.0, predict=True))
    with pytest.raises(TPAError, match="predict wants a rate"):
        TPAConfig(mode="latent", predict=True)
    tpa = backend.convert(model, TPAConfig(rate=1.0))
    assert all(how.predictor is None for pair in tpa.factors for how in pair)


def test_a_text_is_read_for_words_where_they_are_asked_for(backend, random_gemma, monkeypatch):
    """`convert` calibrates with or without them, as the configuration says; factors of fixed rank do not use them."""
    gemma = random_gemma(2, 4, 16, 11)
    model = backend.load(gemma.path)
    model.tokenizer = Bytes()
    of = submodule(backend, "model")
    found, right = [], of.calibrate
    monkeypatch.setattr(of, "calibrate", lambda *args, **more: found.append(more["predict"]) or right(*args, **more))
    for config in (TPAConfig(rate=1.0), TPAConfig(rate=1.0, predict=False), TPAConfig(mode="latent")):
        backend.convert(model, config, TEXT[:200] + "\n")
    assert found == [True, False, False]


def test_default_is_where_the_maps_are_small():
    """Published sizes want to be asked; ids of their vocabularies take four bytes."""
    assert words.affordable(GemmaConfig.tiny()) and not words.affordable(GemmaConfig.gemma3_1b())
    assert words.token_bytes(65_535) == 2 and words.token_bytes(65_536) == 4


@pytest.mark.parametrize("name", ["tpa", "tpa.safetensors", "tpa.pt"])
def test_saved_and_loaded(converted, tmp_path, name):
    """The maps are saved; a map of the wrong shape is refused with one line."""
    model, tokens_bq = converted(tpa_ref)
    expected = model(tokens_bq)
    model.tokenizer = None
    path = tpa_ref.save(model, tmp_path / name)
    assert relative(tpa_ref.load(path, dtype="float64")(tokens_bq), expected) < 1e-6
    how_k, how_v = model.factors[0]
    model.factors[0] = (replace(how_k, predictor=how_k.predictor[:-1]), how_v)
    with pytest.raises(TPAError, match="predictor of latent must have shape"):
        tpa_ref.load(tpa_ref.save(model, tmp_path / f"wrong-{name}"))


def test_the_decoder_of_a_device_reads_words_too(converted):
    """The static step (which a GPU replays as a graph) gives the tokens that the model gives."""
    pytest.importorskip("torch").set_num_threads(1)
    import tpa_torch

    model, tokens_bq = converted(tpa_torch)
    graph = submodule(tpa_torch, "graph")
    cache = model.new_cache(1, 60)
    x_bqm = model.hidden(tokens_bq[:1, :20], cache)[:, -1:]
    decoder = graph.GraphDecoder(model, cache)
    decoder.begin(x_bqm)
    found = [int(decoder.token_b)] + [int(decoder.step()) for _ in range(12)]
    cache, expected = model.new_cache(1, 60), []
    logits = model(tokens_bq[:1, :20], cache)
    for _ in range(13):
        expected.append(int(logits[0, -1].argmax()))
        logits = model(np.array([[expected[-1]]]), cache)
    assert found == expected
    decoder.settle()
    np.testing.assert_array_equal(decoder.cache.text_bt[0, 20:32], np.array(found[:12]) + 1)
