"""What the text tells of K and V: the token vectors, the fit, and a cache that codes only what they do not tell.

The fit against NumPy's least squares and against fresh text, the model against itself: whole text, chunks, tokens one
by one, padded rows, both backends.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import CALIBRATION, Bytes, backends, model, refused, relative, run_cached, to_numpy
from helpers import tokens as random_tokens

import tpa_ref
from tpa_ref.cli.options import TINY
from tpa_ref.compress.config import TPAConfig
from tpa_ref.compress.token_prediction import TokenMoments, affordable, without_tokens
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.texts import read_text
from tpa_ref.gemma.token_vectors import id_dtype
from tpa_ref.trace import Watch

TOKENS = random_tokens(30, batch=2)  # beyond the window of 11


@pytest.fixture
def converted(small):
    """A spectral model of a backend in float64, predicted from its tokens."""

    def make(backend, **choices):
        dense, moments = small(backend, 900, predict=True)
        return backend.convert(dense, TPAConfig(**{"rate": 1.5, "context": 60, "prefer": "size"} | choices), moments)

    return make


# ---- the fit ----


def some_text(n=400, x=6, z=5, seed=0):
    """x that follows from z up to noise of variance 1/4, and what is measured of z."""
    rng = np.random.default_rng(seed)
    Z, W = rng.standard_normal((n, z)) + 0.5, rng.standard_normal((x, z))
    X = Z @ W.T + 0.5 * rng.standard_normal((n, x)) + 3
    return X, Z, W, TokenMoments(Z.mean(0), Z.T @ Z / n, n)


def without(X, Z, moments, F=(None,)):
    shape = (1, X.shape[1])
    M = (X.T @ X / len(X)).reshape(*shape, *shape)
    N = (X.T @ Z / len(X)).reshape(*shape, -1)
    return without_tokens(M, X.mean(0).reshape(shape), F, N, moments)


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
    M, _, W_zgd = without(X, Z, TokenMoments(Z.mean(0), Z.T @ Z / 200, 200))
    assert W_zgd is None
    np.testing.assert_array_equal(M[0, :, 0], X.T @ X / 200)


def test_damage_decides_on_the_ridge():
    """Directions that hurt count: where they follow from z and the others are noise, a map is found by damage."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((300, 100))
    X = 10 * rng.standard_normal((300, 6))
    X[:, 0] = Z[:, 0] + 0.1 * rng.standard_normal(300)
    moments = TokenMoments(Z.mean(0), Z.T @ Z / 300, 300)
    F = np.diag([1.0, *[1e-8] * 5]).reshape(1, 6, 1, 6)
    assert without(X, Z, moments)[2] is None and without(X, Z, moments, (F,))[2] is not None


# ---- in the model ----


def test_token_vectors_are_rows_of_the_embedding(backend):
    """By hand: own row, row before, nothing before the first token, at an image, or at padding; asked of the model, and
    as attention asks for them.
    """
    own = backend.load(TINY)
    embed = np.asarray(to_numpy(own.weights.embed_vm), np.float64)
    e = embed / np.sqrt(np.square(embed).mean(1, keepdims=True))
    text_bt = np.array([[6, 8, 0, 10]])  # tokens 5, 7, an image, 9
    positions_bk = np.array([[3, 2, 1, 0, -1]])
    local, everywhere = own.positions(np.zeros((1, 1), int), None, text_bt)
    zero = np.zeros(256)
    rows = [(e[9], zero), (zero, e[7]), (e[7], e[5]), (e[5], zero), (zero, zero)]
    for Z_bkz in (
        own.token_vectors(text_bt, positions_bk),
        *(at.tokens(positions_bk, "x").Z_bkz for at in (local, everywhere)),
    ):
        np.testing.assert_allclose(to_numpy(Z_bkz)[0], [np.concatenate(pair) for pair in rows], atol=2e-3)


def test_twins_agree_and_read_the_text_from_the_cache(converted):
    """Whole text, chunks, tokens one by one and both backends: the same logits; the ids are counted."""
    pytest.importorskip("torch")
    logits = []
    for backend in backends():
        own = converted(backend)
        assert all(mode.predictor is not None for pair in own.pairs for mode in pair.modes)
        whole = to_numpy(own(TOKENS))
        for chunks in ((1,), (15, 3, 8), (13,)):
            cache, found = run_cached(own, TOKENS, chunks)
            assert relative(found, whole) < 1e-9
            assert cache.nbytes == cache.nbytes_at(cache.max_len, cache.batch)
            assert cache.nbytes > sum(layer.nbytes for layer in cache.layers)
            np.testing.assert_array_equal(cache.text_bt[:, : TOKENS.shape[1]], TOKENS + 1)
        logits.append(whole)
    assert relative(logits[1], logits[0]) < 1e-9


def test_rows_of_different_length(backend, converted):
    """A padded batch gives each row what it gets alone, and so does the next token."""
    own = converted(backend)
    lengths_b, q = np.array([9, 21]), 21
    cache = own.new_cache(2, 40)
    own(np.tile(TOKENS[:1, :q], (2, 1)), cache, lengths_b)
    together = to_numpy(own(TOKENS[:1, lengths_b].T, cache))
    for row, length in enumerate(lengths_b):
        alone = to_numpy(own(TOKENS[:1, : length + 1]))
        assert relative(together[row, 0], alone[0, -1]) < 1e-9


def test_a_token_at_the_wrong_place_is_seen(converted, monkeypatch):
    """Seeded mistake: the token after, instead of the one before. Whole text and chunks no longer agree."""
    from tpa_ref.gemma import model as of

    own, right = converted(tpa_ref), of.with_previous

    def wrong(text_bt, positions_bk):
        own_bk, _ = right(text_bt, positions_bk)
        following_bk, _ = right(text_bt, np.minimum(positions_bk + 1, text_bt.shape[1] - 1))
        return own_bk, following_bk

    monkeypatch.setattr(of, "with_previous", wrong)
    assert relative(run_cached(own, TOKENS, (13,))[1], own(TOKENS)) > 1e-3


def test_prediction_saves_bits_on_text_never_seen(tiny):
    """On the tiny model, at the same bytes with the ids counted: several times less KL."""
    dense, moments = tiny
    text, kl = read_text(TINY / "evaluation.txt"), []
    for predict in (None, False):
        tpa = tpa_ref.convert(dense, TPAConfig(rate=1.0, context=128, predict=predict, sinks=0, prefer="size"), moments)
        kl.append(tpa_ref.evaluate(dense, tpa, text, 512, recall_prompts=0)["kl"])
        assert 0.97 < tpa.new_cache(1, 128).nbytes / (128 * 12 * 32) < 1.03  # 1 bit for each of 256 numbers
    assert kl[0] < kl[1] / 2


def test_predict_needs_moments_of_the_tokens(backend):
    """It is an error where nothing was measured; by default there is no prediction then."""
    dense = model(backend)
    refused(lambda: backend.convert(dense, TPAConfig(rate=1.0, predict=True)), "predict wants moments of the tokens")
    tpa = backend.convert(dense, TPAConfig(rate=1.0, prefer="size"))
    assert all(mode.predictor is None for pair in tpa.pairs[1:] for mode in pair.modes)  # the first follows by itself


def test_moments_with_and_without_tokens_are_saved(small, tmp_path):
    """What calibration found comes back from its file, those of the token vectors where there are any."""
    for predict in (True, False):
        _, moments = small(tpa_ref, 100, predict=predict)
        moments.save(tmp_path / "m.safetensors")
        again = tpa_ref.Moments.load(tmp_path / "m.safetensors")
        assert (again.of_tokens is None) == (moments.of_tokens is None) == (not predict)
        assert again.tokens == moments.tokens and again.layers.keys() == moments.layers.keys()
        for layer, found in moments.layers.items():
            ours, theirs = again.of_layer(layer).arrays(), found.arrays()
            assert ours.keys() == theirs.keys() and ("N" in ours) == predict
            for name in ours:
                np.testing.assert_array_equal(ours[name], theirs[name])
    refused(lambda: again.of_layer(7), "layer 7", "not calibrated")
    (tmp_path / "m.safetensors").write_bytes(b"nothing")
    refused(lambda: tpa_ref.Moments.load(tmp_path / "m.safetensors"), "holds no moments")


def test_a_text_is_read_for_tokens_where_they_are_asked_for(backend, monkeypatch):
    """`convert` calibrates with or without them, as the configuration says; factors of fixed rank do not use them."""
    from tpa_ref.compress import convert as of

    dense = model(backend)
    dense.tokenizer = Bytes()
    found, right = [], of.calibrate
    monkeypatch.setattr(of, "calibrate", lambda *args, **more: found.append(more["predict"]) or right(*args, **more))
    for config in (TPAConfig(rate=1.0, prefer="size"), TPAConfig(rate=1.0), TPAConfig(mode="latent")):
        backend.convert(dense, config, CALIBRATION[:200] + "\n")
    assert found == [True, False, False]


def test_default_is_where_the_maps_are_small():
    """Up to 270M, without images; ids of their vocabularies take four bytes."""
    assert affordable(GemmaConfig.of_variant("270m")) and not affordable(GemmaConfig.of_variant("4b"))
    assert affordable(GemmaConfig.tiny()) and not affordable(GemmaConfig.gemma3_1b())
    assert id_dtype(65_535).itemsize == 2 and id_dtype(65_536).itemsize == 4


@pytest.mark.parametrize("name", ["tpa", "tpa.safetensors", "tpa.pt"])
def test_saved_and_loaded(backend, converted, tmp_path, name):
    """The maps are saved; a map of the wrong shape is refused with one line."""
    if name.endswith(".pt"):
        pytest.importorskip("torch")
    own = converted(backend)
    expected, own.tokenizer = own(TOKENS), None
    path = backend.save(own, tmp_path / name)
    assert relative(backend.load(path, dtype="float64")(TOKENS), expected) < 1e-6
    k, v = own.pairs[0].modes
    own.pairs[0] = own.Joint(replace(k, predictor=k.predictor[:-1]), v)
    wrong = backend.save(own, tmp_path / f"wrong-{name}")
    refused(lambda: backend.load(wrong), "layers.0.k.predictor", "must have shape", "(96, 4, 8)", "(95, 4, 8)")


def test_the_decoder_of_a_device_reads_tokens_too(converted):
    """The static step (which a GPU replays as a graph) gives the tokens that the model gives."""
    pytest.importorskip("torch")
    import tpa_torch
    from tpa_torch.fast.graph import GraphDecoder
    from tpa_torch.gemma.model import StaticModel

    own = converted(tpa_torch)
    assert own.reads_tokens
    cache = own.new_cache(1, 60)
    logits = own(TOKENS[:1, :20], cache)
    decoder = GraphDecoder(StaticModel(own), cache)
    decoder.begin(logits[:, -1])
    found = [int(decoder.token_b)] + [int(decoder.step()) for _ in range(12)]
    cache, expected = own.new_cache(1, 60), []
    logits = own(TOKENS[:1, :20], cache)
    for _ in range(13):
        expected.append(int(logits[0, -1].argmax()))
        logits = own(np.array([[expected[-1]]]), cache)
    assert found == expected
    decoder.settle()
    np.testing.assert_array_equal(decoder.cache.text_bt[0, 20:32], np.array(found[:12]) + 1)


# ---- the first layer ----


def first_layer_of(backend, dense, **choices):
    """A conversion of the first layer alone; the others are as the dense model has them, in bfloat16."""
    return backend.convert(dense, TPAConfig(rate=2.0, layers="0", context=60, prefer="size", **choices))


def test_k_and_v_of_the_first_layer_follow_from_the_token(backend):
    """No byte but the ids, at once and through a cache, and the same logits as with K and V held in full precision."""
    dense = model(backend)
    known = first_layer_of(backend, dense)
    assert known.pairs[0].token_bytes == 0 and known.pairs[0].reads_tokens
    rounded = replace(TPAConfig(mode="fixed-a", k_rank=2, v_rank=2, kv_dtype="float32"), layers="0")
    exact = backend.convert(dense, rounded)
    pairs = [exact.pairs[0], *known.pairs[1:]]
    exact.pairs[:] = pairs
    held = {}
    names = "K_bkgd", "V_bkge"
    watch = Watch({f"layers.0.attn.{name}": held.__setitem__ for name in names})
    dense.hidden(TOKENS, trace=watch)
    at = known.positions(np.arange(30)[None].repeat(2, 0), text_bt=TOKENS + 1)[False]
    for mode, side in zip(known.pairs[0].modes, held.values(), strict=True):
        assert relative(mode.predicted(at.new_tokens), side) < 1e-5
    # where the last bits of K decide how other layers round to bfloat16
    assert relative(known(TOKENS), exact(TOKENS)) < 2e-3
    assert relative(run_cached(known, TOKENS, (9, 12))[1], exact(TOKENS)) < 2e-3


def test_the_first_layer_is_coded_where_it_must_be(backend):
    """Not asked for, K by itself, widths by hand."""
    dense = model(backend)
    for choice in ({"predict": False}, {"k_mode": "fixed-a"}):
        assert first_layer_of(backend, dense, **choice).pairs[0].token_bytes > 0
    by_hand = tuple(tpa_ref.Spectral(widths=(3,) * 9) if layer == 0 else None for layer in range(7))
    assert backend.convert(dense, TPAConfig(per_layer=by_hand)).pairs[0].k.widths == (3,) * 9


def test_a_first_layer_without_its_norm_is_seen(backend, monkeypatch):
    """The gains of K's norm forgotten."""
    from tpa_ref.compress import convert

    right = convert.first_layer
    monkeypatch.setattr(convert, "first_layer", lambda m: right(m) | {"k_norm": np.zeros(m.config.head_dim)})
    with pytest.raises(AssertionError):
        test_k_and_v_of_the_first_layer_follow_from_the_token(backend)
