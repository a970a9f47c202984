"""The cache: rings, bytes (held, by arithmetic and by hand), truncate and reset, and what it refuses."""

from __future__ import annotations

import math

import helpers
import numpy as np
import pytest
from helpers import MODES, back, part, refused, to
from hypothesis import given, settings
from hypothesis import strategies as st

import tpa_ref
from tpa_ref.compress.config import TPAConfig
from tpa_ref.core.cache import slot_positions
from tpa_ref.core.pair import Pair, sides
from tpa_ref.errors import TPAError
from tpa_ref.gemma import memory
from tpa_ref.gemma.config import GemmaConfig

DTYPES = ("float32", "bfloat16", "int8", "int4")
WINDOW = 11
RANKS = {"dense": 0, "contextual": 2, "fixed-a": 1, "fixed-b": 5, "latent": 13}


def pair_of(backend, mode, rank, dtype, g=2, d=16):
    """K and V cached by one mode whose constant arrays are of no concern."""
    if mode == "dense":
        return part(backend, "core.pair").Pair.dense(g, d, dtype)
    made = part(backend, "core.mode").MODES[mode](g, d, rank, dtype)
    return part(backend, "core.pair").Pair(made, made)


def cache_of(backend, config, mode="dense", rank=0, dtype="float32", batch=1, max_len=1):
    pair = pair_of(backend, mode, rank, dtype, config.num_kv_heads, config.head_dim)
    return part(backend, "core.cache").Cache([pair] * config.num_layers, config.windows, batch, max_len)


# ---- rings ----


def test_slot_positions_by_hand():
    """Token p lives in slot p mod slots: after 6 tokens 4 slots hold 4, 5, 2, 3; an unwritten slot says -1."""
    assert slot_positions(4, np.array([6, 2, 0, 4]), 4).tolist() == [
        [4, 5, 2, 3],
        [0, 1, -1, -1],
        [-1, -1, -1, -1],
        [0, 1, 2, 3],
    ]
    assert slot_positions(2, np.array([2]), 4).tolist() == [[0, 1]]
    assert slot_positions(3, np.array([100]), 3).tolist() == [[99, 97, 98]]


def extend(backend, cache, layer, at, value_of=float):
    """Give one layer tokens whose every number is their own position; returns ([b,k] values, [b,k] positions)."""
    ring = cache.layers[layer].rings["coded"]
    value = np.vectorize(value_of)(at) if at.size else at
    X = np.broadcast_to(value[:, :, None, None], (*at.shape, ring.pair.k.g, ring.pair.k.d)).astype(np.float32)
    new = ring.pair.k.store({"X": to(backend, X)})
    held, keys = ring.append(sides(new, new), at, cache.lengths_b)
    for array in held.values():
        assert (back(array) == back(array)[..., :1, :1]).all()
    return back(held["k.X.x"])[:, :, 0, 0], np.asarray(keys)


def assert_every_query_finds_its_keys(values, keys, at, window, value_of=float):
    """Each query sees max(0, i - window + 1) ... i, each exactly once, and under each position that token's number."""
    for row, queries in enumerate(at):
        for i in queries[queries >= 0]:
            seen = [j for j in range(keys.shape[1]) if 0 <= i - keys[row, j] < window and keys[row, j] >= 0]
            assert sorted(keys[row, seen]) == list(range(max(0, i - window + 1), i + 1))
            assert [values[row, j] for j in seen] == [value_of(keys[row, j]) for j in seen]


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.lists(st.one_of(st.just(1), st.integers(1, 30)), min_size=1, max_size=8), layer=st.sampled_from([0, 5])
)
def test_every_query_finds_its_keys_whatever_the_chunks(chunks, layer):
    """A chunk longer than the ring, shorter, or of one token: the keys read are those of the window, none twice."""
    for backend in helpers.backends():
        cache = cache_of(backend, helpers.config(), max_len=sum(chunks))
        window = WINDOW if layer == 0 else sum(chunks)
        assert cache.layers[layer].rings["coded"].slots == min(window, sum(chunks))
        for chunk in chunks:
            at = cache.positions(chunk, None)
            values, keys = extend(backend, cache, layer, at)
            assert_every_query_finds_its_keys(values, keys, at, window)
            cache.advance(at)
        assert cache.lengths_b.tolist() == [sum(chunks)]


@pytest.mark.parametrize("layer", [0, 5])
def test_rows_of_different_length(backend, layer):
    """Padding writes nothing: each row of the batch keeps its own count, in rings as in global layers."""
    cache = cache_of(backend, helpers.config(), batch=3, max_len=60)
    window = WINDOW if layer == 0 else 60
    for lengths in ([5, 2, 0], [1, 1, 1], [9, 0, 14], [1, 0, 1], [12, 13, 1], [1, 1, 0]):
        at = cache.positions(max(lengths), np.array(lengths))
        values, keys = extend(backend, cache, layer, at)
        assert_every_query_finds_its_keys(values, keys, at, window)
        cache.advance(at)
    assert cache.lengths_b.tolist() == [29, 17, 17]


def test_ring_contents_by_hand(backend):
    """13 tokens in 11 slots: 0 and 1 are overwritten by 11 and 12, in place."""
    cache = cache_of(backend, helpers.config(), max_len=40)
    at = cache.positions(13, None)
    extend(backend, cache, 0, at)
    held = back(cache.layers[0].rings["coded"].arrays["k.X.x"])[0, :, 0, 0]
    assert held.tolist() == [11, 12, 2, 3, 4, 5, 6, 7, 8, 9, 10]


# ---- bytes ----


def held_bytes(thing):
    """Bytes of every array reachable from a cache's layers, the memory behind views included."""
    if isinstance(thing, Pair):  # constant factors belong to the model
        return 0
    if isinstance(thing, np.ndarray):
        return (thing if thing.base is None else thing.base).nbytes
    if hasattr(thing, "untyped_storage"):
        return thing.untyped_storage().nbytes()
    if isinstance(thing, dict):
        return sum(held_bytes(value) for value in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(held_bytes(value) for value in thing)
    return held_bytes(vars(thing)) if hasattr(thing, "__dict__") else 0


def row_bytes(n, dtype):
    """One row of n numbers, by the definition of each dtype: scales (and minima) of 2 bytes per 64 numbers."""
    groups = math.ceil(n / 64)
    return {"float32": 4 * n, "bfloat16": 2 * n, "int8": n + 2 * groups, "int4": math.ceil(n / 2) + 4 * groups}[dtype]


def side_bytes(mode, rank, dtype, g, d):
    """One token's K (or V), by the table of modes; the a's of contextual never go below int8."""
    if mode == "dense":
        return g * row_bytes(d, dtype)
    if mode == "contextual":
        return row_bytes(rank * g, "int8" if dtype == "int4" else dtype) + rank * row_bytes(d, dtype)
    if mode == "fixed-a":
        return rank * row_bytes(d, dtype)
    if mode == "fixed-b":
        return g * row_bytes(rank, dtype)
    return row_bytes(rank, dtype)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", RANKS)
def test_nbytes_is_what_is_held_and_what_arithmetic_says(backend, mode, dtype, batch):
    """nbytes = bytes of all arrays really held = nbytes_at = slots x bytes per token, by mode, dtype, batch."""
    config, how = helpers.config(), (mode, RANKS[mode], dtype)
    cache = cache_of(backend, config, *how, batch=batch, max_len=20)
    by_hand = batch * (1 * 20 + 6 * WINDOW) * 2 * side_bytes(mode, RANKS[mode], dtype, g=2, d=16)
    assert cache.nbytes == by_hand
    assert held_bytes(cache.layers) == by_hand
    other = cache_of(backend, config, *how)
    assert other.nbytes_at(20, batch) == by_hand


def test_nbytes_does_not_grow_with_use(backend):
    """Everything is allocated once: a full cache takes what an empty one takes, and so after truncate and reset."""
    model = backend.convert(helpers.model(backend), TPAConfig(mode="contextual", k_rank=1, v_rank=2, kv_dtype="int4"))
    cache = model.new_cache(batch=2, max_len=30)
    before = cache.nbytes
    model.hidden(helpers.tokens(30, batch=2), cache=cache)
    assert cache.nbytes == held_bytes(cache.layers) == before == cache.nbytes_at(30, batch=2)
    cache.truncate(29)
    cache.reset()
    assert held_bytes(cache.layers) == before


def test_sides_and_layers_may_differ(backend):
    """K and V with modes and dtypes of their own, and layers left dense: each is counted as what it is."""
    tpa = TPAConfig(
        k_mode="latent", v_mode="fixed-b", k_rank=9, v_rank=3, k_dtype="int8", v_dtype="int4", layers="global"
    )
    model = backend.convert(helpers.model(backend), tpa)
    cache = model.new_cache(max_len=25)
    globally = side_bytes("latent", 9, "int8", 2, 16) + side_bytes("fixed-b", 3, "int4", 2, 16)
    locally = 2 * side_bytes("dense", 0, "bfloat16", 2, 16)
    assert cache.nbytes == held_bytes(cache.layers) == 25 * globally + 6 * WINDOW * locally


# Bytes of K and V of one token in one layer, by hand (bfloat16, int8, int4).
PER_TOKEN = [
    # 4B, g 4, d 256: 2 (8 + 512) 2; 2 (8 + 2 + 2 (256 + 8)); 2 (8 + 2 + 2 (128 + 16))
    ("4b", "contextual", 2, (2080, 1076, 596)),
    # 2 4 32 2; 2 4 (32 + 2); 2 4 (16 + 4)
    ("4b", "fixed-b", 32, (512, 272, 160)),
    # 2 1 256 2; 2 (256 + 8); 2 (128 + 16)
    ("4b", "fixed-a", 1, (1024, 528, 288)),
    # 2 512 2; 2 (512 + 16); 2 (256 + 32)
    ("4b", "latent", 512, (2048, 1056, 576)),
    ("4b", "dense", 0, (4096, 2112, 1152)),
    # 1B, g 1, d 256: one a more than the dense cache has numbers
    ("1b", "contextual", 1, (1028, 534, 294)),
    ("1b", "dense", 0, (1024, 528, 288)),
    # 12B, g 8, d 256: 2 (8 + 256) 2; 2 (8 + 2 + 264); 2 (8 + 2 + 144)
    ("12b", "contextual", 1, (1056, 548, 308)),
    # 27B, g 16, d 128: 2 (16 + 128) 2; 2 (16 + 2 + 128 + 4); 2 (16 + 2 + 64 + 8)
    ("27b", "contextual", 1, (576, 300, 180)),
    ("27b", "dense", 0, (8192, 4224, 2304)),
]


@pytest.mark.parametrize(("variant", "mode", "rank", "expected"), PER_TOKEN)
def test_bytes_per_token_by_hand(variant, mode, rank, expected):
    """The published shapes: bytes of one token's K and V in one layer."""
    config = GemmaConfig.of_variant(variant)
    g, d = config.num_kv_heads, config.head_dim
    pairs = [pair_of(tpa_ref, mode, rank, dtype, g, d) for dtype in ("bfloat16", "int8", "int4")]
    assert [pair.token_bytes for pair in pairs] == list(expected)


@pytest.mark.parametrize(
    ("variant", "layers_global", "layers_local", "window"),
    [("1b", 4, 22, 512), ("4b", 5, 29, 1024), ("12b", 8, 40, 1024), ("27b", 10, 52, 1024)],
)
def test_nbytes_at_of_the_published_models(backend, variant, layers_global, layers_local, window):
    """nbytes_at(n) = bytes per token x (global layers x n + local layers x min(n, window)), and a real cache agrees."""
    config = GemmaConfig.of_variant(variant)
    for name, mode, rank, expected in PER_TOKEN:
        if name != variant:
            continue
        for dtype, per_token in zip(("bfloat16", "int8", "int4"), expected, strict=True):
            cache = cache_of(backend, config, mode, rank, dtype)
            assert cache.nbytes == per_token * (layers_global + layers_local)
            for n in (1, window, window + 1, 32_768, 131_072):
                slots = layers_global * n + layers_local * min(n, window)
                assert cache.nbytes_at(n) == per_token * slots
                assert cache.nbytes_at(n, batch=5) == 5 * per_token * slots


@pytest.mark.parametrize(
    ("variant", "full", "windowed"),
    [("1b", 0.8125, 0.1357421875), ("4b", 4.25, 0.73828125), ("12b", 12.0, 2.3125), ("27b", 15.5, 2.90625)],
)
def test_baselines_at_32k_by_hand(variant, full, windowed):
    """GiB of a dense bf16 cache at 32,768 tokens, everywhere full and with windows; rounded: .812/.136, 4.25/.738,
    12.0/2.312, 15.5/2.906.
    """
    config = GemmaConfig.of_variant(variant)
    assert memory.full_bytes(config, 32_768) / 2**30 == full
    assert memory.windowed_bytes(config, 32_768) / 2**30 == windowed


def test_the_dense_cache_is_the_windowed_baseline(backend):
    """The fair baseline is not a formula of its own: it is what our dense bf16 cache really takes."""
    for config in (helpers.config(), GemmaConfig.gemma3_4b()):
        cache = cache_of(backend, config, dtype="bfloat16")
        for n in (5, 11, 12, 2000):
            assert cache.nbytes_at(n) == memory.windowed_bytes(config, n)
    held = cache_of(backend, helpers.config(), dtype="bfloat16", max_len=50)
    assert held.nbytes == 2 * 2 * 32 * (50 + 6 * 11)


def test_memory_report_by_hand():
    """Ratios are baseline over TPA, both given: 4B at 32k, contextual R = 2 in int8, 1076 bytes a token and layer."""

    class Filled:
        max_len, nbytes = 100, 123

    config = GemmaConfig.gemma3_4b()
    tpa = 1076 * (5 * 32_768 + 29 * 1024)
    report = memory.kv_report(config, Filled, 32_768, tpa)
    assert report["measured_tokens"] == 100 and report["measured_bytes"] == 123
    assert report["ratio_vs_full"] == pytest.approx(4096 * 34 * 32_768 / tpa)
    assert report["ratio_vs_windowed"] == pytest.approx(4096 / 1076)
    line = memory.table(config, [("here", 32_768, tpa)]).splitlines()[1]
    assert line.split() == ["here", "32,768", "4.25", "GiB", "756.00", "MiB", "198.60", "MiB", "21.9x", "3.8x"]


# ---- truncate and reset ----


def models(backend):
    """A dense model and every mode below full rank, in float64 so that two ways to the same place can be compared."""
    dense = helpers.model(backend, dtype="float64")
    made = {"dense": dense}
    for mode in MODES:
        made[mode] = backend.convert(dense, TPAConfig(mode=mode, kv_dtype="float32"))
    made["int8"] = backend.convert(dense, TPAConfig(mode="latent", kv_dtype="int8"))
    return made


@pytest.mark.parametrize("name", ["dense", *MODES, "int8"])
@pytest.mark.parametrize(("ran", "kept"), [(9, 5), (11, 1), (9, 0), (20, 19), (30, 29)])
def test_truncate_then_continue_equals_a_fresh_run(backend, name, ran, kept):
    """What was taken back leaves no trace: new tokens, in a chunk and singly, give the logits of a text without it."""
    model = models(backend)[name]
    first, later = helpers.tokens(ran, seed=1), helpers.tokens(16, seed=2)
    cache, fresh = model.new_cache(max_len=60), model.new_cache(max_len=60)
    model.hidden(first, cache=cache)
    cache.truncate(kept)
    assert cache.lengths_b.tolist() == [kept]
    if kept:
        model.hidden(first[:, :kept], cache=fresh)
    for piece in (later[:, :7], later[:, 7:8], later[:, 8:9], later[:, 9:]):
        np.testing.assert_allclose(
            helpers.logits(model, piece, cache=cache), helpers.logits(model, piece, cache=fresh), rtol=0, atol=1e-8
        )


@pytest.mark.parametrize(("ran", "kept"), [(12, 10), (12, 1), (12, 0), (30, 28), (30, 5)])
def test_truncate_is_refused_once_a_ring_has_overwritten_what_it_needs(backend, ran, kept):
    """Past its window a ring has lost the keys the next query would read; the cache says so and stays as it was."""
    model = helpers.model(backend, dtype="float64")
    cache, fresh = model.new_cache(max_len=60), model.new_cache(max_len=60)
    ids = helpers.tokens(ran + 1)
    model.hidden(ids[:, :ran], cache=cache)
    model.hidden(ids[:, :ran], cache=fresh)
    with pytest.raises(TPAError, match=f"truncate to {kept} tokens") as caught:
        cache.truncate(kept)
    assert "\n" not in str(caught.value)
    assert cache.lengths_b.tolist() == [ran]
    np.testing.assert_array_equal(
        helpers.logits(model, ids[:, ran:], cache=cache), helpers.logits(model, ids[:, ran:], cache=fresh)
    )


def test_truncate_twice_past_the_window_is_refused(backend):
    """Only the newest token can be taken back, not one more after it; new tokens make room again."""
    model = helpers.model(backend)
    cache = model.new_cache(max_len=60)
    model.hidden(helpers.tokens(20), cache=cache)
    cache.truncate(19)
    with pytest.raises(TPAError):
        cache.truncate(18)
    model.hidden(helpers.tokens(3), cache=cache)
    cache.truncate(21)
    with pytest.raises(TPAError):
        cache.truncate(20)


def test_truncate_beyond_the_end_changes_nothing_and_below_zero_is_refused(backend):
    """truncate(n) with n >= length keeps everything; a negative n is a mistake."""
    model = helpers.model(backend)
    cache = model.new_cache(max_len=60)
    model.hidden(helpers.tokens(20), cache=cache)
    cache.truncate(20)
    cache.truncate(999)
    assert cache.lengths_b.tolist() == [20]
    with pytest.raises(TPAError):
        cache.truncate(-1)


def test_truncate_without_overwriting_works_at_any_length(backend):
    """A cache no longer than the window never overwrites, nor does one whose text just fills the ring."""
    model = helpers.model(backend)
    for max_len in (10, 11, 60):
        cache = model.new_cache(max_len=max_len)
        model.hidden(helpers.tokens(min(max_len, 11)), cache=cache)
        cache.truncate(2)
        assert cache.lengths_b.tolist() == [2]


def test_truncate_of_a_ragged_batch(backend):
    """Rows shorter than n stay; the others are cut to n."""
    model = helpers.model(backend)
    cache = model.new_cache(batch=2, max_len=60)
    model.hidden(helpers.tokens(9, batch=2), cache=cache, lengths_b=np.array([5, 9]))
    cache.truncate(6)
    assert cache.lengths_b.tolist() == [5, 6]


def test_a_row_that_stood_still_keeps_its_history(backend):
    """A row cut back by one token, then left alone while a shorter one goes on, still cannot be cut again."""
    model = helpers.model(backend)
    cache = model.new_cache(batch=2, max_len=60)
    model.hidden(helpers.tokens(20, batch=2), cache=cache, lengths_b=np.array([20, 4]))
    cache.truncate(19)
    model.hidden(helpers.tokens(1, batch=2), cache=cache, lengths_b=np.array([0, 1]))
    assert cache.lengths_b.tolist() == [19, 5]
    with pytest.raises(TPAError):
        cache.truncate(18)
    cache.truncate(19)
    assert cache.lengths_b.tolist() == [19, 5]


def test_reset_forgets_everything(backend):
    """After reset the same cache gives a new text's logits, even where rings had gone round."""
    model = helpers.model(backend, dtype="float64")
    cache = model.new_cache(max_len=60)
    model.hidden(helpers.tokens(30, seed=1), cache=cache)
    cache.reset()
    assert cache.lengths_b.tolist() == [0]
    ids = helpers.tokens(25, seed=2)
    got = [helpers.logits(model, ids[:, a:b], cache=cache) for a, b in ((0, 6), (6, 7), (7, 25))]
    np.testing.assert_allclose(np.concatenate(got, 1), helpers.logits(model, ids), rtol=0, atol=1e-9)
    cache.reset()
    model.hidden(ids[:, :9], cache=cache)
    cache.truncate(3)  # allowed again: nothing of this text was overwritten
    assert cache.lengths_b.tolist() == [3]


def test_a_ragged_batch_gives_the_logits_of_each_text_alone(backend):
    """Padding, rings and lengths together: every row as if it were alone."""
    model = helpers.model(backend, dtype="float64")
    ids, lengths = helpers.tokens(18, batch=3), [18, 4, 13]
    cache = model.new_cache(batch=3, max_len=40)
    first = helpers.logits(model, ids, cache=cache, lengths_b=np.array(lengths))
    more = helpers.tokens(1, batch=3, seed=9)
    second = helpers.logits(model, more, cache=cache)
    for row, length in enumerate(lengths):
        alone = helpers.logits(model, np.concatenate([ids[row : row + 1, :length], more[row : row + 1]], 1))
        np.testing.assert_allclose(first[row, :length], alone[0, :-1], rtol=0, atol=1e-9)
        np.testing.assert_allclose(second[row], alone[0, -1:], rtol=0, atol=1e-9)


# ---- what is refused ----


def test_a_cache_that_is_too_small_is_named_before_anything_is_stored(backend):
    """9 tokens in 8 slots: both numbers in the error, nothing written, and the cache is still of use."""
    model = helpers.model(backend, dtype="float64")
    cache = model.new_cache(max_len=8)
    ids = helpers.tokens(9)
    model.hidden(ids[:, :4], cache=cache)
    refused(lambda: model.hidden(ids[:, 4:], cache=cache), "9 tokens", "max_len 8")
    assert cache.lengths_b.tolist() == [4]
    got = helpers.logits(model, ids[:, 4:8], cache=cache)
    np.testing.assert_allclose(got, helpers.logits(model, ids[:, :8])[:, 4:], rtol=0, atol=1e-9)


def test_a_cache_of_another_model_is_refused(backend):
    """Another mode, rank, dtype, conversion, other sizes: all are refused with the way out."""
    dense = helpers.model(backend)
    latent = backend.convert(dense, TPAConfig(mode="latent", k_rank=4, v_rank=4))
    others = [
        backend.convert(dense, TPAConfig(mode="contextual")),
        backend.convert(dense, TPAConfig(mode="latent", k_rank=5, v_rank=4)),
        backend.convert(dense, TPAConfig(mode="latent", k_rank=4, v_rank=4, v_dtype="int8")),
        helpers.model(backend, helpers.config(sliding_window=12)),
        backend.convert(dense, TPAConfig(mode="latent", k_rank=4, v_rank=4)),  # may have other constant factors
        dense,
    ]
    for other in others:
        cache = other.new_cache(max_len=8)
        refused(lambda cache=cache: latent.hidden(helpers.tokens(3), cache=cache), "another model", "new_cache()")
    latent.hidden(helpers.tokens(3), cache=latent.new_cache(max_len=8))


def test_a_cache_for_another_batch_is_refused(backend):
    """Both batch sizes are named."""
    model = helpers.model(backend)
    cache = model.new_cache(batch=3, max_len=8)
    refused(lambda: model.hidden(helpers.tokens(3, batch=2), cache=cache), "batch 3", "batch 2")


@pytest.mark.parametrize(("batch", "max_len"), [(0, 5), (1, 0), (-1, 5)])
def test_an_empty_cache_is_refused(backend, batch, max_len):
    """batch and max_len must be at least 1, for a cache and for its arithmetic."""
    model = helpers.model(backend)
    refused(lambda: model.new_cache(batch, max_len), batch, max_len)
    refused(lambda: model.new_cache(max_len=1).nbytes_at(max_len, batch), batch, max_len)


@pytest.mark.parametrize(
    ("ids", "lengths", "words"),
    [
        ([[1, 300]], None, ("299", "300")),
        ([[-1, 3]], None, ("299", "-1")),
        ([[]], None, ("q >= 1",)),
        ([1, 2], None, ("[b, q >= 1]",)),
        ([[1.5, 2.0]], None, ("whole numbers", "float64")),
        ([[1, 2]], [3], ("0 ... 2", "[3]")),
        ([[1, 2]], [-1], ("0 ... 2", "[-1]")),
        ([[1, 2]], [1, 1], ("one number a row",)),
    ],
)
def test_wrong_tokens_and_lengths_are_refused(backend, ids, lengths, words):
    """Ids outside the vocabulary, wrong shapes, wrong lengths: one line with rule and value."""
    model = helpers.model(backend)
    refused(lambda: model.hidden(np.array(ids), lengths_b=None if lengths is None else np.array(lengths)), *words)


def test_a_text_beyond_the_models_positions_is_refused(backend):
    """max_positions 128: 129 tokens are one too many."""
    model = helpers.model(backend)
    model.hidden(helpers.tokens(128))
    refused(lambda: model.hidden(helpers.tokens(129)), "129", "128")


# ---- rows that are chosen, room that grows, tokens taken back past the window ----

FORMS = {
    "dense": None,
    "spectral": TPAConfig(rate=3.0, predict=False, sinks=1),
    "contextual": TPAConfig(mode="contextual", kv_dtype="int8"),
    "newest exact": TPAConfig(mode="latent", kv_dtype="int4", sinks=2, recent=3),
}


def of_form(backend, name):
    """A random model of one of them."""
    dense = helpers.model(backend, dtype="float64" if name == "dense" else "float32")
    return dense if FORMS[name] is None else backend.convert(dense, FORMS[name])


def strides(cache):
    """How every array lies in memory."""
    arrays = [array for layer in cache.layers for ring in layer.rings.values() for array in ring.arrays.values()]
    return [array.stride() if hasattr(array, "stride") else None for array in arrays]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1], [1]])
def test_rows_can_be_chosen(backend, name, rows):
    """What follows is what these rows would have given; arrays lie in memory as those of a new cache do."""
    model, ids, later = of_form(backend, name), helpers.tokens(17, batch=2), helpers.tokens(5, batch=1, seed=4)
    cache, fresh = model.new_cache(2, 40), model.new_cache(len(rows), 40)
    model.hidden(ids, cache=cache, lengths_b=np.array([17, 13]))
    cache.select(rows)
    model.hidden(ids[rows], cache=fresh, lengths_b=np.array([17, 13])[rows])
    assert cache.batch == len(rows) and cache.nbytes == fresh.nbytes and strides(cache) == strides(fresh)
    again = np.repeat(later, len(rows), 0)
    found, expected = (helpers.logits(model, again, cache=of) for of in (cache, fresh))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(rows) == 1 or not np.allclose(found[0], found[1]) or rows[0] == rows[1]


@pytest.mark.parametrize("name", FORMS)
def test_room_grows(backend, name):
    """A cache that was made for too few tokens and grows, twice, within the window and beyond."""
    model, ids = of_form(backend, name), helpers.tokens(40, batch=2)
    cache, fresh = model.new_cache(2, 7), model.new_cache(2, 64)
    lengths_b = np.array([6, 4])
    for of in (cache, fresh):
        model.hidden(ids[:, :6], cache=of, lengths_b=lengths_b)
    for start, end, room in ((6, 16, 20), (16, 34, 64)):
        cache.grow(room)
        found, expected = (helpers.logits(model, ids[:, start:end], cache=of) for of in (cache, fresh))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert cache.nbytes == fresh.nbytes and strides(cache) == strides(fresh)


@pytest.mark.parametrize("name", ["dense", "spectral", "newest exact"])
def test_spare_slots_take_tokens_back_past_the_window(backend, name):
    """As many as there are spare slots, and not one more; a cache that grows them has them from then on."""
    model, ids, other = of_form(backend, name), helpers.tokens(30), helpers.tokens(6, seed=9)
    cache, fresh = model.new_cache(1, 60), model.new_cache(1, 60)
    model.hidden(ids[:, :20], cache=cache)
    cache.grow(60, spare=4)
    with pytest.raises(TPAError, match="truncate"):
        cache.truncate(18)  # lost before there were any
    model.hidden(ids[:, 20:], cache=cache)
    with pytest.raises(TPAError, match="truncate"):
        cache.truncate(24)
    cache.truncate(25)
    model.hidden(ids[:, :25], cache=fresh)
    found, expected = (helpers.logits(model, other, cache=of) for of in (cache, fresh))
    np.testing.assert_allclose(found, expected, atol=1e-5)
