"""Decoding on static buffers, run as it is written, against the ordinary way token by token."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import helpers
from helpers import relative
from torch.utils._python_dispatch import TorchDispatchMode

import tpa_torch
from tpa_ref.compress.config import TPAConfig
from tpa_ref.gemma import generate
from tpa_ref.gemma.side_files import SideFiles
from tpa_torch.core.contextual import Contextual
from tpa_torch.fast import banded, graph
from tpa_torch.gemma.model import StaticModel

CHOICES = {
    "dense": None,
    "contextual": TPAConfig(mode="contextual", k_rank=2, v_rank=1, kv_dtype="float32"),
    "fixed-a int4": TPAConfig(mode="fixed-a", k_rank=1, v_rank=2, kv_dtype="int4"),
    "fixed-b int8": TPAConfig(mode="fixed-b", k_rank=10, v_rank=7, kv_dtype="int8"),
    "spectral, first layer known": TPAConfig(mode="latent", rate=3.0, prefer="size"),
    "spectral with sinks": TPAConfig(mode="latent", rate=3.0, predict=False, prefer="size"),
    "banded": TPAConfig(mode="latent", rate=3.0),
    "newest exact": TPAConfig(mode="latent", k_rank=20, v_rank=20, kv_dtype="bfloat16", sinks=2, recent=3),
}
# Texts of which no number lies between two codes, where the last bit decides which one it gets.
ROWS = [helpers.tokens(count, seed=seed)[0].tolist() for count, seed in ((9, 3), (3, 4), (6, 5))]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_interpolation(monkeypatch):
    """The ordinary way forms banded keys as PyTorch does on static buffers: interpolation would flip a code or two."""
    monkeypatch.setattr(banded, "read", lambda Q, dtype, segment, seen, *_: banded.read_formed(Q, segment, seen))


def model_of(name):
    model = helpers.model(tpa_torch, helpers.config(num_kv_heads=4, sliding_window=7))
    return tpa_torch.convert(model, CHOICES[name]) if CHOICES[name] else model


def stop_at(monkeypatch, stop):
    monkeypatch.setattr(SideFiles, "stop_tokens", frozenset(stop))


def never_stop(monkeypatch):
    stop_at(monkeypatch, {-7})


def prefilled(model, rows):
    """(logits behind rows, the cache that holds them)."""
    cache = model.new_cache(len(rows), 40)
    return torch.from_numpy(generate.prefill(model, rows, cache)), cache


def static_steps(model, rows, count, sampling=None):
    """(steps on static buffers, their cache)."""
    L_bv, cache = prefilled(model, rows)
    return graph.stream(
        StaticModel(model), cache, L_bv, count, sampling or graph.Sampling(), model.side_files.stop_tokens
    ), cache


def both(model, count, rows=ROWS):
    """[(tokens of every step, cache)]: the ordinary way, then on static buffers."""
    cache = model.new_cache(len(rows), 40)
    ordinary = generate.generate_rows(model, rows, count, cache=cache), cache
    return [(list(steps), cache) for steps, cache in (ordinary, static_steps(model, rows, count))]


@pytest.mark.parametrize("name", CHOICES)
def test_the_same_tokens_and_the_same_cache(name, monkeypatch):
    """Three rows of different length, past the window and around the ring: tokens, lengths, what the cache holds."""
    never_stop(monkeypatch)
    (tokens, cache), (static_tokens, static_cache) = both(model_of(name), 16)
    assert static_tokens == tokens and len(tokens) == 16
    assert (static_cache.lengths_b == cache.lengths_b).all()
    for layer, static_layer in zip(cache.layers, static_cache.layers, strict=True):
        for array, static_array in held(layer, static_layer):
            if array.is_floating_point():
                assert relative(static_array, array) < 1e-2  # rounded to half or bfloat16
            else:
                assert (array != static_array).sum() <= 0.1 * array.numel()  # of a string many bytes, or none


def held(layer, other):
    """(array, the same of the other) of everything that two layers hold."""
    for kind, ring in layer.rings.items():
        for name, array in ring.arrays.items():
            yield array, other.rings[kind].arrays[name]


def test_rows_that_stop(monkeypatch):
    """A row that says a stop token says nothing more, and its cache stays as it is."""
    model = model_of("contextual")
    never_stop(monkeypatch)
    (tokens, _), _ = both(model, 8)
    stop_at(monkeypatch, {tokens[2][0], tokens[4][1]})
    (tokens, cache), (static_tokens, static_cache) = both(model, 12)
    assert tokens[-1].count(None) >= 1 and static_tokens == tokens
    assert (static_cache.lengths_b == cache.lengths_b).all()


def writes_of_every_row(patch):
    right = graph.NewTokens.__init__

    def init(self, *args):
        right(self, *args)
        self.runs_b = torch.ones_like(self.runs_b)

    patch(graph.NewTokens, "__init__", init)


def keys_one_position_late(patch):
    right = graph.slot_positions
    patch(graph, "slot_positions", lambda length_b, slots: right(length_b + 1, slots))


def rows_that_never_run(patch):
    patch(graph.GraphDecoder, "_next", lambda self, L_bv: self.token_b.copy_(L_bv.argmax(-1)))


@pytest.mark.parametrize("mistake", [None, writes_of_every_row, keys_one_position_late, rows_that_never_run])
def test_a_mistake_turns_it_red(mistake, monkeypatch):
    """Tokens or cached numbers differ with each of them, and without one they do not: a row that stops is compared."""
    model = model_of("dense")
    never_stop(monkeypatch)
    (tokens, _), _ = both(model, 8)
    stop_at(monkeypatch, {tokens[1][0]})
    if mistake:
        mistake(monkeypatch.setattr)
    (tokens, cache), (static_tokens, static_cache) = both(model, 12)
    errors = [
        relative(two, one)
        for layer, other in zip(cache.layers, static_cache.layers, strict=True)
        for two, one in held(layer, other)
    ]
    assert (static_tokens != tokens or max(errors) > 1e-3) == (mistake is not None)


def test_a_consumer_that_leaves():
    """Whoever stops listening finds the cache as the ordinary way leaves it, and can go on with it."""
    model = model_of("dense")
    caches, nexts = [], []
    for static in (False, True):
        if static:
            steps, cache = static_steps(model, ROWS[:1], 20)
        else:
            cache = model.new_cache(1, 40)
            steps = generate.generate_rows(model, ROWS[:1], 20, cache=cache)
        for _ in range(11):
            token = next(steps)
        steps.close()
        caches.append(cache)
        nexts.append(model(np.array([token]), cache=cache))
    assert caches[0].lengths_b == caches[1].lengths_b
    assert relative(nexts[1], nexts[0]) < 1e-5


@pytest.mark.parametrize(("g", "rank"), [(2, 1), (4, 2), (8, 3), (16, 2), (16, 4)])
def test_factors_without_eigh(g, rank):
    """The same factors as `eigh` gives, in float32."""
    X_bkgd = torch.randn((3, 50, g, 32), generator=torch.Generator().manual_seed(g))
    ours, theirs = (sum_of(mode(g, 32, rank).factor(X_bkgd), rank) for mode in (graph.WithoutEigh, Contextual))
    lost, least = ((X_bkgd - x).square().sum((-2, -1)) for x in (ours, theirs))
    assert float((lost / least).max()) < 1 + 1e-4  # every token by itself
    assert float(relative(ours, theirs)) < 0.1 and float((ours - theirs).square().mean()) < 1e-6


def sum_of(factors, rank):
    A_bksg, B_bksd = factors
    return torch.einsum("bksg,bksd->bkgd", A_bksg, B_bksd) / rank


@pytest.mark.parametrize("kind", ["zero", "rank one", "equal", "tiny", "huge"])
def test_factors_of_matrices_made_to_break_them(kind):
    """Nothing to find, less to find than asked, no leading direction, and magnitudes at the end of float32."""
    X_bkgd = torch.randn((1, 7, 4, 32), generator=torch.Generator().manual_seed(0))
    if kind == "rank one":
        X_bkgd = X_bkgd[:, :, :1] * torch.tensor([1.0, -2.0, 0.5, 3.0])[:, None]
    if kind == "equal":
        X_bkgd = torch.eye(32)[:4].expand(1, 7, 4, 32).contiguous()
    X_bkgd = X_bkgd * {"zero": 0.0, "tiny": 1e-12, "huge": 1e12}.get(kind, 1.0)
    modes = graph.WithoutEigh(4, 32, 2), Contextual(4, 32, 2)
    A_bksg, B_bksd = modes[0].factor(X_bkgd)
    assert A_bksg.isfinite().all() and B_bksd.isfinite().all()
    lost, least = (float((X_bkgd.double() - sum_of(mode.factor(X_bkgd.double()), 2)).square().sum()) for mode in modes)
    assert lost <= least * (1 + 1e-6) + 1e-10 * float(X_bkgd.double().square().sum())
    ours = float((X_bkgd - sum_of((A_bksg, B_bksd), 2)).double().square().sum())
    assert ours <= least * (1 + 1e-3) + 1e-10 * float(X_bkgd.double().square().sum())


WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "_linalg_eigh",
    "linalg_eigh",
    "equal",
    "masked_select",
    "lift_fresh",
    "unique",
}


class Waits(TorchDispatchMode):
    """Counts what a captured step must not do: read a number back, take a size from data, bring data from the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1] if isinstance(x, torch.Tensor)
        )
        if name in WAITING or boolean:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [graph.Sampling(), graph.Sampling(0.7, top_k=20, top_p=0.9)])
@pytest.mark.parametrize("name", CHOICES)
def test_a_step_waits_for_nothing(name, sampling):
    """As a CUDA graph demands, once all constants are made; what `eigh` and the ordinary way do is seen."""
    model = model_of(name)
    L_bv, cache = prefilled(model, ROWS)
    decoder = graph.GraphDecoder(StaticModel(model), cache, sampling)
    decoder.begin(L_bv)
    decoder.step()
    with Waits() as waits:
        decoder.step()
    assert not waits.found
    with Waits() as waits:
        model(np.array([[1]] * 3), cache=model.new_cache(3, 40))
        int(torch.ones(1)[0])
    assert "_local_scalar_dense" in waits.found
    assert any("eigh" in each for each in waits.found) == (name == "contextual")


def test_sampling_on_the_device():
    """Tokens come as often as their probability says; both cuts leave what `Sampling.choose` leaves."""
    L_bv = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 0.0]])
    u = (torch.arange(1000) + 0.5) / 1000
    count = sum(torch.nn.functional.one_hot(graph.choose(graph.Sampling(1.0), L_bv, x[None]), 4) for x in u) / 1000
    assert float((count - torch.softmax(L_bv, -1)).abs().max()) < 2e-3
    for cut in ({"top_k": 2}, {"top_p": 0.7}):
        found = {int(graph.choose(graph.Sampling(1.0, **cut), L_bv, x[None])[0]) for x in u}
        rngs = [np.random.default_rng(seed) for seed in range(60)]
        assert found == {graph.Sampling(1.0, **cut).choose(L_bv[0].numpy(), rng) for rng in rngs}
    assert graph.choose(graph.Sampling(), L_bv, u[:1]).tolist() == [1, 0]
    assert graph.choose(graph.Sampling(0.5, top_p=1e-9), L_bv, u[:1]).tolist() == [1, 0]


def test_sampled_tokens_are_repeatable():
    model = model_of("dense")
    made = []
    for seed in (0, 0, 1):
        steps, _ = static_steps(model, [ROWS[0], ROWS[0]], 12, graph.Sampling(1.0, top_k=50, seed=seed))
        made.append(list(steps))
    assert made[0] == made[1] != made[2]
    assert any(one != two for one, two in made[0])  # each row has random numbers of its own


@pytest.mark.parametrize("rules", [{}, {"top_k": 20}, {"top_p": 0.8}])
def test_the_device_draws_what_the_host_draws(rules, monkeypatch):
    """The same random numbers, row by row, pick the same tokens, up to a number that falls between two by rounding."""
    never_stop(monkeypatch)
    model, sampling = model_of("dense"), graph.Sampling(1.0, seed=4, **rules)
    on_device, _ = static_steps(model, ROWS, 16, sampling)
    assert list(on_device) == list(generate.generate_rows(model, ROWS, 16, sampling))


@pytest.mark.parametrize("prefer", ["speed", "size"])
def test_with_kernels(prefer, monkeypatch):
    """Static buffers and Triton's kernels together, under its interpreter."""
    pytest.importorskip("test_kernels")  # asks for the interpreter before it imports Triton
    config = helpers.config(num_layers=2, is_global=(False, True), head_dim=32, sliding_window=5)
    model = tpa_torch.convert(helpers.model(tpa_torch, config), TPAConfig(rate=3.0, predict=False, prefer=prefer))
    tokens, calls, right = list(generate.generate_rows(model, ROWS[:2], 4)), [], graph.kernels.decode
    monkeypatch.setattr(graph.kernels, "decode", lambda *args: calls.append(1) or right(*args))
    monkeypatch.setenv("TPA_TRITON", "1")
    steps, _ = static_steps(model, ROWS[:2], 4)
    assert list(steps) == tokens and len(calls) == 2 * 3


def test_the_ordinary_way_where_no_graph_can_be():
    model = model_of("dense")
    assert not graph.serves(model, model.new_cache(1, 40), 10)
