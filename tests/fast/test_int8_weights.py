"""Weights held in 8 bits: numbers done by hand, products with what is stored against the numbers meant, whole models.

What is read from files is compared in `test_gguf` and `test_formats`.
"""

from __future__ import annotations

import copy
import pickle

import helpers
import numpy as np
import pytest
import torch.nn.functional as F
from helpers import ROOT, refused, relative

torch = pytest.importorskip("torch")

import tpa_torch
from tpa_ref.gemma.memory import weights_bytes
from tpa_torch.fast.int8 import Int8, numbers, rounded, wide
from tpa_torch.fast.kernels import matrices, native
from tpa_torch.fast.linear import linear

TINY = ROOT / "assets" / "tiny-gemma3"
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


def random(rng, *shape, dtype="float32"):
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(getattr(torch, dtype))


# ---- the numbers ----


def test_by_hand():
    """The largest of 32 numbers becomes 127 or -127; each group has a scale; zeros stay zeros, ties go to even."""
    x = torch.zeros(2, 64)
    x[0, :3] = torch.tensor([127.0, -1.0, 2.5])
    x[0, 32:34] = torch.tensor([-254.0, 2.0])
    codes, scale = rounded(x)
    assert codes[0, :4].tolist() == [127, -1, 2, 0] and codes[0, 32:35].tolist() == [-127, 1, 0]
    assert scale.tolist() == [[1, 2], [0, 0]] and not codes[1].any()
    assert numbers(codes, scale, torch.float32)[0, [0, 1, 2, 32, 33]].tolist() == [127, -1, 2, -254, 2]
    halves = Int8(torch.full((1, 32), 3, dtype=torch.int8), torch.tensor([[0.5]]).half(), torch.bfloat16)
    assert halves.wide().dtype == torch.bfloat16 and halves.wide().tolist() == [[1.5] * 32]


def test_half_a_step_away_at_most():
    x = random(np.random.default_rng(0), 5000, 96)  # more rows than are rounded at a time
    held = Int8.of(x, torch.float32)
    error = (held.wide() - x).abs().unflatten(-1, (-1, 32))
    assert (error <= 0.501 * held.scale_ns.float()[..., None]).all()
    assert held.nbytes == x.numel() * (1 + 2 / 32)


def test_it_stands_where_a_tensor_would():
    """Shapes as a tensor's, rows by index, and functions of torch are given its numbers."""
    rng = np.random.default_rng(0)
    held, x = Int8.of(random(rng, 12, 64), torch.float32), random(rng, 2, 64)
    whole = held.wide()
    heads = held.reshape(3, 4, 64)
    assert heads.shape == (3, 4, 64) and heads.flatten(0, 1).shape == (12, 64) and heads.ndim == 3
    assert torch.equal(heads.wide(), whole.reshape(3, 4, 64))
    assert torch.equal(held[2:5], whole[2:5]) and torch.equal(torch.cat(list(held.split(5))), whole)
    assert torch.equal(F.linear(x, held), x @ whole.T)
    assert torch.equal(torch.einsum("bm,hdm->bhd", x, heads), torch.einsum("bm,hdm->bhd", x, wide(heads)))
    ids = torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(F.embedding(ids, held), whole[ids])
    for again in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert torch.equal(again.wide(), whole)
    assert Int8.fits((5, 64)) and not Int8.fits((5, 48)) and not Int8.fits((32,))


# ---- products ----


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_with_what_is_stored(library, dtype):
    """Few rows, a last strip that is not full; rows of more than one block, widened."""
    rng = np.random.default_rng(0)
    bound = {"float32": 3e-6, "bfloat16": 2.0**-8}[dtype]
    with torch.inference_mode():
        for n, m in ((1, 32), (77, 160), (5000, 96)):
            W = Int8.of(random(rng, n, m), getattr(torch, dtype))
            exact = numbers(W.codes_nm, W.scale_ns, torch.float64)
            for rows in (1, 2, 3, 4, 9):
                x = random(rng, 1, rows, m, dtype=dtype)
                assert matrices.linear_takes(x, W) == (rows <= 4)
                got, expected = linear(x, W), x.double() @ exact.T
                size = x.double().abs() @ exact.abs().T
                assert got.dtype == x.dtype and got.shape == expected.shape
                assert ((got.double() - expected).abs() <= bound * size).all()
            assert torch.equal(matrices.widened(W, 0, n), W.wide())


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("TPA_NATIVE", "0")
    rng = np.random.default_rng(0)
    W, x = Int8.of(random(rng, 5000, 96), torch.float32), random(rng, 3, 96)
    with torch.inference_mode():
        assert relative(linear(x, W), x @ W.wide().T) < 1e-6
    x.requires_grad_()
    linear(x, W).sum().backward()
    assert relative(x.grad, W.wide().sum(0).expand(3, -1)) < 1e-5


# ---- models ----


@pytest.fixture(scope="module")
def models():
    return tpa_torch.load(TINY), tpa_torch.load(TINY, weights="int8")


def test_a_model_in_half_the_bytes_of_bfloat16(models):
    dense, held = models
    assert weights_bytes(held, held)["dense"] == pytest.approx(17 / 64 * weights_bytes(dense, dense)["dense"], rel=1e-3)
    found = tpa_torch.evaluate(dense, held, TINY / "evaluation.txt", max_tokens=256)
    assert 1e-7 < found["kl"] < 2e-3, "rounded, and hardly"
    half = tpa_torch.load(TINY, dtype="bfloat16", weights="int8")
    assert half.dtype == "bfloat16" and half.weights.embed_vm.wide().dtype == torch.bfloat16


@needs_compiler
def test_decoding_compiled_and_not(models, monkeypatch):
    """Token by token and three at a time, dense and converted, with what is stored and with its numbers."""
    held = models[1]
    moments = tpa_torch.calibrate(held, TINY / "calibration.txt", max_tokens=512)
    tpa = tpa_torch.convert(held, tpa_torch.TPAConfig(rate=3.0, prefer="size"), calibration=moments)
    exact = {"mode": "contextual", "k_rank": 4, "v_rank": 4, "kv_dtype": "float32"}
    contextual = tpa_torch.convert(held, tpa_torch.TPAConfig(**exact, q_rank=4))
    tokens_bq = helpers.tokens(24)
    for model, bound in ((held, 1e-5), (contextual, 1e-5), (tpa, 1e-2)):  # codes may fall otherwise by a hair
        monkeypatch.setenv("TPA_NATIVE", "1")
        compiled = helpers.run_cached(model, tokens_bq, (12, 3))[1]
        monkeypatch.setenv("TPA_NATIVE", "0")
        assert relative(compiled, helpers.run_cached(model, tokens_bq, (12, 3))[1]) < bound


def test_what_it_cannot_do_is_said(models, tmp_path):
    dense, held = models
    refused(lambda: tpa_torch.save(held, tmp_path / "saved"), "save", "int8")
    tpa = tpa_torch.convert(held, tpa_torch.TPAConfig(mode="fixed-a", k_rank=2, v_rank=2))
    refused(lambda: tpa_torch.heal(tpa, held, TINY / "calibration.txt"), "heal", "int8")
    refused(lambda: tpa_torch.load(TINY, weights="int4"), "weights", "int8", "int4")
    assert not dense.rounded_weights and tpa.rounded_weights


# ---- can it be seen? ----

MISTAKES = {
    "the scale of the first 32": ("scales[uint64_t(i) / SHARE]", "scales[0]"),
    "the second sixteen": ("of.numbers(n * m + j + W)", "of.numbers(n * m + j)"),
    "scales of another strip": ("matrix.scale + first * m / SHARE + i", "matrix.scale + i"),
    "widened with one scale": ("all(from_half(scale[group]))", "all(from_half(scale[0]))"),
}


@needs_compiler
@pytest.mark.parametrize("name", [None, *MISTAKES])
def test_a_mistake_in_the_source_is_seen(build, monkeypatch, name):
    built = build("changed", "-O0", change=MISTAKES.get(name, ("", "")))
    monkeypatch.setattr(native, "library", lambda: built)
    if name is None:
        return test_products_with_what_is_stored(built, "float32")
    with pytest.raises(AssertionError):
        test_products_with_what_is_stored(built, "float32")
