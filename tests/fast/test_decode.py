"""The fast paths, decoding tile by tile and fused prefill, give what the NumPy reference gives."""

from __future__ import annotations

import numpy as np
import pytest
import helpers
from helpers import relative, run_cached, to_numpy

torch = pytest.importorskip("torch")

import tpa_ref
import tpa_torch
from tpa_ref.compress.config import KV_DTYPES
from tpa_ref.core import attention as reference
from tpa_ref.core import cache as reference_cache
from tpa_ref.core import masks as reference_masks
from tpa_ref.core import rope as reference_rope
from tpa_ref.core.factorize import Factorization, part_shapes
from tpa_torch.core import cache
from tpa_torch.fast import decode, prefill
from tpa_torch.gemma import model as torch_model

B, H, G, D = 2, 8, 4, 32
RANKS = {"dense": 0, "contextual": 3, "fixed-a": 2, "fixed-b": 5, "latent": 13}
KINDS = [*RANKS, "fixed-a exact", "fixed-a pairs"]
DTYPES = ("float32", "bfloat16", "int8", "int4")
WIDTHS = (8, 7, 7, 6, 5, 5, 4, 4, 3, 2, 2, 1, 1, 1)


@pytest.fixture(autouse=True, params=["compiled", "PyTorch"])
def small_tiles(request, monkeypatch):
    """Several tiles even of short texts, and a last one that is not full; with compiled products and without."""
    monkeypatch.setattr(decode, "MOST_MADE", 16)
    monkeypatch.setattr(decode, "MOST_READ", 16)
    if request.param == "PyTorch":
        monkeypatch.setenv("TPA_NATIVE", "0")


def factors(kind: str, dtype: str, rng) -> Factorization:
    """A random way to cache one side."""
    if dtype == "spectral":
        order = rng.permutation(len(WIDTHS)) if kind == "unsorted" else np.arange(len(WIDTHS))
        widths = tuple(WIDTHS[i] for i in order)
        basis = rng.normal(size=(len(widths), G, D)).astype(np.float32)
        return Factorization("latent", len(widths), dtype, basis, 0.0, basis, rng.normal(size=(G, D)), widths)
    mode, _, detail = kind.partition(" ")
    rank = G if detail == "exact" else RANKS[mode]
    shape = {"fixed-a": (rank, G, D) if detail == "pairs" else (rank, G), "fixed-b": (G, rank, D)}
    basis = rng.normal(size=shape.get(mode, (rank, G, D))) if mode not in ("dense", "contextual") else None
    if detail == "exact":
        basis = G * np.eye(G)
    return Factorization(mode, rank, dtype, basis, 0.0)


def in_torch(how: Factorization) -> Factorization:
    arrays = {
        name: None if x is None else torch.from_numpy(np.asarray(x, np.float32)) for name, x in how.constants().items()
    }
    return Factorization(
        how.mode, how.rank, how.dtype, arrays["basis"], 0.0, arrays["encoder"], arrays["mean"], how.widths
    )


def stored_pair(how: Factorization, k: int, rng):
    """The same random tokens as both backends cache them."""
    shapes = {"C": (how.rank,)} if how.dtype == "spectral" else part_shapes(how.mode, how.rank, G, D)
    parts = {part: rng.normal(size=(B, k, *shape)).astype(np.float32) for part, shape in shapes.items()}
    held = reference_cache.store(parts, how)
    return held, cache.store({part: torch.from_numpy(x) for part, x in parts.items()}, in_torch(how))


def both(how_k, how_v, k, q, rng, sharpness=1.0, segments=1, ragged=False):
    """(reference, fast path) of random queries over random keys in one or more segments."""
    Q_bqhd = (sharpness * rng.normal(size=(B, q, H, D))).astype(np.float32)
    logits, sides, fast = [], [], []
    for segment in range(segments):
        how = (how_k, how_v) if segment == 0 else reference_cache.DENSE
        positions_bk = np.tile(np.arange(k) + k * segment, (B, 1))
        tables = reference_rope.rope_tables(positions_bk, D, 10_000)
        seen_bqk = rng.random((B, q, k)) < 0.7 if ragged else np.ones((B, q, k), bool)
        seen_bqk[:, :, 0] |= ~seen_bqk.any(-1)
        (held_k, fast_k), (held_v, fast_v) = (stored_pair(side, k, rng) for side in how)
        parts_k, parts_v = (reference_cache.load(x, side, G, D) for x, side in zip((held_k, held_v), how))
        L_bhqk = reference.scores(Q_bqhd, parts_k, how[0], G, tables, 0.3)
        logits.append(reference_masks.apply_mask(L_bhqk, seen_bqk))
        sides.append((parts_v, how[1]))
        turns_bkp = torch.complex(*(torch.from_numpy(x.astype(np.float32)) for x in tables))
        seen = torch.from_numpy(seen_bqk) if ragged else None
        fast.append(decode.Keys((fast_k, fast_v), tuple(map(in_torch, how)), turns_bkp, seen))
    P_bhqk = np.split(reference.softmax(np.concatenate(logits, -1)), segments, -1)
    expected = sum(reference.values(P, parts, how, G) for P, (parts, how) in zip(P_bhqk, sides))
    got = decode.attend(torch.from_numpy(Q_bqhd), fast, G, 0.3, decode.Scratch())
    return expected, to_numpy(got)


# ---- one layer ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode(kind, dtype):
    """K and V in every mode and dtype: a length that is no multiple of the tile, masked keys, three queries."""
    rng = np.random.default_rng(0)
    expected, got = both(factors(kind, dtype, rng), factors(kind, dtype, rng), 45, 3, rng, ragged=True)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("k_kind", ["sorted", "unsorted"])
def test_spectral(k_kind):
    """Widths from 1 to 8 bits, in falling order as the conversion makes them and in any other."""
    rng = np.random.default_rng(0)
    expected, got = both(factors(k_kind, "spectral", rng), factors("sorted", "spectral", rng), 45, 1, rng)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_sharp_logits(kind):
    """Logits that lie hundreds apart, from tile to tile and within one: no NaN, no overflow, the same winner."""
    rng = np.random.default_rng(0)
    expected, got = both(factors(kind, "float32", rng), factors("dense", "float32", rng), 50, 1, rng, sharpness=300)
    assert np.isfinite(got).all()
    assert relative(got, expected) < 1e-3  # logits of some thousand carry errors of 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 15, 16, 17, 32])
def test_lengths(kind, k):
    """One token; and around the size of a tile."""
    rng = np.random.default_rng(k)
    expected, got = both(factors(kind, "float32", rng), factors(kind, "float32", rng), k, 1, rng)
    assert relative(got, expected) < 1e-5


def test_segments():
    """Exact tokens beside coded ones: one softmax over all."""
    rng = np.random.default_rng(0)
    how = factors("sorted", "spectral", rng)
    expected, got = both(how, how, 37, 2, rng, segments=3, ragged=True)
    assert relative(got, expected) < 1e-5


def test_a_lost_tile_is_seen(monkeypatch):
    """The comparison goes red when the last tile, which is not full, is left out."""
    rng = np.random.default_rng(0)
    right = decode._tiles
    monkeypatch.setattr(decode, "_tiles", lambda *sizes: list(right(*sizes))[:-1])
    how = factors("contextual", "float32", rng)
    expected, got = both(how, how, 45, 1, rng)
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
def test_bfloat16(choices, tmp_path):
    """A bfloat16 model's fast path is as close to a float32 computation as its plain path is."""
    numpy, _ = models(**choices)
    fast = tpa_torch.load(helpers.write_folder(tmp_path / "model"), dtype="bfloat16")
    fast = tpa_torch.convert(fast, tpa_torch.TPAConfig(**choices)) if choices else fast
    expected = run_cached(numpy, TEXT, (20,))[1]
    got = run_cached(fast, TEXT, (20,))[1]
    fast._attend_decoding = lambda *args: fast._attend_plainly(*args, torch_model.no_trace)
    plain = run_cached(fast, TEXT, (20,))[1]
    assert np.abs(got - expected).mean() < 1.2 * np.abs(plain - expected).mean() + 1e-6


def test_exact_tokens():
    """Sinks and newest tokens beside a spectral cache, through the model."""
    numpy, fast = models(rate=1.0)
    assert any(numpy.exact(layer) for layer in range(7))
    (_, expected), (_, got) = (run_cached(model, TEXT, (20,)) for model in (numpy, fast))
    assert np.abs(got - expected).mean() < 3e-3 * np.abs(expected).mean()


@pytest.mark.parametrize("choices", [{}, {"mode": "latent", "kv_dtype": "float32"}, {"rate": 1.0}], ids=str)
def test_prefill_in_blocks(choices, monkeypatch):
    """Fused prefill of whole texts and of chunks into a ring, in blocks of queries: the reference's logits."""
    monkeypatch.setattr(torch_model, "QUERY_BLOCK", 9)
    numpy, fast = models(**choices)
    lengths = np.array([45, 13])
    expected, got = (to_numpy(model(TEXT, lengths_b=lengths)) for model in (numpy, fast))
    for row, length in enumerate(lengths):
        assert np.abs(got - expected)[row, :length].mean() < 3e-3 * np.abs(expected).mean()
