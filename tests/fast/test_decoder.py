"""A token through all layers in one compiled call, against the same layer by layer."""

from __future__ import annotations

import copy

import helpers
import numpy as np
import pytest
from helpers import relative

torch = pytest.importorskip("torch")

import tpa_torch
from tpa_ref.core import banded
from tpa_ref.trace import Trace
from tpa_torch.fast import decoder
from tpa_torch.fast.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 80}
INT8 = {"mode": "fixed-a", "k_rank": 99, "v_rank": 99, "kv_dtype": "int8"}
TOKENS = helpers.tokens(40)


def small(rate=None, **choices):
    """A model, dense or with a cache of bands."""
    model = helpers.model(tpa_torch, helpers.config(**SIZES))
    if rate is None and not choices:
        return model
    return tpa_torch.convert(model, tpa_torch.TPAConfig(rate=rate, context=60, **choices))


@pytest.fixture(params=["heads as one", "heads apart"])
def heads(request, monkeypatch):
    """How heads are coded."""
    if request.param == "heads apart":
        monkeypatch.setattr(banded, "TOGETHER", SIZES["head_dim"])


def taken(monkeypatch):
    """The positions of the tokens that went through all layers in one call."""
    found, right = [], decoder.Decoder.__call__
    monkeypatch.setattr(decoder.Decoder, "__call__", lambda self, *args: found.append(args[-1]) or right(self, *args))
    return found


def token_by_token(model, cache, start, end):
    """Logits of some tokens, one after the other."""
    return torch.cat([model(TOKENS[:, k : k + 1], cache=cache) for k in range(start, end)], 1)


def both(model, cache, start, end):
    """The same in one call a token, and layer by layer."""
    other = cache.copy()
    found = token_by_token(model, cache, start, end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "take", lambda *_: None)
        return found, token_by_token(model, other, start, end)


def filled(model, tokens=12, spare=0):
    cache = model.new_cache(1, 64)
    if spare:
        kept = cache.pairs, cache.windows, 1, 64, cache.exact, cache.ids
        cache = type(cache)(*kept, spare=spare)
    model(TOKENS[:, :tokens], cache=cache)
    return cache


def check(**choices):
    model = small(**choices)
    found, expected = both(model, filled(model), 12, 40)
    assert relative(found, expected) < 1e-3  # a rounding to bfloat16 may go the other way


@pytest.mark.parametrize(
    "choices",
    [{}, INT8, {"rate": 4.0}, {"rate": 3.0, "sinks": 0}, {"rate": 3.0, "sinks": 5}, {"rate": 4.0, "layers": "global"}],
    ids=str,
)
def test_as_layer_by_layer(monkeypatch, choices, heads):
    """Past the window, over the end of its ring, until first tokens are no longer seen; some layers dense."""
    calls = taken(monkeypatch)
    check(**choices)
    assert calls == list(range(12, 40))


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("rate", [None, 4.0])
def test_in_bfloat16(tmp_path, monkeypatch, rate, weights):
    """Of a step both round the same numbers, so that only sums differ; with weights in 8 bits, too."""
    calls = taken(monkeypatch)
    folder = helpers.write_folder(tmp_path / "model", helpers.config(**SIZES | {"intermediate_size": 96}))
    model = tpa_torch.load(folder, dtype="bfloat16", **({"weights": weights} if weights else {}))
    model = model if rate is None else tpa_torch.convert(model, tpa_torch.TPAConfig(rate=rate, context=60))
    found, expected = both(model, filled(model), 12, 13)
    assert relative(found, expected) < 0.03 and calls == [12]


@pytest.mark.parametrize("choices", [{}, INT8, {"rate": 4.0}], ids=str)
def test_rings_with_spare_slots(monkeypatch, choices):
    """Slots outside of the window are not read, and tokens that were taken back come again."""
    calls, model = taken(monkeypatch), small(**choices)
    cache = filled(model, spare=3)
    found, expected = both(model, cache, 12, 30)
    assert relative(found, expected) < 1e-3  # a rounding to bfloat16 may go the other way
    cache.truncate(28)
    assert relative(token_by_token(model, cache, 28, 30), expected[:, -2:]) < 1e-4
    assert calls == [*range(12, 30), 28, 29]


@pytest.mark.parametrize("rate", [None, 4.0])
def test_arrays_that_are_replaced_are_seen(rate):
    """A copy of a cache and a chosen row have arrays of their own, and weights may be others."""
    model = small(rate)
    cache = filled(model)
    first = token_by_token(model, cache, 12, 14)
    other = copy.deepcopy(cache)
    cache.select([0])
    assert relative(token_by_token(model, cache, 14, 20), token_by_token(model, other, 14, 20)) < 1e-5
    again = filled(model)
    model.weights.layers[1].W_up_fm = model.weights.layers[1].W_up_fm.flip(0)
    assert relative(token_by_token(model, again, 12, 14), first) > 1e-3


def test_what_it_does_not_serve(monkeypatch):
    """Several rows or tokens, first tokens that are still to be kept, newest ones, a trace, fixed ranks, prediction."""
    calls, model = taken(monkeypatch), small(4.0, sinks=3)
    cache = model.new_cache(1, 64)
    token_by_token(model, cache, 0, 3)
    model(TOKENS[:, 3:5], cache=cache)
    model(TOKENS[:, 5:6], cache=cache, trace=Trace())
    two = model.new_cache(2, 64)
    model(np.tile(TOKENS[:, :4], (2, 1)), cache=two)
    model(np.tile(TOKENS[:, 4:5], (2, 1)), cache=two)
    for choices in ({"rate": 4.0, "recent": 2}, {"mode": "latent"}, {"rate": 2.0, "prefer": "size"}):
        other = tpa_torch.convert(helpers.model(tpa_torch, helpers.config(**SIZES)), tpa_torch.TPAConfig(**choices))
        token_by_token(other, filled(other), 12, 14)
    assert calls == []


# ---- can it be seen? ----

MISTAKES = {
    "the slot that is written": ("own.codes.keys, own.codes.key_row, slot", "own.codes.keys, own.codes.key_row, 0"),
    "where a ring begins anew": ("t += count)", "t = last + 1)"),
    "first tokens": ("asked.see(own.first_K, own.first_V, first, own.sinks - first);", ""),
    "first tokens that are also coded": ("std::max(first, own.sinks), position", "first, position"),
    "positions of a stretch": ("(each.position + k) * d", "k * d"),
    "frequencies of global layers": ("own.is_global ? turns_global : turns_local", "turns_local"),
    "the scale of queries": ("q *= float(scale)", "q *= 1"),
    "K of heads is turned": ("keep(own.K, turned.data()", "keep(own.K, K.data()"),
    "the scale of int8": ("larger(load(x + j), minus(zero(), load(x + j)))", "load(x + j)"),
    "one softmax": ("} else all_of.add(x, last, x);", "}"),
}  # fmt: skip
CHECKS = {name: lambda _: check(rate=4.0, sinks=2) for name in MISTAKES} | {
    "K of heads is turned": lambda _: check(),
    "the scale of int8": lambda _: check(**INT8),
}


@pytest.mark.parametrize("name", [None, *MISTAKES])
def test_a_mistake_in_the_source_is_seen(check_mistake, name):
    """Each by the check that is meant for it; the same build without a mistake passes all of them."""
    check_mistake(name, MISTAKES, CHECKS, "-O0")
