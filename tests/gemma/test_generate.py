"""Sampling rules, streaming of text, the chat template, and generation against repeated full forward passes."""

from __future__ import annotations

from types import SimpleNamespace

import helpers
import numpy as np
import pytest
from helpers import MODES, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_ref.compress.config import TPAConfig
from tpa_ref.errors import TPAError
from tpa_ref.gemma import generate
from tpa_ref.gemma.chat import chat_text, prompt_tokens
from tpa_ref.gemma.conversation import Conversation
from tpa_ref.gemma.generate import Sampling
from tpa_ref.gemma.side_files import SideFiles
from tpa_ref.gemma.tokenizer import BOS, DEFAULT_STOP, END_OF_TURN, EOS, START_OF_TURN, Tokenizer

P = np.array([0.1, 0.4, 0.3, 0.2])  # order of likelihood: 1, 2, 3, 0


def draws(count=400, p=P, seed=0, **rules):
    """`count` draws from logits log p under the rules."""
    sampling, rng = Sampling(**rules), np.random.default_rng(seed)
    return [sampling.choose(np.log(p), rng) for _ in range(count)]


# ---- sampling ----


def test_temperature_zero_is_greedy():
    """The most likely token, whatever the other rules."""
    assert set(draws(20, temperature=0.0)) == {1}
    assert set(draws(20, temperature=0.0, top_k=3, top_p=0.9)) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature):
    """Frequencies follow p^(1/T): at T = 0.5 they are (1, 16, 9, 4)/30."""
    drawn = np.bincount(draws(2000, temperature=temperature), minlength=4) / 2000
    expected = P ** (1 / temperature) / (P ** (1 / temperature)).sum()
    assert np.abs(drawn - expected).max() < 0.05  # over four standard deviations


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-310])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    """Close to zero nothing overflows: the most likely token is drawn."""
    assert set(draws(20, temperature=temperature)) == {1}


@pytest.mark.parametrize(
    ("k", "kept"), [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (10**9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_k_most_likely(k, kept):
    """By hand on p = (.1, .4, .3, .2)."""
    assert set(draws(temperature=1.0, top_k=k)) == kept


@pytest.mark.parametrize(
    ("p", "kept"),
    [(1e-9, {1}), (0.39, {1}), (0.4, {1}), (0.41, {1, 2}), (0.7, {1, 2}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_fewest_that_reach_p(p, kept):
    """By hand: .4, .4 + .3 = .7, + .2 = .9, + .1 = 1; reaching p exactly is enough."""
    assert set(draws(temperature=1.0, top_p=p)) == kept


def test_top_p_is_measured_after_temperature_and_top_k():
    """Within the two most likely, 1 has 4/7 = .571: so p = .57 keeps it alone, and .58 both. At T = .5 it has 16/25."""
    assert set(draws(temperature=1.0, top_k=2, top_p=0.57)) == {1}
    assert set(draws(temperature=1.0, top_k=2, top_p=0.58)) == {1, 2}
    assert set(draws(temperature=0.5, top_k=2, top_p=0.63)) == {1}
    assert set(draws(temperature=0.5, top_k=2, top_p=0.65)) == {1, 2}


def test_what_is_kept_keeps_its_proportions():
    """After top_k = 2 the two are drawn 4 : 3."""
    drawn = np.bincount(draws(2000, temperature=1.0, top_k=2), minlength=4) / 2000
    np.testing.assert_allclose(drawn, [0, 4 / 7, 3 / 7, 0], atol=0.05)


def test_equal_logits_are_cut_by_their_number():
    """Ties: the lower token comes first, greedy and under top_k."""
    assert set(draws(20, p=np.full(4, 0.25), temperature=0.0)) == {0}
    assert set(draws(p=np.full(4, 0.25), temperature=1.0, top_k=2)) == {0, 1}


# ---- generation against the full forward pass ----


def repeated_argmax(model, ids, count):
    """Greedy by definition: a full forward pass over the whole text for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(helpers.logits(model, np.array([ids]))[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("mode", ["dense", *MODES])
def test_greedy_generation_equals_repeated_full_forward(backend, mode):
    """Prefill and steps through the cache, past the window, give the tokens of full passes without one."""
    model = helpers.model(backend, dtype="float64")
    if mode != "dense":
        model = backend.convert(model, TPAConfig(mode=mode, kv_dtype="int8"))
    ids = helpers.tokens(8)[0].tolist()
    expected = repeated_argmax(model, ids, 12)
    assert not {EOS, END_OF_TURN} & set(expected) and len(set(expected)) > 3
    assert list(generate.generate_tokens(model, ids, 12)) == expected


def test_a_prompt_longer_than_a_prefill_chunk(backend):
    """520 tokens are run in two chunks, none twice, none left out: the logits are those of one pass over all."""
    assert generate.PREFILL_CHUNK == 512
    model = helpers.model(backend, helpers.config(max_positions=600, num_layers=6), "float64")
    ids = helpers.tokens(520)
    cache = model.new_cache(max_len=520)
    L_bv = generate.prefill(model, ids.tolist(), cache)
    assert cache.lengths_b.tolist() == [520]
    np.testing.assert_allclose(L_bv, helpers.logits(model, ids)[:, -1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["dense", *MODES])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_batch_gives_every_row_what_it_gets_alone(backend, mode, temperature):
    """Rows of 3, 40 and 17 tokens (the window is 11), padded on the right, past the window; also with random draws,
    each row by its number.
    """
    model = helpers.model(backend, dtype="float64")
    if mode != "dense":
        model = backend.convert(model, TPAConfig(mode=mode, kv_dtype="int8"))
    rows, sampling = [helpers.tokens(n, seed=n)[0].tolist() for n in (3, 40, 17)], Sampling(temperature, seed=5)
    together = list(generate.generate_rows(model, rows, 12, sampling))
    for row, ids in enumerate(rows):
        first_rows = [[2]] * row  # whatever they are
        alone = [step[row] for step in generate.generate_rows(model, [*first_rows, ids], 12, sampling)]
        alone = [token for token in alone if token is not None]
        assert temperature or alone == list(generate.generate_tokens(model, ids, 12, sampling))
        assert [step[row] for step in together][: len(alone)] == alone
        assert all(step[row] is None for step in together[len(alone) :])


def test_equal_prompts_get_different_texts(backend):
    """At temperature 1 four rows of one prompt are four draws, repeatable; no row depends on how many follow, and the
    first is what the prompt gets alone.
    """
    model, ids, sampling = helpers.model(backend), [2, 5, 7], Sampling(1.0, seed=3)

    def texts(count):
        steps = list(generate.generate_rows(model, [ids] * count, 8, sampling))
        return [tuple(step[row] for step in steps) + (None,) * (8 - len(steps)) for row in range(count)]

    four = texts(4)
    assert len(set(four)) == 4 and four == texts(4) and four[:2] == texts(2)
    alone = tuple(generate.generate_tokens(model, ids, 8, sampling))
    assert four[0][: len(alone)] == alone and set(four[0][len(alone) :]) <= {None}


def test_a_batch_goes_on_when_a_row_has_stopped(backend):
    """The row that said <eos> stays silent; the others get what they would get alone."""
    model = helpers.model(backend, dtype="float64")
    rows = [helpers.tokens(n, seed=n)[0].tolist() for n in (5, 9)]
    first, second = (list(generate.generate_tokens(model, ids, 8)) for ids in rows)
    stop = first[2]
    assert stop not in second and stop not in first[:2]
    together = list(generate.generate_rows(model, rows, 8, stop=frozenset({stop})))
    assert [step[0] for step in together] == first[:3] + [None] * 5
    assert [step[1] for step in together] == second


def test_a_padded_prompt_longer_than_a_prefill_chunk(backend):
    """Rows that end in different chunks of the prefill: the logits of each are those behind its own last token."""
    model = helpers.model(backend, helpers.config(max_positions=600, num_layers=6), "float64")
    rows = [helpers.tokens(n, seed=n)[0].tolist() for n in (515, 20, 512)]
    together = generate.prefill(model, rows, model.new_cache(3, 600))
    for row, ids in enumerate(rows):
        alone = helpers.logits(model, np.array([ids]))[0, -1]
        np.testing.assert_allclose(together[row], alone, rtol=0, atol=1e-10)


# ---- conversations ----


def talk(backend, chat=True, max_len=400, new=6):
    model = helpers.model(backend, helpers.config(max_positions=400, vocab_size=400), dtype="float64")
    model.tokenizer = Tokenizer(helpers.tokenizer_proto(400, turns=True))
    return Conversation(model, max_len, chat, max_new_tokens=new)


@pytest.mark.parametrize("chat", [True, False])
def test_a_conversation_is_one_long_text(backend, chat):
    """What is said in the third turn is what a model says that reads all turns from the beginning."""
    talking = talk(backend, chat)
    talking.stop = frozenset()
    for text in ("the list", "a dict"):
        list(talking.say(text))
    asked = talking._asked("and more")
    list(talking.say("and more"))
    answer = talking.ids[len(asked) :]
    assert talking.ids[: len(asked)] == asked
    assert 1 <= len(answer) <= 6 and talking.ids.count(BOS) == 1
    assert repeated_argmax(talking.model, asked, 6)[: len(answer)] == answer


def test_an_undone_turn_leaves_no_trace(backend):
    """Within the window and past it, a turn that was taken back changes nothing that is said later."""
    talking, clean = talk(backend), talk(backend)
    for text in ("the list", "a dict"):
        assert "".join(talking.say(text)) == "".join(clean.say(text))
        list(talking.say("something else"))
        assert talking.undo() and talking.ids == clean.ids
    assert "".join(talking.say("and more")) == "".join(clean.say("and more"))
    talking.reset()
    assert not talking.undo() and talking.ids == []


def test_a_conversation_says_when_the_cache_is_full(backend):
    """The line names what was said, what is new and the room there is, and the turn is not begun."""
    talking = talk(backend, max_len=60)
    refused(lambda: [list(talking.say("the list")) for _ in range(9)], "60", "/reset")
    said = list(talking.ids)
    refused(lambda: list(talking.say("  ")), "empty")
    assert talking.ids == said


def test_the_cache_holds_all_but_the_last_token(backend):
    """A given cache is used and can be continued: prompt + new - 1 tokens are in it."""
    model = helpers.model(backend, dtype="float64")
    ids = helpers.tokens(6)[0].tolist()
    cache = model.new_cache(max_len=40)
    new = list(generate.generate_tokens(model, ids, 5, cache=cache))
    assert len(new) == 5 and cache.lengths_b.tolist() == [10]
    continued = list(generate.generate_tokens(model, new[-1:], 4, cache=cache))
    assert new + continued == repeated_argmax(model, ids, 9)


def test_a_seed_repeats_a_text_and_another_does_not(backend):
    """Same seed, same tokens; five other seeds do not all give the same."""
    model = helpers.model(backend)

    def run(seed):
        return list(generate.generate_tokens(model, [2, 5, 7], 10, Sampling(3.0, seed=seed)))

    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("mode", ["dense", *MODES])
def test_sampled_text_is_the_same_in_both_backends(mode):
    """Tokens are drawn on the host, with the same random numbers, and are not simply the most likely ones."""
    pytest.importorskip("torch")
    said = []
    for backend in helpers.backends():
        model = helpers.model(backend, dtype="float64")
        if mode != "dense":
            model = backend.convert(model, TPAConfig(mode=mode, kv_dtype="int8"))
        sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=3)
        said.append(list(generate.generate_tokens(model, [2, 5, 7], 20, sampling)))
    assert said[0] == said[1] != list(generate.generate_tokens(model, [2, 5, 7], 20))


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_an_unusual_seed_works_or_is_refused_in_one_line(backend, seed):
    """Any whole number may be given on the command line: tokens or a TPAError, nothing else."""
    model = helpers.model(backend)
    try:
        tokens = list(generate.generate_tokens(model, [2, 5], 2, Sampling(1.0, seed=seed)))
    except TPAError as problem:
        assert "seed" in str(problem) and "\n" not in str(problem)
    else:
        assert 1 <= len(tokens) <= 2


class Scripted:
    """A model that says given tokens, whatever it reads, and counts its forward passes."""

    def __init__(self, script):
        self.config, self.side_files, self.script, self.passes = helpers.config(), SideFiles(), script, 0

    def new_cache(self, batch, max_len):
        return None

    def hidden(self, tokens_bq, cache=None, lengths_b=None, images=None):
        self.passes += 1
        return np.zeros((1, len(tokens_bq[0]), 4), np.float32)

    def logits(self, hidden):
        return np.eye(300, dtype=np.float32)[[[self.script[self.passes - 1]]]]

    def to_numpy(self, x):
        return x

    def stream(self, *_):
        return None


@pytest.mark.parametrize(("script", "said"), [([5, 6, EOS, 7], [5, 6, EOS]), ([5, END_OF_TURN, 7], [5, END_OF_TURN])])
def test_generation_stops_on_eos_and_end_of_turn(script, said):
    """The stop token ends the text, and no forward pass is spent after it."""
    model = Scripted(script)
    assert list(generate.generate_tokens(model, [2, 3], 4)) == said
    assert model.passes == len(said)


def test_no_forward_pass_is_spent_on_the_last_token():
    """n tokens take n passes, the prompt's among them."""
    model = Scripted([5, 6, 7, 8])
    assert list(generate.generate_tokens(model, [2, 3], 3)) == [5, 6, 7]
    assert model.passes == 3


def test_generated_text_is_the_decoded_tokens(backend):
    """`generate` is `generate_tokens` on BOS and the prompt's pieces, decoded, without the stop token."""
    model = helpers.model(backend)
    model.tokenizer = tokenizer = Tokenizer(helpers.tokenizer_proto())
    ids = [BOS, *tokenizer.encode("the list", bos=False)]
    tokens = list(generate.generate_tokens(model, ids, 12))
    kept = [token for token in tokens if token not in (EOS, END_OF_TURN)]
    assert "".join(backend.generate(model, "the list", 12)) == tokenizer.decode(kept)


# ---- streaming ----


def streamed(ids, tokenizer=None):
    steps = ([token] for token in ids)
    tokenizer = tokenizer or Tokenizer(helpers.tokenizer_proto())
    return [piece for _, piece in generate.text_of_rows(tokenizer, 1, steps, DEFAULT_STOP)]


@pytest.mark.parametrize(
    "text", ["list", "é", "aé€😀b", "😀😀", "ascii only", "漢字 text\n\nend", "\ufffd", "a\ufffdb"]
)
def test_streamed_pieces_are_whole_characters(text):
    """A character of several tokens appears once, whole, with its last token; joined, the pieces are the text."""
    tokenizer = Tokenizer(helpers.tokenizer_proto())
    ids = tokenizer.encode(text, bos=False)
    pieces = streamed(ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert sum("😀" in piece for piece in pieces) == text.count("😀")


def test_the_emoji_really_takes_several_tokens():
    """The test above is about byte pieces: this tokenizer has none for these characters."""
    tokenizer = Tokenizer(helpers.tokenizer_proto())
    assert len(tokenizer.encode("😀", bos=False)) == 4
    assert streamed(tokenizer.encode("a😀b", bos=False)) == ["a", "😀", "b"]


def test_a_text_cut_inside_a_character_shows_that_it_is_broken():
    """Generation may end in the middle of a character: what is there is shown as replacement characters."""
    ids = Tokenizer(helpers.tokenizer_proto()).encode("a😀", bos=False)
    pieces = streamed(ids[:-1])
    assert pieces[0] == "a" and set("".join(pieces[1:])) == {"\ufffd"}


def test_streaming_stops_before_the_stop_token():
    """<eos> is not shown, and a row that has stopped says nothing."""
    ids = Tokenizer(helpers.tokenizer_proto()).encode("the list", bos=False)
    assert "".join(streamed([*ids, EOS, None, None])) == "the list"


BYTES = st.integers(0, 255).map(lambda byte: 4 + byte)  # of this tokenizer: 0 ... 255 behind the special tokens
LEADS = st.sampled_from([4 + byte for byte in b"\xc3\xe2\xf0\x9f\xa9\xef\xbf\xbd\x80a"])
CHARACTERS = st.sampled_from("aé€😀\ufffd漢 ").map(lambda text: [4 + byte for byte in text.encode()])
ANY = st.integers(4, 299)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(ANY.map(lambda x: [x]), BYTES.map(lambda x: [x]), LEADS.map(lambda x: [x]), CHARACTERS)))
def test_streaming_any_tokens_gives_their_text(parts):
    """Random tokens, characters in bytes, invalid bytes and bytes of broken characters: the pieces joined are the
    decoded whole.
    """
    ids = [token for part in parts for token in part if token != END_OF_TURN]
    assert "".join(streamed(ids)) == Tokenizer(helpers.tokenizer_proto()).decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["the", " list", "é", "😀", "\ufffd", " ", "\n", "a "]), max_size=12))
def test_streaming_with_a_tokenizer_that_adds_a_space(words):
    """SentencePiece's default drops the first space of a text, and of nothing in the middle of it."""
    tokenizer = Tokenizer(helpers.tokenizer_proto(dummy_prefix=True))
    ids = tokenizer.encode("".join(words), bos=False)
    assert "".join(streamed(ids, tokenizer)) == tokenizer.decode(ids) == "".join(words)


def test_bytes_that_never_become_a_character_are_shown():
    """The first of four is no part of a character that a fifth could end."""
    lead = 4 + 0xF0
    assert Tokenizer(helpers.tokenizer_proto()).decode([lead]) == "\ufffd"
    stream = generate.TextStream(Tokenizer(helpers.tokenizer_proto()))
    assert [stream.push(lead) for _ in range(6)] == ["", "", "", *["\ufffd"] * 3]
    assert stream.push() == "\ufffd" * 3 and stream.push() == ""


@pytest.mark.parametrize("text", ["the list of values\n" * 40, "😀é" * 60, None])
def test_streaming_takes_work_in_proportion_to_the_text(text):
    """No more than a dozen ids are decoded for each token, whatever was said before; also of bytes that are no text."""

    class Counting(Tokenizer):
        decoded = 0

        def decode(self, ids):
            self.decoded += len(ids)
            return super().decode(ids)

    tokenizer = Counting(helpers.tokenizer_proto())
    ids = [4 + 0xF0] * 300 if text is None else tokenizer.encode(text, bos=False)
    stream = generate.TextStream(tokenizer)
    pieces = [*map(stream.push, ids), stream.push()]
    assert len(ids) > 150 and tokenizer.decoded <= 12 * len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)


# ---- chat ----


def found(tokenizer):
    """What `prompt_tokens` asks a model for."""
    return SimpleNamespace(tokenizer=tokenizer, config=helpers.config(), side_files=SideFiles())


def test_chat_template_text_by_hand():
    """Gemma's template: a system text, as it is, before the first user text; other texts are stripped."""
    assert chat_text([("user", " Hi\n")]) == "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert chat_text([("system", "Be brief. "), ("user", "Hi"), ("model", "Yes?"), ("user", "Go")]) == (
        "<start_of_turn>user\nBe brief. \n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\nGo<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_chat_tokens_have_bos_once_and_the_turn_tokens():
    """BOS first and nowhere else; 105 and 106 are single tokens."""
    tokenizer = Tokenizer(helpers.tokenizer_proto(400, turns=True))
    ids = prompt_tokens(found(tokenizer), "the list", chat=True)
    assert ids[0] == BOS and ids.count(BOS) == 1
    assert [token for token in ids if token in (START_OF_TURN, END_OF_TURN)] == [105, 106, 105]
    assert ids[1] == START_OF_TURN
    assert tokenizer.decode(ids[1:]) == chat_text([("user", "the list")])


def test_plain_prompts_have_bos_once():
    """Without it Gemma's predictions mean nothing; twice is as bad."""
    tokenizer = Tokenizer(helpers.tokenizer_proto())
    ids = prompt_tokens(found(tokenizer), "the list", chat=False)
    assert ids[0] == BOS and ids.count(BOS) == 1
    assert tokenizer.decode(ids[1:]) == "the list"
    assert tokenizer.encode("the list", bos=False) == ids[1:]


@pytest.mark.parametrize(
    "turns", [[("model", "Hi")], [("user", "a"), ("user", "b")], [("system", "a")], [("user", "a"), ("tool", "b")]]
)
def test_turns_that_do_not_alternate_are_refused(turns):
    """user, model, user, ... and a system text only before the first user turn."""
    refused(lambda: chat_text(turns), "chat")


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": 0}, ("max_new_tokens", 0)),
        ({"max_new_tokens": -5}, ("max_new_tokens", -5)),
        ({"max_new_tokens": 126}, (3, 126, 128)),
        ({"temperature": -0.1}, ("temperature", -0.1)),
        ({"temperature": float("nan")}, ("temperature", "nan")),
        ({"temperature": float("inf")}, ("temperature", "inf")),
        ({"top_k": 0}, ("top_k", 0)),
        ({"top_k": -1}, ("top_k", -1)),
        ({"top_p": 0.0}, ("top_p", 0.0)),
        ({"top_p": 1.1}, ("top_p", 1.1)),
        ({"top_p": float("nan")}, ("top_p", "nan")),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(arguments, words):
    """One line naming the argument, what it may be and what it was; before the model is run."""
    model = Scripted([5] * 200)
    sampling = Sampling(**{name: x for name, x in arguments.items() if name != "max_new_tokens"})
    count = arguments.get("max_new_tokens", 64)
    refused(lambda: list(generate.generate_tokens(model, [2, 3, 4], count, sampling)), "generate", *words)
    assert model.passes == 0


def test_the_longest_text_that_fits_is_accepted():
    """3 + 125 = 128 positions are not too many."""
    model = Scripted([5] * 200)
    assert len(list(generate.generate_tokens(model, [2, 3, 4], 125))) == 125


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
@pytest.mark.parametrize("chat", [False, True])
def test_an_empty_prompt_is_refused(backend, prompt, chat):
    """Nothing to continue."""
    model = helpers.model(backend)
    model.tokenizer = Tokenizer(helpers.tokenizer_proto())
    refused(lambda: list(backend.generate(model, prompt, chat=chat)), "prompt", "empty")


def test_no_tokens_and_no_tokenizer_are_refused(backend):
    """An empty list of ids; and text for a model without a tokenizer, with the way to give one."""
    model = helpers.model(backend)
    refused(lambda: list(generate.generate_tokens(model, [])), "prompt", 0)
    refused(lambda: list(backend.generate(model, "the list")), "tokenizer=")


def test_a_prompt_too_long_is_refused_with_its_length(backend):
    """The model's positions are named as well."""
    model = helpers.model(backend)
    model.tokenizer = tokenizer = Tokenizer(helpers.tokenizer_proto())
    prompt = "the list " * 100
    refused(lambda: list(backend.generate(model, prompt, 4)), len(tokenizer.encode(prompt)), 4, 128)


def test_a_given_cache_that_is_too_small_is_refused(backend):
    """A cache for 4 tokens and a prompt of 6."""
    model = helpers.model(backend)
    cache = model.new_cache(max_len=4)
    refused(lambda: list(generate.generate_tokens(model, [2] * 6, 3, cache=cache)), "max_len 4", 6, 3)
    assert cache.lengths_b.tolist() == [0]


def test_what_a_cache_holds_already_counts(backend):
    """Room and positions are checked before anything is computed; the last new token needs none in the cache."""
    model = helpers.model(backend)
    cache = model.new_cache(max_len=20)
    model.hidden(helpers.tokens(10), cache=cache)
    refused(lambda: next(generate.generate_tokens(model, [5] * 4, 8, cache=cache)), 10, 4, 8, "max_len 20")
    assert cache.lengths_b.tolist() == [10]
    assert len(list(generate.generate_tokens(model, [5] * 4, 7, cache=cache))) <= 7
    cache = model.new_cache(max_len=999)
    model.hidden(helpers.tokens(100), cache=cache)
    refused(lambda: next(generate.generate_tokens(model, [5] * 4, 25, cache=cache)), 100, 4, 25, 128)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b, m: b.generate(m, None), ("prompt", "text", "NoneType")),
        (lambda b, m: b.generate(m, 7), ("prompt", "text", "int")),
        (lambda b, m: b.generate(m, ["the list"]), ("prompt", "text", "list")),
        (lambda b, m: b.generate(m, b"the list"), ("prompt", "text", "bytes")),
        (lambda b, m: b.generate_batch(m, "the list"), ("prompts", "list of texts", "str")),
        (lambda b, m: b.generate_batch(m, None), ("prompts", "list of texts", "NoneType")),
        (lambda b, m: b.generate_batch(m, []), ("prompts", "at least one", 0)),
        (lambda b, m: b.generate_batch(m, ["the list", None]), ("prompt", "text", "NoneType")),
        (lambda b, m: b.generate(m, "the", cache={}), ("new_cache()", "dict")),
        (lambda b, m: b.generate(m, "the", max_new_tokens=None), ("max_new_tokens", "whole number", None)),
        (lambda b, m: b.generate(m, "the", max_new_tokens=2.5), ("max_new_tokens", "whole number", 2.5)),
        (lambda b, m: b.generate(m, "the", temperature=None), ("temperature", "number", None)),
        (lambda b, m: b.generate(m, "the", temperature="1"), ("temperature", "number", "'1'")),
        (lambda b, m: b.generate(m, "the", temperature=1, top_k=2.5), ("top_k", "whole number", 2.5)),
        (lambda b, m: b.generate(m, "the", temperature=1, top_p="x"), ("top_p", "number", "'x'")),
        (lambda b, m: b.generate(m, "the", seed=0.5), ("seed", "whole number", 0.5)),
        (lambda b, m: generate.generate_tokens(m, np.array([1, 2.5])), ("ids", "whole numbers", 2.5)),
        (lambda b, m: generate.generate_tokens(m, ([1], [2, 3])), ("ids", "whole numbers")),
        (lambda b, m: generate.generate_tokens(m, None), ("ids", "whole numbers", None)),
        (lambda b, m: generate.generate_tokens(m, "abc"), ("ids", "whole numbers", "'abc'")),
        (lambda b, m: generate.generate_rows(m, []), ("row", 0)),
        (lambda b, m: [m([[1, 2], [3]])], ("one length", "lengths_b")),
        (lambda b, m: [m(None)], ("whole numbers",)),
        (lambda b, m: [m([["a"]])], ("whole numbers",)),
        (lambda b, m: [m([[1, 2]], lengths_b=[1.5])], ("one number a row", 1.5)),
        (lambda b, m: [b.evaluate(m, m, None)], ("text", "NoneType")),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(backend, call, words):
    """One line that says what is wanted and what was given, no traceback out of the middle."""
    model = helpers.model(backend)
    model.tokenizer = Tokenizer(helpers.tokenizer_proto())
    refused(lambda: list(call(backend, model)), *words)
