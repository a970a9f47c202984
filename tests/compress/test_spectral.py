"""The spectral cache: gradients against finite differences, the transform, the bits, the codes, and exact tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers import relative, run_cached, submodule, to_numpy

import tpa_ref
from tpa_ref.cli.options import TINY
from tpa_ref.compress import transform as spectral
from tpa_ref.compress.calibrate import read_text
from tpa_ref.compress.config import LayerConfig, TPAConfig
from tpa_ref.core import quantize
from tpa_ref.errors import TPAError
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.memory import windowed_bytes

RATE = {"rate": 1.5, "context": 60}


class Bytes:
    """A tokenizer that needs no file: byte b is token 3 + b."""

    vocab_size, proto = 300, b""

    def encode(self, text, bos=True):
        return [2] * bos + [3 + byte for byte in text.encode()]


TEXT = "".join(chr(32 + (7 * i * i + 3 * i) % 90) for i in range(2000)) + "\n"


@pytest.fixture(scope="module")
def tiny():
    """The tiny model in NumPy and its moments, from a little text."""
    model = tpa_ref.load(TINY)
    text = read_text(TINY / "calibration.txt")
    return model, tpa_ref.calibrate(model, text, max_tokens=4096, sensitivity_tokens=2048)


# ---- sensitivity: the way back ----


def directional(f, x, direction, step=1e-5):
    """Central difference of f at x along a direction."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("layer", [0, 5])
def test_gradients_of_a_block_are_those_of_finite_differences(backend, random_gemma, layer):
    """By the input, by normed K and by V, of a window layer and of a global one, along random directions."""
    gemma = random_gemma(g=2, h=4, scaled=True)
    ref = tpa_ref.load(gemma.path, dtype="float64")
    model = backend.load(gemma.path, dtype="float64")
    rng = np.random.default_rng(layer)
    x, dy = rng.standard_normal((2, 1, 20, 48))
    positions = np.arange(20)[None]

    def value(x_bqm=x, K=0.0, V=0.0):
        def moved(name, array):
            return array + (K if name == "attn.K_bkgd" else V if name == "attn.V_bkge" else 0.0)

        return float((ref.block(x_bqm, layer, ref.weights.layers[layer], positions, None, trace=moved) * dy).sum())

    w = model.weights.layers[layer]
    as_own = np.asarray if backend is tpa_ref else __import__("torch").from_numpy
    found = submodule(backend, "sensitivity").block_backward(model, as_own(dy), as_own(x), layer, w, positions)
    dx, dK, dV = (to_numpy(part) for part in found)
    for _ in range(3):
        u, k, v = rng.standard_normal(x.shape), *rng.standard_normal((2, *dK.shape))
        np.testing.assert_allclose((dx * u).sum(), directional(lambda z: value(x_bqm=z), x, u), rtol=1e-5)
        np.testing.assert_allclose((dK * k).sum(), directional(lambda z: value(K=z), 0 * k, k), rtol=1e-5)
        np.testing.assert_allclose((dV * v).sum(), directional(lambda z: value(V=z), 0 * v, v), rtol=1e-5)


def test_a_wrong_way_back_is_seen(random_gemma, monkeypatch):
    """Without turning back through RoPE the gradient by K fails the same comparison."""
    sensitivity = submodule(tpa_ref, "sensitivity")
    right = sensitivity.rope.rotate
    calls = itertools.count()

    def rotate(x, cos, sin):  # the third and fourth call of a block are the way back
        return x if next(calls) % 4 >= 2 else right(x, cos, sin)

    monkeypatch.setattr(sensitivity.rope, "rotate", rotate)
    with pytest.raises(AssertionError):
        test_gradients_of_a_block_are_those_of_finite_differences(tpa_ref, random_gemma, 5)


def test_gradient_of_the_prediction(random_gemma):
    """By the last state: that of -log p(y), y the token that was drawn."""
    gemma = random_gemma(g=2, h=4)
    model = tpa_ref.load(gemma.path, dtype="float64")
    sensitivity, x = submodule(tpa_ref, "sensitivity"), np.random.default_rng(1).standard_normal((1, 9, 48))
    gradient = sensitivity.logits_backward(model, x, np.random.default_rng(3))
    rms_norm, softmax = submodule(tpa_ref, "norm").rms_norm, submodule(tpa_ref, "attention").softmax

    def p(x):
        return softmax(model.logits(rms_norm(x, model.weights.final_norm_m, model.config.rms_eps)))

    y = sensitivity.draw(p(x), np.random.default_rng(3))
    u = np.random.default_rng(2).standard_normal(x.shape)
    found = directional(lambda z: -np.log(np.take_along_axis(p(z), y[..., None], -1)).sum(), x, u)
    np.testing.assert_allclose((gradient * u).sum(), found, rtol=1e-5)


def test_tokens_are_drawn_by_their_probability(backend):
    """Frequencies of many draws are the probabilities."""
    P = np.tile(np.array([0.5, 0.0, 0.2, 0.3]), (1, 20_000, 1))
    own = P if backend is tpa_ref else __import__("torch").from_numpy(P)
    drawn = to_numpy(submodule(backend, "sensitivity").draw(own, np.random.default_rng(0)))
    np.testing.assert_allclose(np.bincount(drawn.ravel(), minlength=4) / 20_000, P[0, 0], atol=0.02)


def test_predicted_damage_is_the_measured_kl(tiny):
    """At a rate where errors are small, 1/2 sum lambda D is the KL of the whole model, on text never seen."""
    dense, moments = tiny
    converted = tpa_ref.convert(dense, TPAConfig(rate=3.0, context=128), moments)
    spectrum = submodule(tpa_ref, "model").layer_spectrum
    variances = [spectrum(dense, layer, moments.of_layer(layer), moments.words).variance_s for layer in range(12)]
    widths = [(*how.widths, *[0] * (256 - len(how.widths))) for how, _ in converted.factors]
    predicted = spectral.damage(variances, widths)
    figures = tpa_ref.evaluate(dense, converted, read_text(TINY / "evaluation.txt"), 1024, recall_prompts=0)
    assert 0.5 < figures["kl"] / predicted < 2.0
    assert figures["kl"] < 0.002


# ---- the transform ----


def some_moments(seed=0, g=2, d=6, tokens=4000):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((g * d, g * d)) + 4 * np.eye(g * d)
    X = rng.standard_normal((tokens, g * d)) @ mixed + rng.standard_normal(g * d)
    G = rng.standard_normal((g * d, g * d)) * np.geomspace(1, 0.01, g * d)
    shape = (g, d, g, d)
    return X, (X.T @ X / tokens).reshape(shape), X.mean(0).reshape(g, d), (G.T @ G).reshape(shape)


def test_the_transform_there_and_back(backend):
    """All coefficients give the vector back; they are uncorrelated, of variance 1, and carry the damage."""
    X, M, mean, F = some_moments()
    own = np.asarray if backend is tpa_ref else __import__("torch").from_numpy
    found = submodule(backend, "spectral").spectrum(own(M), own(mean), [own(F)])
    E, B = (to_numpy(x).reshape(12, 12) for x in (found.encoder_sgd, found.basis_sgd))
    C = (X - mean.ravel()) @ E.T
    np.testing.assert_allclose(C @ B + mean.ravel(), X, atol=1e-8)
    np.testing.assert_allclose(C.T @ C / len(C), np.eye(12), atol=0.01)  # the floor under the variance shows here
    error = X[:50] - X[50:100]
    damage = np.einsum("tx,xy,ty->t", error, F.reshape(12, 12), error)
    by_coefficient = np.square(error @ E.T) @ found.variance_s
    np.testing.assert_allclose(by_coefficient, damage, rtol=0.02)
    assert (np.diff(found.variance_s) <= 0).all()


def test_the_damage_metric_beats_the_plain_one(tiny):
    """Same bits, same text: bases and bits by damage lose several times less KL than by energy."""
    dense, moments = tiny
    without = replace(
        moments, layers={layer: replace(found, F=(None, None)) for layer, found in moments.layers.items()}
    )
    text = read_text(TINY / "evaluation.txt")
    kl = [
        tpa_ref.evaluate(dense, tpa_ref.convert(dense, config, found), text, 1024, recall_prompts=0)["kl"]
        for config, found in itertools.product(
            (TPAConfig(rate=1.0, context=128), TPAConfig(mode="latent", k_rank=64, v_rank=64)), (moments, without)
        )
    ]
    assert kl[0] < kl[1] / 2 and kl[2] < kl[3]


@pytest.mark.parametrize("mode", ["fixed-b", "latent"])
def test_weighted_truncation_loses_least_damage(backend, mode):
    """Less than the basis of least energy, and what it says of its own error is so."""
    X, M, mean, F = some_moments(1)
    own = np.asarray if backend is tpa_ref else __import__("torch").from_numpy
    if mode == "fixed-b":  # heads by themselves
        keep = np.eye(2)[:, None, :, None]
        M = M * keep + np.einsum("gd,jc->gdjc", mean, mean) * (1 - keep)
        F = F * keep
    encoder, basis, error = submodule(backend, "spectral").truncate_weighted(mode, 3, own(M), own(mean), own(F))
    factorize = submodule(backend, "factorize")
    Factorization = factorize.Factorization
    plain, _ = factorize.constant_basis(mode, 3, own(M))
    X_bkgd = own(X[None].reshape(1, -1, 2, 6))
    lost = []
    for how in (
        Factorization(mode, 3, "float64", basis, error, encoder, own(mean)),
        Factorization(mode, 3, "float64", plain),
    ):
        n = (to_numpy(factorize.decode(factorize.encode(X_bkgd, how), how, 2)) - to_numpy(X_bkgd)).reshape(-1, 12)
        lost.append(np.einsum("tx,xy,ty->", n, F.reshape(12, 12), n) / len(n))
    assert lost[0] < lost[1]
    if mode == "latent":
        C = M.reshape(12, 12) - np.outer(mean, mean)
        np.testing.assert_allclose(lost[0], error**2 * np.trace(F.reshape(12, 12) @ C), rtol=0.03)


# ---- bits ----


def test_water_filling_is_optimal():
    """Against every choice of widths, for small cases with different entries; whole bytes in every layer."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        variances, entries = [rng.exponential(size=2) * 8, rng.exponential(size=1) * 8], [1, 3]
        widths = spectral.allocate(variances, entries, bits=10)
        assert all(sum(side) % 8 == 0 for side in widths)
        spent = sum(sum(side) * held for side, held in zip(widths, entries, strict=True))
        assert spent <= 10 + 7 * sum(entries)
        best = min(
            spectral.damage(variances, [(a, b), (c,)])
            for a, b, c in itertools.product(range(9), repeat=3)
            if a + b + 3 * c <= 8  # the last bit, of price 3, may not have fitted into 10
        )
        assert spectral.damage(variances, widths) <= best * (1 + 1e-12)


def test_nothing_beats_the_gaussian_bound():
    """It lies below what any allocation reaches; each bit divides it by 4 where all coefficients have some."""
    variances, entries = [np.geomspace(9, 1, 8), np.geomspace(5, 2, 4)], [2, 1]
    for rate in (0.5, 1, 2, 4):
        widths = spectral.allocate(variances, entries, rate * (2 * 8 + 4))
        spent = sum(sum(side) * held for side, held in zip(widths, entries, strict=True))
        assert spectral.gaussian_bound(variances, entries, spent) < spectral.damage(variances, widths)
    high, higher = (spectral.gaussian_bound(variances, entries, rate * 20) for rate in (5, 6))
    np.testing.assert_allclose(high / higher, 4, rtol=1e-6)


def test_long_texts_move_bits_to_no_layer_for_free(tiny):
    """At a longer context a bit of a global layer costs more, so window layers get more of them."""
    dense, moments = tiny
    rates = []
    for context in (128, 32_768):
        found = tpa_ref.convert(dense, TPAConfig(rate=1.0, context=context), moments)
        bits = np.array([sum(how.widths) for how, _ in found.factors])
        is_global = np.array(dense.config.is_global)
        rates.append(bits[~is_global].mean() / bits[is_global].mean())
    assert rates[1] > 2 * rates[0]


# ---- codes ----


@pytest.mark.parametrize("width", range(1, 9))
def test_levels_are_near_the_best_ones(width):
    """On a Gaussian the error is the table's (which is for slightly heavier tails), and near that of Lloyd and Max."""
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    at = quantize.levels(width)
    error = np.square(at[np.searchsorted(quantize.thresholds(width), x)] - x).mean()
    lloyd = [0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000644, 0.000163, 0.0000413][width - 1]
    assert lloyd * 0.99 < error < lloyd * (1.15 if width < 5 else 2.1)
    assert 0.6 < error / quantize.DISTORTION[width] < 1.05
    np.testing.assert_allclose(at, -at[::-1])


def test_packing_there_and_back(backend):
    """Any widths, sorted or not, none, and bytes as counted; both backends store the same ones."""
    module, rng = submodule(backend, "quantize"), np.random.default_rng(0)
    for size in [0, 1, 3, *rng.integers(2, 60, 12)]:
        widths = tuple(rng.integers(1, 9, size).tolist())
        C = rng.standard_normal((2, 5, size)).astype(np.float32) * 1.5
        own = C if backend is tpa_ref else __import__("torch").from_numpy(C)
        stored = module.quantize_spectral(own, widths)
        expected = quantize.quantize_spectral(C, widths)["codes"]
        np.testing.assert_array_equal(to_numpy(stored["codes"]), expected)
        assert stored["codes"].shape[-1] == quantize.packed_bytes(widths) == -(-sum(widths) // 8)
        back = to_numpy(module.dequantize_spectral(stored, widths))
        for column, width in enumerate(widths):
            at = quantize.levels(width)
            nearest = at[np.abs(at[:, None, None] - C[..., column]).argmin(0)]
            np.testing.assert_allclose(back[..., column], nearest, rtol=1e-6)


# ---- the whole model ----


@pytest.fixture
def spectral_pair(random_gemma):
    """Both backends with a spectral cache in float64, calibrated on a text: (NumPy, torch, tokens)."""

    def make(**choices):
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)
        import tpa_torch

        gemma, made = random_gemma(4, 8, 8, 11, scaled=True), []
        for backend in (tpa_ref, tpa_torch):
            model = backend.load(gemma.path, dtype="float64")
            model.tokenizer = Bytes()
            moments = backend.calibrate(model, TEXT, max_tokens=600)
            made.append(backend.convert(model, TPAConfig(**RATE | choices), moments))
        return *made, gemma.tokens_bq

    return make


@pytest.mark.parametrize("choices", [{}, {"sinks": 0}, {"recent": 7}, {"rate": 0.1, "sinks": 1}], ids=str)
def test_twins_store_the_same_codes(spectral_pair, choices):
    """Whole texts and caches of both backends agree, codes byte for byte, bytes as counted."""
    numpy, torch, tokens_bq = spectral_pair(**choices)
    assert relative(torch(tokens_bq), numpy(tokens_bq)) < 1e-9
    (cache_n, logits_n), (cache_t, logits_t) = (run_cached(model, tokens_bq, (20, 8, 17)) for model in (numpy, torch))
    assert relative(logits_t, logits_n) < 1e-9
    assert cache_n.nbytes == cache_t.nbytes == cache_n.nbytes_at(64, batch=2)
    for held_n, held_t in zip(cache_n.layers, cache_t.layers, strict=True):
        (k_n, v_n), (k_t, v_t) = held_n.stored, held_t.stored
        assert v_n == v_t == {}  # K and V are one vector
        np.testing.assert_array_equal(to_numpy(k_t["C"]["codes"]), k_n["C"]["codes"])
    np.testing.assert_array_equal(cache_n.text_bt, cache_t.text_bt)


@pytest.mark.parametrize(
    "choices",
    [{"k_mode": "fixed-a"}, {"k_mode": "contextual", "k_rank": 3, "k_dtype": "bfloat16", "recent": 5}],
    ids=str,
)
def test_v_alone_beside_k_of_fixed_rank(spectral_pair, choices, tmp_path):
    """Both backends store the same; the rate is V's; it is saved and loaded."""
    numpy, torch, tokens_bq = spectral_pair(**choices)
    (cache_n, logits_n), (cache_t, logits_t) = (run_cached(model, tokens_bq, (20, 8, 17)) for model in (numpy, torch))
    assert relative(logits_t, logits_n) < 1e-9
    assert cache_n.nbytes == cache_t.nbytes == cache_n.nbytes_at(64, batch=2) and cache_n.text_bt is None
    for (how_k, how_v), (_, held_v) in zip(numpy.factors, (layer.stored for layer in cache_n.layers), strict=True):
        assert (how_k.mode, how_k.dtype) == (choices["k_mode"], choices.get("k_dtype", "int8"))
        assert (how_v.mode, how_v.dtype, list(held_v)) == ("latent", "spectral", ["C"])
    config, context = numpy.config, RATE["context"]
    slots = [config.slots(layer, context) for layer in range(config.num_layers)]
    bits = sum(sum(how.widths) * held for (_, how), held in zip(numpy.factors, slots, strict=True))
    numbers = sum(slots) * config.num_kv_heads * config.head_dim
    assert 0.9 * RATE["rate"] <= bits / numbers <= 1.1 * RATE["rate"]  # whole bytes, and there are few
    numpy.tokenizer = None
    again = tpa_ref.load(tpa_ref.save(numpy, tmp_path / "saved"), dtype="float64")
    assert again.tpa == numpy.tpa and relative(again(tokens_bq), numpy(tokens_bq)) < 1e-9


def test_words_predict_no_v_alone():
    with pytest.raises(TPAError, match="words predict K and V together"):
        TPAConfig(k_mode="fixed-a", rate=1.0, predict=True)
    with pytest.raises(TPAError, match="excludes v_rank"):
        TPAConfig(k_mode="fixed-a", v_rank=3, rate=1.0)


@pytest.mark.parametrize("choices", [{}, {"sinks": 0}, {"recent": 7}, {"sinks": 2, "recent": 64}], ids=str)
def test_chunks_and_tokens_read_what_a_whole_text_reads(backend, random_gemma, choices):
    """Sinks and newest tokens are exact by position: prefill in any chunks and decode give the logits of the whole."""
    gemma = random_gemma(2, 4, 16, 11)
    model = backend.load(gemma.path, dtype="float64")
    model.tokenizer = Bytes()
    tpa = backend.convert(model, TPAConfig(**RATE | choices), backend.calibrate(model, TEXT, max_tokens=300))
    whole = to_numpy(tpa(gemma.tokens_bq))
    for chunks in ((1,), (30, 3, 20), (13,)):
        assert relative(run_cached(tpa, gemma.tokens_bq, chunks)[1], whole) < 1e-9


def test_exact_tokens_have_an_effect(backend, random_gemma):
    """Newest tokens are nearer to the dense model than coded ones: with as many as the text is long, global layers
    are exact up to bfloat16.
    """
    gemma = random_gemma(2, 4, 16, 11)
    model = backend.load(gemma.path, dtype="float64")
    model.tokenizer = Bytes()
    moments = backend.calibrate(model, TEXT, max_tokens=300)
    dense = to_numpy(model(gemma.tokens_bq))
    errors = [
        relative(
            backend.convert(model, TPAConfig(rate=0.2, context=60, layers="global", sinks=0, recent=n), moments)(
                gemma.tokens_bq
            ),
            dense,
        )
        for n in (0, 8, 64)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


@pytest.mark.parametrize("name", ["tpa", "tpa.safetensors", "tpa.pt"])
def test_saved_and_loaded(spectral_pair, tmp_path, name):
    """Each backend loads what the other saved, a side without any bits included, and gives the same logits."""
    import tpa_torch

    numpy, torch, tokens_bq = spectral_pair(rate=0.1)
    assert any(how.rank == 0 for pair in numpy.factors for how in pair)
    expected = to_numpy(numpy(tokens_bq))
    for saver, model in ((tpa_ref, numpy), (tpa_torch, torch)):
        model.tokenizer = None
        path = saver.save(model, tmp_path / f"{saver.__name__}-{name}")
        for loader in (tpa_ref, tpa_torch):
            loaded = loader.load(path, dtype="float64")
            assert loaded.tpa == model.tpa and loaded.factors[3][0].widths == model.factors[3][0].widths
            assert relative(loaded(tokens_bq), expected) < 1e-6


def test_a_layer_of_a_plan_may_get_nothing(backend, random_gemma):
    """All bits to one layer: the others read their mean, and the model still runs token by token."""
    gemma = random_gemma(2, 4, 16, 11)
    model = backend.load(gemma.path)
    choices = tuple(LayerConfig.spectral((8,) * 32) if layer == 2 else LayerConfig.spectral(()) for layer in range(7))
    tpa = backend.convert(model, TPAConfig(per_layer=choices, sinks=0))
    cache, logits = run_cached(tpa, gemma.tokens_bq, (9,))
    assert np.isfinite(logits).all() and cache.nbytes == 2 * 11 * 32


def test_layers_that_stay_dense_need_no_moments(backend, random_gemma):
    """A complete choice with one spectral layer, and one with V alone: nothing is asked of the others."""
    gemma = random_gemma(2, 4, 16, 11)
    model = backend.load(gemma.path)
    model.tokenizer = Bytes()
    moments = backend.calibrate(model, TEXT, layers="2", max_tokens=100)
    alone = LayerConfig("fixed-a", "latent", 2, 8, "int8", "spectral", (), (8,) * 8)
    for choice in (LayerConfig.spectral((8,) * 32), alone):
        tpa = backend.convert(model, TPAConfig(per_layer=tuple(choice if n == 2 else None for n in range(7))), moments)
        assert [how.mode for how, _ in tpa.factors] == ["dense"] * 2 + [choice.k_mode] + ["dense"] * 4
        assert np.isfinite(to_numpy(tpa(gemma.tokens_bq))).all()


def test_no_full_precision_copy_lives_beside_the_cache(tiny):
    """What stays allocated after a prefill is the cache that was counted, and little else."""
    import tracemalloc

    dense, moments = tiny
    tpa = tpa_ref.convert(dense, TPAConfig(rate=2.0), moments)
    ids = np.random.default_rng(0).integers(7, 4000, (1, 1000))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    cache = tpa.new_cache(1, 1000)
    for start in range(0, 1000, 200):
        tpa.hidden(ids[:, start : start + 200], cache)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert cache.nbytes < windowed_bytes(dense.config, 1000) / 7
    assert grown < cache.nbytes * 1.15 + 100_000


@pytest.mark.parametrize("variant", ["1b", "4b", "12b", "27b"])
def test_bytes_at_32k_follow_from_a_filled_cache(variant):
    """`nbytes_at` of the published sizes equals a really allocated cache at a smaller context, and is linear beyond
    the window.
    """
    config = GemmaConfig.of_variant(variant)
    numbers = config.num_kv_heads * config.head_dim
    widths = tuple([4] * (numbers // 8) + [2] * (numbers // 4) + [1] * (numbers // 8))
    from tpa_ref.compress.plan import spectral_layer
    from tpa_ref.core.cache import Cache, Exact

    factors = [spectral_layer(LayerConfig.spectral(widths))] * config.num_layers
    cache = Cache(config, factors, 1, 2048, Exact(4, 0))
    assert (
        cache.nbytes
        == cache.nbytes_at(2048)
        == sum(
            array.nbytes
            for layer in cache.layers
            for part in (layer, layer.sinks)
            if part
            for side in part.stored
            for fields in side.values()
            for array in fields.values()
        )
    )
    a_token = cache.nbytes_at(4097) - cache.nbytes_at(4096)
    assert cache.nbytes_at(32_768) == cache.nbytes_at(4096) + (32_768 - 4096) * a_token
