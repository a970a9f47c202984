"""Step 6: a cache of factors as a ring; writing token by token gives what the whole text gives."""

import numpy as np

RANK, G, D, WINDOW, LENGTH = 2, 4, 16, 8, 21


def factors(rng):
    """AK, BK, AV, BV of a whole text."""
    shapes = ((1, LENGTH, RANK, G), (1, LENGTH, RANK, D)) * 2
    return [rng.standard_normal(shape) for shape in shapes]


def test_the_ring_holds_the_newest(mine, rng):
    """After each token: the newest `slots` positions, each in its slot, with the factors of that position."""
    whole, cache = factors(rng), mine.FactorCache(WINDOW, RANK, G, D)
    for t in range(LENGTH):
        cache.append(*(part[:, t : t + 1] for part in whole))
        *held, positions_bk = cache.read()
        positions = np.asarray(positions_bk)[0].tolist()
        assert sorted(positions) == list(range(max(0, t + 1 - WINDOW), t + 1))
        assert all(position % WINDOW == slot for slot, position in enumerate(positions))
        for part, expected in zip(held, whole, strict=True):
            np.testing.assert_array_equal(part, expected[:, positions])


def test_memory_does_not_grow(mine, rng):
    """Room is made once: K and V, WINDOW slots, RANK (G + D) numbers, at most 8 bytes each."""
    whole, cache = factors(rng), mine.FactorCache(WINDOW, RANK, G, D)
    empty = cache.nbytes
    for t in range(LENGTH):
        cache.append(*(part[:, t : t + 1] for part in whole))
        assert cache.nbytes == empty
    assert 0 < empty <= 2 * WINDOW * RANK * (G + D) * 8


def test_token_by_token_equals_the_whole(mine, rng):
    """Your steps together: each query through the ring, against all queries at once with a window."""
    whole, cache = factors(rng), mine.FactorCache(WINDOW, RANK, G, D)
    Q_bqhd, positions = rng.standard_normal((1, LENGTH, 8, D)), np.arange(LENGTH)[None]
    expected = mine.attend(Q_bqhd, *whole, 0.3, positions, positions, WINDOW)
    for t in range(LENGTH):
        cache.append(*(part[:, t : t + 1] for part in whole))
        *held, positions_bk = cache.read()
        now = mine.attend(Q_bqhd[:, t : t + 1], *held, 0.3, np.array([[t]]), positions_bk, WINDOW)
        np.testing.assert_allclose(now[:, 0], expected[:, t], atol=1e-10)
