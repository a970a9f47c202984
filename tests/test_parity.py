"""The two backends are twins: same stages, same cached codes, same logits, same functions, same generated tokens."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
from helpers import KINDS, MODES, TOLERANCE, in_kind, relative, run_cached, to_numpy

import tpa_ref
from tpa_ref.compress.config import KV_DTYPES
from tpa_ref.gemma.generate import generate_tokens
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


def first_difference(a, b, tolerance, skip=None):
    """First stage in which two traces differ, or None; the report of `compare` goes to the test's output."""
    assert list(a.stages) == list(b.stages)  # the same stages in the same order
    kept = {name: x for name, x in a.stages.items() if skip is None or not name.endswith(skip)}
    return compare(kept, b.stages, tolerance)


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
        assert held_n.rings.keys() == held_t.rings.keys()
        for kind, ring in held_n.rings.items():
            assert ring.arrays.keys() == held_t.rings[kind].arrays.keys()
            for name, array in ring.arrays.items():
                other = to_numpy(held_t.rings[kind].arrays[name])
                if array.dtype == np.float64:
                    np.testing.assert_allclose(other, array, rtol=0, atol=1e-10 * np.abs(array).max())
                else:
                    np.testing.assert_array_equal(other, to_numpy(array), f"layer {layer}, {kind}, {name}")


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_truncated(twins, mode, dtype):
    """Half of the exact rank, in every mode and every storage dtype, with the bases each backend finds by itself."""
    numpy, torch, tokens_bq = twins(g=4, n=2, mode=mode, kv_dtype=dtype)
    assert numpy.pairs[0].k.rank == {"contextual": 2, "fixed-a": 2, "fixed-b": 4, "latent": 16}[mode]
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
    for pair_n, pair_t in zip(numpy.pairs, torch.pairs, strict=True):
        for mode_n, mode_t in zip(pair_n.modes, pair_t.modes, strict=True):
            assert relative(mode_t.basis, mode_n.basis) < TOLERANCE["float64"]
            assert mode_n.error > 0.01  # it is a truncation
            np.testing.assert_allclose(mode_t.error, mode_n.error, rtol=1e-8)


# ---- text: calibration, evaluation, generation ----


class Bytes:
    """A tokenizer that needs no file: byte b is token 3 + b."""

    vocab_size, bos = 300, 2

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
    assert moments[0].tokens == moments[1].tokens == 100  # without BOS
    for layer in range(numpy.config.num_layers):
        ours, theirs = (found.of_layer(layer).arrays() for found in moments[::-1])
        assert set(ours) == set(theirs) == {"M", "mean", "N", "F.k", "F.v", "first.x", "first.G", "first.share"}
        for name in ours:
            assert relative(ours[name], theirs[name]) < TOLERANCE["float64"], (layer, name)
    assert relative(moments[1].of_tokens.S_zz, moments[0].of_tokens.S_zz) < TOLERANCE["float64"]
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
        made.append(list(generate_tokens(model, tokens_bq[0, :12].tolist(), max_new_tokens=30)))
    assert made[0] == made[1]
    assert len(made[0]) == 30 and len(set(made[0])) > 4  # past the window, and not one token for ever


def test_greedy_generation_is_the_argmax_of_the_whole_text(twins):
    """Each generated token is the most likely one after all before it, by both backends, without any cache."""
    numpy, torch, tokens_bq = twins(g=4, n=2)
    ids = tokens_bq[0, :12].tolist()
    ids += generate_tokens(numpy, ids, max_new_tokens=30)
    for model in (numpy, torch):
        assert to_numpy(model(np.array([ids])))[0, 11:-1].argmax(-1).tolist() == ids[12:]


# ---- the same functions ----

FOLDERS = ("core", "gemma")


def modules(backend):
    """Of a backend's twinned folders, "core.rope" and so on."""
    root = Path(backend.__file__).parent
    return {f"{folder}.{x.stem}" for folder in FOLDERS for x in (root / folder).glob("[!_]*.py")}


TWINNED = sorted(modules(tpa_torch))

# Modules of the reference that serve models of both backends -> why they can
ONCE = {
    "core.divergence": "two lines of `Model.compare`",
    "core.transform": "conversion: once a model, in float64",
    "gemma.config": "no arrays",
    "gemma.side_files": "files",
    "gemma.chat": "texts",
    "gemma.conversation": "no arrays but token ids",
    "gemma.pieces": "texts",
    "gemma.generate": "token ids, and logits of the last position",
    "gemma.hf_config": "no arrays",
    "gemma.images": "files into pixels",
    "gemma.memory": "no arrays",
    "gemma.texts": "token ids",
    "gemma.tokenizer": "token ids",
    "gemma.weights": "names, and a record of arrays of any kind",
}
# Functions and methods of twinned modules that work on arrays and have no twin -> why
NO_TWIN = {
    "core.attention.algorithm_1": "the paper's; Gemma's queries are dense",
    "core.attention.join_heads": "shapes, sums and comparisons, which tensors know as well",
    "core.attention.mean_values": "the same",
    "core.attention.split_heads": "the same",
    "core.cache.Keys.scores": "`fast.attend` reads keys",
    "core.cache.Keys.values": "the same",
    "core.cache.PassThrough.append": "slices, and calls `write`, `read` and `joined`",
    "core.cache.Ring.append": "the same",
    "core.codes.best_path": "`fast.kernels` has compiled ones; without them tensors go through the reference",
    "core.codes.by_last_bits": "the same",
    "core.codes.choose_scales": "the same",
    "core.codes.windows_of": "one line of `dequantize`",
    "core.banded.Banded.encode": "only calls its modes; `fast.banded` has one of its own",
    "core.banded.Banded.load": "only adds what its modes make",
    "core.banded.BandedLatent.load": "calls `codes` and `cast`",
    "core.banded.band_features": "conversion, and constants of a reader",
    "core.banded.lagrange": "constants of a reader",
    "core.banded.scores": "`fast.banded` reads so; tests hold it against this",
    "core.banded.tile_scores": "the same",
    "core.banded.turned_by": "the same",
    "core.contextual.Contextual.weights": "a reshape",
    "core.dense.Dense.decode": "hands its array on",
    "core.dense.Dense.encode": "hands its array on",
    "core.fixed_a.FixedA.fit": "conversion: once a model, in float64",
    "core.fixed_a.as_pairs": "complex numbers of every dtype; torch has none of bfloat16",
    "core.fixed_a.from_pairs": "the same",
    "core.fixed_a.leading_pairs": "conversion",
    "core.fixed_a.mixed": "`absorb` and `mix`",
    "core.fixed_b.FixedB.fit": "the same",
    "core.fixed_b.leading_features": "the same",
    "core.latent.Latent.fit": "the same",
    "core.latent.Latent.decode": "only calls `cast` and the products, which have twins",
    "core.latent.Latent.encode": "the same",
    "core.latent.Latent.values": "the same",
    "core.masks.segment_mask": "comparisons, which tensors know as well",
    "core.mode.Mode.decode": "every mode has its own",
    "core.mode.Mode.encode": "the same",
    "core.mode.Mode.fit": "conversion",
    "core.mode.Mode.load": "calls `quantize` and `cast`",
    "core.mode.Mode.rotated_keys": "only calls `decode` and `turned`",
    "core.mode.Mode.scores": "calls `attention`",
    "core.mode.Mode.store": "calls `quantize`",
    "core.mode.Mode.values": "calls `attention`",
    "core.mode.of_part": "picks entries of a dictionary",
    "core.pair.Joint.encode": "only adds what its modes make",
    "core.pair.Joint.load": "the same",
    "core.pair.Pair.encode": "only calls its modes and RoPE",
    "core.pair.Pair.load": "the same",
    "core.spectral.CodedLatent.decode": "only calls `Latent`, `cast` and the products",
    "core.spectral.CodedLatent.encode": "the same",
    "core.spectral.CodedLatent.load": "calls `codes` and `cast`",
    "core.spectral.CodedLatent.quantized": "calls `codes`; `fast.spectral` has one of its own",
    "core.spectral.CodedLatent.store": "calls that",
    "core.spectral.CodedLatent.values": "only calls `Latent`, `cast` and the products",
    "gemma.backward.attention_backward": "autograd knows it",
    "gemma.backward.gelu_tanh_backward": "the same",
    "gemma.backward.mlp_backward": "the same",
    "gemma.backward.mlp_block_backward": "the same",
    "gemma.backward.over_queries": "the same",
    "gemma.backward.rms_norm_backward": "the same",
    "gemma.backward.softmax_backward": "the same",
    "gemma.model.Model.compare": "blocks of `compare_rows`, which has one",
    "gemma.token_vectors.unit_rows": "`TokenTable` keeps the scales of all rows",
}
# Functions, classes and methods that only torch has -> why
ONLY_TORCH = {
    "core.contextual.Contextual.factor": "`fast.graph` factorizes without waiting for the GPU",
    "core.fixed_a.absorb": "`fast.readers` needs this step by itself",
    "core.fixed_a.mix": "the same",
    "core.fixed_a.multiply_pairs": "complex numbers of every dtype; torch has none of bfloat16",
    "core.quantize.torch_dtype": "NumPy has one kind of dtype",
    "gemma.model.Model.read": "there are several ways (`fast.attend`)",
    "gemma.model.Model.rope_table": "the Triton kernels read cosines and sines apart",
    "gemma.model.Model.rope_turns": "tables are kept on the device",
    "gemma.model.StaticModel": "the model that a CUDA graph records",
    "gemma.positions.Tokens.of": "`fast.readers` goes from tile to tile",
    "gemma.positions.Tokens.turn": "few tokens in one compiled call",
    "gemma.token_vectors.TokenTable": "the scales of the embedding's rows are kept",
    "gemma.token_vectors.TokenVectors": "token vectors are looked up once for all layers",
}
# "module.name" -> why its arguments differ
OTHER_ARGUMENTS = {
    "core.cache.Cache.__init__": "a device, and how tokens lie in its memory",
    "core.cache.Keys.seen": "of blocks of queries and keys",
    "gemma.positions.Tokens.__init__": "cos and sin as complex numbers, and token vectors when they are asked for",
    "gemma.model.Model.__init__": "hands on what it is given",
}
# NumPy arrays of whole numbers and flags in both backends: they stay on the host
HOST = {"positions", "lengths", "last", "tokens", "numbers", "known", "text", "is_image", "images"}


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
        f"{name}.{method}": getattr(cls, method)
        for name, cls in own.items()
        if inspect.isclass(cls)
        for method, value in vars(cls).items()
        if isinstance(value, FunctionType | classmethod | staticmethod)
        and (not method.startswith("_") or method in ("__init__", "__call__"))
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
    """The same argument names in the same order; torch may add a device at the end, and how weights are held there."""
    ref, torch = (list(inspect.signature(value).parameters) for value in (ref, torch))
    return torch in (ref, [*ref, "device"], [*ref, "device", "weights"])


def function(value):
    """What a method consists of: a class's inherited one is that of its parent."""
    return getattr(value, "__func__", value)


def is_array_mathematics(name, value):
    """Does it take an array of numbers that lie on a device? Constructors only keep what they are given."""
    if inspect.isclass(value) or name.endswith("__init__"):
        return False
    given = inspect.signature(value).parameters.values()
    arrays = [x.name for x in given if re.search("ndarray|Parts|Stored", str(x.annotation))]
    return any(re.sub("_[a-z]+$", "", x) not in HOST for x in arrays)


def without_twin(name, ref, torch):
    """What of a reference module's array mathematics is not written for torch; inherited functions are NumPy's."""
    return {
        f"{name}.{each}"
        for each, value in public(ref).items()
        if is_array_mathematics(each, value)
        and (find(torch, each) is None or function(find(torch, each)) is function(value))
    }


def only_torch(name, ref, torch):
    """What torch's module defines and the reference's lacks; a class without its methods."""
    lacking = {each for each in public(torch) if find(ref, each) is None}
    return {f"{name}.{each}" for each in lacking if each.rpartition(".")[0] not in lacking}


def other_arguments(name, ref, torch):
    """What has other arguments in torch. Classes count by their constructors."""
    return {
        f"{name}.{each}"
        for each, value in public(torch).items()
        if find(ref, each) is not None
        and not inspect.isclass(value)
        and f"{name}.{each.partition('.')[0]}" not in ONLY_TORCH
        and not same_arguments(find(ref, each), value)
    }


def twins_of(name):
    return tuple(importlib.import_module(f"{backend.__name__}.{name}") for backend in BACKENDS)


@pytest.mark.parametrize(
    ("differing", "allowed"),
    [(without_twin, NO_TWIN), (only_torch, ONLY_TORCH), (other_arguments, OTHER_ARGUMENTS)],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("name", TWINNED)
def test_twins_have_the_same_functions(name, differing, allowed):
    """What works on arrays in one backend's module does so in the other's, with the same arguments in order; the
    tables name every exception and no other.
    """
    assert differing(name, *twins_of(name)) == {each for each in allowed if each.startswith(f"{name}.")}


def test_every_module_has_its_twin():
    """Every file of torch's core/ and gemma/ has one of the same name in the reference; those that the reference has
    alone serve both.
    """
    assert set(TWINNED) <= modules(tpa_ref)
    assert modules(tpa_ref) - set(TWINNED) == set(ONCE)
    exceptions = [*NO_TWIN, *ONLY_TORCH, *OTHER_ARGUMENTS]
    assert all(any(each.startswith(f"{name}.") for name in TWINNED) for each in exceptions)


def test_a_lost_twin_is_seen(monkeypatch):
    """A function of torch's that goes, one that is inherited from NumPy, a new one, and a changed argument."""
    ref, torch = twins_of("core.contextual")
    monkeypatch.delattr(torch, "values_contextual")
    monkeypatch.delattr(torch.Contextual, "decode")
    lost = {"core.contextual.values_contextual", "core.contextual.Contextual.decode"}
    assert without_twin("core.contextual", ref, torch) - set(NO_TWIN) == lost
    new = FunctionType((lambda x: x).__code__, vars(torch))
    monkeypatch.setattr(torch, "new", new, raising=False)
    assert "core.contextual.new" in only_torch("core.contextual", ref, torch)
    monkeypatch.setattr(torch, "scores_contextual", new)
    assert other_arguments("core.contextual", ref, torch) == {"core.contextual.scores_contextual"}


def test_loading_has_the_same_arguments():
    """`files.checkpoint` of torch adds a device to what the reference asks for."""
    assert other_arguments("files.checkpoint", *twins_of("files.checkpoint")) == set()


def test_the_same_public_names():
    """`import tpa_ref` and `import tpa_torch` offer the same names with the same arguments; only torch trains."""
    assert sorted(tpa_torch.__all__) == sorted([*tpa_ref.__all__, "heal"])
    for name in tpa_ref.__all__:
        ours, theirs = getattr(tpa_torch, name), getattr(tpa_ref, name)
        assert ours is theirs or name == "Model" or same_arguments(theirs, ours), name
    assert same_arguments(tpa_ref.Model.__call__, tpa_torch.Model.__call__)
