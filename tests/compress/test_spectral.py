"""The spectral cache: gradients against finite differences, the transform, the bits, the codes, and exact tokens.

Both backends on small models in float64, against each other and against the definition; the tiny model in torch alone,
where a figure of quality is measured.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers import back, backends, model, part, relative, run_cached, to, to_numpy
from helpers import tokens as random_tokens

import tpa_ref
from tpa_ref.cli.options import TINY
from tpa_ref.compress.bits import allocate_bits, damage, gaussian_bound
from tpa_ref.compress.config import Side, Spectral, TPAConfig
from tpa_ref.compress.plan import Curve, planned_pair
from tpa_ref.core import banded
from tpa_ref.core.cache import Cache, Exact
from tpa_ref.core.mode import Tokens
from tpa_ref.core.transform import spectrum
from tpa_ref.gemma import backward
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.memory import windowed_bytes
from tpa_ref.gemma.texts import read_text

RATE = {"rate": 1.5, "context": 60}
TOKENS = random_tokens(40, batch=2)  # beyond the window of 11


def measured_kl(dense, tpa):
    """Mean KL on text that calibration has not seen."""
    text = read_text(TINY / "evaluation.txt")
    return tpa_ref.evaluate(dense, tpa, text, 512, recall_prompts=0)["kl"]


# ---- sensitivity: the way back ----


def directional(f, x, direction, step=1e-5):
    """Central difference of f at x along a direction."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("layer", [0, 5])
def test_gradients_of_a_block_are_those_of_finite_differences(backend, layer):
    """By the input, by normed K and by V, of a window layer and of a global one, along random directions."""
    reference, own = model(tpa_ref, dtype="float64"), model(backend, dtype="float64")
    rng = np.random.default_rng(layer)
    x, dy = rng.standard_normal((2, 1, 20, 48))
    positions = np.arange(20)[None]

    def value(x_bqm=x, K=0.0, V=0.0):
        def moved(name, array):
            return array + (K if name == "attn.K_bkgd" else V if name == "attn.V_bkge" else 0.0)

        w, at = reference.weights.layers[layer], reference.positions(positions)
        return float((reference.block(x_bqm, layer, w, at, reference.whole_text(1, 20), moved) * dy).sum())

    way_back = part(backend, "gemma.backward").block_backward
    found = way_back(own, to(backend, dy), to(backend, x), layer, own.weights.layers[layer], positions)
    dx, dK, dV = (to_numpy(x) for x in found)
    for _ in range(3):
        u, k, v = rng.standard_normal(x.shape), *rng.standard_normal((2, *dK.shape))
        np.testing.assert_allclose((dx * u).sum(), directional(lambda z: value(x_bqm=z), x, u), rtol=1e-5)
        np.testing.assert_allclose((dK * k).sum(), directional(lambda z: value(K=z), 0 * k, k), rtol=1e-5)
        np.testing.assert_allclose((dV * v).sum(), directional(lambda z: value(V=z), 0 * v, v), rtol=1e-5)


def test_a_wrong_way_back_is_seen(monkeypatch):
    """Without turning back through RoPE the gradient by K fails the same comparison."""
    right = backward.rope.rotate
    calls = itertools.count()

    def rotate(x, cos, sin):  # the third and fourth call of `block_backward` are the way back
        return x if next(calls) >= 2 else right(x, cos, sin)

    monkeypatch.setattr(backward.rope, "rotate", rotate)
    with pytest.raises(AssertionError):
        test_gradients_of_a_block_are_those_of_finite_differences(tpa_ref, 5)
    assert next(calls) == 4


def test_gradient_of_the_prediction():
    """By the last state: that of -log p(y), y the token that was drawn."""
    own, x = model(tpa_ref, dtype="float64"), np.random.default_rng(1).standard_normal((1, 9, 48))
    gradient = backward.logits_backward(own, x, np.random.default_rng(3))

    def p(x):
        return backward.attention.softmax(own.logits(own.norm(x, own.weights.final_norm_m)))

    y = backward.draw(p(x), np.random.default_rng(3))
    u = np.random.default_rng(2).standard_normal(x.shape)
    found = directional(lambda z: -np.log(np.take_along_axis(p(z), y[..., None], -1)).sum(), x, u)
    np.testing.assert_allclose((gradient * u).sum(), found, rtol=1e-5)


def test_tokens_are_drawn_by_their_probability(backend):
    """Frequencies of many draws are the probabilities."""
    P = np.tile(np.array([0.5, 0.0, 0.2, 0.3]), (1, 20_000, 1))
    drawn = back(part(backend, "gemma.backward").draw(to(backend, P), np.random.default_rng(0)))
    np.testing.assert_allclose(np.bincount(drawn.ravel(), minlength=4) / 20_000, P[0, 0], atol=0.02)


@pytest.mark.parametrize("prefer", ["speed", "size"])
def test_predicted_damage_is_the_measured_kl(tiny, prefer):
    """At a rate where errors are small, 1/2 sum lambda D is the KL of the whole model, on text never seen."""
    dense, moments = tiny
    config = TPAConfig(rate=3.0, context=128, prefer=prefer)
    converted = tpa_ref.convert(dense, config, moments)
    predicted, measured = Curve(dense, moments, config, 128).trial(3.0).predicted, measured_kl(dense, converted)
    assert 0.5 < measured / predicted < 2.0
    assert measured < 0.002


# ---- the transform ----


def some_moments(seed=0, g=2, d=6, tokens=4000):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((g * d, g * d)) + 4 * np.eye(g * d)
    X = rng.standard_normal((tokens, g * d)) @ mixed + rng.standard_normal(g * d)
    G = rng.standard_normal((g * d, g * d)) * np.geomspace(1, 0.01, g * d)
    shape = (g, d, g, d)
    return X, (X.T @ X / tokens).reshape(shape), X.mean(0).reshape(g, d), (G.T @ G).reshape(shape)


def test_the_transform_there_and_back():
    """All coefficients give the vector back; they are uncorrelated, of variance 1, and carry the damage."""
    X, M, mean, F = some_moments()
    found = spectrum(M, mean, [F])
    E, B = found.encoder_sgd.reshape(12, 12), found.basis_sgd.reshape(12, 12)
    C = (X - mean.ravel()) @ E.T
    np.testing.assert_allclose(C @ B + mean.ravel(), X, atol=1e-8)
    np.testing.assert_allclose(C.T @ C / len(C), np.eye(12), atol=0.01)  # the floor under the variance shows here
    error = X[:50] - X[50:100]
    by_vector = np.einsum("tx,xy,ty->t", error, F.reshape(12, 12), error)
    by_coefficient = np.square(error @ E.T) @ found.variance_s
    np.testing.assert_allclose(by_coefficient, by_vector, rtol=0.02)
    assert (np.diff(found.variance_s) <= 0).all()


def test_the_damage_metric_beats_the_plain_one(tiny):
    """Same bits, same text: bases and bits by damage lose several times less KL than by energy."""
    dense, moments = tiny
    without = replace(moments, layers={n: replace(found, F=(None, None)) for n, found in moments.layers.items()})
    configs = TPAConfig(rate=1.0, context=128), TPAConfig(mode="latent", k_rank=64, v_rank=64)
    kl = [
        measured_kl(dense, tpa_ref.convert(dense, config, found))
        for config, found in itertools.product(configs, (moments, without))
    ]
    assert kl[0] < kl[1] / 2 and kl[2] < kl[3]


@pytest.mark.parametrize("mode", ["fixed-b", "latent"])
def test_weighted_truncation_loses_least_damage(backend, mode):
    """Less than the basis of least energy, and what it says of its own error is so."""
    X, M, mean, F = some_moments(1)
    if mode == "fixed-b":  # heads by themselves
        keep = np.eye(2)[:, None, :, None]
        M = M * keep + np.einsum("gd,jc->gdjc", mean, mean) * (1 - keep)
        F = F * keep
    mode_class, X_bkgd, tokens = part(backend, "core.mode").MODES[mode], X.reshape(1, -1, 2, 6), Tokens(())
    lost, modes = [], []
    for sensitivity in (F, None):
        made = mode_class.fit(2, 6, 3, "float64", M, mean, sensitivity)
        made = made.with_arrays({name: None if x is None else to(backend, x) for name, x in made.arrays().items()})
        found = made.decode(made.encode(to(backend, X_bkgd), tokens), tokens)
        n = (back(found) - X_bkgd).reshape(-1, 12)
        lost.append(np.einsum("tx,xy,ty->", n, F.reshape(12, 12), n) / len(n))
        modes.append(made)
    assert lost[0] < lost[1]
    assert modes[0].encoder is not None and modes[1].encoder is None
    if mode == "latent":
        C = M.reshape(12, 12) - np.outer(mean, mean)
        np.testing.assert_allclose(lost[0], modes[0].error ** 2 * np.trace(F.reshape(12, 12) @ C), rtol=0.03)


# ---- bits ----


def test_water_filling_is_optimal():
    """Against every choice of widths, for small cases with different entries; whole bytes in every layer."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        variances, entries = [rng.exponential(size=2) * 8, rng.exponential(size=1) * 8], [1, 3]
        widths = allocate_bits(variances, entries, bits=10)
        assert all(sum(side) % 8 == 0 for side in widths)
        spent = sum(sum(side) * held for side, held in zip(widths, entries, strict=True))
        assert spent <= 10 + 7 * sum(entries)
        best = min(
            damage(variances, [(a, b), (c,)])
            for a, b, c in itertools.product(range(9), repeat=3)
            if a + b + 3 * c <= 8  # the last bit, of price 3, may not have fitted into 10
        )
        assert damage(variances, widths) <= best * (1 + 1e-12)


def test_nothing_beats_the_gaussian_bound():
    """It lies below what any allocation reaches; each bit divides it by 4 where all coefficients have some."""
    variances, entries = [np.geomspace(9, 1, 8), np.geomspace(5, 2, 4)], [2, 1]
    for rate in (0.5, 1, 2, 4):
        widths = allocate_bits(variances, entries, rate * (2 * 8 + 4))
        spent = sum(sum(side) * held for side, held in zip(widths, entries, strict=True))
        assert gaussian_bound(variances, entries, spent) < damage(variances, widths)
    high, higher = (gaussian_bound(variances, entries, rate * 20) for rate in (5, 6))
    np.testing.assert_allclose(high / higher, 4, rtol=1e-6)


def test_long_texts_move_bits_to_no_layer_for_free(tiny):
    """At a longer context a bit of a global layer costs more, so window layers get more of them."""
    dense, moments = tiny
    rates = []
    for context in (128, 32_768):
        found = tpa_ref.convert(dense, TPAConfig(rate=1.0, context=context), moments)
        bits = np.array([sum(pair.k.widths) for pair in found.pairs])
        is_global = np.array(dense.config.is_global)
        rates.append(bits[~is_global].mean() / bits[is_global].mean())
    assert rates[1] > 2 * rates[0]


# ---- the whole model ----


@pytest.fixture
def twins(small):
    """Both backends with a spectral cache in float64, calibrated on a text."""
    pytest.importorskip("torch")

    def make(**choices):
        dense = [(backend, *small(backend)) for backend in backends()]
        return [backend.convert(own, TPAConfig(**RATE | choices), moments) for backend, own, moments in dense]

    return make


def both_cached(models):
    """[(cache, logits)] of both backends, prefilled in chunks and then token by token: nearly the same logits."""
    found = [run_cached(model, TOKENS, (20, 3, 12)) for model in models]
    (cache_n, logits_n), (cache_t, logits_t) = found
    assert relative(logits_t, logits_n) < 1e-9
    assert cache_n.nbytes == cache_t.nbytes == cache_n.nbytes_at(64, batch=2)
    return found


@pytest.fixture
def heads_apart(monkeypatch):
    """Each KV head is coded by itself."""
    monkeypatch.setattr(banded, "TOGETHER", 1)


def test_heads_apart(heads_apart, twins, tmp_path):
    """Codes alike in both backends, bytes as planned, saved and loaded."""
    models = twins(rate=4.0)
    both_cached(models)
    config, pairs = models[0].config, models[0].pairs
    assert {pair.k.groups for pair in pairs} == {config.num_kv_heads} and max(pair.k.rank for pair in pairs) > 4
    for choice, pair in zip(models[0].choices, pairs, strict=True):
        assert planned_pair(choice, config).token_bytes == pair.token_bytes
    expected = models[0](TOKENS)
    for saver, own in zip(backends(), models, strict=True):
        for loader in backends():
            loaded = saved_and_loaded(saver, loader, own, tmp_path / f"{saver.__name__}.pt")
            assert relative(loaded(TOKENS), expected) < 1e-6


@pytest.mark.parametrize(
    "choices", [{}, {"prefer": "size"}, {"sinks": 0}, {"recent": 7}, {"rate": 0.2, "sinks": 1}], ids=str
)
def test_twins_store_the_same_codes(twins, choices):
    """Whole texts and caches of both backends agree, codes byte for byte, bytes as counted."""
    numpy, torch = twins(**choices)
    assert relative(torch(TOKENS), numpy(TOKENS)) < 1e-9
    (cache_n, _), (cache_t, _) = both_cached((numpy, torch))
    for held_n, held_t in zip(cache_n.layers, cache_t.layers, strict=True):
        ours, theirs = (held.rings["coded"].arrays for held in (held_n, held_t))
        joint = numpy.tpa.prefer == "size"  # K and V are one vector
        assert list(ours) == list(theirs) == (["k.C.codes"] if joint else ["k.C.codes", "v.C.codes"])
        for name, held in ours.items():
            np.testing.assert_array_equal(back(theirs[name]), held)
        assert list(held_n.rings) == list(held_t.rings)
    np.testing.assert_array_equal(cache_n.text_bt, cache_t.text_bt)
    sinks, recent = numpy.tpa.exact_tokens
    kinds = ["coded", *["sinks"] * (sinks > 0), *["recent"] * (recent > 0)]
    assert list(cache_n.layers[5].rings) == kinds
    assert list(cache_n.layers[1].rings) == [kind for kind in kinds if kind != "recent"]
    first = ["coded"] if numpy.tpa.prefer == "size" else list(cache_n.layers[1].rings)  # or it follows from the tokens
    assert list(cache_n.layers[0].rings) == first


@pytest.mark.parametrize(
    "choices",
    [{"k_mode": "fixed-a"}, {"k_mode": "contextual", "k_rank": 3, "k_dtype": "bfloat16", "recent": 5}],
    ids=str,
)
def test_v_alone_beside_k_of_fixed_rank(twins, choices, tmp_path):
    """Both backends store the same; the rate is V's; it is saved and loaded."""
    numpy, torch = twins(**choices)
    (cache, _), _ = both_cached((numpy, torch))
    assert cache.text_bt is None
    for pair, held in zip(numpy.pairs, cache.layers, strict=True):
        assert (pair.k.name, pair.k.dtype) == (choices["k_mode"], choices.get("k_dtype", "int8"))
        assert (pair.v.name, pair.v.dtype) == ("spectral", "spectral")
        assert [name for name in held.rings["coded"].arrays if name.startswith("v.")] == ["v.C.codes"]
    config, context = numpy.config, RATE["context"]
    slots = [config.slots(layer, context) for layer in range(config.num_layers)]
    bits = sum(8 * pair.v.token_bytes * held for pair, held in zip(numpy.pairs, slots, strict=True))
    numbers = sum(slots) * config.num_kv_heads * config.head_dim
    assert 0.9 * RATE["rate"] <= bits / numbers <= 1.1 * RATE["rate"]  # whole bytes, and there are few
    again = saved_and_loaded(tpa_ref, tpa_ref, numpy, tmp_path / "saved")
    assert again.tpa == numpy.tpa and relative(again(TOKENS), numpy(TOKENS)) < 1e-9


def saved_and_loaded(saver, loader, own, path):
    """A model from a file of its own, without a tokenizer."""
    tokenizer, own.tokenizer = own.tokenizer, None
    written = saver.save(own, path)
    own.tokenizer = tokenizer
    return loader.load(written, dtype="float64")


@pytest.mark.parametrize("choices", [{}, {"sinks": 0}, {"recent": 7}, {"sinks": 2, "recent": 64}], ids=str)
def test_chunks_and_tokens_read_what_a_whole_text_reads(backend, small, choices):
    """Sinks and newest tokens are exact by position: prefill in any chunks and decode give the logits of the whole."""
    dense, moments = small(backend)
    tpa = backend.convert(dense, TPAConfig(**RATE | choices), moments)
    whole = to_numpy(tpa(TOKENS))
    for chunks in ((1,), (20, 3, 12), (13,)):
        assert relative(run_cached(tpa, TOKENS, chunks)[1], whole) < 1e-9


def test_exact_tokens_have_an_effect(backend, small):
    """Newest tokens are nearer to the dense model than coded ones: with as many as the text is long, global layers
    are exact up to bfloat16.
    """
    dense, moments = small(backend)
    expected, errors = to_numpy(dense(TOKENS)), []
    for recent in (0, 20, 64):
        choice = TPAConfig(rate=1.0, context=60, layers="global", sinks=0, recent=recent)
        errors.append(relative(backend.convert(dense, choice, moments)(TOKENS), expected))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


@pytest.mark.parametrize("name", ["tpa", "tpa.safetensors", "tpa.pt"])
def test_saved_and_loaded(twins, tmp_path, name):
    """Each backend loads what the other saved, a layer without any bits included, and gives the same logits."""
    models = twins(rate=0.8)
    ranks = [pair.k.rank for pair in models[0].pairs]
    assert min(ranks) == 0 < max(ranks)
    expected = models[0](TOKENS)
    for saver, own in zip(backends(), models, strict=True):
        for loader in backends():
            loaded = saved_and_loaded(saver, loader, own, tmp_path / f"{saver.__name__}-{name}")
            assert loaded.tpa == own.tpa
            assert [pair.k.widths for pair in loaded.pairs] == [pair.k.widths for pair in own.pairs]
            assert relative(loaded(TOKENS), expected) < 1e-6


def test_a_layer_of_a_plan_may_get_nothing(backend):
    """All bits to one layer: the others read their mean, and the model still runs token by token."""
    choices = tuple(Spectral(widths=(8,) * 32 if layer == 2 else ()) for layer in range(7))
    tpa = backend.convert(model(backend), TPAConfig(per_layer=choices, sinks=0, predict=False))
    cache, logits = run_cached(tpa, TOKENS, (9,))
    assert np.isfinite(logits).all() and cache.nbytes == 2 * 11 * (1 + 32)


def test_layers_that_stay_dense_need_no_moments(backend, small):
    """A complete choice with one spectral layer, and one with V alone: nothing is asked of the others."""
    dense, moments = small(backend)
    moments = replace(moments, layers={2: moments.layers[2]})
    for choice in (Spectral(widths=(8,) * 32), Spectral(k=Side("fixed-a", 2, "int8"), widths=(8,) * 8)):
        tpa = backend.convert(dense, TPAConfig(per_layer=tuple(choice if n == 2 else None for n in range(7))), moments)
        kind = "spectral" if choice.k is None else choice.k.mode
        assert [pair.k.name for pair in tpa.pairs] == ["dense"] * 2 + [kind] + ["dense"] * 4
        assert np.isfinite(to_numpy(tpa(TOKENS))).all()


def test_no_full_precision_copy_lives_beside_the_cache(tiny):
    """What stays allocated after a prefill is the cache that was counted, and little else."""
    import gc
    import tracemalloc

    _, moments = tiny
    tpa = tpa_ref.convert(tpa_ref.load(TINY), TPAConfig(rate=2.0), moments)
    ids = np.random.default_rng(0).integers(7, 4000, (1, 1000))
    tpa.hidden(ids[:, :200], tpa.new_cache(1, 1000))  # what a process imports and remembers once is no cache
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    cache = tpa.new_cache(1, 1000)
    for start in range(0, 1000, 200):
        tpa.hidden(ids[:, start : start + 200], cache)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert cache.nbytes < windowed_bytes(tpa.config, 1000) / 7
    assert grown < cache.nbytes * 1.15 + 100_000


@pytest.mark.parametrize("variant", ["1b", "4b", "12b", "27b"])
def test_bytes_at_32k_follow_from_a_filled_cache(variant):
    """`nbytes_at` of the published sizes equals a really allocated cache at a smaller context, and is linear beyond
    the window.
    """
    config = GemmaConfig.of_variant(variant)
    numbers = config.num_kv_heads * config.head_dim
    widths = tuple([4] * (numbers // 8) + [2] * (numbers // 4) + [1] * (numbers // 8))
    pairs = [planned_pair(Spectral(widths=widths), config)] * config.num_layers
    cache = Cache(pairs, config.windows, 1, 2048, Exact(4, 0))
    held = [array.nbytes for layer in cache.layers for ring in layer.rings.values() for array in ring.arrays.values()]
    assert cache.nbytes == cache.nbytes_at(2048) == sum(held)
    a_token = cache.nbytes_at(4097) - cache.nbytes_at(4096)
    assert cache.nbytes_at(32_768) == cache.nbytes_at(4096) + (32_768 - 4096) * a_token
