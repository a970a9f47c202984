"""Attention on factors against the dense oracle on the K and V they stand for, and the paper's Algorithm 1."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
from helpers import MODES, back, part, to

from tpa_ref.core.attention import algorithm_1
from tpa_ref.core.mode import Tokens

B_, Q_, K_, G, N, D, E = 2, 3, 9, 3, 2, 6, 6
SCALE = 0.37
CASES = [("dense", 0), ("contextual", 1), ("contextual", 2), ("contextual", 3), ("fixed-a", 2), ("fixed-a", 3)]
CASES += [("fixed-b", 2), ("fixed-b", 6), ("latent", 1), ("latent", 7), ("latent", 18)]


def rng(seed=0):
    return np.random.default_rng(seed)


def softmax(L):
    """exp(L) / sum exp(L), written out."""
    E = np.exp(L - L.max(-1, keepdims=True))
    return E / E.sum(-1, keepdims=True)


def dense_scores(Q, K, scale=SCALE):
    """q . k, one head at a time: query head h reads KV head h // n."""
    b, q, h, _ = Q.shape
    n = h // K.shape[2]
    L = np.zeros((b, h, q, K.shape[1]))
    for head in range(h):
        for row in range(b):
            L[row, head] = Q[row, :, head] @ K[row, :, head // n].T * scale
    return L


def dense_values(P, V):
    """sum p v, one head at a time."""
    b, h, q, _ = P.shape
    n = h // V.shape[2]
    O = np.zeros((b, q, h, V.shape[3]))  # noqa: E741
    for head in range(h):
        for row in range(b):
            O[row, :, head] = P[row, head] @ V[row, :, head // n]
    return O


def turn(x, positions, base=10_000.0):
    """RoPE as complex numbers: feature i and i + d/2 are one number, turned by position * base^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * base ** (-2 * np.arange(half) / x.shape[-1])
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def positions(b=B_, k=K_):
    return np.broadcast_to(np.arange(k), (b, k))


def tokens(backend, at, d=D):
    """What is known of tokens at some positions."""
    return Tokens(part(backend, "core.rope").rope_tables(to(backend, np.array(at)), d, 10_000.0))


def cached(backend, name, rank, X, is_key):
    """(parts as a cache holds them, mode, the K or V they stand for after rotation)."""
    mode, at = helpers.fitted(backend, name, rank, X), tokens(backend, positions(*X.shape[:2]))
    parts = mode.encode(to(backend, X), at)
    formed = back(mode.decode(parts, at))
    if is_key:
        formed = turn(formed, positions(*X.shape[:2]))
        if mode.rotated:
            parts[mode.rotated] = part(backend, "core.rope").rotate(parts[mode.rotated], *at.tables)
    return parts, mode, formed


@pytest.mark.parametrize(("mode", "rank"), CASES)
def test_scores_on_factors_equal_dense_scores_on_the_decoded_keys(backend, mode, rank):
    """Eq. (A.2) and its short cuts: the logits of every mode are q . RoPE(K) of the K its factors form."""
    Q, K = rng(1).standard_normal((B_, Q_, G * N, D)), rng(2).standard_normal((B_, K_, G, D))
    parts, mode, formed = cached(backend, mode, rank, K, is_key=True)
    scores = mode.scores(to(backend, Q), parts, tokens(backend, positions()), SCALE)
    np.testing.assert_allclose(back(scores), dense_scores(Q, formed), rtol=0, atol=1e-12)
    rotated = mode.rotated_keys(parts, tokens(backend, positions()))
    np.testing.assert_allclose(back(rotated), formed, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mode", "rank"), CASES)
def test_values_on_factors_equal_dense_values_on_the_decoded_values(backend, mode, rank):
    """Eq. (A.3): averaging factors and forming afterwards is forming V and averaging it."""
    P, V = softmax(rng(3).standard_normal((B_, G * N, Q_, K_))), rng(4).standard_normal((B_, K_, G, E))
    parts, mode, formed = cached(backend, mode, rank, V, is_key=False)
    values = mode.values(to(backend, P), parts, tokens(backend, positions()))
    np.testing.assert_allclose(back(values), dense_values(P, formed), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_full_rank_attention_is_the_dense_attention(backend, mode):
    """At its exact rank a mode changes nothing: softmax(q . k) v of the original K and V."""
    rank = {"contextual": G, "fixed-a": G, "fixed-b": D, "latent": G * D}[mode]
    Q, K, V = (
        rng(seed).standard_normal(shape)
        for seed, shape in ((1, (B_, Q_, G * N, D)), (2, (B_, K_, G, D)), (4, (B_, K_, G, E)))
    )
    parts_k, mode_k, _ = cached(backend, mode, rank, K, is_key=True)
    parts_v, mode_v, _ = cached(backend, mode, rank, V, is_key=False)
    at = tokens(backend, positions())
    L = mode_k.scores(to(backend, Q), parts_k, at, SCALE)
    O = mode_v.values(part(backend, "core.attention").softmax(L), parts_v, at)  # noqa: E741
    expected = dense_values(softmax(dense_scores(Q, turn(K, positions()))), V)
    np.testing.assert_allclose(back(O), expected, rtol=0, atol=1e-12)


def factors(heads, ranks=(3, 2, 4), seed=5):
    """A_Q, B_Q, A_K, B_K, A_V, B_V of Algorithm 1."""
    made, draw = [], rng(seed)
    for rank, length, width in zip(ranks, (Q_, K_, K_), (D, D, E), strict=True):
        made += [draw.standard_normal((B_, length, rank, heads)), draw.standard_normal((B_, length, rank, width))]
    return made


def formed(A, B):
    """Eq. (3.1), summed over ranks one by one: (1/R) sum_r a_r (x) b_r. [b,k,heads,d]"""
    return sum(A[:, :, r, :, None] * B[:, :, r, None, :] for r in range(A.shape[2])) / A.shape[2]


def test_algorithm_1_is_attention_on_the_formed_matrices():
    """The paper's Algorithm 1 forms nothing and gives softmax(Q K^T) V of the Q, K, V that Eq. (3.1) forms."""
    given = factors(heads=4)
    found = algorithm_1(*given, SCALE)
    Q, K, V = formed(*given[:2]), formed(*given[2:4]), formed(*given[4:])
    np.testing.assert_allclose(back(found), dense_values(softmax(dense_scores(Q, K)), V), rtol=0, atol=1e-12)


def test_algorithm_1_with_a_mask():
    """Masked keys get probability zero."""
    given = factors(heads=4)
    seen = rng(6).random((B_, Q_, K_)) < 0.6
    seen[:, :, 0] = True
    found = algorithm_1(*given, SCALE, seen)
    Q, K, V = formed(*given[:2]), formed(*given[2:4]), formed(*given[4:])
    L = np.where(seen[:, None], dense_scores(Q, K), -np.inf)
    np.testing.assert_allclose(back(found), dense_values(softmax(L), V), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mha_mqa_and_gqa_are_special_cases_of_eq_3_1(groups):
    """With constant 0/1 a's that say which heads share a key (times R), Algorithm 1 is MHA, GQA or MQA."""
    heads, draw = 4, rng(7)
    Q, K, V = draw.standard_normal((B_, Q_, heads, D)), *draw.standard_normal((2, B_, K_, groups, D))
    share = np.repeat(np.eye(groups), heads // groups, axis=1) * groups  # [s, h]
    A = np.broadcast_to(share, (B_, K_, groups, heads))
    A_q = np.broadcast_to(heads * np.eye(heads), (B_, Q_, heads, heads))
    found = algorithm_1(A_q, Q, A, K, A, V, SCALE)
    np.testing.assert_allclose(back(found), dense_values(softmax(dense_scores(Q, K)), V), rtol=0, atol=1e-12)


@pytest.mark.parametrize("g", [1, 2, 4])
def test_the_ordinary_gqa_cache_is_contextual_and_fixed_a_tpa(backend, g):
    """R = g with one-hot a's: `scores_contextual` and `scores_fixed_a` are plain grouped-query attention."""
    Q, K = rng(8).standard_normal((B_, Q_, 4, D)), rng(9).standard_normal((B_, K_, g, D))
    contextual, fixed_a = part(backend, "core.contextual"), part(backend, "core.fixed_a")
    A, of_every_token = g * np.eye(g), np.tile(g * np.eye(g), (*K.shape[:2], 1, 1))
    for found in (
        contextual.scores_contextual(to(backend, Q), to(backend, of_every_token), to(backend, K), SCALE),
        fixed_a.scores_fixed_a(to(backend, Q), to(backend, A), to(backend, K), SCALE),
    ):
        np.testing.assert_allclose(back(found), dense_scores(Q, K), rtol=0, atol=1e-12)


def test_dense_scores_and_values_by_hand(backend):
    """Two query heads on one KV head: logits 0.5 q . k, and the mean of two values."""
    attention = part(backend, "core.attention")
    Q, K = np.array([[[[1.0, 0.0], [0.0, 2.0]]]]), np.array([[[[3.0, 4.0]], [[5.0, 6.0]]]])
    np.testing.assert_allclose(
        back(attention.scores_dense(to(backend, Q), to(backend, K), 0.5)), [[[[1.5, 2.5]], [[4.0, 6.0]]]]
    )
    P = np.full((1, 2, 1, 2), 0.5)
    np.testing.assert_allclose(back(attention.values_dense(to(backend, P), to(backend, K))), [[[[4, 5], [4, 5]]]])


def test_softmax_is_safe_for_large_and_masked_logits(backend):
    """Logits of 1e4 overflow nothing; a row that sees nothing gives no NaN; a masked key gets exactly zero."""
    masks, attention = part(backend, "core.masks"), part(backend, "core.attention")
    L = np.array([[[[1e4, 1e4 - np.log(3)], [5.0, 7.0], [0.0, 0.0]]]])
    seen = np.array([[[True, True], [True, False], [False, False]]])
    P = back(attention.softmax(masks.apply_mask(to(backend, L), to(backend, seen))))
    np.testing.assert_allclose(P[0, 0, :2], [[0.75, 0.25], [1.0, 0.0]], atol=1e-9)
    assert P[0, 0, 1, 1] == 0.0 and np.isfinite(P).all()


# ---- positions ----


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_shifting_all_positions_leaves_logits_alone(backend, scale):
    """A global layer sees only distances: adding 1000 to every position changes no logit."""
    rope, attention = part(backend, "core.rope"), part(backend, "core.attention")
    Q, K = rng(10).standard_normal((B_, K_, G * N, D)), rng(11).standard_normal((B_, K_, G, D))

    def at(shift):
        turned = rope.rope_tables(to(backend, positions() + shift), D, 1e6, scale)
        Q_turned, K_turned = (rope.rotate(to(backend, x), *turned) for x in (Q, K))
        return back(attention.scores_dense(Q_turned, K_turned, SCALE))

    np.testing.assert_allclose(at(1000), at(0), rtol=0, atol=1e-10)
    assert np.abs(at(0) - dense_scores(Q, K)).max() > 0.1  # positions do matter


@pytest.mark.parametrize("window", [9, 10, 1000])
def test_a_window_as_long_as_the_text_is_no_window(backend, window):
    """window >= length hides nothing that causality does not hide; window 8 of 9 hides exactly one key."""
    visible = part(backend, "core.masks").visible
    at = to(backend, np.array(positions()))
    np.testing.assert_array_equal(back(visible(at, at, window)), back(visible(at, at, None)))
    assert (back(visible(at, at, None)) != back(visible(at, at, 8))).sum() == B_


def test_visible_by_hand(backend):
    """Query 5 with window 3 sees 3, 4, 5, wherever they stand; -1 is an empty slot."""
    seen = part(backend, "core.masks").visible(
        to(backend, np.array([[5, -1]])), to(backend, np.array([[6, 3, -1, 5, 2, 4]])), 3
    )
    assert back(seen).tolist() == [[[False, True, False, True, False, True], [False] * 6]]


# ---- the same through a whole model ----


def test_window_of_a_whole_model(backend):
    """A model whose window covers the text equals one that has none but the local RoPE base; a shorter one differs."""
    ids = helpers.tokens(12)

    def run(window):
        return helpers.logits(helpers.model(backend, helpers.config(sliding_window=window), "float64"), ids)

    np.testing.assert_allclose(run(12), run(100), rtol=0, atol=1e-10)
    short = run(11)
    np.testing.assert_allclose(short[:, :11], run(100)[:, :11], rtol=0, atol=1e-10)
    assert np.abs(short[:, 11] - run(100)[:, 11]).max() > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_full_rank_tpa_model_is_the_dense_model(backend, mode):
    """convert at exact rank with full precision changes no logit, calibrated or not, for K and V alike."""
    dense = helpers.model(backend, dtype="float64")
    rank = {"contextual": 2, "fixed-a": 2, "fixed-b": 16, "latent": 32}[mode]
    tpa = backend.convert(dense, backend.TPAConfig(mode=mode, k_rank=rank, v_rank=rank, kv_dtype="float32"))
    ids = helpers.tokens(20, batch=2)
    np.testing.assert_allclose(helpers.logits(tpa, ids), helpers.logits(dense, ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_mqa_gqa_and_mha_models_convert_exactly(backend, kv_heads):
    """g = 1, 2, 4 of four query heads: contextual TPA of rank g is the model itself."""
    dense = helpers.model(backend, helpers.config(num_kv_heads=kv_heads), "float64")
    tpa = backend.convert(
        dense, backend.TPAConfig(mode="contextual", k_rank=kv_heads, v_rank=kv_heads, kv_dtype="float32")
    )
    ids = helpers.tokens(14)
    np.testing.assert_allclose(helpers.logits(tpa, ids), helpers.logits(dense, ids), rtol=0, atol=1e-10)
