"""Whatever is in a folder, read as `transformers` reads it: heads, RoPE, dtypes, stop ids, tokenizers, chat templates;
and nothing of it lost when the model is saved or exported.
"""

from __future__ import annotations

import builtins
import functools
import json
import shutil
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
from helpers import TOLERANCE, refused, relative, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tpa_ref.files.found import inspect
from tpa_ref.gemma.chat import chat_tokens, prompt_tokens, stop_tokens
from tpa_ref.gemma.conversation import Conversation
from tpa_ref.gemma.generate import TextStream, generate, generate_tokens
from tpa_ref.gemma.side_files import SideFiles
from tpa_ref.gemma.tokenizer import Tokenizer
from tpa_ref.gemma.weights import EMBED, HEAD

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

IDS = helpers.tokens(40)
NEAR = TOLERANCE["transformers"]

# Gemma's own, as its checkpoints carry it, and that of many fine-tunes
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def edit(folder, name="config.json", **changes):
    """A JSON file of a folder with other values; None takes a key away."""
    path = folder / name
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def folder_of(path, weights=None, tokenizer=None, **config):
    made = helpers.config(**config)
    return helpers.write_folder(path, made, weights or helpers.tensors(made), tokenizer=tokenizer)


def theirs(folder, **options):
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def their_logits(folder, ids=IDS, **options):
    with torch.no_grad():
        return to_numpy(theirs(folder, **options)(torch.tensor(ids)).logits)


# ---- heads ----


def with_head(path, head, tied):
    """A folder with an lm_head: "other", "equal", "only" (no embedding); tied: what the config says."""
    named = helpers.tensors(helpers.config())
    named[HEAD] = named[EMBED].copy()
    if head == "other":
        named[HEAD] += np.random.default_rng(1).normal(0, 0.02, named[HEAD].shape).astype(np.float32)
    if head == "only":
        del named[EMBED]
    return edit(folder_of(path, named), tie_word_embeddings=tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["other", "equal", "only"])
def test_a_head_of_its_own(backend, tmp_path, head, tied):
    """As `transformers` loads it, whatever the config says; saved and exported it stays what it was."""
    folder = with_head(tmp_path / "model", head, tied)
    if head == "only" and not tied:  # where `transformers` would make up an embedding
        return refused(lambda: backend.load(folder), "missing model.embed_tokens.weight")
    expected, model = their_logits(folder), backend.load(folder)
    assert model.config.tied == (head != "other")
    assert relative(helpers.logits(model, IDS), expected) < NEAR
    for suffix in ("", ".safetensors", ".pt"):
        again = backend.load(backend.save(model, tmp_path / f"saved{suffix}"))
        assert again.config == model.config
        np.testing.assert_array_equal(helpers.logits(again, IDS), helpers.logits(model, IDS))
    exported = backend.export(folder, tmp_path / "exported")
    assert relative(their_logits(exported), expected) < 1e-6
    if head == "other":  # the seeded mistake
        model.weights.head_vm = model.weights.embed_vm
        assert relative(helpers.logits(model, IDS), expected) > 100 * NEAR


def test_everything_goes_through_the_head(backend, tmp_path):
    """Gradients for calibration start at the head, not at the embedding table; a stream writes it, too."""
    folder = with_head(tmp_path / "model", "other", True)
    (folder / "tokenizer.model").write_bytes(helpers.tokenizer_proto())
    model, plain = backend.load(folder), backend.load(folder)
    plain.weights.head_vm = plain.weights.embed_vm
    x_bqm = model.array(to_numpy(model.hidden(IDS)))
    own, other = (to_numpy(m.logits_backward(x_bqm, np.random.default_rng(0))) for m in (model, plain))
    assert relative(own, other) > 0.01
    tpa = backend.TPAConfig(rate=4.0)
    target = backend.convert_checkpoint(folder, tmp_path / "tpa", tpa, helpers.TEXT * 3)
    whole = backend.convert(model, tpa, helpers.TEXT * 3)
    assert relative(helpers.logits(backend.load(target), IDS), helpers.logits(whole, IDS)) < 1e-5


def test_a_missing_head_is_refused(backend, tmp_path):
    """`transformers` would begin with a random one."""
    folder = edit(folder_of(tmp_path / "model"), tie_word_embeddings=False)
    refused(lambda: backend.load(folder), "tie_word_embeddings", "lm_head.weight")


# ---- RoPE ----

DEFAULT = {"rope_type": "default"}
LINEAR = {"rope_type": "linear", "factor": 4.0}
NO_OLD = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling"))
ROPE = {
    "window layers scaled": NO_OLD
    | {"rope_parameters": {"sliding_attention": LINEAR | {"rope_theta": 5e3}, "full_attention": DEFAULT}},
    "both scaled": NO_OLD | {"rope_parameters": {"sliding_attention": LINEAR, "full_attention": LINEAR}},
    "bases alone": NO_OLD
    | {"rope_parameters": {"sliding_attention": {"rope_theta": 500.0}, "full_attention": {"rope_theta": 7e4}}},
    "both generations": {
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "rope_parameters": {"sliding_attention": DEFAULT, "full_attention": DEFAULT | {"rope_theta": 9e4}},
    },
}


@pytest.mark.parametrize("keys", list(ROPE))
def test_rope_of_both_kinds_of_layers(backend, tmp_path, keys):
    """Bases and scales of window and global layers, in either generation of keys, and again after saving."""
    folder = edit(folder_of(tmp_path / "model"), **ROPE[keys])
    expected, model = their_logits(folder), backend.load(folder)
    assert relative(helpers.logits(model, IDS), expected) < NEAR
    saved = backend.save(model, tmp_path / "saved")
    assert backend.load(saved).config == model.config
    assert relative(their_logits(saved), expected) < NEAR


def test_the_older_name_of_the_kind_of_scaling(backend, tmp_path):
    """`type` for rope_type, which `transformers` 4 reads and 5 passes over."""
    old, new = (folder_of(tmp_path / name) for name in ("old", "new"))
    edit(old, rope_scaling={"type": "linear", "factor": 2.0})
    edit(new, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert backend.load(old).config == backend.load(new).config
    assert backend.load(old).config.rope_scale_global == 2.0


def test_a_forgotten_scale_would_show(tmp_path):
    """The seeded mistake."""
    folder = edit(folder_of(tmp_path / "model"), **ROPE["window layers scaled"])
    expected = their_logits(folder)
    edit(folder, **NO_OLD, rope_parameters={"sliding_attention": {"rope_theta": 5e3}, "full_attention": DEFAULT})
    import tpa_ref

    assert relative(helpers.logits(tpa_ref.load(folder), IDS), expected) > 100 * NEAR


@pytest.mark.parametrize(
    ("kind", "scaling", "words"),
    [
        ("sliding_attention", {"rope_type": "yarn", "factor": 2.0}, ("linear", "yarn")),
        ("sliding_attention", {"rope_type": "linear"}, ("factor",)),
        ("full_attention", {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, ("partial", "0.5")),
        ("full_attention", {"rope_type": "linear", "factor": -2.0}, ("rope_scale_global", "-2")),
    ],
)
def test_what_is_not_honoured_is_refused(backend, tmp_path, kind, scaling, words):
    """No key that changes numbers is passed over."""
    folder = edit(folder_of(tmp_path / "model"), **NO_OLD, rope_parameters={kind: scaling})
    refused(lambda: backend.load(folder), *words)


# ---- dtypes, and files that are passed over ----


def test_float16_weights_are_widened(backend, tmp_path):
    """Computed in float32 as `transformers` does, and stored as they were."""
    of = helpers.config()
    folder = folder_of(tmp_path / "model", helpers.tensors(of, dtype=np.float16))
    model = backend.load(folder)
    assert model.stored_dtype == "float16" and model.dtype == "float32"
    assert relative(helpers.logits(model, IDS), their_logits(folder)) < NEAR
    saved = backend.save(model, tmp_path / "saved")
    assert {x.dtype.name for x in load_file(saved / "model.safetensors").values()} == {"float16"}
    mixed = helpers.tensors(of, dtype=np.float16)
    mixed[EMBED] = mixed[EMBED].astype(helpers.ml_dtypes.bfloat16)
    assert backend.load(folder_of(tmp_path / "mixed", mixed)).stored_dtype == "float32"


def test_a_whole_file_wins_over_a_stale_index(backend, tmp_path):
    """The index names shards that are gone; a line says so."""
    folder = folder_of(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBED: "gone.safetensors"}}))
    assert any("index.json is ignored" in note for note in inspect(folder).notes)
    assert relative(helpers.logits(backend.load(folder), IDS), their_logits(folder)) < NEAR


def test_tables_of_rope_are_not_read(backend, tmp_path):
    """Older programs stored them; a line says that they are ignored."""
    named = helpers.tensors(helpers.config())
    named["model.rotary_emb.inv_freq"] = np.full(8, np.nan, np.float32)
    named["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    folder = folder_of(tmp_path / "model", named)
    assert any("inv_freq is ignored" in note for note in backend.load(folder).notes)
    assert relative(helpers.logits(backend.load(folder), IDS), their_logits(folder)) < NEAR


# ---- where a text ends ----

STOPS = {
    "generation_config": ({"eos_token_id": 1}, {"eos_token_id": [1, 106, 50]}),
    "config alone": ({"eos_token_id": [1, 50]}, None),
    "a single id": ({"eos_token_id": 7}, None),
}


@pytest.mark.parametrize("said", list(STOPS))
def test_generation_stops_where_the_files_say(backend, tmp_path, said):
    """The same ids as `transformers` generates, which end with the same token; and again once saved."""
    config, generation = STOPS[said]
    folder = edit(folder_of(tmp_path / "model"), **config)
    if generation is not None:
        edit(folder, "generation_config.json", **generation)
    prompt = helpers.tokens(6)[0].tolist()
    free = list(generate_tokens(backend.load(folder), prompt, 12, stop=frozenset()))
    for place, name in ((config, "config.json"), (generation, "generation_config.json")):
        if place and "eos_token_id" in place:  # one of the ids is a token that the model comes to say
            ids = place["eos_token_id"]
            edit(folder, name, eos_token_id=[*ids[:-1], free[4]] if isinstance(ids, list) else free[4])
    hf = theirs(folder)
    got = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 6:].tolist()
    model = backend.load(folder)
    assert list(generate_tokens(model, prompt, 12)) == got and len(got) <= 5
    saved = backend.load(backend.save(backend.convert(model, backend.TPAConfig(mode="fixed-a")), tmp_path / "saved"))
    assert saved.side_files.stop_tokens == model.side_files.stop_tokens


def test_where_no_file_says_what_ends_a_text(backend, tmp_path):
    """<eos>, the default of Gemma's config, where there is a config.json; Gemma's two ids without one. A
    generation_config.json that says none leaves it to config.json. Saving changes none of it.
    """
    assert SideFiles().stop_tokens == {1, 106}
    folder = edit(folder_of(tmp_path / "model"), eos_token_id=None)
    model = backend.load(folder)
    assert model.side_files.stop_tokens == {1}
    assert backend.load(backend.save(model, tmp_path / "saved")).side_files.stop_tokens == {1}
    model.side_files = SideFiles()
    assert backend.load(backend.save(model, tmp_path / "again")).side_files.stop_tokens == {1, 106}
    files = {"generation_config.json": b'{"top_k": 64}', "config.json": b'{"text_config": {"eos_token_id": 7}}'}
    assert SideFiles(files).stop_tokens == {7}


@pytest.mark.parametrize("value", ["a", [1, "a"], [1, -2], 1.5, {"a": 1}, True])
def test_stop_ids_that_are_none_are_refused(backend, tmp_path, value):
    folder = edit(folder_of(tmp_path / "model"), "generation_config.json", eos_token_id=value)
    refused(lambda: backend.load(folder), "eos_token_id")


# ---- tokenizers ----


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Folders with one tokenizer: as "model" (SentencePiece), "json" (`transformers` 5), and "added" with ChatML's
    tokens, beside its tokenizer.model as "both".
    """
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "model").mkdir()
    (root / "model" / "tokenizer.model").write_bytes(helpers.tokenizer_proto(400, turns=True))
    read = transformers.GemmaTokenizer.from_pretrained(root / "model")
    read.save_pretrained(root / "json")
    read.add_tokens(["<|im_start|>", "<|im_end|>", "<|im|>"], special_tokens=True)
    read.add_tokens([f"<word{i}>" for i in range(90)])
    read.chat_template = CHATML
    read.save_pretrained(root / "added")
    shutil.copytree(root / "added", root / "both")
    shutil.copy(root / "model" / "tokenizer.model", root / "both")
    return root


def with_tokenizer(path, source, **config):
    """A random model with the files of a tokenizer beside it."""
    folder = folder_of(path, **({"vocab_size": 512} | config))
    for file in source.iterdir():
        shutil.copy(file, folder)
    return folder


TEXTS = [
    "the <bos> list of <eos><pad> numbers <unk>",
    "<start_of_turn>user\nHi  there<end_of_turn>\n<start_of_turn>model\n",
    "<|im_start|>user\nthe <|im_end|> <|im|>\n<word3><word33>",
    " two  spaces\n\n\n and Grüße 你好 🎉 \t<unused7>",
    "",
]


@pytest.mark.parametrize("kind", ["model", "json", "added", "both"])
def test_ids_and_text_are_those_of_transformers(tokenizers, tmp_path, kind):
    """Special tokens typed into a text, added ones, spaces, bytes; and the text of the ids."""
    folder = with_tokenizer(tmp_path / "model", tokenizers / kind)
    expected = transformers.GemmaTokenizer.from_pretrained(tokenizers / kind)
    tokenizer = inspect(folder).tokenizer
    for text in TEXTS:
        ids = expected(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.encode(text) == [2, *ids]
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("the list<|im_start>bos/ \né你🎉"), max_size=30))
def test_any_text_has_the_ids_of_transformers(tokenizers, text):
    files = {file.name: file.read_bytes() for file in (tokenizers / "both").iterdir()}
    tokenizer = Tokenizer({name: files[name] for name in ("tokenizer.json", "tokenizer.model")})
    expected = tokenizer_of(tokenizers / "both")
    assert tokenizer.encode(text, bos=False) == expected(text, add_special_tokens=False).input_ids


@functools.cache
def tokenizer_of(folder):
    return transformers.GemmaTokenizer.from_pretrained(folder)


def test_tokens_that_were_added_to_a_tokenizer_model(tokenizers, tmp_path):
    """As older fine-tunes have them: tokenizer.model, and the added ones in added_tokens.json or tokenizer_config."""
    added = {"<|im_start|>": 400, "<|im_end|>": 401}
    for name, content in (
        ("added_tokens.json", added),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(i): {"content": text} for text, i in added.items()}}),
    ):
        folder = with_tokenizer(tmp_path / name, tokenizers / "model")
        (folder / name).write_text(json.dumps(content))
        given = tmp_path / f"{name}.model"
        shutil.copy(folder / "tokenizer.model", given)
        for tokenizer in (inspect(folder).tokenizer, inspect(folder, tokenizer=given).tokenizer):
            ids = tokenizer.encode("<|im_start|>the<|im_end|>", bos=False)
            assert ids[0] == 400 and ids[-1] == 401 and len(ids) > 2
            assert tokenizer.decode([*ids, 511, 10**6]) == "<|im_start|>the<|im_end|>"
        decoder = {str(token): {"content": text, "special": True} for text, token in added.items()}
        edit(folder, "tokenizer_config.json", added_tokens_decoder=decoder)
        assert inspect(folder).tokenizer.decode(ids) == "the"


def without_library(monkeypatch, name):
    """Importing it fails."""
    real = builtins.__import__

    def importing(module, *more):
        if module.split(".")[0] == name:
            raise ImportError(module)
        return real(module, *more)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_without_the_tokenizers_library(tokenizers, tmp_path, monkeypatch):
    """tokenizer.model does where it knows the same tokens, otherwise one line says what to install."""
    same = with_tokenizer(tmp_path / "same", tokenizers / "json")
    shutil.copy(tokenizers / "model" / "tokenizer.model", same)
    edit(same, "added_tokens.json", **{"<mask>": 400})
    lacking = with_tokenizer(tmp_path / "lacking", tokenizers / "both")
    alone = with_tokenizer(tmp_path / "alone", tokenizers / "json")
    without_library(monkeypatch, "tokenizers")
    assert inspect(same).tokenizer.encode("<start_of_turn>", bos=False) == [105]
    (lacking / "tokenizer_config.json").unlink()
    refused(lambda: inspect(lacking), "tokenizers", "pip install")
    refused(lambda: inspect(alone), "tokenizers", "pip install")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_tokenizer_json_is_one_line(tokenizers, data):
    """Bytes changed, cut off, or another file: refused, or read."""
    content = bytearray((tokenizers / "added" / "tokenizer.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content)[: data.draw(st.sampled_from([len(content), len(content) // 2, 0]))]
    try:
        Tokenizer({"tokenizer.json": content}).encode("the list")
    except Exception as problem:
        assert type(problem).__name__ == "TPAError" and "\n" not in str(problem)


@pytest.mark.parametrize("rows", [493, 494, 560])
def test_resized_embeddings(backend, tokenizers, tmp_path, rows):
    """Any number of rows beyond the tokens; an id without a token is no text, a token without a row is one line."""
    folder = with_tokenizer(tmp_path / "model", tokenizers / "added", vocab_size=rows)
    model = backend.load(folder)
    assert relative(helpers.logits(model, IDS), their_logits(folder)) < NEAR
    last = len(tokenizer_of(tokenizers / "added")) - 1
    assert model.tokenizer.encode("<word89>", bos=False) == [last] == [493]
    assert model.tokenizer.decode([490, 10**6]) == "<word86>"
    ask = lambda: list(generate(model, "the <word89>", max_new_tokens=2))  # noqa: E731
    if rows == 493:
        refused(ask, "493", "492")
    else:
        ask()


def test_what_ends_a_turn(tokenizers):
    """<end_of_turn> ends one where the template has it; 106 is just a token elsewhere."""
    tokenizer = Tokenizer({"tokenizer.json": (tokenizers / "added" / "tokenizer.json").read_bytes()})
    for template, expected in ((None, {1, 106}), (GEMMA, {1, 106}), (CHATML, {1})):
        files = {"config.json": b'{"eos_token_id": 1}'}
        files |= {} if template is None else {"chat_template.jinja": template.encode()}
        model = SimpleNamespace(tokenizer=tokenizer, side_files=SideFiles(files))
        assert stop_tokens(model, chat=True) == expected and stop_tokens(model, chat=False) == {1}


def test_a_tokenizer_without_gemma_s_turns_cannot_chat(backend, tmp_path):
    """A line at the loader, and one where a chat is asked for."""
    folder = folder_of(tmp_path / "model", tokenizer=helpers.tokenizer_proto())
    model = backend.load(folder)
    assert any("<start_of_turn>" in note for note in model.notes)
    refused(lambda: list(generate(model, "the list", chat=True)), "<start_of_turn>", "105")


def changed(tokenizers, kind, **changes):
    """A tokenizer.json with other entries, as a `Tokenizer`."""
    content = json.loads((tokenizers / kind / "tokenizer.json").read_text()) | changes
    return Tokenizer({"tokenizer.json": json.dumps(content).encode()})


def test_what_training_left_in_a_tokenizer_is_not_obeyed(tokenizers):
    """Truncation and padding of tokenizer.json, which `transformers` switches off."""
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    tokenizer = changed(tokenizers, "json", truncation=cut, padding=fill | {"pad_type_id": 0, "pad_token": "<pad>"})
    expected = tokenizer_of(tokenizers / "json")
    for text in ("the", TEXTS[3]):
        assert tokenizer.encode(text, bos=False) == expected(text, add_special_tokens=False).input_ids


def test_tokens_that_only_tokenizer_config_adds(tokenizers, tmp_path):
    """Beside a tokenizer.json as beside a tokenizer.model."""
    folder = with_tokenizer(tmp_path / "model", tokenizers / "json")
    edit(folder, "tokenizer_config.json", added_tokens_decoder={"401": {"content": "<new>", "special": True}})
    tokenizer = inspect(folder).tokenizer
    assert tokenizer.encode("<new>", bos=False) == [401] and tokenizer.decode([401]) == ""


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("the 你好üß🎉😀\n<"), max_size=20))
def test_streamed_text_is_the_decoded_whole(tokenizers, text):
    """Characters of several bytes next to each other, in both formats."""
    for kind, name in (("json", "tokenizer.json"), ("model", "tokenizer.model")):
        tokenizer = tokenizer_from(tokenizers / kind / name)
        stream = TextStream(tokenizer)
        ids = tokenizer.encode(text, bos=False)
        assert "".join(map(stream.push, ids)) + stream.push() == tokenizer.decode(ids) == text


tokenizer_from = functools.cache(Tokenizer.from_file)


@pytest.mark.parametrize("content", [b"", b"{}", b"\0"])
def test_a_tokenizer_model_without_a_model(tmp_path, content):
    """A broken download."""
    (tmp_path / "tokenizer.model").write_bytes(content)
    refused(lambda: Tokenizer.from_file(tmp_path / "tokenizer.model"), "tokenizer.model", "SentencePiece")


def test_every_text_begins_with_the_tokenizers_own_bos(backend, tmp_path):
    """Which is not 2 everywhere."""
    proto = helpers.tokenizer_proto().replace(b"<bos>", b"<BOS>")
    assert Tokenizer(proto).encode("the")[0] == Tokenizer(proto).bos == 2
    sentencepiece = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = sentencepiece.ModelProto.FromString(helpers.tokenizer_proto())
    model.trainer_spec.bos_id, model.trainer_spec.eos_id = 1, 2
    model.pieces[1].piece, model.pieces[2].piece = "<bos>", "<eos>"
    assert Tokenizer(model.SerializeToString()).encode("the")[0] == 1


# ---- chats ----

TURNS = [("system", " Be\nbrief. "), ("user", " the list "), ("assistant", "a dict "), ("user", "and more\n")]


def as_messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


@pytest.mark.parametrize("template", [None, GEMMA, CHATML], ids=["built in", "gemma", "chatml"])
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[:2], TURNS[1:2]])
def test_a_conversation_has_the_ids_of_transformers(tokenizers, template, turns):
    """System text as it is, other texts stripped, roles by either name; the model's own template where it has one."""
    files = {} if template is None else {"chat_template.jinja": template.encode()}
    content = (tokenizers / "added" / "tokenizer.json").read_bytes()
    got = chat_tokens(Tokenizer({"tokenizer.json": content}), SideFiles(files), turns)
    expected = tokenizer_of(tokenizers / "added").apply_chat_template(
        as_messages(turns),
        chat_template=template or GEMMA,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert got == expected


THINKS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}<think>no</think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
ODD = (
    "{% if tools is not none %}tools{% endif %}{% if documents is none %}none{% endif %}"
    "{{ messages | tojson(indent=2) }}"
    "{{ messages[0]['content'] | tojson(ensure_ascii=True) }}{% generation %}{{ messages[-1]['content'] }}"
    "{% endgeneration %}{{ strftime_now('%Y') }}{{ eos_token }}{{ bos_token }}"
)


@pytest.mark.parametrize("template", [THINKS, ODD], ids=["thinks", "odd"])
def test_what_templates_of_other_people_use(tokenizers, tmp_path, template):
    """tools, documents, dates, marks of what is trained on, JSON with options, tokens of special_tokens_map.json."""
    shutil.copytree(tokenizers / "added", tmp_path / "folder")
    folder = edit(tmp_path / "folder", "tokenizer_config.json", eos_token="<|im_end|>")
    (folder / "chat_template.jinja").write_text(template)
    read = transformers.GemmaTokenizer.from_pretrained(folder)
    expected = read.apply_chat_template(as_messages(TURNS), add_generation_prompt=True, return_dict=False)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    got = chat_tokens(Tokenizer({"tokenizer.json": files["tokenizer.json"]}), SideFiles(files), TURNS)
    assert got == expected
    assert SideFiles({"special_tokens_map.json": b'{"eos_token": {"content": "x"}}'}).special_tokens["eos_token"] == "x"
    assert "bos_token" not in SideFiles({"tokenizer_config.json": b'{"bos_token": null}'}).special_tokens


def test_a_template_that_shows_earlier_turns_in_another_way(backend, tokenizers, tmp_path):
    """The whole conversation is read anew, and taking a turn back leaves no trace."""
    model = backend.load(with_tokenizer(tmp_path / "model", tokenizers / "added"))
    model.side_files = SideFiles({"chat_template.jinja": THINKS.encode()})
    talking, clean = (Conversation(model, 128, max_new_tokens=3) for _ in range(2))
    for text in ("a", "b"):
        said = "".join(talking.say(text))
        assert said == "".join(clean.say(text))
        turns = [*talking.said[:-1]]
        asked = chat_tokens(model.tokenizer, model.side_files, turns)
        assert talking.ids[: len(asked)] == asked
        list(talking.say("c"))
        assert talking.undo() and talking.ids == clean.ids and talking.said == clean.said


def test_a_turn_that_fails_is_taken_back(backend, tokenizers, tmp_path):
    """A token without an embedding row: the next turn works."""
    folder = with_tokenizer(tmp_path / "model", tokenizers / "added", vocab_size=450)
    talking = Conversation(backend.load(folder), 120, max_new_tokens=4)
    list(talking.say("the list"))
    before = list(talking.ids), list(talking.said)
    refused(lambda: list(talking.say("<word89>")), "493")
    assert (talking.ids, talking.said) == before
    list(talking.say("a dict"))


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "named"])
def test_where_a_template_lies(where):
    """The four places that `transformers` has had for it."""
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    content = {"chat_template": named if where == "named" else CHATML}
    name = "tokenizer_config.json" if where == "named" else where
    files = {name: CHATML.encode() if where.endswith("jinja") else json.dumps(content).encode()}
    assert SideFiles(files).chat_template == CHATML


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('only\nusers') }}", "{% for %}", "{{ ''.__class__.__mro__ }}"]
)
def test_a_template_that_cannot_be_used_is_one_line(tokenizers, template):
    """Refusals of the template itself, faults in it, and what the sandbox forbids."""
    content = (tokenizers / "json" / "tokenizer.json").read_bytes()
    side_files = SideFiles({"chat_template.jinja": template.encode()})
    refused(lambda: chat_tokens(Tokenizer({"tokenizer.json": content}), side_files, TURNS[1:2]), "chat template")


@pytest.mark.parametrize("kind", ["json", "added"], ids=["gemma", "chatml"])
def test_turns_that_follow_are_those_of_the_whole_conversation(backend, tokenizers, tmp_path, kind):
    """What the cache reads turn by turn is what the template makes of the whole conversation, with the model's answers
    as they were; the token that ends an answer stands once, and no <eos> before <end_of_turn>.
    """
    model = backend.load(with_tokenizer(tmp_path / "model", tokenizers / kind))
    for stops in (frozenset(), frozenset(range(0, 512, 2))):  # answers that are cut off, and answers that end
        talking = Conversation(model, 120, max_new_tokens=4, system="Be brief.")
        talking.stop = stops
        asked = [list(talking.ids)]
        for text in ("the list", " a dict"):
            asked.append(talking._asked(text))
            list(talking.say(text))
            assert talking.ids[: len(asked[-1])] == asked[-1]
        answers = [text for role, text in talking.said if role == "model"]
        close, begin = (("<end_of_turn>\n", "<start_of_turn>model\n"), ("<|im_end|>\n", "<|im_start|>assistant\n"))[
            kind == "added"
        ]
        first, second = asked[1], asked[2]
        encode = lambda text: model.tokenizer.encode(text, bos=False)  # noqa: E731
        said = second[len(first) :]
        assert said[-len(encode(begin)) :] == encode(begin)
        answer = talking.ids[len(first) : len(said) - len(encode(begin)) + len(first)]
        assert model.tokenizer.decode(answer).startswith(answers[0])
        assert second.count(1) == 0 and encode(close)[0] in said


def test_a_system_text_without_a_chat_is_refused(backend, tokenizers, tmp_path):
    model = backend.load(with_tokenizer(tmp_path / "model", tokenizers / "json"))
    refused(lambda: list(generate(model, "the list", system="Be brief.")), "system", "chat")
    with_system = prompt_tokens(model, "the list", chat=True, system="Be brief.")
    assert "Be brief.\n\nthe list" in model.tokenizer.decode(with_system)


# ---- nothing is lost ----

KEPT = {
    "generation_config.json": b'{"eos_token_id": [1, 106, 50], "top_k": 64}',
    "chat_template.jinja": CHATML.encode(),
    "special_tokens_map.json": b'{"bos_token": "<bos>"}',
    "processor_config.json": b"{}",
    "preprocessor_config.json": b'{"size": 1}',
}


@pytest.mark.parametrize("way", ["save", ".pt", ".safetensors", "stream", "export", "export of a saved one"])
def test_everything_beside_the_weights_goes_along(backend, tokenizers, tmp_path, way):
    """Byte for byte, but for config.json, whose other keys stay; and `transformers` reads the same model."""
    source = with_tokenizer(tmp_path / "model", tokenizers / "both")
    for name, content in KEPT.items():
        (source / name).write_bytes(content)
    edit(source, eos_token_id=[1, 50], pad_token_id=3, _name_or_path="mine", initializer_range=0.5)
    tpa, target = backend.TPAConfig(mode="fixed-a"), tmp_path / "saved"
    if way == "export":
        backend.export(source, target)
    elif way == "stream":
        backend.convert_checkpoint(source, target, tpa)
    else:
        suffix = way if way.startswith(".") else ""
        made = backend.save(backend.convert(backend.load(source), tpa), tmp_path / f"one{suffix}")
        if way == "save":
            target = made
        else:
            backend.export(made, target)
    beside, found = (
        {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(("model", "config"))}
        for folder in (source, target)
    )
    assert beside.keys() >= {*KEPT, "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    assert found == beside
    config = json.loads((target / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["initializer_range"]) == ([1, 50], 3, 0.5)
    assert relative(their_logits(target), their_logits(source)) < 1e-6
    assert theirs(target).generation_config.eos_token_id == [1, 106, 50]
    hf = transformers.GemmaTokenizer.from_pretrained(target)
    assert hf(TEXTS[2]).input_ids == tokenizer_of(tokenizers / "both")(TEXTS[2]).input_ids
    again = backend.load(target)
    assert again.side_files.chat_template == CHATML and again.side_files.stop_tokens == {1, 106, 50}


def test_the_checkpoint_of_somebody_else_is_not_replaced(backend, tokenizers, tmp_path):
    """A folder of Hugging Face looks like one of ours; only what was saved here, or is empty, may be replaced."""
    model = backend.load(with_tokenizer(tmp_path / "model", tokenizers / "json"))
    before = sorted((tmp_path / "model").iterdir())
    refused(lambda: backend.save(model, tmp_path / "model"), "config.json", "not saved by this program")
    refused(lambda: backend.export(tmp_path / "model", tmp_path / "model"), "model")
    assert sorted((tmp_path / "model").iterdir()) == before
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        backend.save(model, tmp_path / "empty")


def test_saving_again_replaces_what_was_beside(backend, tokenizers, tmp_path):
    """A model without these files in the place of one that had them: none of the old ones stays."""
    target = backend.save(backend.load(with_tokenizer(tmp_path / "a", tokenizers / "added")), tmp_path / "saved")
    backend.save(backend.load(folder_of(tmp_path / "b")), target)
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
