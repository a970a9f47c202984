"""K in two bands, V behind them: triangular transform, strings of codes, slow pairs that are not rebuilt."""

from __future__ import annotations

import numpy as np
import pytest

from tpa_ref.core import banded, codes
from tpa_ref.core.banded import NODES, TILE, BandedLatent, band_features, interpolation, nodes
from tpa_ref.core.mode import Tokens
from tpa_ref.core.rope import frequencies, rope_tables
from tpa_ref.core.transform import spectrum, successive


def some_moments(seed=0, g=2, d=4, tokens=4000):
    """Vectors whose numbers hang together, and what their errors cost."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((tokens, g * d)) @ (rng.standard_normal((g * d, g * d)) + 2 * np.eye(g * d))
    G = rng.standard_normal((g * d, g * d)) * np.geomspace(1, 0.1, g * d)
    shape = g, d, g, d
    return X, (X.T @ X / tokens).reshape(shape), X.mean(0).reshape(g, d), (G.T @ G + 0.1 * np.eye(g * d)).reshape(shape)


def some_keys(base, g=2, d=32, seed=0, groups=1):
    """K's mode with random factors, and codes of 200 tokens; fast pairs know nothing of slow coefficients."""
    rng = np.random.default_rng(seed)
    theta = frequencies(d, base)
    fast, _ = band_features(theta)
    widths = (6, 5, 4, 4, 3), (8, 7, 5, 2, 2, 1, 1)
    B = rng.standard_normal((12, g, d))
    B[5:][..., fast] = 0
    sizes = {"widths": sum(widths, ()), "strings": (5, 7), "theta": theta, "groups": groups}
    return BandedLatent(g, d, 12, "spectral", basis=B, encoder=B, mean=rng.standard_normal((g, d)), **sizes)


# ---- the triangular transform ----


@pytest.mark.parametrize("blocks", [[[0, 2, 5], [1, 3, 4, 6, 7]], [[6, 7], [0, 1, 2], [3, 4, 5]]])
def test_a_triangular_transform_codes_as_well(blocks):
    """Without errors both are F^(1/2) Cov F^(1/2) in other coordinates: the product of the variances, which decides how
    many bits are needed, is the same. Blocks that know nothing of each other need more.
    """
    _, M, mean, F = some_moments()
    blocks = [np.array(block) for block in blocks]
    joint = spectrum(M, mean, [F])
    found = successive(M, mean, [F], blocks, [np.zeros(len(block)) for block in blocks[:-1]])
    assert np.isclose(np.log(found.variance_s).sum(), np.log(joint.variance_s).sum(), atol=0.01)
    alone = successive(M, mean, [F], blocks, [np.ones(len(block)) for block in blocks[:-1]])
    assert np.log(alone.variance_s).sum() > np.log(joint.variance_s).sum() + 0.1


def test_block_after_block_there_and_back():
    """Exact coefficients of all blocks give the vector back, though each block is of what is left; a later row of the
    basis never reaches an earlier block.
    """
    X, M, mean, F = some_moments()
    blocks = [np.array([1, 4, 6]), np.array([0, 2, 3, 5, 7])]
    found = successive(M, mean, [F], blocks, [np.zeros(3)])
    E, B = found.encoder_sgd.reshape(8, 8), found.basis_sgd.reshape(8, 8)
    left = X - mean.ravel()
    for rows in (slice(0, 3), slice(3, 8)):
        left = left - left @ E[rows].T @ B[rows]
    np.testing.assert_allclose(left, 0, atol=1e-9)
    assert (B[3:, blocks[0]] == 0).all() and (B[:3, blocks[1]] != 0).all()


@pytest.mark.parametrize("wrong", [False, True])
def test_its_damage_is_the_predicted_one(wrong):
    """With real codes of Gaussian vectors, tr(F errors) is sum lambda D: mending and prediction are what they claim."""
    rng, n = np.random.default_rng(1), 32
    _, M, _, F = some_moments(g=1, d=n)
    M, F_xx = M.reshape(n, n), F.reshape(n, n)
    X = rng.standard_normal((3000, n)) @ np.linalg.cholesky(M).T
    widths = (5, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 1), (4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 1, 1)
    blocks, D = [np.arange(16), np.arange(16, 32)], np.ones(16)
    D[:12] = codes.DISTORTION[list(widths[0])]
    found = successive(M.reshape(1, n, 1, n), np.zeros((1, n)), [F], blocks, [D])
    E, B = found.encoder_sgd.reshape(n, n), found.basis_sgd.reshape(n, n)
    if wrong:  # errors of the first block are no longer mended
        E[16:, :16] = 0
    left = X
    for start, given in zip((0, 16), widths, strict=True):
        rows = slice(start, start + len(given))
        left = left - codes.dequantize(codes.quantize(left @ E[rows].T, given), given) @ B[rows]
    measured = np.einsum("tx,xy,ty->t", left, F_xx, left).mean()
    D_all = np.ones(n)
    D_all[:16], D_all[16:28] = D, codes.DISTORTION[list(widths[1])]
    assert (abs(measured / (found.variance_s * D_all).sum() - 1) < 0.15) != wrong


# ---- strings of codes ----


def test_each_string_is_of_what_is_left():
    """By hand: two numbers, of which the first is coded in one bit and the second takes what that missed."""
    mode = BandedLatent(
        1, 2, 2, "spectral", widths=(1, 8), strings=(1, 1), basis=np.array([[[1.0, 1.0]], [[0.0, 1.0]]]),
        encoder=np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), mean=np.zeros((1, 2)),
    )  # fmt: skip
    string, C = mode.coded(np.array([[[[0.7, 0.2]]]]))
    assert string.shape == (1, 1, 4) and mode.string_bytes == [2, 2]
    first, second = C[0, 0, 0]
    assert abs(second - (0.2 - first)) < 0.05  # not 0.2, nor 0.2 - 0.7
    np.testing.assert_array_equal(mode.load({"C.codes": string}, np.float64)["C"], C)


def test_a_string_may_be_empty():
    mode = BandedLatent(
        1,
        2,
        1,
        "spectral",
        widths=(3,),
        strings=(0, 1),
        basis=np.ones((1, 1, 2)),
        encoder=np.ones((1, 1, 2)),
        mean=np.zeros((1, 2)),
    )
    string, C = mode.coded(np.ones((1, 3, 1, 2)))
    assert string.shape == (1, 3, 2) and C.shape == (1, 3, 1, 1)


# ---- slow pairs ----


def test_nodes_are_those_of_chebyshev():
    """Where T_4 is zero on the tile."""
    t = 2 * nodes() / (TILE - 1) - 1
    np.testing.assert_allclose(8 * t**4 - 8 * t**2 + 1, 0, atol=1e-12)
    np.testing.assert_allclose(interpolation().sum(0), 1, atol=1e-12)  # a constant stays a constant


@pytest.mark.parametrize("theta_tile", [1.0, 0.5, 0.1])
def test_the_error_is_bounded(theta_tile):
    """Of e^{i theta t}: (theta T / 2)^4 / (2^3 4!), and no bound of it that is half as large holds."""
    t = np.arange(TILE)
    error = np.abs(
        np.exp(1j * theta_tile / TILE * nodes()) @ interpolation() - np.exp(1j * theta_tile / TILE * t)
    ).max()
    bound = (theta_tile / 2) ** NODES / (2 ** (NODES - 1) * 24)
    assert bound / 2 < error <= bound


@pytest.mark.parametrize("base", [1e4, 1e6])
@pytest.mark.parametrize("start", [0, 90_000])
@pytest.mark.parametrize("groups", [1, 2])
def test_logits_without_rebuilding_slow_pairs(base, start, groups):
    """As `Mode.scores`, which turns every key; positions jump where a ring begins anew."""
    rng, mode = np.random.default_rng(0), some_keys(base, groups=groups)
    C = rng.standard_normal((2, 150, groups, 12))
    positions = start + np.stack([np.roll(np.arange(150), 37), np.arange(150)])
    Q = rng.standard_normal((2, 3, 4, 32))
    exact = mode.scores(Q, {"C": C}, Tokens(rope_tables(positions, 32, base)), 0.3)
    found = banded.scores(Q, C, mode, positions, 0.3)
    assert np.abs(found - exact).max() < 1e-3 * np.abs(exact).max()
    shifted = banded.scores(Q, C, mode, positions + 1, 0.3)
    assert np.abs(shifted - exact).max() > 0.1 * np.abs(exact).max()
