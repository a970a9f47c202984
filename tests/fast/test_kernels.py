"""The Triton decode kernels against the PyTorch twin: every mode and storage, rings, batches, and inputs made to break
them. Without a CUDA device they run under Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import TOLERANCE, relative, to_numpy

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import helpers

import tpa_ref
import tpa_torch
from tpa_ref.compress.config import TPAConfig
from tpa_ref.core import codes as reference_codes
from tpa_torch.core import attention, masks
from tpa_torch.core import cache as kv
from tpa_torch.core.contextual import Contextual
from tpa_torch.core.dense import Dense
from tpa_torch.core.fixed_a import FixedA
from tpa_torch.core.fixed_b import FixedB
from tpa_torch.core.latent import Latent
from tpa_torch.core.pair import Joint, Pair
from tpa_torch.core.spectral import CodedLatent
from tpa_torch.fast import graph, kernels
from tpa_torch.fast.kernels import launch
from tpa_torch.gemma.positions import Tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
G, H, D, SCALE = 4, 8, 64, 0.125
THETA = torch.logspace(0, -3, D // 2)  # how far a pair turns from token to token
STORAGES = ("float32", "bfloat16", "int8", "int4")
TILE = launch.Tile(tokens=16, values=64, coefficients=16)
WIDTHS = (8, 7, 6, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1)  # every width, and planes that fill no byte


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    """Kernels on the CPU are for tests only."""
    monkeypatch.setenv("TPA_TRITON", "1")
    torch.set_num_threads(1)


def random_mode(name, dtype, rank=None, seed=0):
    """A mode with random constants; ranks are no powers of two, and no multiples of a tile."""
    rng = torch.Generator().manual_seed(seed)

    def constant(*shape):
        return torch.randn(shape, generator=rng).to(DEVICE)

    if name == "dense":
        return Dense(G, D, dtype=dtype)
    rank = {"contextual": 3, "fixed-a": 3, "fixed-b": 20, "latent": 37}[name] if rank is None else rank
    if name == "contextual":
        return Contextual(G, D, rank, dtype)
    shape = {"fixed-a": (rank, G, D), "fixed-b": (G, rank, D), "latent": (rank, G, D)}[name]
    basis = constant(*shape) / max(rank, 1) ** 0.5
    if name == "fixed-a":
        return FixedA(G, D, rank, dtype, basis=basis)
    return (FixedB if name == "fixed-b" else Latent)(
        G, D, rank, dtype, basis=basis, mean=constant(G, D) if dtype in ("spectral", "int4") else None
    )


def spectral(widths=WIDTHS, seed=0):
    """A `latent` with bits of its own for each coefficient."""
    return CodedLatent(**vars(random_mode("latent", "spectral", len(widths), seed)), widths=tuple(widths))


def turns(n=4096):
    """cos + i sin of some rotation, [n,d/2]."""
    angle = torch.arange(n)[:, None] * THETA
    return torch.polar(torch.ones_like(angle), angle).to(DEVICE)


def filled(pair, lengths, slots, windowed, size=1.0, seed=0):
    """A layer's cache that holds random K and V of texts of some lengths."""
    cache = kv.Cache(
        [pair],
        [slots if windowed else None],
        len(lengths),
        4096 if windowed else slots,
        device=DEVICE,
        whole_tokens=True,
    )
    ring = cache.layers[0].rings["coded"]
    assert ring.slots == slots and ring.windowed == windowed
    rng = torch.Generator().manual_seed(seed)
    K, V = (torch.randn((len(lengths), max(lengths), G, D), generator=rng).to(DEVICE) for _ in "KV")
    t = np.arange(max(lengths))
    new = pair.encode(K * size, V, Tokens(turns()[None, : len(t)]))
    ring.write(new, np.where(t < np.array(lengths)[:, None], t, -1))
    return cache.layers[0]


def expected(Q, held, lengths, asking=None):
    """What the PyTorch twin makes of the same cache, in float64."""
    lengths, ring = np.array(lengths), held.rings["coded"]
    stored, positions = ring.read(lengths)
    position = torch.from_numpy(positions).to(DEVICE)
    query = torch.from_numpy((lengths - 1 if asking is None else np.array(asking))[:, None]).to(DEVICE)
    parts_k, parts_v = ring.pair.load(stored, torch.float64)
    tokens = Tokens(turns().to(torch.complex128)[position.clamp(min=0)])
    L = ring.pair.k.scores(Q.double(), parts_k, tokens, SCALE)
    P = attention.softmax(masks.apply_mask(L, masks.visible(query, position, held.window)))
    return ring.pair.v.values(P, parts_v, tokens)


def decoded(Q, held, lengths, asking=None, splits=2, tile=TILE):
    """The same by the kernels."""
    lengths = np.array(lengths)
    query = lengths - 1 if asking is None else np.array(asking)
    step = kernels.Step(*(torch.from_numpy(x.astype(np.int32)).to(DEVICE) for x in (query, lengths)))
    tables = turns().real.contiguous(), turns().imag.contiguous()
    return kernels.decode(Q, held, step, tables, SCALE, splits, tile)


def queries(batch, seed=1):
    return torch.randn((batch, 1, H, D), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(pair, lengths, slots=48, windowed=False, size=1.0, **more):
    """How far kernels and twin are apart."""
    held, Q = filled(pair, lengths, slots, windowed, size), queries(len(lengths))
    return relative(decoded(Q, held, lengths, **more), expected(Q, held, lengths))


def twice(name, dtype="float32", **more):
    """K and V in the same mode, with different constants."""
    return Pair(random_mode(name, dtype, **more), random_mode(name, dtype, **more, seed=1))


CASES = [(mode, dtype) for mode in ("dense", *helpers.MODES) for dtype in STORAGES]


@pytest.mark.parametrize(("mode", "dtype"), [*CASES, ("latent", "spectral")])
def test_a_global_layer(mode, dtype):
    """Rows of different length, none a multiple of the tile, in two splits."""
    pair = Pair(spectral(), spectral(seed=1)) if dtype == "spectral" else twice(mode, dtype)
    assert error(pair, (37, 9)) < TOLERANCE["float32"]


PAIRS = [("contextual", "latent"), ("fixed-a", "contextual"), ("dense", "latent"), ("latent", "fixed-a")]


@pytest.mark.parametrize(("mode_k", "mode_v"), PAIRS)
def test_k_and_v_of_different_modes(mode_k, mode_v):
    """K and V choose their mode by themselves, also where one is shared by all heads and the other is not."""
    pair = Pair(random_mode(mode_k, "int8"), spectral() if mode_v == "latent" else random_mode(mode_v, "float32"))
    assert error(pair, (21,)) < TOLERANCE["float32"]


@pytest.mark.parametrize("mode", ["dense", "contextual", "latent"])
@pytest.mark.parametrize("lengths", [(19, 20), (21, 45), (40, 3)])
def test_a_ring(mode, lengths):
    """Lengths at the edge of a window of 20, beyond it, and around the ring more than once."""
    assert error(twice(mode), lengths, slots=20, windowed=True) < TOLERANCE["float32"]


@pytest.mark.parametrize("window", [4, 5, 6])
def test_the_edge_of_a_window(window):
    """A window that is shorter than what the ring holds."""
    held, Q = filled(twice("dense"), (23,), 20, windowed=True), queries(1)
    held.window = window
    right = expected(Q, held, (23,))
    assert relative(decoded(Q, held, (23,)), right) < TOLERANCE["float32"]
    held.window = window + 1
    assert relative(decoded(Q, held, (23,)), right) > 100 * TOLERANCE["float32"]


@pytest.mark.parametrize("mode", ["dense", "contextual", "latent"])
def test_one_token(mode):
    """A text of one token: all other splits see nothing."""
    assert error(twice(mode), (1, 1), splits=3) < TOLERANCE["float32"]


@pytest.mark.parametrize("mode", ["dense", "contextual", "fixed-a", "fixed-b"])
def test_gaps_of_more_than_a_hundred(mode):
    """Logits hundreds apart, within a tile, between tiles and between splits."""
    held, Q = filled(twice(mode), (45, 30), 48, False, size=400.0), queries(2)
    ring = held.rings["coded"]
    parts_k, _ = ring.pair.load(ring.arrays, torch.float32)
    logits = ring.pair.k.scores(Q, parts_k, Tokens(turns()[None, :48]), SCALE)
    assert float(logits.amax() - logits.amin()) > 500
    assert relative(decoded(Q, held, (45, 30), splits=3), expected(Q, held, (45, 30))) < 1e-4


@pytest.mark.parametrize("splits", [1, 3, 5])
def test_any_number_of_splits(splits):
    """More splits than tiles leave some without a key."""
    assert error(twice("contextual"), (33, 2), splits=splits) < TOLERANCE["float32"]


def test_rows_of_more_than_one_tile():
    """R d = 320 numbers, for K in two pieces, for V in five blocks."""
    pair = Pair(random_mode("fixed-a", "int8", rank=5), random_mode("fixed-a", "float32", rank=5, seed=1))
    assert error(pair, (33, 2)) < TOLERANCE["float32"]


def test_sizes_chosen_by_itself():
    """Without a tile and a number of splits."""
    pair = Pair(random_mode("contextual", "int4"), spectral())
    assert error(pair, (33, 2), splits=None, tile=None) < TOLERANCE["float32"]


@pytest.mark.parametrize("sides", ["kv", "k", "v"])
def test_no_coefficient_at_all(sides):
    """A spectral side that no bit was given holds nothing but its mean."""
    none, some = spectral(()), spectral(seed=2)
    pair = Pair(none if "k" in sides else some, none if "v" in sides else some)
    assert error(pair, (17, 5)) < TOLERANCE["float32"]


@pytest.mark.parametrize("widths", [WIDTHS, ()])
def test_coefficients_of_both(widths):
    """V shares the coefficients of K and holds nothing of its own."""
    pair = Joint(spectral(widths), spectral(widths, seed=1))
    assert list(filled(pair, (9,), 48, False).rings["coded"].arrays) == ["k.C.codes"]
    assert error(pair, (37, 9)) < TOLERANCE["float32"]


def test_what_is_predicted_is_left_to_pytorch():
    """A cache that is predicted from tokens is not read by the kernels."""
    pair = Joint(spectral(), spectral(seed=1))
    assert all(map(kernels.readable, pair.modes))
    assert not kernels.readable(replace(pair.k, predictor=torch.zeros(8, G, D)))


def test_full_rank_fixed_a_is_read_as_heads():
    """A = g I needs no mixing, and is found out once."""
    mode = FixedA(G, D, G, "int8", basis=(G * torch.eye(G)).to(DEVICE))
    assert launch.as_rows(mode).name == "dense" and error(Pair(mode, mode), (17, 5)) < TOLERANCE["float32"]
    assert launch.as_rows(replace(mode, basis=mode.basis.flip(0))).name == "fixed-a"
    real = FixedA(G, D, 1, "float32", basis=torch.ones((1, G)).to(DEVICE))
    assert error(Pair(real, real), (17, 5)) < TOLERANCE["float32"]


def test_a_row_that_takes_no_part():
    """A row that asks from position -1 sees nothing and gives zeros; the others do not notice."""
    held, Q = filled(twice("contextual"), (20, 30), 48, False), queries(2)
    O_bqhe = decoded(Q, held, (20, 30), asking=(-1, 29))
    assert not O_bqhe[0].any()
    assert relative(O_bqhe[1:], expected(Q, held, (20, 30))[1:]) < TOLERANCE["float32"]


# ---- factors of each token ----


@pytest.mark.parametrize(
    ("g", "rank", "kind"), [(4, 2, "random"), (16, 3, "random"), (4, 2, "rank one"), (4, 1, "zero")]
)
def test_factors_of_a_token(g, rank, kind, monkeypatch):
    """The same K from factors made in one launch as from those of `graph`, also where there is less to find."""
    X_bkgd = torch.randn((2, 3, g, 32), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    X_bkgd = {"random": X_bkgd, "zero": X_bkgd * 0}.get(
        kind, X_bkgd[:, :, :1] * torch.arange(1.0, 5)[:, None].to(DEVICE)
    )
    mode = graph.WithoutEigh(g, 32, rank)
    ours = mode.factor(X_bkgd)
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    theirs = mode.factor(X_bkgd)
    K_ours, K_theirs = (torch.einsum("bksg,bksd->bkgd", *of) / rank for of in (ours, theirs))
    assert float((K_ours - K_theirs).abs().max()) <= 1e-4 * float(X_bkgd.abs().max())
    assert all(torch.isfinite(x).all() for x in ours)


# ---- paths through the trellis ----


@pytest.mark.parametrize("widths", [(1,), (8, 6, 5), (7, 4, 4, 3, 2, 2, 1, 1, 1)])
def test_paths_through_the_trellis(widths):
    """The string of every token is the reference's, or as near to its coefficients where products were not rounded."""
    C_ks = np.random.default_rng(len(widths)).standard_normal((6, len(widths))).astype(np.float32)
    C_ks[1] *= 5
    C_ks[2] = 0
    windows_kr = kernels.best_paths(torch.from_numpy(C_ks).to(DEVICE), widths).cpu().numpy()
    expected = reference_codes.best_paths(C_ks, widths)
    np.testing.assert_array_equal(windows_kr[:, 0], expected[:, 0])
    errors = [
        np.square(reference_codes.dequantize(reference_codes.pack(x, widths), widths) - C_ks).sum(-1)
        for x in (windows_kr, expected)
    ]
    np.testing.assert_allclose(*errors, rtol=1e-5)
    assert (windows_kr == expected).mean() > 0.9


# ---- a whole model ----


@pytest.fixture(scope="module")
def config():
    """Two layers, a window of five and a global one."""
    return helpers.config(num_layers=2, is_global=(False, True), head_dim=32, sliding_window=5)


CHOICES = {
    "dense": None,
    "contextual": TPAConfig(mode="contextual", k_rank=1, v_rank=2, kv_dtype="float32"),
    "fixed-b": TPAConfig(mode="fixed-b", k_rank=20, v_rank=16, kv_dtype="int8"),
    "spectral": TPAConfig(mode="latent", rate=3.0, predict=False, prefer="size"),  # with a sink
    "banded": TPAConfig(mode="latent", rate=3.0),
    "V alone": TPAConfig(k_mode="fixed-a", k_rank=2, k_dtype="bfloat16", rate=3.0),
    "newest exact": TPAConfig(mode="latent", k_rank=24, v_rank=24, kv_dtype="int4", sinks=2, recent=3),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_model_decodes_as_the_reference(config, name, monkeypatch):
    """Prefill of two rows of different length, then token by token, past the window: the logits of NumPy.

    Texts of which no number lies between two codes, where the last bit decides which one it gets.
    """
    found, calls = [], []
    right = kernels.decode
    monkeypatch.setattr(kernels, "decode", lambda *args: calls.append(1) or right(*args))
    for backend in (tpa_ref, tpa_torch):
        model = helpers.model(backend, config, device=DEVICE if backend is tpa_torch else "cpu")
        if CHOICES[name]:
            model = backend.convert(model, CHOICES[name])
        cache, ids = model.new_cache(2, 20), helpers.tokens(11, batch=2, seed=3)
        model(ids[:, :7], cache=cache, lengths_b=np.array([7, 4]))
        found.append(np.concatenate([to_numpy(model(ids[:, t : t + 1], cache=cache)) for t in range(7, 11)], 1))
    assert len(calls) == 4 * config.num_layers
    assert relative(found[1], found[0]) < TOLERANCE["transformers"]


def test_where_kernels_do_not_run(config, monkeypatch):
    """Without the switch, in float64, and in heads of a size that no kernel has: the PyTorch path, silently."""
    pair = helpers.model(tpa_torch, config).pairs[0]
    assert kernels.usable(DEVICE, pair, torch.float32)
    assert not kernels.usable(DEVICE, pair, torch.float64)
    assert not kernels.usable(DEVICE, Pair.dense(pair.k.g, 48), torch.float32)
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert not kernels.usable(DEVICE, pair, torch.float32)
    monkeypatch.undo()
    monkeypatch.delenv("TPA_TRITON", raising=False)
    assert not kernels.usable("cpu", pair, torch.float32)


def test_kernels_compile_for_a_gpu(tmp_path):
    """Without a GPU: every form and storage in some combination, within the shared memory of any GPU served; a cache of
    another size compiles nothing anew.
    """
    here = Path(__file__).parent
    path = os.pathsep.join(str(here.parents[1] / folder) for folder in (".", "cuda"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, str(here / "compile_for_gpu.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    names = [name for name, _, _ in lines]
    assert names.count("attend_split") == 7 and names[-2:] == ["factor_token", "path_of_token"]
    assert all(int(shared) <= 99 * 1024 for _, shared, _ in lines)
    assert [cores for name, _, cores in lines if name == "attend_split"] == ["True"] * 6 + ["False"]


# ---- seeded mistakes ----


def dropped_one_over_r(patch):
    patch(launch, "finished", lambda O_bhe, mode: O_bhe)


def splits_of_equal_weight(patch):
    right = launch.merge
    patch(launch, "merge", lambda partial, lse: right(partial, torch.zeros_like(lse)))


def smallest_log_sum_exp(patch):
    right = launch.merge
    patch(launch, "merge", lambda partial, lse: right(partial, 2 * lse.amin(-1, keepdim=True) - lse))


def a_token_too_few(patch):
    right = launch.attend
    patch(launch, "attend", lambda *a: right(*a[:5], kernels.Step(a[5].query_b, a[5].length_b - 1), *a[6:]))


@pytest.mark.parametrize("mistake", [dropped_one_over_r, splits_of_equal_weight, smallest_log_sum_exp, a_token_too_few])
def test_a_mistake_turns_it_red(mistake, monkeypatch):
    """The comparison above sees each of them."""
    mistake(monkeypatch.setattr)
    assert error(twice("contextual"), (37, 9)) > 100 * TOLERANCE["float32"]
