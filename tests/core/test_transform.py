"""Second moments from weights and head-mixing ranks of Q, against sums and SVDs written out. They live once, in NumPy;
`compress` calls them for models of both backends.
"""

from __future__ import annotations

import numpy as np
import pytest

from tpa_ref.core.transform import moment_from_weights, truncate_query_heads

# ---- moments from weights ----


def test_moment_of_values_from_weights():
    """The input is white noise times 1 + w: E[v v^T] is the sum over unit inputs of what each of them gives."""
    rng = np.random.default_rng(2)
    W, norm = rng.standard_normal((2, 3, 7)), rng.standard_normal(7) * 0.3
    expected = np.zeros((6, 6))
    for m in range(7):
        unit = np.zeros(7)
        unit[m] = 1 + norm[m]
        value = (W @ unit).ravel()
        expected += np.outer(value, value)
    found = moment_from_weights(W, norm)
    np.testing.assert_allclose(found.reshape(6, 6), expected, atol=1e-12)


def test_moment_of_keys_from_weights():
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
    found = moment_from_weights(W, norm, k_norm)
    np.testing.assert_allclose(found.reshape(8, 8), expected, atol=1e-12)
    for head in range(2):
        power = np.diag(found[head, :, head]) / (1 + k_norm) ** 2
        assert power.mean() == pytest.approx(1.0)


# ---- queries ----


def test_query_heads_at_full_rank_are_exact():
    """q_rank = h: W_Q = sum_r a_r (x) W_r comes back."""
    W = np.random.default_rng(4).standard_normal((4, 3, 5))
    A, W_r, error = truncate_query_heads(W, 4)
    np.testing.assert_allclose(np.einsum("rh,rdm->hdm", A, W_r), W, atol=1e-12)
    assert error < 1e-7


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_query_heads_below_are_the_svd_of_w_q(rank):
    """Smaller q_rank: the SVD of W_Q as a matrix of heads by (features x width), cut after R values."""
    W = np.random.default_rng(5).standard_normal((4, 3, 5))
    U, S, V = np.linalg.svd(W.reshape(4, 15), full_matrices=False)
    best = (U[:, :rank] * S[:rank] @ V[:rank]).reshape(4, 3, 5)
    A, W_r, error = truncate_query_heads(W, rank)
    assert tuple(A.shape) == (rank, 4) and tuple(W_r.shape) == (rank, 3, 5)
    np.testing.assert_allclose(np.einsum("rh,rdm->hdm", A, W_r), best, atol=1e-12)
    assert error == pytest.approx(np.sqrt(np.square(S[rank:]).sum() / np.square(S).sum()), rel=1e-9)
