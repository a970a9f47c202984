"""Step 1: the sum of tensor products, Eq. (3.1)."""

import numpy as np

from tpa_ref import tpa


def test_by_hand(mine):
    """Two products of two heads and three features, small enough for pencil and paper."""
    A_bksg = np.array([[[[1.0, 2.0], [0.0, -2.0]]]])
    B_bksd = np.array([[[[1.0, 0.0, 3.0], [4.0, 2.0, 0.0]]]])
    expected_gd = [[0.5, 0.0, 1.5], [-3.0, -2.0, 3.0]]  # (a_0 (x) b_0 + a_1 (x) b_1) / 2
    np.testing.assert_allclose(mine.from_factors(A_bksg, B_bksd)[0, 0], expected_gd)


def test_against_the_package(mine, rng):
    """Many tokens, rank 3."""
    A_bksg, B_bksd = rng.standard_normal((2, 5, 3, 4)), rng.standard_normal((2, 5, 3, 8))
    expected = tpa.tensor_product(A_bksg, B_bksd)
    np.testing.assert_allclose(mine.from_factors(A_bksg, B_bksd), expected, atol=1e-12)
