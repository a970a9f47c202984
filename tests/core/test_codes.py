"""Spectral codes: the trellis against a search through every string, its levels against the bounds of information
theory, and both backends, with and without compiled functions, against each other: the same bytes, the same numbers.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from helpers import ROOT, back, part, to

from tpa_ref.core import codes

LLOYD_MAX = [0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000644, 0.000163, 0.0000413]  # bits 1 to 8


def string_of(packed: np.ndarray) -> str:
    """The bits of one token."""
    return "".join(f"{byte:08b}" for byte in packed)


def by_hand(packed: np.ndarray, widths: tuple[int, ...]) -> list[float]:
    """Coefficients read bit by bit."""
    bits, end, found = string_of(packed), 8, []
    for width in widths:
        end += width
        found.append(float(codes.LEVELS[width, int(bits[end - 8 : end], 2)] * codes.SCALES[packed[0]]))
    return found


@pytest.mark.parametrize("widths", [(3, 2, 2, 1), (4, 4), (8, 1), (2, 2, 2, 2, 1), (1,) * 9])
def test_no_string_is_nearer(widths):
    """The scale as it is, all strings tried: 2,048 to 4,096 of them."""
    rng = np.random.default_rng(len(widths))
    for size in (0.3, 1.0, 4.0):
        C = (size * rng.standard_normal((1, len(widths)))).astype(np.float32)
        packed = codes.quantize(C, widths)[0]
        found = by_hand(packed, widths)
        np.testing.assert_array_equal(codes.dequantize(packed, widths), np.array(found, np.float32))
        least = np.inf
        for free, *choice in itertools.product(range(8), *(range(1 << width) for width in widths)):
            bits = f"{packed[0] // 8 * 8 + free:08b}" + "".join(
                f"{own:0{width}b}" for own, width in zip(choice, widths, strict=True)
            )
            ends = 8 + np.cumsum(widths)
            levels = [codes.LEVELS[width, int(bits[end - 8 : end], 2)] for width, end in zip(widths, ends, strict=True)]
            least = min(least, float(np.square(codes.SCALES[packed[0]] * np.array(levels) - C[0]).sum()))
        assert np.square(found - C[0]).sum() <= least * (1 + 1e-5)


@pytest.mark.parametrize("width", range(1, 9))
def test_error_on_gaussian_numbers(width):
    """The error is the table's, above the rate-distortion bound, and below what the best single levels leave: by a
    quarter and more up to 5 bits, where the bits before still choose.
    """
    X = np.random.default_rng(width).standard_normal((128, 200)).astype(np.float32)
    windows = codes.best_path(X, (width,) * 200, np.zeros(128, int))[:, 1:]
    error = float(np.square(codes.LEVELS[width][windows] - X)[:, 8:].mean())
    assert error == pytest.approx(codes.DISTORTION[width], rel=0.06)
    assert 4.0**-width < error < LLOYD_MAX[width - 1] * (0.78 if width < 6 else 1.1)


def test_distortion_falls_by_less_with_every_bit():
    """So that bits can be given one by one (`compress.bits`)."""
    gains = -np.diff(codes.DISTORTION)
    assert (gains[:-1] > gains[1:]).all()


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0, 10.0])
def test_the_scale_follows_the_token(size):
    """A token that is so many times larger loses as large a share of itself."""
    widths = tuple(sorted(np.random.default_rng(0).integers(1, 6, 100).tolist(), reverse=True))
    C = np.random.default_rng(1).standard_normal((50, 100)).astype(np.float32)
    errors = [np.square(codes.dequantize(codes.quantize(C * x, widths), widths) / x - C).mean() for x in (1.0, size)]
    assert errors[1] < errors[0] * 1.1


def test_a_scale_is_near_the_best_one():
    """As found by trying every scale, on tokens of many sizes with outliers: at most a sixth more error."""
    widths = (4,) * 80 + (2,) * 160
    rng = np.random.default_rng(0)
    weight = 1 / codes.DISTORTION[list(widths)]
    for size in (0.5, 1.0, 4.0):
        C = (size * rng.standard_t(6, (8, 240))).astype(np.float32)
        chosen = codes.choose_scales(C, widths)
        errors = []
        for index in range(0, 256, codes.FREE):
            first = np.full(8, index)
            levels = codes.LEVELS[list(widths), codes.best_path(C / codes.SCALES[index], widths, first)[:, 1:]]
            errors.append((np.square(levels * codes.SCALES[index] - C) * weight).sum(-1))
        errors = np.array(errors)
        assert errors[chosen // codes.FREE, np.arange(8)].sum() < 1.17 * errors.min(0).sum()


def cases():
    rng = np.random.default_rng(3)
    mixed = tuple(sorted(rng.integers(1, 9, 61).tolist(), reverse=True))
    for widths in ((), (5,), (8, 7, 3, 3, 2, 1), mixed, (1,) * 130):
        for tokens in (1, 9, 70):
            C = rng.standard_normal((1, tokens, len(widths))) * np.exp(rng.standard_normal((1, tokens, 1)))
            C[0, 0] *= 1e-20
            C[0, -1, :1] = rng.choice([-1e30, 1e30])
            yield widths, C.astype(np.float32)


def test_the_same_bytes_everywhere(backend):
    """Both backends, any number of tokens, coefficients far beyond every level, none at all."""
    own = part(backend, "core.codes")
    for widths, C in cases():
        expected = codes.quantize(C, widths)
        got = own.quantize(to(backend, C), widths)
        np.testing.assert_array_equal(back(got), expected)
        assert got.shape[-1] == codes.packed_bytes(widths) == (1 + -(-sum(widths) // 8) if widths else 0)
        np.testing.assert_array_equal(back(own.dequantize(got, widths)), codes.dequantize(expected, widths))
        if widths:
            np.testing.assert_array_equal(codes.dequantize(expected, widths)[0, 0], by_hand(expected[0, 0], widths))


@pytest.mark.parametrize("compiled", ["1", "0"])
def test_the_same_bytes_from_the_mode(compiled, monkeypatch):
    """As a model stores them: by compiled functions, and without."""
    torch = pytest.importorskip("torch")
    from tpa_torch.fast.spectral import CodedLatent

    monkeypatch.setenv("TPA_NATIVE", compiled)
    for widths, C in cases():
        mode = CodedLatent(1, 16, len(widths), "spectral", widths=widths)
        got = mode.store({"C": torch.from_numpy(C)})["C.codes"]
        np.testing.assert_array_equal(got.numpy(), codes.quantize(C, widths))


@pytest.mark.parametrize("mistake", ["greedy", "window", "order"])
def test_mistakes_are_seen(mistake, monkeypatch):
    """Choosing one by one instead of the best path; a window one bit too early; bytes in the wrong order."""
    if mistake == "greedy":

        def greedy(X_ks, widths, first_k):
            windows, before = [first_k], first_k
            for width, x in zip(widths, X_ks.T, strict=True):
                own = np.arange(1 << width)[:, None] + ((before.astype(int) << width) & 255)
                before = np.take_along_axis(own, np.abs(codes.LEVELS[width][own] - x).argmin(0)[None], 0)[0]
                windows.append(before)
            return np.stack(windows, 1).astype(np.uint8)

        monkeypatch.setattr(codes, "best_path", greedy)
        failing = lambda: test_no_string_is_nearer((1,) * 9)  # noqa: E731
    elif mistake == "window":
        places = codes.places
        monkeypatch.setattr(codes, "places", lambda widths: (*places(widths)[:2], places(widths)[2] % 8 + 1))
        failing = lambda: test_no_string_is_nearer((3, 2, 2, 1))  # noqa: E731
    else:
        pack = codes.pack
        flipped = [0, 2, 1]
        monkeypatch.setattr(codes, "pack", lambda windows, widths: pack(windows, widths)[:, flipped])
        failing = lambda: test_no_string_is_nearer((8, 1))  # noqa: E731
    with pytest.raises(AssertionError):
        failing()


def test_the_levels_come_from_the_script():
    """One round of `scripts/train_levels.py` from the shipped levels of 3 bits changes next to nothing."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import train_levels

    levels = codes.LEVELS[3].copy()
    X = np.random.default_rng(5).standard_normal((192, 256)).astype(np.float32)
    _, sums, counts = train_levels.error_and_sums(levels, 3, X)
    np.testing.assert_array_equal(codes.LEVELS[3], levels)
    moved = np.abs(sums / np.maximum(counts, 1) - levels)[counts > 50]
    assert len(moved) > 200 and np.median(moved) < 0.02
