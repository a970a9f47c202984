"""Step 4: scores from factors, Eq. (A.2) with dense queries."""

import numpy as np
import pytest

from tpa_ref.core import attention


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_dense_keys_give_the_same_scores(mine, rng, rank):
    """8 query heads share 4 KV heads in pairs: query head h reads KV head h // 2."""
    Q_bqhd = rng.standard_normal((2, 3, 8, 16))
    A_bksg, B_bksd = rng.standard_normal((2, 5, rank, 4)), rng.standard_normal((2, 5, rank, 16))
    K_bkgd = np.einsum("bksg,bksd->bkgd", A_bksg, B_bksd) / rank
    expected = attention.scores_dense(Q_bqhd, K_bkgd, scale=0.3)
    np.testing.assert_allclose(mine.scores(Q_bqhd, A_bksg, B_bksd, 0.3), expected, atol=1e-10)
