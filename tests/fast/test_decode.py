"""The fast paths, decoding tile by tile and fused prefill, give what the NumPy reference gives."""

from __future__ import annotations

from types import SimpleNamespace

import helpers
import numpy as np
import pytest
from helpers import relative, run_cached, to_numpy

torch = pytest.importorskip("torch")

import tpa_ref
import tpa_torch
from tpa_ref.compress.config import KV_DTYPES
from tpa_ref.core import attention, masks, rope
from tpa_ref.core.contextual import Contextual
from tpa_ref.core.dense import Dense
from tpa_ref.core.fixed_a import FixedA
from tpa_ref.core.fixed_b import FixedB
from tpa_ref.core.latent import Latent
from tpa_ref.core.mode import Tokens
from tpa_ref.core.pair import Pair
from tpa_ref.core.spectral import CodedLatent
from tpa_ref.trace import no_trace
from tpa_torch.core.cache import Exact, Segment
from tpa_torch.core.dense import Dense as TorchDense
from tpa_torch.fast import attend, blocks, decode, prefill, readers
from tpa_torch.fast.scratch import Scratch
from tpa_torch.gemma import positions

B, H, G, D = 2, 8, 4, 32
KINDS = ("dense", "contextual", "fixed-a", "fixed-b", "latent", "fixed-a exact", "fixed-a pairs")
DTYPES = ("float32", "bfloat16", "int8", "int4")
WIDTHS = (8, 7, 7, 6, 5, 5, 4, 4, 3, 2, 2, 1, 1, 1)
SEGMENTS = ("coded", "sinks", "recent")
TWINS = {**tpa_torch.Model.MODES, "dense": TorchDense, "spectral": tpa_torch.Model.CodedLatent}


@pytest.fixture(autouse=True, params=["compiled", "PyTorch"])
def small_tiles(request, monkeypatch):
    """Several tiles even of short texts, and a last one that is not full; with compiled products and without."""
    monkeypatch.setattr(decode, "MOST_MADE", 16)
    monkeypatch.setattr(decode, "MOST_READ", 16)
    if request.param == "PyTorch":
        monkeypatch.setenv("TPA_NATIVE", "0")


def random_mode(kind: str, dtype: str, rng):
    """A random way to cache one side."""
    match kind:
        case "dense":
            return Dense(G, D, dtype=dtype)
        case "contextual":
            return Contextual(G, D, 3, dtype)
        case "fixed-a":
            return FixedA(G, D, 2, dtype, basis=rng.normal(size=(2, G)))
        case "fixed-a exact":
            return FixedA(G, D, G, dtype, basis=G * np.eye(G))
        case "fixed-a pairs":
            return FixedA(G, D, 2, dtype, basis=rng.normal(size=(2, G, D)))
        case "fixed-b":
            return FixedB(G, D, 5, dtype, basis=rng.normal(size=(G, 5, D)))
        case "latent":
            return Latent(G, D, 13, dtype, basis=rng.normal(size=(13, G, D)))
    widths = WIDTHS if kind == "sorted" else tuple(int(width) for width in rng.permutation(WIDTHS))
    basis, mean = rng.normal(size=(len(widths), G, D)), rng.normal(size=(G, D))
    return CodedLatent(G, D, len(widths), "spectral", 0.0, basis, basis, mean, widths)


def twin(mode):
    """The same mode in PyTorch."""
    arrays = {name: None if x is None else torch.tensor(x, dtype=torch.float32) for name, x in mode.arrays().items()}
    return TWINS[mode.name](**vars(mode) | arrays)


def random_tokens(mode, k, rng):
    """The same random tokens as both backends cache them."""
    parts = {part: rng.normal(size=(B, k, *shape)).astype(np.float32) for part, shape in mode.parts().items()}
    return mode.store(parts), twin(mode).store({part: torch.from_numpy(x) for part, x in parts.items()})


def both(k_mode, v_mode, k, q, rng, sharpness=1.0, kinds=SEGMENTS[:1], ragged=False):
    """(reference, fast path) of random queries over random keys in one or more segments."""
    Q_bqhd = (sharpness * rng.normal(size=(B, q, H, D))).astype(np.float32)
    logits, values, segments, masked = [], [], [], {}
    for number, kind in enumerate(kinds):
        modes = (k_mode, v_mode) if kind == "coded" else Pair.dense(G, D).modes
        positions_bk = np.tile(np.arange(k) + k * number, (B, 1))
        tables = rope.rope_tables(positions_bk, D, 10_000)
        seen_bqk = rng.random((B, q, k)) < 0.7 if ragged else np.ones((B, q, k), bool)
        seen_bqk[:, :, 0] |= ~seen_bqk.any(-1)
        (stored_k, torch_k), (stored_v, torch_v) = (random_tokens(mode, k, rng) for mode in modes)
        L_bhqk = modes[0].scores(Q_bqhd, modes[0].load(stored_k, np.float32), Tokens(tables), 0.3)
        logits.append(masks.apply_mask(L_bhqk, seen_bqk))
        values.append((modes[1], modes[1].load(stored_v, np.float32), Tokens(tables)))
        turns_bkp = torch.complex(*(torch.from_numpy(x.astype(np.float32)) for x in tables))
        stored = {f"k.{name}": x for name, x in torch_k.items()} | {f"v.{name}": x for name, x in torch_v.items()}
        pair = tpa_torch.Model.Pair(*map(twin, modes))
        segments.append(Segment(kind, pair, stored, positions_bk, positions.Tokens(turns_bkp)))
        masked[kind] = torch.from_numpy(seen_bqk)
    P_bhqk = np.split(attention.softmax(np.concatenate(logits, -1)), len(kinds), -1)
    expected = sum(mode.values(P, *more) for P, (mode, *more) in zip(P_bhqk, values))
    keys = SimpleNamespace(
        segments=segments,
        at=SimpleNamespace(kept={}),
        held=SimpleNamespace(exact=Exact()),
        seen=lambda segment: masked[segment.kind],
    )
    return expected, to_numpy(decode.attend(torch.from_numpy(Q_bqhd), keys, 0.3, Scratch()))


# ---- one layer ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode(kind, dtype):
    """K and V in every mode and dtype: a length that is no multiple of the tile, masked keys, three queries."""
    rng = np.random.default_rng(0)
    expected, got = both(random_mode(kind, dtype, rng), random_mode(kind, dtype, rng), 45, 3, rng, ragged=True)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("k_kind", ["sorted", "unsorted"])
def test_spectral(k_kind):
    """Widths from 1 to 8 bits, in falling order as the conversion makes them and in any other."""
    rng = np.random.default_rng(0)
    expected, got = both(random_mode(k_kind, "", rng), random_mode("sorted", "", rng), 45, 1, rng)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("kind", [*KINDS, "sorted"])
def test_a_mode_without_a_reader(kind, monkeypatch):
    """What `readers` does not know is formed by the mode's own `decode`."""
    monkeypatch.setattr(readers, "side", lambda *known: readers.Formed(*known, ""))
    rng = np.random.default_rng(0)
    expected, got = both(random_mode(kind, "int8", rng), random_mode(kind, "int8", rng), 45, 3, rng, ragged=True)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_sharp_logits(kind):
    """Logits that lie hundreds apart, from tile to tile and within one: no NaN, no overflow, the same winner."""
    rng = np.random.default_rng(0)
    modes = random_mode(kind, "float32", rng), random_mode("dense", "float32", rng)
    expected, got = both(*modes, 50, 1, rng, sharpness=300)
    assert np.isfinite(got).all()
    assert relative(got, expected) < 1e-3  # logits of some thousand carry errors of 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 15, 16, 17, 32])
def test_lengths(kind, k):
    """One token; and around the size of a tile."""
    rng = np.random.default_rng(k)
    expected, got = both(random_mode(kind, "float32", rng), random_mode(kind, "float32", rng), k, 1, rng)
    assert relative(got, expected) < 1e-5


def test_segments():
    """Exact tokens beside coded ones: one softmax over all."""
    rng = np.random.default_rng(0)
    mode = random_mode("sorted", "", rng)
    expected, got = both(mode, mode, 37, 2, rng, kinds=SEGMENTS, ragged=True)
    assert relative(got, expected) < 1e-5


def test_a_lost_tile_is_seen(monkeypatch):
    """The comparison goes red when the last tile, which is not full, is left out."""
    rng = np.random.default_rng(0)
    right = decode.tiles
    monkeypatch.setattr(decode, "tiles", lambda *sizes: list(right(*sizes))[:-1])
    mode = random_mode("contextual", "float32", rng)
    expected, got = both(mode, mode, 45, 1, rng)
    assert relative(got, expected) > 1e-2


# ---- whole models ----


def models(**choices):
    """The same small model in both backends, in float32, converted where there are choices."""
    made = [helpers.model(backend, dtype="float32") for backend in (tpa_ref, tpa_torch)]
    if choices:
        made = [b.convert(m, b.TPAConfig(**choices)) for b, m in zip((tpa_ref, tpa_torch), made)]
    return made


TEXT = np.random.default_rng(0).integers(3, 300, (2, 45))
CHOICES = [
    {},
    *(
        {"mode": mode, "kv_dtype": dtype}
        for mode in ("contextual", "fixed-a", "fixed-b", "latent")
        for dtype in KV_DTYPES
    ),
    {"k_mode": "fixed-a", "v_mode": "latent", "k_rank": 2, "k_dtype": "int8"},
    {"rate": 2.0},
    {"rate": 1.0},
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_a_text_in_a_cache(choices, monkeypatch):
    """Prefill in chunks, then token by token past the window, in float32: logits of the reference.

    Codes of a number between two levels may differ by one between backends; a few such do not move the mean.
    """
    numpy, fast = models(**choices)
    calls = {"decode": 0, "prefill": 0}
    for name, module in (("decode", decode), ("prefill", prefill)):
        right = module.attend

        def counted(*args, name=name, right=right):
            calls[name] += 1
            return right(*args)

        monkeypatch.setattr(module, "attend", counted)
    (_, expected), (_, got) = (run_cached(model, TEXT, (20, 15)) for model in (numpy, fast))
    assert calls == {"decode": 7 * 10, "prefill": 7 * 2}
    difference = np.abs(got - expected).mean() / np.abs(expected).mean()
    exact = not choices or choices.get("kv_dtype") == "float32"
    assert difference < (1e-5 if exact else 3e-3)


@pytest.mark.parametrize("mode", ["dense", "contextual", "latent"])
def test_different_lengths(mode):
    """Rows of a batch that are of different length, in a ring and in a global layer."""
    numpy, fast = models(**({} if mode == "dense" else {"mode": mode, "kv_dtype": "float32"}))
    lengths = np.array([20, 7])
    found = []
    for model in (numpy, fast):
        held = model.new_cache(2, 64)
        model(TEXT[:, :20], cache=held, lengths_b=lengths)
        found.append([to_numpy(model(TEXT[:, i : i + 1], cache=held)) for i in range(20, 34)])
    assert relative(np.concatenate(found[1], 1), np.concatenate(found[0], 1)) < 1e-5


@pytest.mark.parametrize(
    "choices", [{}, {"mode": "contextual"}, {"k_mode": "fixed-a", "v_mode": "latent"}, {"rate": 2.0}], ids=str
)
def test_bfloat16(choices, tmp_path, monkeypatch):
    """A bfloat16 model's fast path is as close to a float32 computation as its plain path is."""
    numpy, _ = models(**choices)
    fast = tpa_torch.load(helpers.write_folder(tmp_path / "model"), dtype="bfloat16")
    fast = tpa_torch.convert(fast, tpa_torch.TPAConfig(**choices)) if choices else fast
    expected = run_cached(numpy, TEXT, (20,))[1]
    got = run_cached(fast, TEXT, (20,))[1]
    monkeypatch.setattr(decode, "attend", lambda *args: attend.plainly(*args[:3], no_trace))
    plain = run_cached(fast, TEXT, (20,))[1]
    assert np.abs(got - expected).mean() < 1.2 * np.abs(plain - expected).mean() + 1e-6


def test_exact_tokens():
    """Sinks and newest tokens beside a spectral cache, through the model."""
    numpy, fast = models(rate=1.0)
    assert [list(model.new_cache(2, 64).layers[5].rings) for model in (numpy, fast)] == [["coded", "sinks"]] * 2
    (_, expected), (_, got) = (run_cached(model, TEXT, (20,)) for model in (numpy, fast))
    assert np.abs(got - expected).mean() < 3e-3 * np.abs(expected).mean()


@pytest.mark.parametrize("choices", [{}, {"mode": "latent", "kv_dtype": "float32"}, {"rate": 1.0}], ids=str)
def test_prefill_in_blocks(choices, monkeypatch):
    """Fused prefill of whole texts and of chunks into a ring, in blocks of queries: the reference's logits."""
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 9)
    numpy, fast = models(**choices)
    lengths = np.array([45, 13])
    expected, got = (to_numpy(model(TEXT, lengths_b=lengths)) for model in (numpy, fast))
    for row, length in enumerate(lengths):
        assert np.abs(got - expected)[row, :length].mean() < 3e-3 * np.abs(expected).mean()
