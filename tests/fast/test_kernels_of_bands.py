"""The Triton decode kernels on `banded` codes against the PyTorch twin; see `test_kernels`."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
test_kernels = pytest.importorskip("test_kernels")  # asks for the interpreter before it imports Triton

from helpers import TOLERANCE
from test_graph import Waits
from test_kernels import DEVICE, THETA, WIDTHS, D, G, asked_for, error, random_mode

from tpa_torch.core.banded import Banded, BandedLatent
from tpa_torch.fast import graph, kernels
from tpa_torch.fast.kernels import launch
from tpa_torch.fast.spectral import BandedLatent as Coder

__all__ = ["asked_for"]  # for every test here
STRINGS = WIDTHS[:9], WIDTHS, WIDTHS[3:]  # of fast K, slow K and V


def banded(strings=STRINGS, seed=0):
    """K in two bands, and V behind them."""
    sides, read = [], 0
    for own, theta in ((strings[:-1], THETA.to(DEVICE)), (strings[-1:], None)):
        rank, before = sum(map(len, own)), read
        read += rank
        made = vars(random_mode("latent", "spectral", read, seed + before))
        made |= {"rank": rank, "before": before, "strings": tuple(map(len, own)), "widths": sum(own, ())}
        made |= {"encoder": made["basis"][before:] * (read / (G * D)) ** 0.5, "theta": theta}  # of unit variance
        sides.append(BandedLatent(**made))
    return Banded(*sides)


@pytest.mark.parametrize("none", ["", "fast", "slow", "v", "fast slow", "fast slow v"])
def test_a_global_layer(none):
    """Rows of different length, in two splits; also where a string has no coefficient at all."""
    strings = [() if name in none.split() else own for name, own in zip(("fast", "slow", "v"), STRINGS, strict=True)]
    assert error(banded(strings), (37, 9)) < TOLERANCE["float32"]


@pytest.mark.parametrize("lengths", [(19, 20), (21, 45), (40, 3)])
def test_a_ring(lengths):
    """Lengths at the edge of a window of 20, beyond it, and around the ring more than once."""
    assert error(banded(), lengths, slots=20, windowed=True) < TOLERANCE["float32"]


def test_sizes_chosen_by_itself():
    """Without a tile and a number of splits."""
    assert error(banded(), (33, 2), splits=None, tile=None) < TOLERANCE["float32"]


def one_scale_for_all_strings(patch):
    right = launch.unpacking
    patch(launch, "unpacking", lambda *args: right(*args) * torch.tensor([1, 1, 1, 1, 0])[:, None].int().to(DEVICE))


def values_from_their_neighbours(patch):
    right = launch.unpacking
    patch(launch, "unpacking", lambda *args: right(*args).roll(1 if len(args) > 2 else 0, 1))


@pytest.mark.parametrize("mistake", [one_scale_for_all_strings, values_from_their_neighbours])
def test_a_mistake_turns_it_red(mistake, monkeypatch):
    """The comparison above sees each of them."""
    mistake(monkeypatch.setattr)
    assert error(banded(), (37, 9)) > 100 * TOLERANCE["float32"]


# ---- as a captured step encodes ----


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
