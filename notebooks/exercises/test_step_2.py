"""Step 2: the best factors of a given matrix, by Eckart-Young."""

import numpy as np
import pytest

from tpa_ref.core import contextual


def form(A_bksg, B_bksd):
    return np.einsum("bksg,bksd->bkgd", A_bksg, B_bksd) / A_bksg.shape[2]


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_nothing_is_closer(mine, rng, rank):
    """The sum is the package's; the factors themselves may differ by a sign."""
    X_bkgd = rng.standard_normal((2, 5, 4, 8))
    A_bksg, B_bksd = mine.best_factors(X_bkgd, rank)
    assert A_bksg.shape == (2, 5, rank, 4) and B_bksd.shape == (2, 5, rank, 8)
    best = form(*contextual.factor(X_bkgd, rank))
    np.testing.assert_allclose(form(A_bksg, B_bksd), best, atol=1e-10)


def test_full_rank_is_exact(mine, rng):
    """R = g loses nothing."""
    X_bkgd = rng.standard_normal((1, 3, 4, 8))
    np.testing.assert_allclose(form(*mine.best_factors(X_bkgd, 4)), X_bkgd, atol=1e-10)
