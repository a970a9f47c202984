"""The Triton decode kernels on `banded` codes against the PyTorch twin; see `test_kernels`."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
test_kernels = pytest.importorskip("test_kernels")  # asks for the interpreter before it imports Triton

from dataclasses import replace

import numpy as np
from helpers import TOLERANCE, relative, to_numpy
from test_graph import Waits
from test_kernels import DEVICE, SCALE, THETA, WIDTHS, D, G, H, asked_for, decoded, filled, queries, random_mode, turns

from tpa_ref.core.banded import TILE, band_features, tile_scores
from tpa_torch.core import attention, masks
from tpa_torch.core.banded import Banded, BandedLatent
from tpa_torch.fast import graph, kernels
from tpa_torch.fast.kernels import absorbed, launch
from tpa_torch.fast.spectral import BandedLatent as Coder

__all__ = ["asked_for"]  # for every test here
STRINGS = WIDTHS[:9], WIDTHS, WIDTHS[3:]  # of fast K, slow K and V


def banded(strings=STRINGS, seed=0, groups=1):
    """K in two bands, and V behind them."""
    sides, read = [], 0
    for own, theta in ((strings[:-1], THETA.to(DEVICE)), (strings[-1:], None)):
        rank, before = sum(map(len, own)), read
        read += rank
        made = vars(random_mode("latent", "spectral", read, seed + before))
        made |= {"rank": rank, "before": before, "strings": tuple(map(len, own)), "widths": sum(own, ())}
        made |= {"groups": groups}
        made |= {"encoder": made["basis"][before:] * (read / (G * D)) ** 0.5, "theta": theta}  # of unit variance
        sides.append(BandedLatent(**made))
    fast, _ = band_features(THETA.numpy())
    sides[0].basis[len(strings[0]) :, :, fast] = 0  # slow coefficients say nothing of fast pairs
    return Banded(*sides)


def expected(Q, held, lengths):
    """By the reference's tiles, here of slots, in float64: of each tile once for every lap of the ring in it."""
    lengths, ring = np.array(lengths), held.rings["coded"]
    stored, positions_bk = ring.read(lengths)
    (parts_k, parts_v), K = ring.pair.load(stored, torch.float64), ring.pair.k
    mode = replace(K, **{name: None if x is None else to_numpy(x) for name, x in K.arrays().items()})
    Q_bqhd, C_bkjs = to_numpy(Q.double()), to_numpy(parts_k["C"])
    origin_bk = positions_bk - np.arange(positions_bk.shape[1])
    L_bhqk = np.zeros((len(Q), H, 1, positions_bk.shape[1]))
    for row, origin_k in enumerate(origin_bk):
        for start in range(0, len(origin_k), TILE):
            tile = slice(start, start + TILE)
            for origin in np.unique(origin_k[tile][positions_bk[row, tile] >= 0]):
                found = tile_scores(Q_bqhd[row], C_bkjs[row, tile], mode, origin + start)
                L_bhqk[row, :, :, tile] += np.where(origin_k[tile] == origin, found, 0) * SCALE
    query, position = (torch.from_numpy(x).to(DEVICE) for x in (lengths[:, None] - 1, positions_bk))
    seen = masks.visible(query, position, held.window)
    P = attention.softmax(masks.apply_mask(torch.from_numpy(L_bhqk).to(DEVICE), seen))
    return ring.pair.v.values(P, parts_v, None)


def error(pair, lengths, slots=48, windowed=False, **more):
    """How far kernels and reference are apart."""
    held, Q = filled(pair, lengths, slots, windowed), queries(len(lengths))
    return relative(decoded(Q, held, lengths, **more), expected(Q, held, lengths))


@pytest.mark.parametrize("none", ["", "fast", "slow", "v", "fast slow", "fast slow v"])
def test_a_global_layer(none):
    """Rows of different length, in two splits; also where a string has no coefficient at all."""
    strings = [() if name in none.split() else own for name, own in zip(("fast", "slow", "v"), STRINGS, strict=True)]
    assert error(banded(strings), (37, 9)) < TOLERANCE["float32"]


@pytest.mark.parametrize(("slots", "lengths"), [(20, (19, 20)), (20, (21, 45)), (150, (331, 3)), (150, (300, 364))])
def test_a_ring(slots, lengths):
    """Lengths at the edge of a window, beyond it, and around the ring more than once, so that laps meet in a tile or
    between two of them.
    """
    assert error(banded(), lengths, slots=slots, windowed=True) < TOLERANCE["float32"]


@pytest.mark.parametrize("tokens", [16, 64, 128, None])
def test_tiles(tokens):
    """A text of several tiles, in programs of some tokens each, or as is chosen where nothing is asked for."""
    tile = tokens and launch.Tile(tokens, 64, 16)
    assert error(banded(), (197, 65), slots=200, splits=tokens and 3, tile=tile) < TOLERANCE["float32"]


@pytest.mark.parametrize(("g", "h", "d", "groups"), [(1, 4, 64, 1), (2, 4, 32, 2), (2, 16, 128, 1), (4, 8, 32, 2)])
def test_other_heads(g, h, d, groups, monkeypatch):
    """One KV head, small ones in groups of one and two, and more queries than a matrix product has rows at least."""
    for name, size in zip("GHD", (g, h, d), strict=True):
        monkeypatch.setattr(test_kernels, name, size)
        monkeypatch.setitem(globals(), name, size)
    monkeypatch.setattr(test_kernels, "THETA", torch.logspace(0, -3, d // 2))
    monkeypatch.setitem(globals(), "THETA", test_kernels.THETA)
    assert error(banded(groups=groups), (37, 9)) < TOLERANCE["float32"]


def test_how_little_interpolation_changes():
    """Beside K rebuilt and turned, as PyTorch does it."""
    assert 1e-6 < test_kernels.error(banded(), (37, 9)) < 1e-3


def one_scale_for_all_strings(patch):
    right = launch.unpacking
    patch(launch, "unpacking", lambda *args: right(*args) * torch.tensor([1, 1, 1, 1, 0])[:, None].int().to(DEVICE))


def laps_taken_for_one(patch):
    right = launch.at_nodes
    patch(launch, "at_nodes", lambda *args: right(*args)[:, :, :1].expand(-1, -1, args[4], -1, -1, -1).contiguous())


def nodes_at_even_distances(patch):
    patch(absorbed, "nodes", lambda: np.linspace(0, TILE - 1, 4)[::-1])


def values_from_their_neighbours(patch):
    right = launch.unpacking
    patch(launch, "unpacking", lambda *args: right(*args).roll(1 if len(args) > 2 else 0, 1))


@pytest.mark.parametrize(
    "mistake",
    [one_scale_for_all_strings, values_from_their_neighbours, laps_taken_for_one, nodes_at_even_distances],
)
def test_a_mistake_turns_it_red(mistake, monkeypatch):
    """The comparison above sees each of them."""
    mistake(monkeypatch.setattr)
    assert error(banded(), (30, 9), slots=20, windowed=True) > 100 * TOLERANCE["float32"]


# ---- in a captured step ----


def test_absorbing_waits_for_nothing():
    """Once the constants of a layer are made."""
    pair, length_b, tables = banded(), torch.tensor([30, 9]).int().to(DEVICE), (turns().real, turns().imag)
    for _ in range(2):
        with Waits() as waits:
            absorbed.at_nodes(queries(2)[:, 0], absorbed.bands_of(pair.k, torch.float32), length_b, 20, 2, tables)
    assert not waits.found


def test_encoding_waits_for_nothing(monkeypatch):
    """All that a GPU does of it, but for the kernel that finds the paths; and it computes in full precision."""
    pair = banded()
    coders = [Coder(**vars(graph.static(mode, torch.bfloat16))) for mode in pair.modes]
    assert all(x.dtype == torch.float32 for mode in coders for x in mode.arrays().values() if x is not None)
    monkeypatch.setattr(
        kernels, "best_paths", lambda C_ks, widths: C_ks.new_zeros(len(C_ks), 1 + len(widths), dtype=torch.uint8)
    )
    K, V = torch.ones((2, 2, 1, G, D), dtype=torch.bfloat16, device=DEVICE)
    Banded(*coders).encode(K, V, None)  # makes the constants
    with Waits() as waits:
        Banded(*coders).encode(K, V, None)
    assert not waits.found
