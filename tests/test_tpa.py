"""The lesson in one file, tpa.py: what it states holds to rounding, and every comparison here can fail."""

from __future__ import annotations

import doctest
import re

import numpy as np
import pytest

from tpa_ref import tpa

TOKENS, G, N, D, WINDOW = 9, 3, 2, 8, 4
RNG = np.random.default_rng(1)
Q_bqhd, K_bkgd, V_bkge = (RNG.standard_normal((2, TOKENS, heads, D)) for heads in (G * N, G, G))
AT_bk = np.tile(np.arange(TOKENS), (2, 1))


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


def rotated_by_hand(x_bkgd):
    """One rotation after the other: features i and i + d/2 of token k by the angle k 10,000^(-2i/d)."""
    out_bkgd = np.empty_like(x_bkgd)
    for k, i in np.ndindex(TOKENS, D // 2):
        cos, sin, pair = np.cos(k * 10_000 ** (-2 * i / D)), np.sin(k * 10_000 ** (-2 * i / D)), [i, i + D // 2]
        out_bkgd[:, k, :, pair] = np.einsum("ij,jbg->ibg", [[cos, -sin], [sin, cos]], x_bkgd[:, k, :, pair])
    return out_bkgd


def dense_by_hand(K_bkgd, V_bkge, window):
    """Grouped-query attention, one query after the other, over the keys that it sees."""
    out_bqhe, Q, K = np.empty_like(Q_bqhd), rotated_by_hand(Q_bqhd), rotated_by_hand(K_bkgd)
    for b, i, h in np.ndindex(2, TOKENS, G * N):
        seen = slice(max(0, i - window + 1), i + 1)
        p = np.exp(K[b, seen, h // N] @ Q[b, i, h] / D**0.5)
        out_bqhe[b, i, h] = p / p.sum() @ V_bkge[b, seen, h // N]
    return out_bqhe


def cached(rank):
    """A_K, rotated B_K, A_V, B_V of all tokens."""
    (AK, BK), (AV, BV) = tpa.factor(K_bkgd, rank), tpa.factor(V_bkge, rank)
    return AK, tpa.rope(BK, AT_bk), AV, BV


def check_full_rank():
    """R = g is exact, and a larger R is no more than that."""
    close(tpa.tensor_product(*tpa.factor(K_bkgd, G)), K_bkgd)
    close(tpa.tensor_product(*tpa.factor(K_bkgd, G + 5)), K_bkgd)


def check_truncation():
    """Eckart-Young: what is lost is the discarded singular values."""
    for rank in range(1, G):
        lost_bk = np.linalg.norm(K_bkgd - tpa.tensor_product(*tpa.factor(K_bkgd, rank)), axis=(2, 3))
        close(lost_bk, np.linalg.norm(np.linalg.svd(K_bkgd, compute_uv=False)[..., rank:], axis=2))


def check_theorem_3_1():
    A, B = tpa.factor(K_bkgd, 2)
    close(tpa.tensor_product(A, tpa.rope(B, AT_bk)), rotated_by_hand(tpa.tensor_product(A, B)))


def check_whole_text(rank=2):
    K, V = (tpa.tensor_product(*tpa.factor(x, rank)) for x in (K_bkgd, V_bkge))
    for window in WINDOW, TOKENS:
        seen = tpa.visible(AT_bk, AT_bk, window)
        close(tpa.attention(tpa.rope(Q_bqhd, AT_bk), *cached(rank), seen), dense_by_hand(K, V, window))


def check_cache(slots=TOKENS):
    """Token by token, at full rank: so what is expected is made of K and V alone, without tpa.py."""
    cache, Q, arrays, outputs = tpa.Cache(slots), tpa.rope(Q_bqhd, AT_bk), cached(G), []
    for i in range(TOKENS):
        cache.append(*(x[:, [i]] for x in arrays))
        outputs.append(tpa.attention(Q[:, [i]], *cache.read()))
    close(np.concatenate(outputs, 1), dense_by_hand(K_bkgd, V_bkge, slots))


def check_ring():
    check_cache(WINDOW)


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]

# (the check that must turn red, what is replaced, the wrong one made from the right one)
MISTAKES = {
    "1/R dropped": (check_full_rank, "tensor_product", lambda right: lambda A, B: right(A, B) * A.shape[2]),
    "1/R dropped in scores": (check_whole_text, "scores", lambda right: lambda Q, A, B: right(Q, A, B) * A.shape[2]),
    "1/R dropped in values": (check_whole_text, "values", lambda right: lambda P, A, B: right(P, A, B) * A.shape[2]),
    "a factor too few": (check_truncation, "factor", lambda right: lambda K, rank: right(K, max(1, rank - 1))),
    "b rotated backwards": (check_theorem_3_1, "rope", lambda right: lambda x, at: right(x, -at)),
    "only b backwards": (check_cache, "rope", lambda right: lambda x, at: right(x, at if x.shape[2] > G else -at)),
    "positions off by one for b": (check_ring, "rope", lambda right: lambda x, at: right(x, at + (x.shape[2] <= G))),
    "base of global layers": (check_whole_text, "rope", lambda right: lambda x, at: right(x, at, 1_000_000)),
    "window one too long": (check_whole_text, "visible", lambda right: lambda i, j, window: right(i, j, window + 1)),
    "ring one too long": (check_ring, "Cache", lambda right: lambda slots: right(slots + 1)),
    "ring one too short": (check_ring, "Cache", lambda right: lambda slots: right(slots - 1)),
}


@pytest.mark.parametrize("check", CHECKS)
def test_holds(check):
    check()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_seen(mistake, monkeypatch):
    check, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(tpa, name, wrong(getattr(tpa, name)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check()


def test_every_check_has_a_mistake():
    assert {check for check, _, _ in MISTAKES.values()} == set(CHECKS)


def test_examples():
    assert doctest.testmod(tpa).attempted and not doctest.testmod(tpa).failed


def test_lesson(capsys):
    """Every printed error is rounding, the ring is seen to turn, and the bytes are R (g + d) against g d."""
    tpa.main()
    text = capsys.readouterr().out
    for equation in "Eq. 3.1", "Eq. 3.5", "Eq. A.2", "Eq. A.3", "Alg. 1":
        assert equation in text
    errors = [float(number) for number in re.findall(r"\de[+-]\d\d$", text, re.MULTILINE)]
    assert len(errors) == 18 and max(errors) < 1e-13
    assert "token 5 reads [0 1 2 3 4 5] " in text and "token 4 reads [3 4 2] " in text
    assert re.search(r"12B .* 8,192 +1,056 +2,112 +8,448\n", text) and "257 numbers for 256" in text
