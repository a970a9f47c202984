"""Modes: exact at full rank, optimal below it, orthonormal where constant, in step with RoPE; what a token caches."""

from __future__ import annotations

from dataclasses import replace

import helpers
import numpy as np
import pytest
from helpers import MODES, back, backends, part, to

from tpa_ref.core.dense import Dense
from tpa_ref.core.mode import MODES as CLASSES
from tpa_ref.core.mode import Tokens

CONSTANT = ("fixed-a", "fixed-b", "latent")
G, D = 3, 6
FULL = {"contextual": 3, "fixed-a": 3, "fixed-b": 6, "latent": 18}
BELOW = [
    ("contextual", 1),
    ("contextual", 2),
    ("fixed-a", 2),
    ("fixed-b", 1),
    ("fixed-b", 4),
    ("latent", 1),
    ("latent", 7),
]
CONSTANT_BELOW = [(name, rank) for name, rank in BELOW if name in CONSTANT]


def data(g=G, d=D, b=2, k=9, seed=0):
    """Tokens whose heads and features are correlated, so that truncation has something to find. [b,k,g,d]"""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((g * d, g * d)) * 0.6 ** np.arange(g * d)
    return (rng.standard_normal((b, k, g * d)) @ mix.T).reshape(b, k, g, d)


def nowhere(backend, X):
    """Tokens at position 0, which RoPE leaves as they are."""
    return Tokens(part(backend, "core.rope").rope_tables(to(backend, np.zeros(X.shape[:2])), X.shape[-1], 10_000.0))


def made(backend, name, rank, X):
    """A mode whose constant arrays are made of X itself."""
    return helpers.fitted(backend, name, rank, X)


def encoded(backend, X, mode):
    return {name: back(array) for name, array in mode.encode(to(backend, X), nowhere(backend, X)).items()}


def rebuilt(backend, X, mode):
    at = nowhere(backend, X)
    return back(mode.decode(mode.encode(to(backend, X), at), at))


def relative(X, Y):
    return np.linalg.norm(X - Y) / np.linalg.norm(X)


# ---- full rank ----


@pytest.mark.parametrize("name", MODES)
def test_full_rank_is_exact(backend, name):
    """Every mode loses nothing at its exact rank: min(g, d), g, d and g d."""
    X = data()
    mode = made(backend, name, FULL[name], X)
    assert mode.error == 0.0
    np.testing.assert_allclose(rebuilt(backend, X, mode), X, rtol=0, atol=1e-12)


def test_contextual_is_exact_from_the_smaller_side_on(backend):
    """More heads than features: R = d is enough, for the rank of a g x d matrix is at most min(g, d)."""
    X = data(g=5, d=2)
    np.testing.assert_allclose(rebuilt(backend, X, made(backend, "contextual", 2, X)), X, atol=1e-12)


def test_exact_constant_bases_are_identities(backend):
    """At full rank a basis from data would only rotate coordinates: the identity is used, and the error is zero."""
    A, B, C = (made(backend, name, FULL[name], data()) for name in CONSTANT)
    np.testing.assert_array_equal(back(A.basis), 3 * np.eye(3))
    np.testing.assert_array_equal(back(B.basis), np.stack([np.eye(6)] * 3))
    np.testing.assert_array_equal(back(C.basis).reshape(18, 18), np.eye(18))
    assert A.error == B.error == C.error == 0.0 and not any(mode.needs_moments() for mode in (A, B, C))
    contextual = made(backend, "contextual", 2, data())
    assert contextual.arrays() == {} and contextual.error == 0.0


@pytest.mark.parametrize("name", ["contextual", "fixed-a"])
def test_one_kv_head_needs_rank_one_only(backend, name):
    """The paper's R = 1 for MQA models (Gemma 3 1B): a = 1 and b = k, exactly."""
    X = data(g=1)
    mode = made(backend, name, 1, X)
    parts = encoded(backend, X, mode)
    np.testing.assert_allclose(parts["B"], X, atol=1e-14)
    np.testing.assert_allclose(rebuilt(backend, X, mode), X, atol=1e-14)
    if name == "contextual":
        np.testing.assert_allclose(parts["A"], 1.0, atol=1e-14)


# ---- truncation ----


@pytest.mark.parametrize(("name", "rank"), CONSTANT_BELOW)
def test_error_is_the_real_one(backend, name, rank):
    """||X - X_R|| / ||X||, measured on the tokens the constant factor was made from."""
    X = data()
    mode = made(backend, name, rank, X)
    measured = relative(X, rebuilt(backend, X, mode))
    assert measured > 0.01
    assert mode.error == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize(("g", "d"), [(3, 6), (6, 3), (4, 4)])
@pytest.mark.parametrize("rank", [1, 2])
def test_contextual_truncation_is_eckart_youngs_optimum(backend, g, d, rank):
    """Per token no rank-R matrix is closer: the result is np.linalg.svd cut after R values."""
    X = data(g, d)
    U, S, V = np.linalg.svd(X, full_matrices=False)
    best = np.einsum("bkgr,bkr,bkrd->bkgd", U[..., :rank], S[..., :rank], V[..., :rank, :])
    np.testing.assert_allclose(rebuilt(backend, X, made(backend, "contextual", rank, X)), best, atol=1e-10)


def test_contextual_factors_carry_the_1_over_R(backend):
    """a_r = R u_r with |u_r| = 1 and its largest entry positive; b_r = u_r^T X; X_R = (1/R) sum a_r (x) b_r."""
    X = data()
    A, B = (back(x) for x in part(backend, "core.contextual").factor(to(backend, X), 2))
    assert A.shape == (2, 9, 2, 3) and B.shape == (2, 9, 2, 6)
    np.testing.assert_allclose(np.linalg.norm(A, axis=-1), 2.0, atol=1e-12)
    assert (np.take_along_axis(A, np.abs(A).argmax(-1, keepdims=True), -1) > 0).all()
    np.testing.assert_allclose(B, np.einsum("bksg,bkgd->bksd", A / 2, X), atol=1e-12)


def test_contextual_by_hand(backend):
    """One token, two heads: (3, 4) and its double. u = (1, 2)/sqrt 5, so a = (1, 2)/sqrt 5 and b = sqrt 5 (3, 4)."""
    X = np.array([[[[3.0, 4.0], [6.0, 8.0]]]])
    parts = encoded(backend, X, made(backend, "contextual", 1, X))
    np.testing.assert_allclose(parts["A"].ravel(), np.array([1, 2]) / 5**0.5, atol=1e-12)
    np.testing.assert_allclose(parts["B"].ravel(), np.array([3, 4]) * 5**0.5, atol=1e-12)


@pytest.mark.parametrize("name", MODES)
def test_zero_tokens_stay_zero(backend, name):
    """A token of zeros (or all of them) gives neither NaN nor anything else than zero."""
    X = data()
    X[0, 3] = 0
    mode = made(backend, name, 1, X)
    assert (rebuilt(backend, X, mode)[0, 3] == 0).all()
    nothing = made(backend, name, 1, np.zeros_like(X))
    assert nothing.error == 0.0 and (rebuilt(backend, np.zeros_like(X), nothing) == 0).all()


@pytest.mark.parametrize(("name", "rank"), BELOW)
def test_tokens_are_encoded_independently(backend, name, rank):
    """A cache receives one token at a time: its parts must not depend on the others of the chunk."""
    X = data()
    mode = made(backend, name, rank, X)
    together = encoded(backend, X, mode)
    for name, alone in encoded(backend, X[1:, 4:5], mode).items():
        np.testing.assert_allclose(alone[0, 0], together[name][1, 4], atol=1e-12)


# ---- constant bases ----


@pytest.mark.parametrize(("name", "rank"), CONSTANT_BELOW)
def test_constant_bases_are_orthonormal(backend, name, rank):
    """fixed-a: rows R u_r; fixed-b: per head; latent: as vectors of length g d."""
    basis = back(made(backend, name, rank, data()).basis)
    if name == "fixed-a":
        assert basis.shape == (rank, G, D)  # one complex mixture of heads for every RoPE pair
        basis = np.moveaxis(basis[..., : D // 2] + 1j * basis[..., D // 2 :], -1, 0) / rank
    elif name == "fixed-b":
        assert basis.shape == (G, rank, D)
    else:
        assert basis.shape == (rank, G, D)
        basis = basis.reshape(1, rank, G * D)
    for rows in basis:
        np.testing.assert_allclose(rows @ rows.conj().T, np.eye(rank), atol=1e-12)


@pytest.mark.parametrize(("name", "rank"), CONSTANT_BELOW)
def test_encoding_is_least_squares(backend, name, rank):
    """The coefficients are those np.linalg.lstsq finds for tokens the basis has never seen."""
    mode = made(backend, name, rank, data())
    X, basis = data(seed=5), back(mode.basis)
    for token, x in enumerate(X[0]):
        parts = {name: array[0, token] for name, array in encoded(backend, X[:1], mode).items()}
        if name == "fixed-a":
            for i in range(D // 2):
                A, z = (y[..., i] + 1j * y[..., i + D // 2] for y in (basis, x))
                expected = np.linalg.lstsq(A.T / rank, z, rcond=None)[0]
                np.testing.assert_allclose(parts["B"][:, [i, i + D // 2]].T, [expected.real, expected.imag], atol=1e-10)
        elif name == "fixed-b":
            for head in range(G):
                expected = np.linalg.lstsq(basis[head].T, x[head], rcond=None)[0]
                np.testing.assert_allclose(parts["A"][head], expected, atol=1e-10)
        else:
            expected = np.linalg.lstsq(basis.reshape(rank, -1).T, x.ravel(), rcond=None)[0]
            np.testing.assert_allclose(parts["C"], expected, atol=1e-10)


@pytest.mark.parametrize(("name", "rank"), CONSTANT_BELOW)
def test_bases_from_data_beat_random_ones(backend, name, rank):
    """Leading eigenvectors leave out the least: no random orthonormal basis of the same shape does better."""
    X = data()
    mode = made(backend, name, rank, X)
    ours = relative(X, rebuilt(backend, X, mode))
    rng = np.random.default_rng(0)
    for _ in range(10):
        if name == "fixed-a":
            random = rank * np.linalg.qr(rng.standard_normal((G, rank)))[0].T
        elif name == "fixed-b":
            random = np.stack([np.linalg.qr(rng.standard_normal((D, rank)))[0].T for _ in range(G)])
        else:
            random = np.linalg.qr(rng.standard_normal((G * D, rank)))[0].T.reshape(rank, G, D)
        other = mode.with_arrays({"basis": to(backend, random)})
        assert ours <= relative(X, rebuilt(backend, X, other)) + 1e-12


def test_latent_error_is_the_tail_of_the_spectrum():
    """By hand: moment diag(4, 3, 2, 1) with one direction kept leaves sqrt(6/10)."""
    M = np.diag([4.0, 3.0, 2.0, 1.0]).reshape(2, 2, 2, 2)
    mode = CLASSES["latent"].fit(2, 2, 1, "float64", M)
    assert mode.error == pytest.approx(0.6**0.5)
    np.testing.assert_allclose(mode.basis.ravel(), [1, 0, 0, 0], atol=1e-14)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_fixed_b_is_latent_when_there_is_one_kv_head(backend, rank):
    """With g = 1 both store R coefficients in one basis over features: same codes, same K."""
    X = data(g=1)
    fixed_b, latent = (made(backend, name, rank, X) for name in ("fixed-b", "latent"))
    np.testing.assert_allclose(back(fixed_b.basis)[0], back(latent.basis)[:, 0], atol=1e-12)
    np.testing.assert_allclose(encoded(backend, X, fixed_b)["A"][:, :, 0], encoded(backend, X, latent)["C"], atol=1e-12)
    np.testing.assert_allclose(rebuilt(backend, X, fixed_b), rebuilt(backend, X, latent), atol=1e-12)
    assert fixed_b.error == pytest.approx(latent.error, abs=1e-7)


# ---- RoPE on factors ----


def rotated(backend, X, position=7.0):
    """RoPE at one position for every token of X."""
    rope = part(backend, "core.rope")
    tables = rope.rope_tables(to(backend, np.full(X.shape[:2], position)), X.shape[-1], 10_000.0)
    return back(rope.rotate(to(backend, X), *tables))


@pytest.mark.parametrize("name", ["contextual", "fixed-a"])
def test_rope_commutes_with_a(backend, name):
    """Theorem 3.1: rotating b and then forming K is forming K and then rotating it, at any rank."""
    X = data()
    mode = made(backend, name, 2, X)
    assert mode.rotated
    parts = encoded(backend, X, mode)
    parts["B"] = rotated(backend, parts["B"])
    on_factors = back(mode.decode({part: to(backend, array) for part, array in parts.items()}, None))
    np.testing.assert_allclose(on_factors, rotated(backend, rebuilt(backend, X, mode)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "rank"), [("fixed-b", 2), ("latent", 4)])
def test_rope_does_not_commute_with_a_basis_over_features(backend, name, rank):
    """K that lies in the basis leaves it when rotated, so these modes cache K before RoPE and rotate when they read."""
    X = data()
    mode = made(backend, name, rank, X)
    assert not mode.rotated
    inside = rebuilt(backend, X, mode)
    np.testing.assert_allclose(rebuilt(backend, inside, mode), inside, atol=1e-12)
    turned = rotated(backend, inside)
    assert relative(turned, rebuilt(backend, turned, mode)) > 0.1


def test_rotation_keeps_length_and_depends_on_distance_only(backend):
    """R_t is orthogonal, and q_i . k_j is a function of i - j (Eq. 3.5)."""
    rng = np.random.default_rng(8)
    q, k = rng.standard_normal((2, 1, 1, 1, D))
    np.testing.assert_allclose(np.linalg.norm(rotated(backend, q, 123.0)), np.linalg.norm(q), rtol=1e-12)
    near = (rotated(backend, q, 9.0) * rotated(backend, k, 4.0)).sum()
    far = (rotated(backend, q, 1009.0) * rotated(backend, k, 1004.0)).sum()
    other = (rotated(backend, q, 9.0) * rotated(backend, k, 5.0)).sum()
    assert near == pytest.approx(far, abs=1e-9)
    assert abs(near - other) > 1e-3


# ---- what a token caches ----


def test_parts_by_hand():
    """The table of modes for 4B (g = 4, d = 256): R (g + d), R d, g R and R numbers; dense g d."""
    ranks = {"contextual": 2, "fixed-a": 2, "fixed-b": 32, "latent": 512}
    assert {name: CLASSES[name](4, 256, rank).parts() for name, rank in ranks.items()} == {
        "contextual": {"A": (8,), "B": (2, 256)},
        "fixed-a": {"B": (2, 256)},
        "fixed-b": {"A": (4, 32)},
        "latent": {"C": (512,)},
    }
    assert Dense(4, 256).parts() == {"X": (4, 256)}


@pytest.mark.parametrize(("name", "rank"), [("dense", 0), *BELOW])
def test_encoded_parts_have_the_promised_shapes(backend, name, rank):
    """What the cache allocates is what encode returns, and what it stores is what it promises."""
    X = data()
    mode = made(backend, name, rank, X)
    parts = mode.encode(to(backend, X), nowhere(backend, X))
    assert {part: tuple(array.shape[2:]) for part, array in parts.items()} == mode.parts()
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        stored = replace(mode, dtype=dtype).store(parts)
        promised = {field: (shape, kind.name) for field, (shape, kind) in replace(mode, dtype=dtype).fields().items()}
        assert promised == {
            field: (tuple(array.shape[2:]), str(array.dtype).removeprefix("torch.")) for field, array in stored.items()
        }


@pytest.mark.parametrize(("name", "rank"), BELOW)
def test_constant_arrays_have_the_promised_shapes(backend, name, rank):
    """What a saved model is checked against is what `fit` makes."""
    mode = made(backend, name, rank, data())
    for constant, allowed in mode.array_shapes().items():
        x = mode.arrays()[constant]
        assert (None if x is None else tuple(x.shape)) in allowed


@pytest.mark.parametrize(("name", "rank"), BELOW)
def test_both_backends_make_the_same_parts(name, rank):
    """Same parts of the same tokens, sign included."""
    pytest.importorskip("torch")
    tpa_ref, tpa_torch = backends()
    X = data()
    ours, theirs = made(tpa_ref, name, rank, X), made(tpa_torch, name, rank, X)
    for part_, array in encoded(tpa_ref, X, ours).items():
        np.testing.assert_allclose(encoded(tpa_torch, X, theirs)[part_], array, atol=1e-10)
