"""Step 3: RoPE on the b's, Eq. (3.5) and Theorem 3.1."""

import numpy as np
import pytest

from tpa_ref.core import rope


def test_direction(mine):
    """At position 1 the first pair, the point (1, 0), turns counter-clockwise by one radian."""
    turned = mine.rotate(np.array([[[[1.0, 0.0]]]]), np.array([[1]]), 10_000.0)
    np.testing.assert_allclose(turned.ravel(), [np.cos(1), np.sin(1)], atol=1e-12)


@pytest.mark.parametrize(("base", "scale"), [(10_000.0, 1.0), (1_000_000.0, 8.0)])
def test_both_kinds_of_layers(mine, rng, base, scale):
    """Local and global layers of Gemma 3, far into the text as well."""
    x_bksd, positions_bk = rng.standard_normal((2, 4, 3, 16)), np.array([[0, 1, 7, 500], [3, 4, 5, 100_000]])
    expected = rope.rotate(x_bksd, *rope.rope_tables(positions_bk, 16, base, scale))
    np.testing.assert_allclose(mine.rotate(x_bksd, positions_bk, base, scale), expected, atol=1e-9)


def test_it_commutes_with_a(mine, rng):
    """Theorem 3.1: rotating the sum is summing the rotated."""
    A_bksg, B_bksd = rng.standard_normal((1, 6, 3, 4)), rng.standard_normal((1, 6, 3, 16))
    positions_bk = np.arange(6)[None]

    def form(B_bksd):
        return np.einsum("bksg,bksd->bkgd", A_bksg, B_bksd) / 3

    left = mine.rotate(form(B_bksd), positions_bk, 10_000.0)
    np.testing.assert_allclose(form(mine.rotate(B_bksd, positions_bk, 10_000.0)), left, atol=1e-12)
