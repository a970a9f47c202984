"""What tpa.py teaches is what core/ computes: each of its functions against core's, in both backends, on random arrays.

Factors are compared through their product, since the signs of singular vectors are free.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers import back, part, to

from tpa_ref import tpa
from tpa_ref.core.attention import algorithm_1
from tpa_ref.core.mode import Tokens

TOKENS, G, N, D, R, WINDOW = 9, 3, 2, 8, 2, 4
RNG = np.random.default_rng(2)
Q, K, V = (RNG.standard_normal((2, TOKENS, heads, D)) for heads in (G * N, G, G))
A, B, P = (RNG.standard_normal(shape) for shape in ((2, TOKENS, R, G), (2, TOKENS, R, D), (2, G * N, TOKENS, TOKENS)))
AT = np.tile(np.arange(TOKENS), (2, 1))


def close(ours, expected):
    np.testing.assert_allclose(back(ours), expected, rtol=1e-10, atol=1e-12)


def pair(backend):
    mode = part(backend, "core.contextual").Contextual(G, D, R, "float64")
    return part(backend, "core.pair").Pair(mode, mode)


def standing(backend, at=AT, base=10_000.0):
    return Tokens(part(backend, "core.rope").rope_tables(to(backend, at), D, base))


def learned():
    """A_K, rotated B_K, A_V, B_V as the lesson makes them."""
    (AK, BK), (AV, BV) = tpa.factor(K, R), tpa.factor(V, R)
    return AK, tpa.rope(BK, AT), AV, BV


def check_tensor_product(backend):
    parts = {"A": to(backend, A.reshape(2, TOKENS, R * G)), "B": to(backend, B)}
    close(pair(backend).k.decode(parts, None), tpa.tensor_product(A, B))


def check_factor(backend):
    for rank in range(1, G + 1):
        ours = (back(x) for x in part(backend, "core.contextual").factor(to(backend, K), rank))
        close(tpa.tensor_product(*ours), tpa.tensor_product(*tpa.factor(K, rank)))


def check_rope(backend):
    for base in 1e4, 1e6:
        tables = standing(backend, base=base).tables
        close(part(backend, "core.rope").rotate(to(backend, B), *tables), tpa.rope(B, AT, base))


def check_scores(backend):
    given = (to(backend, x) for x in (Q, A, B))
    close(part(backend, "core.contextual").scores_contextual(*given, D**-0.5), tpa.scores(Q, A, B))


def check_values(backend):
    given = (to(backend, x) for x in (P, A, B))
    close(part(backend, "core.contextual").values_contextual(*given), tpa.values(P, A, B))


def check_visible(backend):
    at = to(backend, AT)
    for window in (1, WINDOW, None):
        ours = part(backend, "core.masks").visible(at, at, window)
        np.testing.assert_allclose(back(ours)[:, None], tpa.visible(AT, AT, window or np.inf))


def check_softmax(backend):
    seen = tpa.visible(AT, AT, WINDOW)
    masked = part(backend, "core.masks").apply_mask(to(backend, P * 30), to(backend, seen[:, 0]))
    close(part(backend, "core.attention").softmax(masked), tpa.softmax(P * 30, seen))


def check_attention(backend):
    """A whole text through a pair of modes; and the paper's algorithm, where Q is a product, too."""
    at, masks = standing(backend), part(backend, "core.masks")
    Q_turned, stored = to(backend, tpa.rope(Q, AT)), pair(backend).encode(to(backend, K), to(backend, V), at)
    parts_k, parts_v = pair(backend).load(stored, Q_turned.dtype)
    seen = masks.visible(to(backend, AT), to(backend, AT), WINDOW)
    L = masks.apply_mask(pair(backend).k.scores(Q_turned, parts_k, at, D**-0.5), seen)
    ours = pair(backend).v.values(part(backend, "core.attention").softmax(L), parts_v, at)
    close(ours, tpa.attention(back(Q_turned), *learned(), tpa.visible(AT, AT, WINDOW)))
    AQ, BQ, (AK, BK, AV, BV) = RNG.standard_normal((2, TOKENS, 5, G * N)), B[:, :, [0, 1, 0, 1, 1]], learned()
    every_head = (np.repeat(AK, N, 3), BK, np.repeat(AV, N, 3), BV)
    close(algorithm_1(AQ, BQ, *every_head, D**-0.5), tpa.attention(tpa.tensor_product(AQ, BQ), AK, BK, AV, BV))


def check_cache(backend):
    """Token by token the same tokens lie in the same slots, in a ring as in a global layer."""
    for slots in TOKENS, WINDOW:
        window = None if slots == TOKENS else slots
        ours = part(backend, "core.cache").Cache([pair(backend)], [window], 2, TOKENS).layers[0].rings["coded"]
        lesson, length = tpa.Cache(slots), np.zeros(2, int)
        for i in range(TOKENS):
            one = slice(i, i + 1)
            lesson.append(AT[:, one], *(x[:, one] for x in learned()))
            new = pair(backend).encode(to(backend, K[:, one]), to(backend, V[:, one]), standing(backend, AT[:, one]))
            stored, positions = ours.append(new, AT[:, one], length + i)
            held_at, AK, BK, AV, BV = lesson.read()
            np.testing.assert_allclose(positions, held_at)
            parts_k, parts_v = pair(backend).load(stored, to(backend, K).dtype)
            close(pair(backend).k.decode(parts_k, None), tpa.tensor_product(AK, BK))
            close(pair(backend).v.decode(parts_v, None), tpa.tensor_product(AV, BV))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}

# name -> (the check that must turn red, what is replaced in core/, the wrong one made from the right one)
MISTAKES = {
    "1/R dropped": ("tensor_product", "contextual.Contextual.decode", lambda f: lambda *x: f(*x) * R),
    "a factor too few": ("factor", "contextual.factor", lambda f: lambda X, rank: f(X, max(1, rank - 1))),
    "R not in a": ("factor", "contextual.factor", lambda f: lambda X, rank: (f(X, rank)[0] / rank, f(X, rank)[1])),
    "rotated backwards": ("rope", "rope.rotate", lambda f: lambda x, cos, sin: f(x, cos, -sin)),
    "one base": ("rope", "rope.rope_tables", lambda f: lambda at, d, base: f(at, d, 1e4)),
    "1/R dropped in scores": ("scores", "contextual.scores_contextual", lambda f: lambda *x: f(*x) * R),
    "1/R dropped in values": ("values", "contextual.values_contextual", lambda f: lambda *x: f(*x) * R),
    "window one too long": ("visible", "masks.visible", lambda f: lambda i, j, w: f(i, j, w and w + 1)),
    "mask forgotten": ("softmax", "masks.apply_mask", lambda f: lambda L, seen: L),
    "K not rotated": ("attention", "mode.Mode.turned", lambda f: staticmethod(lambda X, tokens: X)),
    "next token's slot": ("cache", "cache.Ring.write", lambda f: lambda ring, new, at: f(ring, new, at + 1)),
}


@pytest.mark.parametrize("check", CHECKS)
def test_core_is_the_lesson(backend, check):
    CHECKS[check](backend)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_seen(backend, monkeypatch, mistake):
    check, path, wrong = MISTAKES[mistake]
    module, *holder, name = path.split(".")
    place = part(backend, f"core.{module}")
    place = getattr(place, holder[0]) if holder else place
    monkeypatch.setattr(place, name, wrong(getattr(place, name)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        CHECKS[check](backend)


def test_everything_that_is_taught_is_checked():
    own = {name for name, x in vars(tpa).items() if getattr(x, "__module__", "") == tpa.__name__}
    assert {name.lower() for name in own} - {"show", "main"} == set(CHECKS)
    assert {check for check, *_ in MISTAKES.values()} == set(CHECKS)
