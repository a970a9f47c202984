"""The compiled products for CPUs against float64 NumPy, in both builds: the one for this machine, and a plain one.

Where nothing can be compiled, PyTorch computes the same (`test_decode` runs both ways).
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from helpers import relative

torch = pytest.importorskip("torch")

from tpa_ref.core import codes as reference
from tpa_ref.core import rope
from tpa_torch.core import codes, quantize
from tpa_torch.fast.kernels import native
from tpa_torch.fast.linear import linear

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


def rows(kind, shape, rng, rounded=False):
    """(Rows, the same numbers in float64)."""
    fields = quantize.quantize(torch.from_numpy(rng.normal(size=shape).astype(np.float32)), kind)
    numbers = quantize.dequantize(fields, kind, shape[-1]).double().numpy()
    assert native.Rows.takes(fields, kind, shape[-1])
    return native.Rows(fields, kind, shape[-1], rounded), numbers


def random(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


SHAPES = [  # b, x, k, d
    (1, 1, 1, 16),
    (2, 3, 31, 32),
    (3, 8, 33, 64),
    (1, 19, 300, 80),
    (4, 2, 2100, 256),
    (1, 1, 65, 144),
    (2, 16, 16, 256),  # many queries: sixteen side by side, twice sixteen, more
    (1, 32, 1000, 128),
    (1, 41, 47, 64),
    (1, 17, 70, 320),  # longer than a block has room for
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_products_with_stored_rows(library, kind, threads):
    """Queries and keys of any number, batches, groups of a head that are not whole."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for b, x, k, d in SHAPES:
            rng = np.random.default_rng(d)
            stored, numbers = rows(kind, (b, k, d), rng)
            Q, P = random(rng, b, x, d), random(rng, b, x, k)
            assert relative(native.dot(Q, stored), Q.double().numpy() @ numbers.transpose(0, 2, 1)) < 3e-6
            assert relative(native.weigh(P, stored), P.double().numpy() @ numbers) < 1e-5
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_tile_out_of_a_cache(library, kind):
    """Rows that do not lie one behind the other: some keys of a longer cache, one rank of several."""
    rng = np.random.default_rng(0)
    whole, numbers = rows(kind, (2, 4, 90, 64), rng)
    tile = native.Rows({name: x[:, :, 17:60] for name, x in whole.fields.items()}, kind, 64)
    Q, P = random(rng, 2, 4, 64), random(rng, 2, 4, 43)
    for rank, part in enumerate(tile.unbind(1)):
        expected = numbers[:, rank, 17:60]
        assert relative(native.dot(Q, part), Q.double().numpy() @ expected.transpose(0, 2, 1)) < 3e-6
        assert relative(native.weigh(P, part), P.double().numpy() @ expected) < 1e-5


def test_queries_in_16_bits(library):
    """Of int8 keys, in models of bfloat16: a hundred times finer than bfloat16 itself. A group of zeros stays zero."""
    rng = np.random.default_rng(0)
    stored, numbers = rows("int8", (2, 70, 128), rng, rounded=True)
    Q = random(rng, 2, 5, 128) * 100
    Q[:, 0, :64] = 0
    assert relative(native.dot(Q, stored), Q.double().numpy() @ numbers.transpose(0, 2, 1)) < 5e-5
    assert relative(native.dot(0 * Q, stored)[:, :1] + 1, np.ones((2, 1, 70))) == 0


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("x", [2, 6, 12, 24, 32])
def test_in_models_of_bfloat16(library, kind, x):
    """Few queries of int8 and int4 are rounded to 16 bits, many and their keys to bfloat16. Blocks not full."""
    rng = np.random.default_rng(x)
    for b, k, d in ((2, 70, 128), (1, 33, 256), (1, 15, 64), (2, 31, 80)):
        stored, numbers = rows(kind, (b, k, d), rng, rounded=True)
        Q, P = random(rng, b, x, d) * 100, random(rng, b, x, k)
        Q[:, 0, :64] = 0
        P[:, 0] = 0
        part = 2.0**-8 if x >= 8 else 1e-4 if kind.startswith("int") else 1e-6
        for got, one, other in (
            (native.dot(Q, stored), Q.double().numpy(), numbers.transpose(0, 2, 1)),
            (native.weigh(P, stored), P.double().numpy(), numbers),
        ):
            error, size = np.abs(got.double().numpy() - one @ other), np.abs(one) @ np.abs(other)
            assert (error <= 2 * part * size + 1e-9).all()


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("g,n,k", [(1, 1, 5), (4, 2, 33), (16, 2, 48)])
def test_weights_of_keys(library, kind, rounded, g, n, k):
    """A factor of every key and KV head, out of a longer cache; and logits that are added to others."""
    rng = np.random.default_rng(g)
    b, d = 2, 64
    stored, numbers = rows(kind, (b, k, d), rng, rounded)
    A = random(rng, b, 3, g, k + 9)[:, 1, :, 4 : k + 4]
    A_bxk = A.double().numpy().repeat(n, 1)
    Q, P, L = random(rng, b, g * n, d), random(rng, b, g * n, k), random(rng, b, g * n, k)
    bound = 1e-2 if rounded else 1e-5
    logits = A_bxk * (Q.double().numpy() @ numbers.transpose(0, 2, 1))
    assert relative(native.dot(Q, stored, A_bgk=A), logits) < bound
    expected = L.double().numpy() + logits
    assert relative(native.dot(Q, stored, L, A, add=True), expected) < bound
    assert relative(L, expected) < bound, "added in place"
    assert relative(native.weigh(P, stored, A), (P.double().numpy() * A_bxk) @ numbers) < bound


@pytest.mark.parametrize("k", [1, 15, 16, 17, 1000])
def test_exponentials(library, k):
    """To the last places of float32, as far down as it goes; in place."""
    rng = np.random.default_rng(k)
    L = random(rng, 2, 3, k) * 40
    L[0, 0, 0], L[1, 2] = 90, torch.finfo(torch.float32).min
    highest = L.amax(-1, keepdim=True)
    expected = np.exp((L - highest).double().numpy())
    largest, total = native.exponentials(L)
    assert torch.equal(largest, highest)
    assert np.allclose(L.double().numpy(), expected, rtol=3e-6, atol=1e-44)
    assert np.allclose(total.double().numpy(), expected.sum(-1, keepdims=True), rtol=1e-6)


def packed(widths, b, k, rng):
    """(codes [b,bytes,k], coefficients [b,s,k] by the reference)."""
    C_bks = rng.normal(size=(b, k, len(widths))).astype(np.float32) * rng.choice([0.5, 1.0, 3.0], (b, k, 1))
    packed_bkc = codes.quantize(torch.from_numpy(C_bks), widths)
    return packed_bkc.mT.contiguous(), codes.dequantize(packed_bkc, widths).double().numpy().transpose(0, 2, 1)


@pytest.mark.parametrize("tokens", [1, 70])
def test_paths_through_the_trellis(library, tokens):
    """The bytes are those of the reference, of every width, and of costs that are equal."""
    rng = np.random.default_rng(tokens)
    mixed = tuple(sorted(rng.integers(1, 9, 61).tolist(), reverse=True))
    for widths in (*((width,) * 9 for width in range(1, 9)), mixed):
        C_ks = (rng.standard_normal((tokens, len(widths))) * rng.choice([0.0, 1.0, 4.0], (tokens, 1))).astype(
            np.float32
        )
        C_ks[0] = rng.choice([np.inf, -1e30, 0.0], len(widths))
        got = native.quantize(torch.from_numpy(C_ks), widths)
        np.testing.assert_array_equal(got.numpy(), reference.quantize(C_ks, widths))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("b,y,k", [(1, 1, 1), (2, 3, 63), (1, 9, 64), (2, 8, 2100)])
def test_packed_codes(library, b, y, k, rounded):
    """Every width, alone and in pieces, more coefficients than one and an odd number of them."""
    rng = np.random.default_rng(k)
    for widths in ((3,), tuple(rng.integers(1, 9, 37)), (8, 7, 6, 5, 4, 3, 2, 1)):
        widths = tuple(int(width) for width in widths)
        codes_bck, expected = packed(widths, b, k, rng)
        out = torch.full((b, len(widths), k), float("nan"))
        assert relative(native.levels(codes_bck, widths, out), expected) < 1e-6
        P = random(rng, b, y, k).abs()
        sums = np.einsum("byk,bsk->bys", P.double().numpy(), expected)
        error = np.abs(native.weigh_codes(P, codes_bck, widths, rounded).double().numpy() - sums)
        size = np.einsum("byk,bsk->bys", P.double().numpy(), np.abs(expected))
        assert (error <= (2.0**-7 if rounded else 1e-5) * size + 1e-12).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows_of_turns", [1, 2])
def test_rebuilt_keys_are_turned(library, dtype, rows_of_turns):
    """Mean, RoPE and product in one pass, as `rope.rotate` does it; heads lie before keys or behind."""
    rng = np.random.default_rng(0)
    b, g, x, k, d = 2, 3, 2, 70, 64
    K = random(rng, b, g, k, d).to(getattr(torch, dtype)).transpose(1, 2)
    mean, Q = random(rng, g, d), random(rng, b, g, x, d)
    positions = np.arange(k)[None] + np.array([[0], [5]])[:rows_of_turns]
    tables = rope.rope_tables(positions, d, 10_000.0)
    turns = torch.complex(*(torch.from_numpy(table.astype(np.float32)) for table in tables))
    for centre in (None, mean):
        whole = K.double().numpy() + (0 if centre is None else centre.double().numpy())
        turned = rope.rotate(whole, *tables)
        expected = np.einsum("bgxd,bkgd->bgxk", Q.double().numpy(), turned)
        assert relative(native.dot_rotated(Q, K, centre, turns), expected) < 3e-6


# ---- can it be seen? ----

MISTAKES = {
    "scale of the first group": ("scale[k * step + j / GROUP]", "scale[k * step]"),
    "halves of a byte": ("_mm_slli_epi16(two, 4)", "_mm_slli_epi16(two, 8)"),
    "half of a window": ("_mm512_sll_epi16(_mm512_maskz_loadu_epi8(here, p + k), left)", "_mm512_setzero_si512()"),
    "where a string begins": ("fill(cost + at, cost + at", "fill(cost, cost"),
    "a narrow one of equal costs": ("z == y && other < first", "z == y && other > first"),
    "turned the wrong way": ("times(times(two, all(-1)), s)", "times(two, s)"),
    "the last keys": ("last = std::min(keys, first + BLOCK)", "last = std::min(keys / BLOCK * BLOCK, first + BLOCK)"),
    "second sixteen queries": ("with + i * width + v * W", "with + i * width"),
    "every other key": ("_mm512_slli_epi32(_mm512_cvtepu16_epi32(V.in_bf16(k + 1, j)), 16)", "_mm512_setzero_si512()"),
    "order of unpacked columns": ("0, 4, 1, 5, 2, 6, 3, 7", "0, 1, 2, 3, 4, 5, 6, 7"),
    "weights of another head": ("x / queries * row", "0 * row"),
    "largest of a row": ("highest = larger(highest, load_of(at + k, keys - k, -INFINITY))", "highest = load(at)"),
}


CHECKS = {
    "scale of the first group": lambda built: test_products_with_stored_rows(built, "int8", 1),
    "halves of a byte": lambda built: test_products_with_stored_rows(built, "int4", 1),
    "half of a window": lambda built: test_packed_codes(built, 2, 3, 63, False),
    "where a string begins": lambda built: test_paths_through_the_trellis(built, 70),
    "a narrow one of equal costs": lambda built: test_paths_through_the_trellis(built, 70),
    "turned the wrong way": lambda built: test_rebuilt_keys_are_turned(built, "float32", 1),
    "the last keys": lambda built: test_products_with_stored_rows(built, "bfloat16", 1),
    "second sixteen queries": lambda built: test_products_with_stored_rows(built, "float32", 1),
    "every other key": lambda built: test_in_models_of_bfloat16(built, "bfloat16", 12),
    "order of unpacked columns": lambda built: test_in_models_of_bfloat16(built, "int4", 2),
    "weights of another head": lambda built: test_weights_of_keys(built, "float32", False, 4, 2, 33),
    "largest of a row": lambda built: test_exponentials(built, 1000),
}


@pytest.mark.skipif(not native.has_bf16_dot(), reason="the plain build has other lines")
@pytest.mark.parametrize("name", [None, *MISTAKES])
def test_a_mistake_in_the_source_is_seen(check_mistake, name):
    """Each by the check that is meant for it; the same build without a mistake passes all of them."""
    check_mistake(name, MISTAKES, CHECKS, "-O0")


# ---- where it cannot be compiled ----


@pytest.fixture
def anew():
    """Looks for a library again, before and after."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_without_a_compiler_pytorch_computes(anew, monkeypatch, tmp_path):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.library() is None and not native.available()
    x, W = torch.ones(1, 16).bfloat16(), torch.ones(3, 16).bfloat16()
    with torch.inference_mode():
        assert linear(x, W).tolist() == [[16, 16, 16]]


def test_a_compiler_that_fails_is_no_error(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", shutil.which("false"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library() is None and not list(tmp_path.rglob("*.so"))


def test_it_is_compiled_once(anew, monkeypatch, tmp_path):
    """The second process finds the file of the first; a damaged one is made again."""
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-O0", "-DTPA_PLAIN"])  # what is compiled does not matter here
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library() is not None
    (made,) = (tmp_path / "tpa_torch").iterdir()
    native.library.cache_clear()
    stamp = made.stat().st_mtime_ns
    assert native.library() is not None and made.stat().st_mtime_ns == stamp
    native.library.cache_clear()
    damaged = made.with_name("damaged")
    damaged.write_bytes(made.read_bytes()[:1000])
    damaged.replace(made)
    assert native.library() is not None and made.stat().st_mtime_ns != stamp
    assert [file for file in (tmp_path / "tpa_torch").iterdir()] == [made]


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("TPA_NATIVE", "0")
    assert not native.available()
