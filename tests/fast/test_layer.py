"""A layer around attention, and attention of few queries, each in one compiled call: against float64 NumPy in both
builds, and in whole models against PyTorch step by step and the reference.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
from helpers import relative, to_numpy

torch = pytest.importorskip("torch")

import tpa_ref
import tpa_torch
from tpa_ref.core import norm, rope
from tpa_ref.gemma.mlp import mlp
from tpa_torch.core import quantize
from tpa_torch.fast import decoder, step
from tpa_torch.fast.kernels import matrices, native
from tpa_torch.fast.linear import at_least_float32, linear

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
EPS = 1e-6
ONE_ROUNDING = {"float32": 3e-6, "bfloat16": 2.0**-8}


def random(rng, *shape, dtype="float32"):
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(getattr(torch, dtype))


def layer(rng, dtype="float32", m=80, h=4, g=2, d=32, f=48):
    """Random weights of a layer: of a size at which every step counts."""
    W = lambda *shape: random(rng, *shape, dtype=dtype) * shape[-1] ** -0.5  # noqa: E731
    w = lambda n: random(rng, n, dtype=dtype) * 0.3  # noqa: E731
    return SimpleNamespace(
        attn_norm_m=w(m), WQ_hdm=W(h, d, m), WK_gdm=W(g, d, m), WV_gem=W(g, d, m), WO_mhe=W(m, h, d), q_norm_d=w(d),
        k_norm_d=w(d), post_attn_norm_m=w(m), mlp_norm_m=w(m), W_gate_fm=W(f, m), W_up_fm=W(f, m), W_down_mf=W(m, f),
        post_mlp_norm_m=w(m),
    )  # fmt: skip


def in_float64(w):
    return SimpleNamespace(**{name: to_numpy(x) for name, x in vars(w).items()})


# ---- one matrix ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 4, 1152), (3, 1, 160)])
def test_a_matrix_times_few_rows(library, shape, dtype):
    """As `torch.nn.functional.linear`: sums in float32, one rounding at the end."""
    rng = np.random.default_rng(0)
    x, W = random(rng, *shape, dtype=dtype), random(rng, 77, shape[-1], dtype=dtype)
    with torch.inference_mode():
        assert matrices.linear_takes(x, W)
        got = linear(x, W)
    exact = x.double() @ W.double().T
    assert got.dtype == x.dtype and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= ONE_ROUNDING[dtype] * exact.abs() + 1e-4).all()
    assert not matrices.linear_takes(x, W), "a gradient may be wanted"
    with torch.inference_mode():
        assert not matrices.linear_takes(x.double(), W.double())
        assert not matrices.linear_takes(x.repeat(1, 9, 1), W)
        assert not matrices.linear_takes(x, W[:, :-1])


def test_logits_are_not_rounded_before_they_are_float32():
    """Of one row in bfloat16: sums in float32, as they are; many rows are PyTorch's."""
    rng = np.random.default_rng(0)
    x, W = random(rng, 1, 1, 64, dtype="bfloat16"), random(rng, 77, 64, dtype="bfloat16")
    with torch.inference_mode():
        one, many = at_least_float32(x, W), at_least_float32(x.repeat(1, 9, 1), W)
    exact = x.double() @ W.double().T
    assert one.dtype == many.dtype == torch.float32
    assert relative(one, exact) < 1e-6 < relative(many[:, :1], exact) < 1e-2


# ---- a layer ----


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("b,q", [(1, 1), (3, 1), (2, 2), (1, 4)])
def test_a_layer_around_attention(library, dtype, b, q, threads):
    """Norms, projections, RoPE of each row's own positions; residual, MLP. Also of as many weights as threads share."""
    rng = np.random.default_rng(b + q)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for sizes in ({}, {"m": 1024, "h": 8, "g": 8, "f": 336}):
            check_layer(layer(rng, dtype, **sizes), rng, dtype, b, q)
    finally:
        torch.set_num_threads(before)


def check_layer(w, rng, dtype, b, q):
    exact, made = in_float64(w), matrices.layer_of(w, EPS)
    h, d, m = w.WQ_hdm.shape
    x, O_bqhe = random(rng, b, q, m, dtype=dtype) * 3, random(rng, b, q, h, d, dtype=dtype)
    tables = rope.rope_tables(rng.integers(0, 99, (b, q)), d, 100.0)
    turns = torch.complex(*(torch.from_numpy(table.astype(np.float32)) for table in tables))

    a = norm.rms_norm(to_numpy(x), exact.attn_norm_m, EPS)
    Q, K, V = (np.einsum("bqm,hdm->bqhd", a, W) for W in (exact.WQ_hdm, exact.WK_gdm, exact.WV_gem))
    Q, K = norm.rms_norm(Q, exact.q_norm_d, EPS), norm.rms_norm(K, exact.k_norm_d, EPS)
    bound = ONE_ROUNDING[dtype]
    for got, expected in zip(matrices.before(made, x, turns), (rope.rotate(Q, *tables), K, V), strict=True):
        assert got.dtype == x.dtype and relative(got, expected) < bound
    some = to_numpy(O_bqhe)
    assert relative(matrices.turned(O_bqhe, turns), rope.rotate(some, *tables)) < bound

    y = to_numpy(x) + norm.rms_norm(np.einsum("bqhe,mhe->bqm", some, exact.WO_mhe), exact.post_attn_norm_m, EPS)
    y = y + norm.rms_norm(mlp(norm.rms_norm(y, exact.mlp_norm_m, EPS), exact), exact.post_mlp_norm_m, EPS)
    assert relative(matrices.after(made, x, O_bqhe), y) < bound


def test_what_is_no_number_stays_none(library):
    """NaN in the stream comes out as NaN, in bfloat16 too, and infinity as no finite number."""
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        made = matrices.layer_of(w := layer(rng, dtype), EPS)
        x, O_bqhe = random(rng, 2, 1, 80, dtype=dtype), random(rng, 2, 1, 4, 32, dtype=dtype)
        x[0, 0, 3], x[1, 0, 3] = torch.nan, torch.inf
        y = matrices.after(made, x, O_bqhe)
        assert y[0].isnan().all() and not y[1].isfinite().all(), w


@pytest.mark.parametrize("sizes", [{"m": 72}, {"d": 16}, {"f": 40}])
def test_odd_sizes_are_left_to_pytorch(sizes):
    assert matrices.layer_of(layer(np.random.default_rng(0)), EPS) is not None
    assert matrices.layer_of(layer(np.random.default_rng(0), **sizes), EPS) is None


# ---- attention ----


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_attention_in_one_go(library, kind, rounded, threads):
    """Any number of keys and queries; the largest logit stands anywhere, so that sums before it are weighed anew."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for b, x, k, d in ((1, 1, 1, 32), (2, 3, 300, 64), (1, 8, 2300, 128), (3, 5, 257, 256)):
            check_attention(kind, rounded, b, x, k, d)
    finally:
        torch.set_num_threads(before)


def check_attention(kind, rounded, b, x, k, d):
    rng = np.random.default_rng(k)
    Q, K, V = random(rng, b, x, d), random(rng, b, k, d), random(rng, b, k, d)
    K *= torch.from_numpy(rng.choice([0.1, 1.0, 4.0], (b, k, 1))) * d**-0.5
    stored = [quantize.quantize(side, kind) for side in (K, V)]
    K, V = (quantize.dequantize(fields, kind, d).double().numpy() for fields in stored)
    rows = [native.Rows({name: array for name, array in fields.items()}, kind, d, rounded) for fields in stored]
    largest, total, Y = (x.double().numpy() for x in native.attend(Q, *rows))
    L = Q.double().numpy() @ K.transpose(0, 2, 1)
    P = np.exp(L - L.max(-1, keepdims=True))
    bound = 2e-4 if rounded and kind.startswith("int") else 1e-5
    assert relative(largest, L.max(-1, keepdims=True)) < bound
    assert relative(total * np.exp(largest - L.max(-1, keepdims=True)), P.sum(-1, keepdims=True)) < bound
    assert relative(Y / total, P @ V / P.sum(-1, keepdims=True)) < bound


# ---- whole models ----

SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 80}


def count(monkeypatch):
    """How often a layer was computed in two calls, where no token goes through all layers in one (`test_decoder`)."""
    calls = []
    monkeypatch.setattr(decoder, "take", lambda *_: None)
    right = step.block
    monkeypatch.setattr(step, "block", lambda *args: calls.append(0) or right(*args))
    return calls


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "contextual", "fixed-a", "latent"])
def test_models_decode_as_the_reference(monkeypatch, kind, batch):
    """Token by token past the window, and three at a time."""
    config, tokens_bq = helpers.config(**SIZES), helpers.tokens(30, batch)
    calls = count(monkeypatch)
    made = {}
    for backend in (tpa_ref, tpa_torch):
        model = helpers.in_kind(backend, helpers.model(backend, config), kind)
        made[backend] = helpers.run_cached(model, tokens_bq, (12, 3) if batch == 1 else (12,))[1]
    assert len(calls) == config.num_layers * (16 if batch == 1 else 18)
    assert relative(made[tpa_torch], made[tpa_ref]) < 1e-5
    monkeypatch.setenv("TPA_NATIVE", "0")
    assert relative(helpers.run_cached(model, tokens_bq, (12,))[1], made[tpa_ref]) < 1e-5


def test_rows_of_different_length(monkeypatch):
    """Padding is asked from position -1, and rows stand at positions of their own."""
    tokens_bq, calls = helpers.tokens(20, 2), count(monkeypatch)
    made = []
    for native_too in ("1", "0"):
        monkeypatch.setenv("TPA_NATIVE", native_too)
        model = helpers.model(tpa_torch, helpers.config(**SIZES))
        cache = model.new_cache(2, 40)
        model(tokens_bq, cache=cache, lengths_b=[20, 9])
        made.append([model(tokens_bq[:, k : k + 2], cache=cache, lengths_b=[2 - k % 2, 2])[:, :1] for k in range(6)])
    assert len(calls) == 6 * model.config.num_layers
    assert relative(torch.cat(made[0]), torch.cat(made[1])) < 1e-5


def test_in_bfloat16_nearer_to_float32_than_step_by_step(monkeypatch):
    """Numbers between are float32, so less is rounded."""
    config, tokens_bq, errors = helpers.config(**SIZES), helpers.tokens(30), []
    exact = helpers.run_cached(helpers.model(tpa_torch, config), tokens_bq, (12,))[1]
    model = helpers.model(tpa_torch, config)
    for block in model.weights.layers:
        vars(block).update({name: x.bfloat16() for name, x in vars(block).items()})
    weights = replace(model.weights, embed_vm=model.weights.embed_vm.bfloat16(), head_vm=None,
                      final_norm_m=model.weights.final_norm_m.bfloat16())  # fmt: skip
    for native_too in ("1", "0"):
        monkeypatch.setenv("TPA_NATIVE", native_too)
        got = helpers.run_cached(tpa_torch.Model(config, weights), tokens_bq, (12,))[1]
        errors.append(np.abs(got - exact).mean())
    assert errors[0] < errors[1] < 0.05 * np.abs(exact).max()


def test_weights_that_are_replaced_are_seen():
    """And a copy of a model has its own."""
    model, tokens_bq = helpers.model(tpa_torch, helpers.config(**SIZES)), helpers.tokens(3)
    other = copy.deepcopy(model)
    first = model(tokens_bq)
    assert torch.equal(other(tokens_bq), first)
    model.weights.layers[2].W_up_fm = model.weights.layers[2].W_up_fm.flip(0)
    assert not torch.allclose(model(tokens_bq), first)
    assert torch.equal(other(tokens_bq), first)


def test_what_is_looked_into_is_computed_step_by_step(monkeypatch):
    """A trace, a gradient, many rows, a head-mixing rank."""
    calls, model = count(monkeypatch), helpers.model(tpa_torch, helpers.config(**SIZES))
    model(helpers.tokens(3))
    assert len(calls) == 7
    helpers.run_whole(model, helpers.tokens(3))
    model(helpers.tokens(5))
    mixing = tpa_torch.convert(model, tpa_torch.TPAConfig(mode="contextual", k_rank=2, v_rank=2, q_rank=2))
    mixing(helpers.tokens(3))
    with torch.enable_grad():
        at = model.positions(np.arange(3)[None])
        model.block(torch.ones(1, 3, 64), 0, model.weights.layers[0], at, model.whole_text(1, 3))
    assert len(calls) == 7


# ---- can it be seen? ----

MISTAKES = {
    "residual before attention": ("load(normed + j), load(to + j)", "load(normed + j), zero()"),
    "norm times w": ("fma(one, read(w, kind, j), one)", "times(one, read(w, kind, j))"),
    "a key's norm": ("is_query ? w->q_norm : w->k_norm", "w->q_norm"),
    "the other way round": ("one * c - two * s", "one * c + two * s"),
    "another row's position": ("turns + r / q * turns_batch + r % q * d, d)", "turns, d)"),
    "gate and up": ("multiply(w->up, a", "multiply(w->gate, a"),
    "a new largest logit": ("seen.raise(x + q, largest(highest))", "seen.most[x + q] = largest(highest)"),
    "parts that threads have read": ("part < parts; part++)", "part < 1; part++)"),
}
CHECKS = {name: lambda built: test_a_layer_around_attention(built, "float32", 2, 2, 1) for name in MISTAKES} | {
    "a new largest logit": lambda built: test_attention_in_one_go(built, "float32", False, 1),
    "parts that threads have read": lambda built: test_attention_in_one_go(built, "int8", True, 3),
}


@pytest.mark.parametrize("name", [None, *MISTAKES])
def test_a_mistake_in_the_source_is_seen(check_mistake, name):
    """Each by the check that is meant for it; the same build without a mistake passes all of them."""
    check_mistake(name, MISTAKES, CHECKS, "-O0")
