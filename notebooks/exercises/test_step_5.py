"""Step 5: masked attention from factors, Eq. (A.3)."""

import numpy as np
import pytest

from tpa_ref.core import attention, masks


@pytest.mark.parametrize("window", [None, 4])
def test_against_dense_attention(mine, rng, window):
    """Ten queries on ten keys that stand in a shuffled order, as in a ring; ranks of K and V differ."""
    s, u, length = 2, 3, 10
    Q_bqhd = rng.standard_normal((1, length, 8, 16))
    AK_bksg, BK_bksd = rng.standard_normal((1, length, s, 4)), rng.standard_normal((1, length, s, 16))
    AV_bkug, BV_bkue = rng.standard_normal((1, length, u, 4)), rng.standard_normal((1, length, u, 16))
    positions_bq, positions_bk = np.arange(length)[None], rng.permutation(length)[None]

    K_bkgd = np.einsum("bksg,bksd->bkgd", AK_bksg, BK_bksd) / s
    V_bkge = np.einsum("bkug,bkue->bkge", AV_bkug, BV_bkue) / u
    seen_bqk = masks.visible(positions_bq, positions_bk, window)
    P_bhqk = attention.softmax(masks.apply_mask(attention.scores_dense(Q_bqhd, K_bkgd, 0.3), seen_bqk))
    expected = attention.values_dense(P_bhqk, V_bkge)

    found = mine.attend(Q_bqhd, AK_bksg, BK_bksd, AV_bkug, BV_bkue, 0.3, positions_bq, positions_bk, window)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_large_scores_do_not_overflow(mine, rng):
    """Scores of thousands: the softmax must be shifted by its maximum."""
    A, B = np.full((1, 2, 1, 4), 100.0), rng.standard_normal((1, 2, 1, 16))
    Q_bqhd, positions = 100 * rng.standard_normal((1, 2, 8, 16)), np.arange(2)[None]
    assert np.isfinite(mine.attend(Q_bqhd, A, B, A, B, 1.0, positions, positions, None)).all()
