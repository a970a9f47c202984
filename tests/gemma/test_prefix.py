"""Texts that go on with what a cache holds: copies of a prefix, BOS, and how many logits are made on the way."""

from __future__ import annotations

import copy
import pickle

import helpers
import numpy as np
import pytest
from helpers import MODES, back, refused

from tpa_ref.compress.config import TPAConfig
from tpa_ref.gemma import backward, generate
from tpa_ref.gemma.chat import chat_text
from tpa_ref.gemma.conversation import Conversation
from tpa_ref.gemma.generate import generate_rows, generate_tokens
from tpa_ref.gemma.tokenizer import BOS, Tokenizer

KINDS = ["dense", *MODES, "exact tokens"]
LIKE = helpers.config(max_positions=400)


def model_of(backend, kind, dtype="float64"):
    model = helpers.model(backend, LIKE, dtype)
    model.tokenizer = Tokenizer(helpers.tokenizer_proto())
    if kind == "dense":
        return model
    exact = {"sinks": 2, "recent": 3} if kind == "exact tokens" else {}
    return backend.convert(
        model, TPAConfig(mode="latent" if exact else kind, k_rank=2, v_rank=2, kv_dtype="int8", **exact)
    )


def contents(cache):
    """Everything a cache holds, by name."""
    arrays = {
        f"{number} {kind} {name}": array
        for number, layer in enumerate(cache.layers)
        for kind, ring in layer.rings.items()
        for name, array in ring.arrays.items()
    }
    return arrays | ({} if cache.text_bt is None else {"text": cache.text_bt}) | {"lengths": cache.lengths_b}


def strides(array):
    return array.stride() if hasattr(array, "stride") else array.strides


# ---- copies ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5, 30])
def test_two_texts_with_one_prefix(backend, kind, length):
    """Within the window of 11 and past it: each goes on as if it had been read alone, and the prefix stays as it is."""
    model = model_of(backend, kind)
    prefix, (one, two) = helpers.tokens(length)[0].tolist(), helpers.tokens(4, batch=2, seed=1).tolist()
    cache = model.new_cache(max_len=80)
    generate.prefill(model, [prefix], cache)
    before = {name: back(array).copy() for name, array in contents(cache).items()}
    for more in (one, two, one):
        alone = model.new_cache(max_len=80)
        generate.prefill(model, [prefix], alone)
        expected = list(generate_tokens(model, more, 14, cache=alone))
        assert list(generate_tokens(model, more, 14, cache=cache.copy())) == expected
    for name, array in contents(cache).items():
        np.testing.assert_array_equal(back(array), before[name], err_msg=name)
    assert list(generate_tokens(model, one, 14, cache=cache)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_batch(backend, kind):
    """Rows of different length, padded: the copy goes on with each of them."""
    model = model_of(backend, kind)
    rows, more = [helpers.tokens(n, seed=n)[0].tolist() for n in (3, 25, 12)], helpers.tokens(2, batch=3).tolist()
    caches = [model.new_cache(3, 60) for _ in range(2)]
    for cache in caches:
        generate.prefill(model, rows, cache)
    copied = caches[0].copy()
    expected = list(generate_rows(model, more, 9, cache=caches[1]))
    assert list(generate_rows(model, more, 9, cache=copied)) == expected
    assert caches[0].lengths_b.tolist() == [3, 25, 12] != copied.lengths_b.tolist()


@pytest.mark.parametrize("how", [lambda cache: cache.copy(), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_and_what_is_shared(backend, kind, how):
    """Every array anew, as it lies in memory; the pairs, which are the model's, and the sizes as they are."""
    model = model_of(backend, kind, "float32")
    cache = model.new_cache(batch=2, max_len=30)
    model.hidden(helpers.tokens(20, batch=2), cache=cache)
    copied = how(cache)
    assert type(copied) is type(cache) and all(a is b for a, b in zip(cache.pairs, copied.pairs, strict=True))
    assert copied.nbytes == cache.nbytes and copied.lengths_b.tolist() == [20, 20]
    for name, array in contents(cache).items():
        other = contents(copied)[name]
        np.testing.assert_array_equal(back(array), back(other), err_msg=name)
        assert strides(array) == strides(other), name
        assert not np.shares_memory(back(array), back(other)), name
    ids = helpers.tokens(3, batch=2, seed=2)
    np.testing.assert_array_equal(helpers.logits(model, ids, cache=copied), helpers.logits(model, ids, cache=cache))


def test_tokens_that_something_is_predicted_from_are_copied(backend):
    """The ids of the text are part of what a cache holds."""
    model = helpers.model(backend, helpers.config(num_heads=8, num_kv_heads=4, head_dim=8))
    model.tokenizer = helpers.Bytes()
    moments = backend.calibrate(model, helpers.CALIBRATION, max_tokens=300, predict=True)
    tpa = backend.convert(model, TPAConfig(rate=1.5, context=60, prefer="size"), moments)
    cache = tpa.new_cache(max_len=60)
    tpa.hidden(helpers.tokens(20), cache=cache)
    assert cache.text_bt is not None
    copied = cache.copy()
    assert not np.shares_memory(cache.text_bt, copied.text_bt)
    tpa.hidden(helpers.tokens(9, seed=3), cache=copied)
    assert not cache.text_bt[0, 20:].any() and copied.text_bt[0, 20:29].all()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_a_model_and_of_a_conversation_work(backend, how):
    """A model that has generated and its copy say the same; a conversation is copied with its model and its cache."""
    model = model_of(backend, "latent", "float32")
    said = "".join(backend.generate(model, "the list", 8))
    copied = how(model)
    assert copied.pairs[0] is not model.pairs[0] and "".join(backend.generate(copied, "the list", 8)) == said
    talking = Conversation(model, 200, chat=False, max_new_tokens=6)
    list(talking.say("the list"))
    assert "".join(how(talking).say("and more")) == "".join(talking.say("and more"))


# ---- BOS ----


def fed(model, cache, prompts, **more):
    """The ids that a cache is fed."""
    seen, right = [], type(model).hidden

    def hidden(self, tokens_bq, *args, **rest):
        seen.append(np.asarray(tokens_bq))
        return right(self, tokens_bq, *args, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "hidden", hidden)
        list(generate.generate_batch(model, prompts, 1, cache=cache, **more))
    return np.concatenate(seen, 1)


@pytest.mark.parametrize("chat", [False, True])
def test_bos_begins_a_text_and_nothing_else(backend, chat):
    """In front of the first prompt of a cache, and not of one that goes on; nor of a turn in Gemma's template."""
    model = helpers.model(backend, helpers.config(max_positions=400, vocab_size=400), "float64")
    model.tokenizer = Tokenizer(helpers.tokenizer_proto(400, turns=True))
    cache, encode = model.new_cache(max_len=300), model.tokenizer.encode
    text = chat_text([("user", "the list")]) if chat else "the list"
    assert fed(model, cache, ["the list"], chat=chat).tolist() == [[BOS, *encode(text, bos=False)]]
    assert fed(model, cache, ["the list"], chat=chat).tolist() == [encode(text, bos=False)]
    cache.reset()
    assert fed(model, cache, ["the list"], chat=chat)[0, 0] == BOS


def test_a_text_in_two_prompts_is_the_text_in_one(backend):
    """The prefix read once, the question after it: what the whole prompt gets."""
    model = model_of(backend, "dense")
    cache = model.new_cache(max_len=200)
    prefix, question = "the return value is the sum of", " the list"
    both = model.tokenizer.encode(prefix) + model.tokenizer.encode(question, bos=False)
    assert both == model.tokenizer.encode(prefix + question)
    generate.prefill(model, [model.tokenizer.encode(prefix)], cache)
    for _ in range(2):
        said = "".join(backend.generate(model, question, 12, cache=cache.copy()))
        assert said == "".join(backend.generate(model, prefix + question, 12))


def test_rows_of_a_cache_begin_together_or_not_at_all(backend):
    """Where one row is empty and another is not, nobody can know where the prompts belong."""
    model = model_of(backend, "dense")
    cache = model.new_cache(2, 60)
    model.hidden(helpers.tokens(3, batch=2), cache=cache, lengths_b=np.array([0, 3]))
    refused(lambda: list(generate.generate_batch(model, ["the list"] * 2, 4, cache=cache)), "rows", "[0, 3]")
    refused(lambda: list(generate.generate_batch(model, ["the list"], 4, cache=cache)), "batch 2", "batch 1")


# ---- logits of few positions ----


@pytest.mark.parametrize("lengths", [None, [9, 4, 1]])
@pytest.mark.parametrize("cached", [False, True])
def test_logits_of_the_last_tokens_alone(backend, lengths, cached):
    """They are the last row, of each text, of all logits."""
    model, ids = model_of(backend, "latent"), helpers.tokens(9, batch=3)
    given = None if lengths is None else np.array(lengths)

    def logits(**more):
        cache = model.new_cache(3, 20) if cached else None
        return back(model(ids, cache=cache, lengths_b=given, **more))

    last = logits(last_only=True)
    assert last.shape == (3, 1, LIKE.vocab_size)
    ends = np.array(lengths or [9] * 3) - 1
    np.testing.assert_allclose(last[:, 0], logits()[np.arange(3), ends], rtol=0, atol=1e-12)


def test_no_more_logits_than_are_read(backend, monkeypatch):
    """A prompt of two chunks and its steps: one position a time. Comparing two models: a block of positions a time."""
    model = model_of(backend, "dense", "float32")
    made, right = [], type(model).logits

    def logits(self, x_bqm, *args):
        made.append(x_bqm.shape[0] * x_bqm.shape[1])
        return right(self, x_bqm, *args)

    monkeypatch.setattr(type(model), "logits", logits)
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 64)
    list(generate_tokens(model, helpers.tokens(100)[0].tolist(), 6))
    model(helpers.tokens(100), last_only=True)
    assert made and set(made) == {1}
    made.clear()
    backend.evaluate(model, model, helpers.TEXT * 4, 300, recall_prompts=0)
    assert sum(made) > 2 * 250 and max(made) <= backward.ROWS < 250


def test_blocks_of_a_comparison_are_the_comparison(backend, monkeypatch):
    """In blocks of 7 positions, the last of them shorter and without a token that follows: the same numbers."""
    one, other = model_of(backend, "dense"), model_of(backend, "latent")
    ids = helpers.tokens(30)
    found = []
    for rows in (7, 29, 1000):
        monkeypatch.setattr(backward, "ROWS", rows)
        found.append(one.compare(one.hidden(ids), other, other.hidden(ids), ids[0, 1:]))
    assert {name: len(x) for name, x in found[0].items()} == {"kl": 30, "same": 30, "nll": 29, "nll_other": 29}
    for name, x in found[2].items():
        np.testing.assert_allclose(found[0][name], x, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found[1][name], x, rtol=1e-9, atol=1e-12)
