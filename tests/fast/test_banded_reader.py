"""Banded codes on a CPU: the compiled reader and coder beside the same in PyTorch."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tpa_ref.core.banded import band_features
from tpa_ref.core.cache import Segment
from tpa_ref.core.rope import frequencies, rope_tables
from tpa_torch.core.cache import Cache
from tpa_torch.core.pair import Pair
from tpa_torch.fast import banded
from tpa_torch.fast.kernels import native
from tpa_torch.fast.scratch import Scratch
from tpa_torch.fast.spectral import BandedLatent
from tpa_torch.gemma.positions import Tokens

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler")


def some_pair(g=1, d=64, base=1e4, ranks=(9, 20, 40), seed=0, groups=1):
    """K and V of a layer with random factors; fast pairs know nothing of slow coefficients."""
    rng = np.random.default_rng(seed)
    theta = frequencies(d, base)
    fast, slow = band_features(theta)
    heads = g // groups
    ranks = min(ranks[0], heads * len(fast)), min(ranks[1], heads * len(slow)), min(ranks[2], heads * d)
    widths = [tuple(sorted(rng.integers(1, 9, rank).tolist(), reverse=True)) for rank in ranks]
    number = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).float() / d**0.5  # noqa: E731
    before = ranks[0] + ranks[1]
    basis = number(before, g, d)
    basis[ranks[0] :, :, fast] = 0
    k = BandedLatent(
        g, d, before, "spectral", basis=basis, encoder=number(before, g, d), mean=number(g, d),
        widths=widths[0] + widths[1], strings=ranks[:2], theta=torch.from_numpy(theta).float(), groups=groups,
    )  # fmt: skip
    v = BandedLatent(
        g, d, ranks[2], "spectral", basis=number(before + ranks[2], g, d), encoder=number(ranks[2], g, d),
        mean=number(g, d), widths=widths[2], strings=ranks[2:], before=before, groups=groups,
    )  # fmt: skip
    return banded.Banded(k, v)


def some_segment(pair, keys=300, batch=2, base=1e4, shift=0, seed=0):
    """Random codes with scales near 1; shift: where in its ring a text has begun anew."""
    rng = np.random.default_rng(seed)
    stored, positions = Cache([pair], [None], batch, keys).layers[0].rings["coded"].read(np.full(batch, keys))
    for side, mode in (("k", pair.k), ("v", pair.v)):
        held = stored[f"{side}.C.codes"]
        held.copy_(torch.from_numpy(rng.integers(0, 256, held.shape).astype(np.uint8)))
        of_group, starts = sum(mode.string_bytes), np.cumsum([0, *mode.string_bytes[:-1]])
        for start in (group * of_group + x for group in range(mode.groups) for x in starts if x < of_group):
            held[..., start] = torch.from_numpy(rng.integers(56, 72, held.shape[:2]).astype(np.uint8))
    positions = (positions + shift) % keys
    tables = rope_tables(positions, pair.k.d, base)
    turns = torch.complex(*(torch.from_numpy(table.astype(np.float32)) for table in tables))
    return Segment("coded", pair, stored, positions, Tokens(turns))


def outputs(partial):
    """The output, and the logarithm of the sum of exponentials."""
    largest, total, Y = partial
    return Y / total, largest + total.log()


def both(pair, segment, x, dtype, seen=None, seed=0):
    Q = torch.from_numpy(
        np.random.default_rng(seed).standard_normal((len(segment.positions_bk), pair.k.g, x, pair.k.d))
    )
    Q = Q.float()
    read = banded.read(Q, dtype, segment, seen, SimpleNamespace(kept={}), Scratch())
    return outputs(read), outputs(banded.read_formed(Q, segment, seen))


def check(shape, dtype=torch.float32, masked=False, bound=1e-3):
    pair = some_pair(**shape)
    segment = some_segment(pair, keys=300, base=shape.get("base", 1e4), shift=shape.get("seed", 0))
    seen = torch.rand(2, 1, 300, generator=torch.Generator().manual_seed(0)) > 0.3 if masked else None
    (out, lse), (out_formed, lse_formed) = both(pair, segment, 4, dtype, seen)
    assert (out - out_formed).norm() < bound * out_formed.norm()
    assert (lse - lse_formed).abs().max() < 10 * bound


SHAPES = [
    {}, {"base": 1e6}, {"g": 2, "d": 32}, {"d": 128, "base": 1e6, "ranks": (13, 60, 100), "seed": 37},
    
    {"g": 3, "d": 32, "groups": 3}, {"g": 4, "d": 32, "groups": 2},
    {"ranks": (0, 11, 9)}, {"ranks": (5, 0, 9)}, {"ranks": (5, 6, 0)}, {"ranks": (0, 0, 3)},
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_segment_is_read_as_it_is_formed(library, shape, masked):
    """Fast and slow pairs, several heads, a ring begun anew, strings without coefficients, keys that are not seen."""
    check(shape, masked=masked)


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_in_models_of_bfloat16(shape):
    check(shape, torch.bfloat16, bound=0.02)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 1030, 2500])
def test_runs_of_every_length(keys):
    """Tiles that are not full, stretches of sixteen tiles, and several of them."""
    pair = some_pair()
    (out, lse), (out_formed, lse_formed) = both(pair, some_segment(pair, keys, 1, shift=keys // 3), 2, torch.float32)
    assert (out - out_formed).norm() < 1e-3 * out_formed.norm() and (lse - lse_formed).abs().max() < 0.01


def test_many_queries_and_rows_of_their_own_length(library):
    pair = some_pair(g=2, d=32)
    segment = some_segment(pair, 130, 3)
    segment.positions_bk[1, 100:] = -1  # a shorter row
    seen = torch.ones(3, 5, 130, dtype=torch.bool)
    seen[1, :, 100:] = False
    seen[2, 3] = False  # a query that sees nothing here
    (out, lse), (out_formed, lse_formed) = both(pair, segment, 10, torch.float32, seen)
    held = lse_formed > -1e30
    assert (out - out_formed)[held[..., 0]].norm() < 1e-3 * out_formed[held[..., 0]].norm()
    assert (lse - lse_formed)[held].abs().max() < 0.01 and (lse[~held] < -1e30).all()


def codes_of(pair, K, V, compiled):
    stored = pair.encode(K, V, None) if compiled else super(banded.Banded, pair).encode(K, V, None)
    return torch.cat([stored["k.C.codes"], stored["v.C.codes"]], -1)


def check_coder(shape):
    pair, rng = some_pair(**shape), np.random.default_rng(0)
    g, d = pair.k.g, pair.k.d
    K, V = (torch.from_numpy(rng.standard_normal((2, 3, g, d))).float() for _ in "KV")
    found, expected = codes_of(pair, K, V, True), codes_of(pair, K, V, False)
    assert found.shape == expected.shape
    assert (found != expected).float().mean() < 0.02  # of two paths that are equally good either may be found


@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens_are_coded_in_one_call(library, shape):
    check_coder(shape)


# ---- can it be seen? ----

MISTAKES = {
    "scale of another string": ("from.scale_rows[string] * codes.row", "from.scale_rows[0] * codes.row"),
    "the tile's place in its stretch": ("of.stretch_weights + tile * NODES * NODES", "of.stretch_weights"),
    "the mean of slow pairs": ("fma(fma(all(1), at_node, of_mean), load", "fma(at_node, load"),
    "turned the wrong way": ("minus(times(a, load(cosine)), times(b, load(sine)))", "minus(a, times(b, load(sine)))"),
    "what was summed before": ("total[row] = total[row] * shrink + sum(sum_of)", "total[row] += sum(sum_of)"),
    "what is not seen": ("if (!seen[k]) L[row * SPAN + k] = MASKED", "(void)L, (void)seen"),
    "what the first string has told": ("if (n + 1 < side.strings) take(C, basis, count)", "(void)basis"),
    "the codes of another group": ("group * of.key_bytes * from.key_row", "0"),
    "the basis of another head": ("(first_head + head) * size * of.columns, size, &st", "0, size, &st"),
    "the values of another head": ("head % of.g * of.rank * of.d", "0"),
    "the encoder of another group": ("side.encoder + group * side.rank * side.numbers", "side.encoder"),
    "what K has told of V": ("take(room.decoded.data(), basis, side.before);", ""),
}  # fmt: skip
CHECKS = {name: lambda _: check({"d": 128, "base": 1e6, "ranks": (13, 60, 100)}) for name in MISTAKES} | {
    "scale of another string": lambda _: check({}),
    "turned the wrong way": lambda _: check({}),
    "what is not seen": lambda _: check({}, masked=True),
    "what the first string has told": lambda _: check_coder({}),
    "what K has told of V": lambda _: check_coder({}),
    "the codes of another group": lambda _: check({"g": 4, "d": 32, "groups": 2}),
    "the basis of another head": lambda _: check({"g": 4, "d": 32, "groups": 2}),
    "the values of another head": lambda _: check({"g": 4, "d": 32, "groups": 2}),
    "the encoder of another group": lambda _: check_coder({"g": 4, "d": 32, "groups": 2}),
}


@pytest.mark.parametrize("name", [None, *MISTAKES])
def test_a_mistake_in_the_source_is_seen(check_mistake, name):
    """Each by the check that is meant for it; the same build without a mistake passes all of them."""
    check_mistake(name, MISTAKES, CHECKS, "-O1", "-DTPA_PLAIN")


def test_a_pair_that_has_coded_is_copied():
    """Its coder points to its own arrays: a copy makes another, and codes the same."""
    pair, rng = some_pair(), np.random.default_rng(0)
    K, V = (torch.from_numpy(rng.standard_normal((1, 1, 1, 64))).float() for _ in "KV")
    expected = codes_of(pair, K, V, True)
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert other.k.basis is not pair.k.basis
        assert torch.equal(codes_of(other, K, V, True), expected)


def test_without_a_compiler_pytorch_reads(monkeypatch):
    pair = some_pair()
    segment = some_segment(pair)
    (out, _), _ = both(pair, segment, 2, torch.float32)
    monkeypatch.setenv("TPA_NATIVE", "0")
    (out_formed, _), _ = both(pair, segment, 2, torch.float32)
    assert (out - out_formed).norm() < 1e-3 * out_formed.norm()
    assert issubclass(banded.Banded, Pair)
