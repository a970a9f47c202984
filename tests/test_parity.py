"""The two backends are twins: same stages, same cached codes, same logits, same functions, same generated tokens."""

from __future__ import annotations

import importlib
import inspect
import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers import KINDS, TOLERANCE, in_kind, relative, run_cached, submodule, to_numpy

import tpa_ref
from tpa_ref.compress.config import KV_DTYPES, MODES
from tpa_ref.trace import Trace, compare

pytest.importorskip("torch").set_num_threads(1)
import tpa_torch

BACKENDS = (tpa_ref, tpa_torch)


@pytest.fixture
def twins(random_gemma):
    """Makes the same model in both backends: (NumPy, torch, text)."""

    def make(dtype="float64", g=2, n=2, **choices):
        gemma = random_gemma(g, g * n, 8 if g == 4 else 16, 11, scaled=True)
        models = [backend.load(gemma.path, dtype=dtype) for backend in BACKENDS]
        if choices:
            models = [b.convert(m, b.TPAConfig(**choices)) for b, m in zip(BACKENDS, models, strict=True)]
        return *models, gemma.tokens_bq

    return make


# ---- every stage ----


def comparable(stages):
    """The stages of a trace, with 0 for masked logits: beside -2e38 no other difference would show."""
    arrays = {name: to_numpy(array) for name, array in stages.items()}
    return {name: np.where(x < -1e37, 0, x) if name.endswith("L_bhqk") else x for name, x in arrays.items()}


def first_difference(a, b, tolerance, skip=None):
    """First stage in which two traces differ, or None; the report of `compare` goes to the test's output."""
    assert list(a.stages) == list(b.stages)  # the same stages in the same order
    kept = {name: x for name, x in comparable(a.stages).items() if skip is None or not name.endswith(skip)}
    return compare(kept, comparable(b.stages), tolerance)


def ill_conditioned(kind, dtype):
    """The one stage that float32 does not determine to 1e-5: where two singular values of a token's K nearly coincide,
    its singular vectors (b of `contextual`) may turn by far more than the rounding, and a turns with them. Their
    product does not change: L, P and all stages after it are compared; float64 compares b too.
    """
    return "rope.K_B" if (kind, dtype) == ("contextual", "float32") else None


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("g", "n"), [(1, 4), (2, 2), (4, 2)])
def test_every_stage(twins, g, n, kind, dtype):
    """Every named intermediate of a whole text agrees, from the embedding to the logits."""
    numpy, torch, tokens_bq = twins(dtype, g, n)
    traces = []
    for backend, model in zip(BACKENDS, (numpy, torch), strict=True):
        traces.append(Trace())
        in_kind(backend, model, kind)(tokens_bq, trace=traces[-1])
    assert first_difference(*traces, TOLERANCE[dtype], ill_conditioned(kind, dtype)) is None


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_of_a_decode_step(twins, kind, dtype):
    """The same for one token that is decoded far past the window."""
    numpy, torch, tokens_bq = twins(dtype)
    traces = []
    for backend, model in zip(BACKENDS, (numpy, torch), strict=True):
        model = in_kind(backend, model, kind)
        cache, _ = run_cached(model, tokens_bq[:, :-1], chunks=(20, 15))
        traces.append(Trace())
        model(tokens_bq[:, -1:], cache=cache, trace=traces[-1])
    assert first_difference(*traces, TOLERANCE[dtype], ill_conditioned(kind, dtype)) is None


def test_a_wrong_stage_is_found(twins):
    """The comparison names the stage that was disturbed, masked logits included."""
    numpy, torch, tokens_bq = twins("float64")
    for wrong in ("layers.3.attn.L_bhqk", "layers.5.rope.K_X", "logits_bqv"):
        good, bad = Trace(), Trace()
        numpy(tokens_bq, trace=good)
        torch(tokens_bq, trace=bad)
        bad.stages[wrong] = bad.stages[wrong] * (1 + 1e-6)
        assert first_difference(good, bad, TOLERANCE["float64"]) == wrong


# ---- truncated and quantized ----


def assert_same_runs(numpy, torch, tokens_bq):
    """Whole and cached logits agree, and the caches hold the same: codes and scales bit for bit."""
    whole = relative(torch(tokens_bq), numpy(tokens_bq))
    (cache_n, logits_n), (cache_t, logits_t) = (run_cached(model, tokens_bq, (20, 8, 17)) for model in (numpy, torch))
    cached = relative(logits_t, logits_n)
    assert max(whole, cached) < TOLERANCE["float64"]
    assert cache_t.nbytes == cache_n.nbytes
    for layer, (held_n, held_t) in enumerate(zip(cache_n.layers, cache_t.layers, strict=True)):
        for side_n, side_t in zip(held_n.stored, held_t.stored, strict=True):
            assert side_n.keys() == side_t.keys()
            for part, fields in side_n.items():
                assert fields.keys() == side_t[part].keys()
                for name, array in fields.items():
                    other = to_numpy(side_t[part][name])
                    if array.dtype == np.float64:
                        np.testing.assert_allclose(other, array, rtol=0, atol=1e-10 * np.abs(array).max())
                    else:
                        np.testing.assert_array_equal(other, to_numpy(array), f"layer {layer}, {part}, {name}")


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_truncated(twins, mode, dtype):
    """Half of the exact rank, in every mode and every storage dtype, with the bases each backend finds by itself."""
    numpy, torch, tokens_bq = twins(g=4, n=2, mode=mode, kv_dtype=dtype)
    assert numpy.factors[0][0].rank == {"contextual": 2, "fixed-a": 2, "fixed-b": 4, "latent": 16}[mode]
    assert_same_runs(numpy, torch, tokens_bq)


@pytest.mark.parametrize(("k_mode", "v_mode"), list(itertools.permutations(MODES, 2)))
def test_different_modes_for_k_and_v(twins, k_mode, v_mode):
    """K and V may be cached in different modes and dtypes."""
    assert_same_runs(*twins(g=4, n=2, k_mode=k_mode, v_mode=v_mode, k_dtype="int8", v_dtype="int4"))


@pytest.mark.parametrize(
    "choices",
    [{"layers": "global"}, {"layers": "0,5", "kv_dtype": "float32"}, {"q_rank": 5}, {"k_rank": 1, "v_rank": 3}],
    ids=str,
)
def test_other_choices(twins, choices):
    """Some layers dense, a truncated query, different ranks: the defaults of both backends are the same."""
    numpy, torch, tokens_bq = twins(g=4, n=2, **choices)
    assert_same_runs(numpy, torch, tokens_bq)


@pytest.mark.parametrize("mode", ["fixed-a", "fixed-b", "latent"])
def test_constant_factors_and_their_error(twins, mode):
    """The constant bases and the share that they leave out are the same numbers."""
    numpy, torch, _ = twins(g=4, n=2, mode=mode)
    for pair_n, pair_t in zip(numpy.factors, torch.factors, strict=True):
        for how_n, how_t in zip(pair_n, pair_t, strict=True):
            assert relative(how_t.basis, how_n.basis) < TOLERANCE["float64"]
            assert how_n.error > 0.01  # it is a truncation
            np.testing.assert_allclose(how_t.error, how_n.error, rtol=1e-8)


# ---- text: calibration, evaluation, generation ----


class Bytes:
    """A tokenizer that needs no file: byte b is token 3 + b."""

    vocab_size, proto = 300, b""

    def encode(self, text, bos=True):
        return [2] * bos + [3 + byte for byte in text.encode()]


TEXT = "The window is short; the text is not. " * 4 + "\n"


def test_calibrate(twins):
    """Second moments of a text, and the factors made from them, are the same."""
    numpy, torch, tokens_bq = twins(g=4, n=2)
    moments, converted = [], []
    for backend, model in zip(BACKENDS, (numpy, torch), strict=True):
        model.tokenizer = Bytes()
        moments.append(backend.calibrate(model, TEXT, max_tokens=100))
        converted.append(backend.convert(model, backend.TPAConfig(mode="latent"), moments[-1]))
    assert moments[0].tokens == moments[1].tokens == 101
    for layer in range(numpy.config.num_layers):
        ours, theirs = (found.of_layer(layer).arrays() for found in moments[::-1])
        assert set(ours) == set(theirs) == {"M", "mean", "N", "F.k", "F.v"}
        for name in ours:
            assert relative(ours[name], theirs[name]) < TOLERANCE["float64"], (layer, name)
    assert relative(moments[1].words.S_zz, moments[0].words.S_zz) < TOLERANCE["float64"]
    assert_same_runs(*converted, tokens_bq)
    uncalibrated = tpa_ref.convert(numpy, tpa_ref.TPAConfig(mode="latent"))
    assert relative(converted[0](tokens_bq), uncalibrated(tokens_bq)) > 1e-3  # the text has an effect


def test_calibrate_after_a_forward_pass(twins):
    """Rotation tables that a text has left behind can be used backwards, too."""
    _, torch, tokens_bq = twins(g=4, n=2)
    torch.tokenizer = Bytes()
    torch(tokens_bq)
    again = BACKENDS[1].calibrate(torch, TEXT, max_tokens=tokens_bq.shape[1] - 1)
    assert again.of_layer(0).F[0] is not None


def test_evaluate(twins):
    """KL, top-1 agreement and perplexities of the default conversion are the same figures."""
    numpy, torch, _ = twins(g=4, n=2)
    figures = []
    for backend, model in zip(BACKENDS, (numpy, torch), strict=True):
        model.tokenizer = Bytes()
        figures.append(
            backend.evaluate(model, backend.convert(model), TEXT, max_tokens=100, length=40, recall_prompts=0)
        )
    assert figures[0].keys() == figures[1].keys()
    assert figures[0]["kl"] > 1e-4
    for name in ("tokens", "kl", "kl_p95", "kl_p99", "kl_max", "top1", "ppl_dense", "ppl_tpa"):
        np.testing.assert_allclose(figures[1][name], figures[0][name], rtol=1e-7, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation(twins, kind):
    """Greedy generation past the window gives the same tokens, from a TPA cache in int8 as from a dense one."""
    numpy, torch, tokens_bq = twins(g=4, n=2)
    made = []
    for backend, model in zip(BACKENDS, (numpy, torch), strict=True):
        model = in_kind(backend, model, kind, kv_dtype="int8")
        generate = submodule(backend, "generate")
        made.append(list(generate.generate_tokens(model, tokens_bq[0, :12].tolist(), max_new_tokens=30)))
    assert made[0] == made[1]
    assert len(made[0]) == 30 and len(set(made[0])) > 4  # past the window, and not one token for ever


def test_greedy_generation_is_the_argmax_of_the_whole_text(twins):
    """Each generated token is the most likely one after all before it, by both backends, without any cache."""
    numpy, torch, tokens_bq = twins(g=4, n=2)
    ids = tokens_bq[0, :12].tolist()
    ids += submodule(tpa_ref, "generate").generate_tokens(numpy, ids, max_new_tokens=30)
    for model in (numpy, torch):
        assert to_numpy(model(np.array([ids])))[0, 11:-1].argmax(-1).tolist() == ids[12:]


# ---- the same functions ----

SHARED = sorted(
    file.stem
    for file in Path(tpa_torch.__file__).parent.glob("*.py")
    if file.stem != "__init__" and (Path(tpa_ref.__file__).parent / file.name).is_file()
)

# "module.name" -> why only one backend has it
ONE_SIDED = {
    "attention.absorb": "the fast path needs this step by itself",
    "attention.mix": "the same",
    "checkpoint.choose_device": "NumPy has one device",
    "factorize.as_pairs": "complex numbers of every dtype; torch has none of bfloat16",
    "factorize.from_pairs": "the same",
    "factorize.multiply_pairs": "the same",
    "factorize.contextual_factors": "`truncate_contextual` without the error, which would make a GPU wait",
    "model.Model.rope_table": "the Triton kernels read cosines and sines apart",
    "model.Model.rope_turns": "tables are kept on the device",
    "model.Model.words": "words are looked up once for all layers of a kind (`model.Views`)",
    "model.Model.views": "the reference makes tables and masks anew in every layer",
    "model.Views": "the same",
    "model.eigen_device": "NumPy has one device",
    "model.on_device": "the same",
    "model.placed": "the same",
    "model.query_blocks": "the reference makes all logits at once",
    "quantize.Packing": "what packing needs of the widths is kept on the device",
    "quantize.Piece": "what unpacking needs of the widths is kept",
    "quantize.unpacking": "the same",
    "words.Words": "the same",
    "words.WordTable": "the scales of the embedding's rows are kept",
    "stream.to_numpy": "NumPy's own are arrays already",
    "sensitivity.gelu_tanh_backward": "autograd knows it",
    "sensitivity.mlp_backward": "the same",
    "sensitivity.over_queries": "the same",
    "sensitivity.rms_norm_backward": "the same",
    "sensitivity.softmax_backward": "the same",
    "quantize.torch_dtype": "NumPy has one kind of dtype",
}
# "module.name" -> why its arguments differ
OTHER_ARGUMENTS = {
    "model.Model.attend": "positions travel with their tables and masks, which all layers of a kind share",
    "model.Model.block": "the same",
}


def public(module):
    """{name: function, class or method} that a module itself defines."""
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }
    methods = {
        f"{name}.{method}": value
        for name, cls in own.items()
        if inspect.isclass(cls)
        for method, value in vars(cls).items()
        if inspect.isfunction(value) and (not method.startswith("_") or method in ("__init__", "__call__"))
    }
    return own | methods


def find(module, name):
    """`name` (perhaps Class.method) in a module, wherever it was defined; None if it has none."""
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
        if value is None:
            break
    return value


def same_arguments(ref, torch):
    """The same argument names in the same order; torch may add a device at the end."""
    ref, torch = (list(inspect.signature(value).parameters) for value in (ref, torch))
    return torch in (ref, [*ref, "device"])


def differences(module):
    """({name that one side lacks}, {name whose arguments differ}) of one module and its twin, "module." in front."""
    ref, torch = (importlib.import_module(f"{backend.__name__}.{module}") for backend in BACKENDS)
    lacking, other = set(), set()
    for name in public(ref) | public(torch):
        ours, theirs = find(torch, name), find(ref, name)
        if ours is None or theirs is None:
            lacking.add(name)
        elif ours is not theirs and not same_arguments(theirs, ours):
            other.add(name)
    lacking = {name for name in lacking if name.rpartition(".")[0] not in lacking}  # a class without its methods
    return {f"{module}.{name}" for name in lacking}, {f"{module}.{name}" for name in other}


@pytest.mark.parametrize("module", SHARED)
def test_twins_have_the_same_functions(module):
    """What one backend's module defines for the public the other's offers, with the same arguments in order; the two
    tables name every exception and no other.
    """
    lacking, other = differences(module)
    assert lacking == {name for name in ONE_SIDED if name.startswith(f"{module}.")}
    assert other == {name for name in OTHER_ARGUMENTS if name.startswith(f"{module}.")}


def test_every_module_has_its_twin():
    """The modules of the reference through which a token flows all have a twin of the same name."""
    flow = "checkpoint norm rope factorize quantize cache attention masks vision model generate calibrate evaluate"
    assert {*flow.split(), "stream"} <= set(SHARED)


def test_the_same_public_names():
    """`import tpa_ref` and `import tpa_torch` offer the same names with the same arguments; only torch trains."""
    assert sorted(tpa_torch.__all__) == sorted([*tpa_ref.__all__, "heal"])
    for name in tpa_ref.__all__:
        ours, theirs = getattr(tpa_torch, name), getattr(tpa_ref, name)
        assert ours is theirs or same_arguments(theirs, ours), name
