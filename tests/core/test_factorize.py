"""Factors of K and V: exact at full rank, optimal below it, orthonormal where constant, in step with norm and RoPE."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import MODES, back, backends, part, to

from tpa_ref.core.factorize import Factorization, numbers_per_token, part_shapes
from tpa_ref.gemma.config import GemmaConfig

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


def data(g=G, d=D, b=2, k=9, seed=0):
    """Tokens whose heads and features are correlated, so that truncation has something to find. [b,k,g,d]"""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((g * d, g * d)) * 0.6 ** np.arange(g * d)
    return (rng.standard_normal((b, k, g * d)) @ mix.T).reshape(b, k, g, d)


def moment(X):
    """E[x x^T] of flattened tokens, written out."""
    g, d = X.shape[2:]
    flat = X.reshape(-1, g * d)
    return (sum(np.outer(x, x) for x in flat) / len(flat)).reshape(g, d, g, d)


def made(backend, mode, rank, X):
    """How a mode at a rank factorizes, its constant factor taken from X itself."""
    basis, error = part(backend, "factorize").constant_basis(mode, rank, to(backend, moment(X)))
    return Factorization(mode, rank, "float64", basis, error)


def encoded(backend, X, how):
    return {name: back(array) for name, array in part(backend, "factorize").encode(to(backend, X), how).items()}


def rebuilt(backend, X, how):
    factorize = part(backend, "factorize")
    return back(factorize.decode(factorize.encode(to(backend, X), how), how, X.shape[2]))


def relative(X, Y):
    return np.linalg.norm(X - Y) / np.linalg.norm(X)


# ---- full rank ----


@pytest.mark.parametrize("mode", MODES)
def test_full_rank_is_exact(backend, mode):
    """Every mode loses nothing at its exact rank: min(g, d), g, d and g d."""
    X = data()
    how = made(backend, mode, FULL[mode], X)
    assert how.error == 0.0
    np.testing.assert_allclose(rebuilt(backend, X, how), X, rtol=0, atol=1e-12)


def test_contextual_is_exact_from_the_smaller_side_on(backend):
    """More heads than features: R = d is enough, for the rank of a g x d matrix is at most min(g, d)."""
    X = data(g=5, d=2)
    np.testing.assert_allclose(rebuilt(backend, X, Factorization("contextual", 2)), X, atol=1e-12)


def test_exact_contextual_factors_are_one_hot(backend):
    """The GQA cache written as Eq. (3.1): b_r is head r, a_r = R e_r; the 1/R gives K back."""
    X = data()
    A, B = (back(x) for x in part(backend, "factorize").exact_contextual(to(backend, X)))
    np.testing.assert_array_equal(A, np.broadcast_to(3 * np.eye(3), A.shape))
    np.testing.assert_array_equal(B, X)
    np.testing.assert_allclose(sum(A[:, :, r, :, None] * B[:, :, r, None] for r in range(3)) / 3, X, atol=1e-14)


def test_exact_constant_bases_are_identities(backend):
    """At full rank a basis from data would only rotate coordinates: the identity is used, and the error is zero."""
    M = to(backend, moment(data()))
    constant_basis = part(backend, "factorize").constant_basis
    A, _ = constant_basis("fixed-a", 3, M)
    np.testing.assert_array_equal(back(A), 3 * np.eye(3))
    B, _ = constant_basis("fixed-b", 6, M)
    np.testing.assert_array_equal(back(B), np.stack([np.eye(6)] * 3))
    C, _ = constant_basis("latent", 18, M)
    np.testing.assert_array_equal(back(C).reshape(18, 18), np.eye(18))
    assert constant_basis("contextual", 2, M) == (None, 0.0)


@pytest.mark.parametrize("mode", ["contextual", "fixed-a"])
def test_one_kv_head_needs_rank_one_only(backend, mode):
    """The paper's R = 1 for MQA models (Gemma 3 1B): a = 1 and b = k, exactly."""
    X = data(g=1)
    how = made(backend, mode, 1, X)
    parts = encoded(backend, X, how)
    np.testing.assert_allclose(parts["B"], X, atol=1e-14)
    np.testing.assert_allclose(rebuilt(backend, X, how), X, atol=1e-14)
    if mode == "contextual":
        np.testing.assert_allclose(parts["A"], 1.0, atol=1e-14)


# ---- truncation ----


@pytest.mark.parametrize(("mode", "rank"), BELOW)
def test_returned_error_is_the_real_one(backend, mode, rank):
    """||X - X_R|| / ||X||, measured on the tokens the constant factor was made from."""
    X = data()
    if mode == "contextual":
        error = part(backend, "factorize").truncate_contextual(to(backend, X), rank)[2]
        how = Factorization(mode, rank)
    else:
        how = made(backend, mode, rank, X)
        error = how.error
    measured = relative(X, rebuilt(backend, X, how))
    assert measured > 0.01
    assert error == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize(("g", "d"), [(3, 6), (6, 3), (4, 4)])
@pytest.mark.parametrize("rank", [1, 2])
def test_contextual_truncation_is_eckart_youngs_optimum(backend, g, d, rank):
    """Per token no rank-R matrix is closer: the result is np.linalg.svd cut after R values."""
    X = data(g, d)
    U, S, V = np.linalg.svd(X, full_matrices=False)
    best = np.einsum("bkgr,bkr,bkrd->bkgd", U[..., :rank], S[..., :rank], V[..., :rank, :])
    np.testing.assert_allclose(rebuilt(backend, X, Factorization("contextual", rank)), best, atol=1e-10)


def test_contextual_factors_carry_the_1_over_R(backend):
    """a_r = R u_r with |u_r| = 1 and its largest entry positive; b_r = u_r^T X; X_R = (1/R) sum a_r (x) b_r."""
    X = data()
    A, B, _ = (back(x) for x in part(backend, "factorize").truncate_contextual(to(backend, X), 2))
    assert A.shape == (2, 9, 2, 3) and B.shape == (2, 9, 2, 6)
    np.testing.assert_allclose(np.linalg.norm(A, axis=-1), 2.0, atol=1e-12)
    assert (np.take_along_axis(A, np.abs(A).argmax(-1, keepdims=True), -1) > 0).all()
    np.testing.assert_allclose(B, np.einsum("bksg,bkgd->bksd", A / 2, X), atol=1e-12)


def test_contextual_by_hand(backend):
    """One token, two heads: (3, 4) and its double. u = (1, 2)/sqrt 5, so a = (1, 2)/sqrt 5 and b = sqrt 5 (3, 4)."""
    X = np.array([[[[3.0, 4.0], [6.0, 8.0]]]])
    parts = encoded(backend, X, Factorization("contextual", 1))
    np.testing.assert_allclose(parts["A"].ravel(), np.array([1, 2]) / 5**0.5, atol=1e-12)
    np.testing.assert_allclose(parts["B"].ravel(), np.array([3, 4]) * 5**0.5, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_zero_tokens_stay_zero(backend, mode):
    """A token of zeros (or all of them) gives neither NaN nor anything else than zero."""
    X = data()
    X[0, 3] = 0
    how = made(backend, mode, 1, X)
    assert (rebuilt(backend, X, how)[0, 3] == 0).all()
    nothing = made(backend, mode, 1, np.zeros_like(X))
    assert nothing.error == 0.0 and (rebuilt(backend, np.zeros_like(X), nothing) == 0).all()


@pytest.mark.parametrize(("mode", "rank"), BELOW)
def test_tokens_are_encoded_independently(backend, mode, rank):
    """A cache receives one token at a time: its parts must not depend on the others of the chunk."""
    X = data()
    how = made(backend, mode, rank, X)
    together = encoded(backend, X, how)
    for name, alone in encoded(backend, X[1:, 4:5], how).items():
        np.testing.assert_allclose(alone[0, 0], together[name][1, 4], atol=1e-12)


# ---- constant bases ----


@pytest.mark.parametrize(("mode", "rank"), [(mode, rank) for mode, rank in BELOW if mode != "contextual"])
def test_constant_bases_are_orthonormal(backend, mode, rank):
    """fixed-a: rows R u_r; fixed-b: per head; latent: as vectors of length g d."""
    basis = back(made(backend, mode, rank, data()).basis)
    if mode == "fixed-a":
        assert basis.shape == (rank, G, D)  # one complex mixture of heads for every RoPE pair
        basis = np.moveaxis(basis[..., : D // 2] + 1j * basis[..., D // 2 :], -1, 0) / rank
    elif mode == "fixed-b":
        assert basis.shape == (G, rank, D)
    else:
        assert basis.shape == (rank, G, D)
        basis = basis.reshape(1, rank, G * D)
    for rows in basis:
        np.testing.assert_allclose(rows @ rows.conj().T, np.eye(rank), atol=1e-12)


@pytest.mark.parametrize(("mode", "rank"), [(mode, rank) for mode, rank in BELOW if mode != "contextual"])
def test_encoding_is_least_squares(backend, mode, rank):
    """The coefficients are those np.linalg.lstsq finds for tokens the basis has never seen."""
    how = made(backend, mode, rank, data())
    X, basis = data(seed=5), back(how.basis)
    for token, x in enumerate(X[0]):
        parts = {name: array[0, token] for name, array in encoded(backend, X[:1], how).items()}
        if mode == "fixed-a":
            for i in range(D // 2):
                A, z = (y[..., i] + 1j * y[..., i + D // 2] for y in (basis, x))
                expected = np.linalg.lstsq(A.T / rank, z, rcond=None)[0]
                np.testing.assert_allclose(parts["B"][:, [i, i + D // 2]].T, [expected.real, expected.imag], atol=1e-10)
        elif mode == "fixed-b":
            for head in range(G):
                expected = np.linalg.lstsq(basis[head].T, x[head], rcond=None)[0]
                np.testing.assert_allclose(parts["A"][head], expected, atol=1e-10)
        else:
            expected = np.linalg.lstsq(basis.reshape(rank, -1).T, x.ravel(), rcond=None)[0]
            np.testing.assert_allclose(parts["C"], expected, atol=1e-10)


@pytest.mark.parametrize(("mode", "rank"), [(mode, rank) for mode, rank in BELOW if mode != "contextual"])
def test_bases_from_data_beat_random_ones(backend, mode, rank):
    """Leading eigenvectors leave out the least: no random orthonormal basis of the same shape does better."""
    X = data()
    how = made(backend, mode, rank, X)
    ours = relative(X, rebuilt(backend, X, how))
    rng = np.random.default_rng(0)
    for _ in range(10):
        if mode == "fixed-a":
            random = rank * np.linalg.qr(rng.standard_normal((G, rank)))[0].T
        elif mode == "fixed-b":
            random = np.stack([np.linalg.qr(rng.standard_normal((D, rank)))[0].T for _ in range(G)])
        else:
            random = np.linalg.qr(rng.standard_normal((G * D, rank)))[0].T.reshape(rank, G, D)
        other = Factorization(mode, rank, "float64", to(backend, random))
        assert ours <= relative(X, rebuilt(backend, X, other)) + 1e-12


def test_latent_error_is_the_tail_of_the_spectrum(backend):
    """By hand: moment diag(4, 3, 2, 1) with one direction kept leaves sqrt(6/10)."""
    M = np.diag([4.0, 3.0, 2.0, 1.0]).reshape(2, 2, 2, 2)
    basis, error = part(backend, "factorize").truncate_latent(to(backend, M), 1)
    assert error == pytest.approx(0.6**0.5)
    np.testing.assert_allclose(back(basis).ravel(), [1, 0, 0, 0], atol=1e-14)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_fixed_b_is_latent_when_there_is_one_kv_head(backend, rank):
    """With g = 1 both store R coefficients in one basis over features: same codes, same K."""
    X = data(g=1)
    fixed_b, latent = (made(backend, mode, rank, X) for mode in ("fixed-b", "latent"))
    np.testing.assert_allclose(back(fixed_b.basis)[0], back(latent.basis)[:, 0], atol=1e-12)
    np.testing.assert_allclose(encoded(backend, X, fixed_b)["A"][:, :, 0], encoded(backend, X, latent)["C"], atol=1e-12)
    np.testing.assert_allclose(rebuilt(backend, X, fixed_b), rebuilt(backend, X, latent), atol=1e-12)
    assert fixed_b.error == pytest.approx(latent.error, abs=1e-7)


# ---- moments from weights ----


def test_moment_of_values_from_weights(backend):
    """The input is white noise times 1 + w: E[v v^T] is the sum over unit inputs of what each of them gives."""
    rng = np.random.default_rng(2)
    W, norm = rng.standard_normal((2, 3, 7)), rng.standard_normal(7) * 0.3
    expected = np.zeros((6, 6))
    for m in range(7):
        unit = np.zeros(7)
        unit[m] = 1 + norm[m]
        value = (W @ unit).ravel()
        expected += np.outer(value, value)
    found = part(backend, "factorize").moment_from_weights(to(backend, W), to(backend, norm))
    np.testing.assert_allclose(back(found).reshape(6, 6), expected, atol=1e-12)


def test_moment_of_keys_from_weights(backend):
    """QK-norm brings every head to rms 1 before its gain: mean square 1 per feature, then columns times 1 + w."""
    rng = np.random.default_rng(3)
    W, norm, k_norm = rng.standard_normal((2, 4, 7)), rng.standard_normal(7) * 0.3, rng.standard_normal(4) * 0.3
    W[1] *= 50  # the norm takes the size of a head away
    heads = []
    for head in W:
        scaled = head @ np.diag(1 + norm)
        power = np.trace(scaled @ scaled.T) / 4
        heads.append(np.diag(1 + k_norm) @ scaled / power**0.5)
    expected = np.concatenate(heads) @ np.concatenate(heads).T
    found = back(part(backend, "factorize").moment_from_weights(to(backend, W), to(backend, norm), to(backend, k_norm)))
    np.testing.assert_allclose(found.reshape(8, 8), expected, atol=1e-12)
    for head in range(2):
        power = np.diag(found[head, :, head]) / (1 + k_norm) ** 2
        assert power.mean() == pytest.approx(1.0)


# ---- queries ----


def test_query_heads_at_full_rank_are_exact(backend):
    """q_rank = h: W_Q = sum_r a_r (x) W_r comes back."""
    W = np.random.default_rng(4).standard_normal((4, 3, 5))
    A, W_r, error = part(backend, "factorize").truncate_query_heads(to(backend, W), 4)
    np.testing.assert_allclose(np.einsum("rh,rdm->hdm", back(A), back(W_r)), W, atol=1e-12)
    assert error < 1e-7


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_query_heads_below_are_the_svd_of_w_q(backend, rank):
    """Smaller q_rank: the SVD of W_Q as a matrix of heads by (features x width), cut after R values."""
    W = np.random.default_rng(5).standard_normal((4, 3, 5))
    U, S, V = np.linalg.svd(W.reshape(4, 15), full_matrices=False)
    best = (U[:, :rank] * S[:rank] @ V[:rank]).reshape(4, 3, 5)
    A, W_r, error = part(backend, "factorize").truncate_query_heads(to(backend, W), rank)
    assert tuple(A.shape) == (rank, 4) and tuple(W_r.shape) == (rank, 3, 5)
    np.testing.assert_allclose(np.einsum("rh,rdm->hdm", back(A), back(W_r)), best, atol=1e-12)
    assert error == pytest.approx(np.sqrt(np.square(S[rank:]).sum() / np.square(S).sum()), rel=1e-9)


# ---- QK-norm and RoPE on factors ----


def normed(K, w, eps=1e-6):
    """RMSNorm written out."""
    return K / np.sqrt((K**2).mean(-1, keepdims=True) + eps) * (1 + w)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_fold_into_contextual_is_exact(backend, rank):
    """RMSNorm of K = (1/R) sum a (x) b equals the K of the folded factors: the norm needs no new factorization."""
    rng = np.random.default_rng(6)
    A, B, w = rng.standard_normal((2, 4, rank, G)), rng.standard_normal((2, 4, rank, D)), rng.standard_normal(D)
    K = np.einsum("bksg,bksd->bkgd", A, B) / rank
    fold = part(backend, "norm").fold_into_contextual
    A2, B2 = (back(x) for x in fold(to(backend, A), to(backend, B), to(backend, w)))
    np.testing.assert_allclose(np.einsum("bksg,bksd->bkgd", A2, B2) / rank, normed(K, w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_fold_into_fixed_b_is_exact(backend, rank):
    """The same for a constant B per head: 1/rms goes into the coefficients, 1 + w into B."""
    rng = np.random.default_rng(7)
    A, B, w = rng.standard_normal((2, 4, G, rank)), rng.standard_normal((G, rank, D)), rng.standard_normal(D)
    K = np.einsum("bkgs,gsd->bkgd", A, B)
    fold = part(backend, "norm").fold_into_fixed_b
    A2, B2 = (back(x) for x in fold(to(backend, A), to(backend, B), to(backend, w)))
    np.testing.assert_allclose(np.einsum("bkgs,gsd->bkgd", A2, B2), normed(K, w), rtol=0, atol=1e-12)


def rotated(backend, X, position=7.0):
    """RoPE at one position for every token of X."""
    rope = part(backend, "rope")
    tables = rope.rope_tables(to(backend, np.full(X.shape[:2], position)), X.shape[-1], 10_000.0)
    return back(rope.rotate(to(backend, X), *tables))


@pytest.mark.parametrize("mode", ["contextual", "fixed-a"])
def test_rope_commutes_with_a(backend, mode):
    """Theorem 3.1: rotating b and then forming K is forming K and then rotating it, at any rank."""
    X = data()
    how = made(backend, mode, 2, X)
    assert how.rotated
    parts = encoded(backend, X, how)
    parts["B"] = rotated(backend, parts["B"])
    on_factors = back(
        part(backend, "factorize").decode({name: to(backend, array) for name, array in parts.items()}, how, G)
    )
    np.testing.assert_allclose(on_factors, rotated(backend, rebuilt(backend, X, how)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mode", "rank"), [("fixed-b", 2), ("latent", 4)])
def test_rope_does_not_commute_with_a_basis_over_features(backend, mode, rank):
    """K that lies in the basis leaves it when rotated, so these modes cache K before RoPE and rotate when they read."""
    X = data()
    how = made(backend, mode, rank, X)
    assert not how.rotated
    inside = rebuilt(backend, X, how)
    np.testing.assert_allclose(rebuilt(backend, inside, how), inside, atol=1e-12)
    turned = rotated(backend, inside)
    assert relative(turned, rebuilt(backend, turned, how)) > 0.1


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


def test_part_shapes_and_numbers_per_token_by_hand():
    """The table of modes for 4B (g = 4, d = 256): R (g + d), R d, g R and R numbers; dense g d."""
    assert part_shapes("contextual", 2, 4, 256) == {"A": (8,), "B": (2, 256)}
    assert part_shapes("fixed-a", 2, 4, 256) == {"B": (2, 256)}
    assert part_shapes("fixed-b", 32, 4, 256) == {"A": (4, 32)}
    assert part_shapes("latent", 512, 4, 256) == {"C": (512,)}
    config = GemmaConfig.gemma3_4b()
    found = {mode: numbers_per_token(mode, 2, config) for mode in ("dense", *MODES)}
    assert found == {"dense": 1024, "contextual": 520, "fixed-a": 512, "fixed-b": 8, "latent": 2}


@pytest.mark.parametrize(("mode", "rank"), BELOW)
def test_encoded_parts_have_the_promised_shapes(backend, mode, rank):
    """What the cache allocates is what encode returns."""
    X = data()
    found = {name: array.shape[2:] for name, array in encoded(backend, X, made(backend, mode, rank, X)).items()}
    assert found == part_shapes(mode, rank, G, D)


@pytest.mark.parametrize(("mode", "rank"), BELOW)
def test_both_backends_make_the_same_factors(mode, rank):
    """Same bases and same parts, sign included."""
    pytest.importorskip("torch")
    tpa_ref, tpa_torch = backends()
    X = data()
    ours, theirs = made(tpa_ref, mode, rank, X), made(tpa_torch, mode, rank, X)
    if mode in CONSTANT:
        np.testing.assert_allclose(back(theirs.basis), ours.basis, atol=1e-10)
        assert theirs.error == pytest.approx(ours.error, abs=1e-9)
    for name, array in encoded(tpa_ref, X, ours).items():
        np.testing.assert_allclose(encoded(tpa_torch, X, theirs)[name], array, atol=1e-10)
