"""Checkpoints: what is saved comes back in every format and either backend, and bad input ends in one clear line."""

from __future__ import annotations

import base64
import itertools
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import helpers
import ml_dtypes
import numpy as np
import pytest
from helpers import back, refused, tensors, write_folder, write_sharded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tpa_ref
from tpa_ref import GemmaConfig, TPAConfig, TPAError
from tpa_ref.files import checkpoint
from tpa_ref.files.pairs import describe, named_arrays
from tpa_ref.gemma.weights import hf_names

FORMATS = ("", ".safetensors", ".pt")
IDS = helpers.tokens(25, batch=2, seed=3)

CHOICES = {
    "dense": None,
    "default": TPAConfig(),
    "contextual": TPAConfig(k_rank=1, v_rank=2),
    "fixed-a": TPAConfig(mode="fixed-a", k_rank=1, v_rank=1, kv_dtype="int4"),
    "mixed": TPAConfig(k_mode="latent", v_mode="fixed-b", k_rank=20, v_rank=9, k_dtype="int8", v_dtype="int4"),
    "global layers, q_rank": TPAConfig(mode="latent", q_rank=2, layers="global"),
    "float32": TPAConfig(mode="fixed-b", kv_dtype="float32"),
}


def loaded(backend, folder, choice, dtype="float32"):
    """A model read from a folder and converted."""
    dense = backend.load(folder, dtype=dtype)
    return dense if CHOICES[choice] is None else backend.convert(dense, CHOICES[choice])


def target(tmp_path, suffix):
    if suffix == ".pt":
        pytest.importorskip("torch")
    return tmp_path / f"saved{suffix}"


@pytest.fixture
def folder(tmp_path):
    """A fresh checkpoint folder with a tokenizer."""
    return write_folder(tmp_path / "model", tokenizer=helpers.tokenizer_proto())


def edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
    return folder


# ---- round trips ----


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_saved_model_gives_identical_logits(backend, tmp_path, folder, choice, suffix):
    """Dense and TPA, folder, .safetensors and .pt: config, choice, factors, tokenizer and every logit come back."""
    model = loaded(backend, folder, choice)
    path = target(tmp_path, suffix)
    assert backend.save(model, path) == path
    again = backend.load(path)
    assert again.config == model.config and again.tpa == model.tpa and again.stored_dtype == model.stored_dtype
    assert again.tokenizer.files == {"tokenizer.model": helpers.tokenizer_proto()}
    assert again.choices == model.choices
    for ours, theirs in zip(model.pairs, again.pairs, strict=True):
        assert type(ours) is type(theirs) and describe(ours) == describe(theirs)
        constants, read = dict(named_arrays(ours, 0)), dict(named_arrays(theirs, 0))
        assert constants.keys() == read.keys()
        for name, array in constants.items():
            np.testing.assert_array_equal(back(array), back(read[name]))
    np.testing.assert_array_equal(helpers.logits(again, IDS), helpers.logits(model, IDS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", f"saved{suffix}"]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("choice", CHOICES)
def test_each_backend_reads_what_the_other_saved(tmp_path, folder, choice, suffix):
    """One format for both: NumPy reads PyTorch's models and the other way round, to the same logits."""
    pytest.importorskip("torch")
    for saver, reader in itertools.permutations(helpers.backends()):
        model = loaded(saver, folder, choice, "float64")
        path = saver.save(model, tmp_path / f"{saver.__name__}{suffix}")
        again = reader.load(path, dtype="float64")
        assert again.config == model.config and again.tpa == model.tpa
        expected = helpers.logits(model, IDS)
        error = np.abs(helpers.logits(again, IDS) - expected).max() / np.abs(expected).max()
        # Equal codes almost everywhere; a number halfway between two codes may fall to either side.
        assert error < (1e-9 if choice in ("dense", "float32") else 1e-2)


@pytest.mark.parametrize("suffix", FORMATS)
def test_bfloat16_weights_stay_bfloat16(backend, tmp_path, suffix):
    """They are computed in float32, and written as they were read: bit for bit, two bytes each."""
    named = helpers.bfloat16(tensors(helpers.config()))
    model = backend.load(write_folder(tmp_path / "model", weights=named))
    assert model.stored_dtype == "bfloat16" and model.dtype == "float32"
    path = backend.save(model, target(tmp_path, suffix))
    again = helpers.to_named(tpa_ref.load(path).weights)
    for name, value in named.items():
        np.testing.assert_array_equal(again[name], value.astype(np.float32))
    if suffix != ".pt":
        held = load_file(path / "model.safetensors" if path.is_dir() else path)
        assert {value.dtype for value in held.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_a_saved_dense_folder_is_a_hugging_face_checkpoint(tmp_path, folder):
    """Text-only names and shapes, nothing more, and the config.json it was read from, with the dtype that is stored."""
    path = tpa_ref.save(tpa_ref.load(folder), tmp_path / "saved")
    held = load_file(path / "model.safetensors")
    assert {name: value.shape for name, value in held.items()} == hf_names(helpers.config())
    ours = {"torch_dtype": "float32", "saved_by": "tpa-gemma3"}
    assert json.loads((path / "config.json").read_text()) == helpers.config().to_hf() | ours
    assert (path / "tokenizer.model").read_bytes() == helpers.tokenizer_proto()
    with safe_open(path / "model.safetensors", "numpy") as handle:
        assert handle.metadata() == {"format": "pt"}  # transformers insists on it


def test_tpa_tensors_stand_beside_untouched_weights(tmp_path, folder):
    """A saved TPA model holds the dense weights bit for bit, plus bases and query factors under tpa.*"""
    model = loaded(tpa_ref, folder, "global layers, q_rank")
    held = load_file(tpa_ref.save(model, tmp_path / "saved") / "model.safetensors")
    for name, value in tensors(helpers.config()).items():
        np.testing.assert_array_equal(held.pop(name), value)
    queries = {f"tpa.layers.{layer}.q.{name}" for layer in range(7) for name in "AW"}
    assert set(held) == {"tpa.layers.5.k.basis", "tpa.layers.5.v.basis"} | queries


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_multimodal_files_load_as_their_text_model(backend, tmp_path, prefix):
    """Every generation of prefixes; an equal lm_head is not kept twice, and an image tower that the config does
    not know of is left alone.
    """
    named = {prefix + name.removeprefix("model."): value for name, value in tensors(helpers.config()).items()}
    named["vision_tower.patch.weight"] = np.full(3, np.nan, np.float16)
    named["multi_modal_projector.w"] = np.ones(2, np.float32)
    named["lm_head.weight"] = named[prefix + "embed_tokens.weight"].copy()
    folder = write_folder(tmp_path / "model", weights=named)
    content = {"model_type": "gemma3", "text_config": helpers.config().to_hf()}
    (folder / "config.json").write_text(json.dumps(content))
    plain = backend.load(write_folder(tmp_path / "plain"))
    np.testing.assert_array_equal(helpers.logits(backend.load(folder), IDS), helpers.logits(plain, IDS))


def test_shards_load_as_one_file(backend, tmp_path):
    """An index and three shards give the model of one file."""
    sharded = backend.load(write_sharded(tmp_path / "sharded"))
    plain = backend.load(write_folder(tmp_path / "plain"))
    np.testing.assert_array_equal(helpers.logits(sharded, IDS), helpers.logits(plain, IDS))


def test_a_lone_safetensors_file_needs_a_config(backend, tmp_path, folder):
    """config= as an object or as a path; without one the error says how."""
    path = tmp_path / "alone" / "weights.safetensors"
    path.parent.mkdir()
    shutil.copy(folder / "model.safetensors", path)
    refused(lambda: backend.load(path), path, "config=", "7 layers", "48")
    expected = helpers.logits(backend.load(folder), IDS)
    for config in (helpers.config(), folder / "config.json", str(folder / "config.json")):
        np.testing.assert_array_equal(helpers.logits(backend.load(path, config=config), IDS), expected)


def test_the_tokenizer_can_be_given(backend, tmp_path):
    """tokenizer= is used where the folder has none, and wins where it has one."""
    folder = write_folder(tmp_path / "model")
    assert backend.load(folder).tokenizer is None
    (tmp_path / "mine.model").write_bytes(helpers.tokenizer_proto())
    assert backend.load(folder, tokenizer=tmp_path / "mine.model").tokenizer.vocab_size == 300


def test_saving_over_a_saved_model_replaces_it(backend, tmp_path, folder):
    """The new one stands in the place of the old one, whole, and nothing else is left."""
    for suffix in FORMATS:
        path = target(tmp_path, suffix)
        backend.save(loaded(backend, folder, "dense"), path)
        backend.save(loaded(backend, folder, "mixed"), path)
        assert backend.load(path).tpa == CHOICES["mixed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved", "saved.pt", "saved.safetensors"]


# ---- what cannot be saved ----


def listing(folder):
    """Every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    } | {str(path.relative_to(folder)): None for path in folder.rglob("*") if path.is_dir()}


def refused_save(backend, folder, path, where, *words):
    """Saving is refused in one line and the surroundings stay as they were."""
    before = listing(where)
    refused(lambda: backend.save(backend.load(folder), path), *words)
    assert listing(where) == before


def test_a_wrong_suffix_is_refused(backend, tmp_path, folder):
    """.pt, .safetensors or a folder; the one given is named."""
    refused_save(backend, folder, tmp_path / "out.bin", tmp_path, "save", ".pt", ".safetensors", ".bin")


def test_a_missing_parent_folder_is_refused(backend, tmp_path, folder):
    """It is named and not made."""
    refused_save(backend, folder, tmp_path / "no" / "out", tmp_path, "save", tmp_path / "no")


def test_a_folder_that_is_not_a_saved_model_is_not_replaced(backend, tmp_path, folder):
    """Nobody's files are removed; an empty folder is taken."""
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"x")
    refused_save(backend, folder, tmp_path / "holiday", tmp_path, "save", "holiday", "not saved by this program")
    (tmp_path / "notes").write_text("mine")
    refused_save(backend, folder, tmp_path / "notes", tmp_path, "save", "notes")
    (tmp_path / "empty").mkdir()
    backend.save(backend.load(folder), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_folder_in_the_place_of_a_file_is_refused(backend, tmp_path, folder, suffix):
    """A file was expected."""
    (tmp_path / f"out{suffix}").mkdir()
    refused_save(backend, folder, tmp_path / f"out{suffix}", tmp_path, "save", "folder")


@pytest.mark.parametrize("suffix", FORMATS)
def test_names_the_file_system_cannot_hold_are_refused(backend, tmp_path, folder, suffix):
    """A name of 300 characters, one of 250 (a temporary name beside it is longer), and one with a zero byte."""
    for name in ("x" * 300, "a\0b"):
        refused_save(backend, folder, tmp_path / (name + suffix), tmp_path, "save")
    before = listing(tmp_path)
    path = tmp_path / ("x" * (250 - len(suffix)) + suffix)
    try:
        backend.save(backend.load(folder), path)
    except TPAError as problem:
        assert "\n" not in str(problem) and listing(tmp_path) == before
    else:
        assert {name.split("/")[0] for name in set(listing(tmp_path)) - set(before)} == {path.name}


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="everything is writable for root")
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_folder_without_write_permission_is_refused(backend, tmp_path, folder, suffix):
    """Before anything is written."""
    place = tmp_path / "locked"
    place.mkdir()
    place.chmod(0o500)
    try:
        refused_save(backend, folder, place / f"out{suffix}", place, "save", "permission", place)
    finally:
        place.chmod(0o700)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_disk_that_fills_up_leaves_the_old_model(backend, tmp_path, folder, suffix):
    """Writing fails half way (a limit on file size stands for a full disk): one line, the old model intact, no rest."""
    resource = pytest.importorskip("resource")
    place = tmp_path / "place"
    place.mkdir()
    path = place / f"saved{suffix}"
    if suffix == ".pt":
        pytest.importorskip("torch")
    model = backend.load(folder)
    backend.save(model, path)
    before = listing(place)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # Python ignores SIGXFSZ, so writing gives an error
    try:
        refused(lambda: backend.save(model, path), "save", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(place) == before


@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_nothing_behind(backend, tmp_path, folder, monkeypatch, problem):
    """Ctrl-C in the middle of writing: the temporary files vanish, the interruption is passed on."""

    def half(tensors, file, metadata=None):
        Path(file).write_bytes(b"half a model")
        raise problem

    model = backend.load(folder)
    before = listing(tmp_path)
    monkeypatch.setattr(checkpoint, "save_file", half)
    for name in ("out", "out.safetensors"):
        with pytest.raises(KeyboardInterrupt if problem is KeyboardInterrupt else TPAError):
            backend.save(model, tmp_path / name)
        assert listing(tmp_path) == before


# ---- what cannot be loaded: paths, config, index ----


def test_a_missing_path_is_named(backend, tmp_path):
    """No such file or folder, also for names no file system has, and for files of another kind."""
    for name in ("nothing", "nothing.pt", "nothing.safetensors", "x" * 300, "a\0b", "two\nlines"):
        refused(lambda name=name: backend.load(tmp_path / name), "load")
    refused(lambda: backend.load(tmp_path / "nothing"), tmp_path / "nothing")
    (tmp_path / "model.onnx").write_bytes(b"x")
    refused(lambda: backend.load(tmp_path / "model.onnx"), "load", ".gguf", ".safetensors", ".pt")


def test_a_folder_without_config_or_without_weights(backend, tmp_path, folder):
    """What is missing is named."""
    (tmp_path / "empty").mkdir()
    refused(lambda: backend.load(tmp_path / "empty"), "model.safetensors", tmp_path / "empty")
    (folder / "config.json").unlink()
    refused(lambda: backend.load(folder), "config.json", folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("JSON",)),
        (b"{", ("JSON",)),
        (b"[1, 2]", ("object", "list")),
        (b"\xff\xfe\x00", ("UTF-8",)),
        (b"[" * 100_000, ("JSON",)),
        (b'{"model_type": "gemma3_text", "hidden_size": ' + b"1" * 5000 + b"}", ("config",)),
    ],
)
def test_a_config_that_is_no_json_object(backend, folder, content, words):
    """Empty, cut, a list, not UTF-8, nested 100,000 deep, a number of 5,000 digits."""
    (folder / "config.json").write_bytes(content)
    refused(lambda: backend.load(folder), *words)
    refused(lambda: GemmaConfig.from_hf(folder / "config.json"), "config.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ("model_type", "llama", "gemma3")),
        ({"model_type": None}, ("model_type", "None")),
        ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping", "30.0")),
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping", "50.0")),
        ({"attention_bias": True}, ("attention_bias", "false", "True")),
        ({"use_bidirectional_attention": True}, ("use_bidirectional_attention", "false", "True")),
        ({"num_hidden_layers": 10_001}, ("num_hidden_layers", "10000", "10001")),
        ({"hidden_activation": "gelu"}, ("hidden_activation", "gelu_pytorch_tanh", "'gelu'")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ("rope", "linear", "yarn")),
        ({"rope_scaling": {"rope_type": "linear"}}, ("factor",)),
        ({"layer_types": ["full_attention"] * 6}, ("6", "7")),
        ({"layer_types": ["chunked_attention"] * 7}, ("layer_types", "chunked_attention")),
        ({"num_attention_heads": 5}, ("5", "2")),
        ({"head_dim": 15}, ("head_dim", "15")),
        ({"hidden_size": 0}, ("hidden_size", "0")),
        ({"sliding_window": -1}, ("sliding_window", "-1")),
        ({"hidden_size": "48"}, ("hidden_size", "48")),
        ({"hidden_size": 48.5}, ("hidden_size", "48.5")),
        ({"text_config": 3}, ("text_config",)),
    ],
)
def test_a_config_that_is_not_gemma_3(backend, folder, changes, words):
    """Every rule on the config names the key, the rule and the value."""
    edit_config(folder, **changes)
    refused(lambda: backend.load(folder), *words)


def test_whole_floats_and_null_in_a_config_are_read_as_meant(backend, folder):
    """JSON writers may say 48.0 for 48; null stands for the default."""
    expected = helpers.logits(backend.load(folder), IDS)
    edit_config(folder, hidden_size=48.0, num_hidden_layers=7.0, head_dim=16.0, vocab_size=300.0, rope_parameters=None)
    np.testing.assert_array_equal(helpers.logits(backend.load(folder), IDS), expected)


def test_a_config_that_contradicts_the_tensors(backend, folder):
    """The tensor is named, with the shape it must have and the one it has."""
    edit_config(folder, hidden_size=52)
    refused(lambda: backend.load(folder), "model.embed_tokens.weight", "[300, 52]", "[300, 48]")
    edit_config(folder, hidden_size=48, intermediate_size=41)
    refused(lambda: backend.load(folder), "model.layers.0.mlp.up_proj.weight", "[41, 48]", "[40, 48]", "more")


def test_missing_and_unexpected_tensors_are_named_together(backend, tmp_path):
    """One error tells all, so that nobody repairs a file in rounds."""
    named = tensors(helpers.config())
    del named["model.layers.2.self_attn.k_norm.weight"]
    named["model.layers.2.self_attn.k_bias"] = np.ones(3, np.float32)
    folder = write_folder(tmp_path / "model", weights=named)
    refused(
        lambda: backend.load(folder),
        "missing model.layers.2.self_attn.k_norm.weight",
        "unexpected model.layers.2.self_attn.k_bias",
    )


def test_names_with_line_breaks_stay_on_one_line(backend, tmp_path):
    """A tensor or a shard called "a(newline)b" does not break the rule of one line."""
    named = tensors(helpers.config()) | {"a\nb": np.ones(2, np.float32)}
    refused(lambda: backend.load(write_folder(tmp_path / "model", weights=named)), "unexpected")
    sharded = write_sharded(tmp_path / "sharded")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "a\nb"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: backend.load(sharded), "index")


@pytest.mark.parametrize("kind", [np.int32, np.int8])
def test_weights_that_are_no_floats_are_refused(backend, tmp_path, kind):
    """Quantized files of other programs."""
    named = tensors(helpers.config())
    named["model.norm.weight"] = named["model.norm.weight"].astype(kind)
    refused(lambda: backend.load(write_folder(tmp_path / "model", weights=named)), "bfloat16", "float32", "got")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(backend, tmp_path, value):
    """The tensor and how many numbers are wrong."""
    named = tensors(helpers.config())
    named["model.layers.3.mlp.up_proj.weight"][1, 2:5] = value
    folder = write_folder(tmp_path / "model", weights=named)
    refused(lambda: backend.load(folder), "model.layers.3.mlp.up_proj.weight", "finite", "3")


def test_variant_must_be_known_and_fit(backend, folder):
    """An unknown name lists the known ones; a contradiction names both sizes."""
    refused(lambda: backend.load(folder, variant="2b"), "variant", "270m", "27b", "'2b'")
    refused(lambda: backend.load(folder, variant="1b"), "1b", "26", "1152", "7", "48")


def test_dtype_must_be_known(backend, folder):
    """float16 is not among them."""
    refused(lambda: backend.load(folder, dtype="float16"), "dtype", "float32", "'float16'")


def test_a_given_config_must_exist(backend, folder):
    """config= naming no file."""
    refused(lambda: backend.load(folder, config=folder / "no.json"), "no.json", "not found")


# ---- what cannot be loaded: safetensors ----


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_safetensors_file(backend, folder, keep):
    """Cut at any place: the file is named."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(lambda: backend.load(folder), file, "safetensors")


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"a": 1}', b"\xff" * 40, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}']
)
def test_a_corrupt_safetensors_header(backend, folder, header):
    """No JSON, no object, no tensor, no UTF-8, offsets that do not fit the shape."""
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 100)
    refused(lambda: backend.load(folder), "model")


def test_a_header_longer_than_the_file(backend, folder):
    """A length of 2^60 bytes is not believed."""
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])
    refused(lambda: backend.load(folder), file)


@pytest.mark.parametrize("shard", ["absent.safetensors", "../model.safetensors", "..", "", "x" * 300, "a\0b"])
def test_an_index_that_names_an_absent_shard(backend, tmp_path, shard):
    """Or one outside the folder, or a name that cannot be."""
    folder = write_sharded(tmp_path / "sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: backend.load(folder), "load", folder)


@pytest.mark.parametrize(
    "index", [b"", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {}}']
)
def test_an_index_that_is_none(backend, tmp_path, index):
    """No JSON, no object, no weight_map, a weight_map of numbers, an empty one."""
    folder = write_sharded(tmp_path / "sharded")
    (folder / "model.safetensors.index.json").write_bytes(index)
    refused(lambda: backend.load(folder), "load")


def test_a_key_held_twice(backend, tmp_path):
    """By two shards, or by one file under two prefixes: nobody can know which one is meant."""
    folder = write_sharded(tmp_path / "sharded")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second, {"format": "pt"})
    refused(lambda: backend.load(folder), name, first.name, second.name, "twice")
    named = tensors(helpers.config())
    named["language_model.model.norm.weight"] = named["model.norm.weight"]
    refused(lambda: backend.load(write_folder(tmp_path / "twice", weights=named)), "norm.weight", "twice")


# ---- what cannot be loaded: tokenizers ----


def test_a_tokenizer_of_another_vocabulary_size(backend, tmp_path):
    """More pieces than embedding rows, or more rows without a piece than with one: both numbers are named."""
    folder = write_folder(tmp_path / "model", tokenizer=helpers.tokenizer_proto(400, turns=True))
    refused(lambda: backend.load(folder), "tokenizer", "400", "300")
    wide = write_folder(tmp_path / "wide", helpers.config(vocab_size=601), tokenizer=helpers.tokenizer_proto())
    refused(lambda: backend.load(wide), "tokenizer", "300", "601")
    spare = write_folder(tmp_path / "spare", helpers.config(vocab_size=417), tokenizer=helpers.tokenizer_proto())
    model = backend.load(spare)
    assert model.tokenizer.vocab_size == 300 and model.tokenizer.decode([400, 10**7, -1]) == ""


def test_a_tokenizer_that_is_none(backend, tmp_path):
    """Bytes that are no SentencePiece model, and a file that is not there."""
    folder = write_folder(tmp_path / "model", tokenizer=b"this is no tokenizer")
    refused(lambda: backend.load(folder), "tokenizer", "SentencePiece")
    refused(lambda: backend.load(folder, tokenizer=tmp_path / "no.model"), "tokenizer", "no.model")


# ---- what cannot be loaded: saved TPA models ----


@pytest.fixture
def saved(tmp_path, folder):
    """A saved TPA model: K latent of rank 20 in int8, V contextual of rank 1, Q of rank 2."""
    choice = TPAConfig(k_mode="latent", v_mode="contextual", k_rank=20, v_rank=1, k_dtype="int8", q_rank=2)
    return tpa_ref.save(tpa_ref.convert(tpa_ref.load(folder), choice), tmp_path / "saved")


def test_a_newer_format_is_refused(backend, tmp_path, saved):
    """Another version of a folder, a .safetensors and a .pt, dense or TPA: both versions are named."""
    content = json.loads((saved / "config.json").read_text())
    content["tpa"]["version"] = 5
    (saved / "config.json").write_text(json.dumps(content))
    refused(lambda: backend.load(saved), saved, "version 5", "4")

    dense = backend.load(write_folder(tmp_path / "dense"))
    path = backend.save(dense, tmp_path / "one.safetensors")
    with safe_open(path, "numpy") as handle:
        metadata = handle.metadata()
    save_file(load_file(path), path, metadata | {"version": "1"})
    refused(lambda: backend.load(path), path, "version 1", "4")

    if helpers.has_torch():
        import torch

        path = backend.save(dense, tmp_path / "one.pt")
        torch.save(torch.load(path, weights_only=True) | {"version": 1}, path)
        refused(lambda: backend.load(path), path, "version 1", "4")


def tamper(saved, change):
    """Change the "tpa" entry of a saved model's config.json."""
    content = json.loads((saved / "config.json").read_text())
    content["tpa"] = change(content["tpa"])
    (saved / "config.json").write_text(json.dumps(content))


def factor(side, **changes):
    """A change of one side of layer 2."""

    def change(entry):
        entry["factors"][2][side] |= changes
        return entry

    return change


def drop(key):
    def change(entry):
        del entry[key]
        return entry

    return change


WRONG_ENTRIES = {
    "a number": lambda entry: 5,
    "a list": lambda entry: [],
    "a string": lambda entry: "tpa",
    "empty": lambda entry: {},
    "no version": drop("version"),
    "no config": drop("config"),
    "no factors": drop("factors"),
    "config is a number": lambda entry: entry | {"config": 3},
    "config is a list": lambda entry: entry | {"config": ["a"]},
    "config with an unknown mode": lambda entry: entry | {"config": {"mode": "pca"}},
    "config with an unknown key": lambda entry: entry | {"config": {"colour": "red"}},
    "factors are a number": lambda entry: entry | {"factors": 3},
    "a layer is missing": lambda entry: entry | {"factors": entry["factors"][:-1]},
    "a side is missing": lambda entry: entry | {"factors": [[pair[0]] for pair in entry["factors"]]},
    "layers are numbers": lambda entry: entry | {"factors": [3] * 7},
    "unknown mode": factor(0, mode="pca"),
    "mode without its basis": factor(1, mode="fixed-b", rank=4),
    "mode of another basis": factor(0, mode="fixed-a"),
    "mode is a list": factor(0, mode=["latent"]),
    "rank below its basis": factor(0, rank=19),
    "rank 0": factor(0, rank=0),
    "rank is a string": factor(0, rank="20"),
    "rank is a fraction": factor(0, rank=20.5),
    "rank is negative": factor(1, rank=-1),
    "rank above the exact one": factor(1, rank=3),
    "unknown dtype": factor(0, dtype="int2"),
    "dtype of NumPy that is not ours": factor(0, dtype="complex64"),
    "dtype is a number": factor(0, dtype=8),
    "unknown key": factor(0, colour="red"),
}


@pytest.mark.parametrize("wrong", WRONG_ENTRIES)
def test_a_tpa_entry_that_does_not_fit_is_refused_at_load(backend, saved, wrong):
    """Modes, ranks, dtypes and bases of a saved model are checked before they are used."""
    backend.load(saved)
    tamper(saved, WRONG_ENTRIES[wrong])
    message = refused(lambda: backend.load(saved)).lower()
    assert "tpa" in message or "saved factors" in message


WRONG_TENSORS = {
    "no basis": ("k.basis", lambda value: None),
    "a basis of another rank": ("k.basis", lambda value: value[:-1].copy()),
    "a basis of another shape": ("k.basis", lambda value: value.reshape(20, -1)),
    "a basis that is not finite": ("k.basis", lambda value: value * np.nan),
    "a basis of whole numbers": ("k.basis", lambda value: value.astype(np.int32)),
    "a query factor of another rank": ("q.A", lambda value: value[:-1].copy()),
    "a query factor of another shape": ("q.W", lambda value: value.reshape(2, -1)),
    "half of the query factors": ("q.W", lambda value: None),
    "the other half": ("q.A", lambda value: None),
    "a tensor of no use": ("colour", lambda value: np.ones(3, np.float32)),
    "a basis of no layer": ("tpa.layers.99.k.basis", lambda value: np.ones(3, np.float32)),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_tpa_tensors_that_do_not_fit_are_refused_at_load(backend, saved, wrong):
    """Missing, of another shape, not finite, of another kind, or of no use: the tensor is named."""
    backend.load(saved)
    named = load_file(saved / "model.safetensors")
    name, change = WRONG_TENSORS[wrong]
    name = name if name.startswith("tpa.") else f"tpa.layers.2.{name}"
    value = change(named.pop(name, None))
    save_file(named if value is None else named | {name: value}, saved / "model.safetensors", {"format": "pt"})
    message = refused(lambda: backend.load(saved))
    assert name.removesuffix(".A").removesuffix(".W") in message or "layer 2, K: basis" in message, message


@pytest.mark.parametrize(
    "changes",
    [
        {"config": None},
        {"config": "x"},
        {"config": "[]"},
        {"config": "{}"},
        {"tokenizer": "abc"},
        {"tokenizer": "é"},
        {"tokenizer": base64.b64encode(b"no tokenizer").decode()},
        {"version": None},
    ],
)
def test_damaged_metadata_of_a_single_file(backend, tmp_path, folder, changes):
    """A .safetensors of ours whose config, tokenizer or version is missing or unreadable."""
    path = tpa_ref.save(tpa_ref.load(folder), tmp_path / "one.safetensors")
    with safe_open(path, "numpy") as handle:
        metadata = handle.metadata() | changes
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})
    refused(lambda: backend.load(path), "model_type" if changes == {"config": "{}"} else "one.safetensors")


# ---- what cannot be loaded: .pt ----


class Payload:
    """Runs code when a pickle that holds it is opened without care."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return open, (str(self.flag), "w")


def test_the_payload_of_these_tests_really_runs(tmp_path):
    """Opened with pickle it leaves its mark: the next test would notice."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "flag")))
    assert (tmp_path / "flag").exists()


@pytest.mark.parametrize("how", ["torch", "torch, legacy", "pickle", "in our format"])
def test_a_malicious_pickle_is_refused_and_never_runs(backend, tmp_path, how):
    """A .pt is data: whoever asks for code to be run is refused, and nothing has run."""
    torch = pytest.importorskip("torch")
    flag, path = tmp_path / "flag", tmp_path / "evil.pt"
    content = {"format": "tpa-gemma3", "version": 1, "config": "{}", "tokenizer": None, "tensors": {}}
    if how == "torch":
        torch.save({"weights": Payload(flag)}, path)
    elif how == "torch, legacy":
        torch.save({"weights": Payload(flag)}, path, _use_new_zipfile_serialization=False)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Payload(flag)))
    else:
        torch.save(content | {"tensors": Payload(flag)}, path)
    refused(lambda: backend.load(path), path, "not opened")
    assert not flag.exists()


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_truncated_pt(backend, tmp_path, folder, keep):
    """Cut at any place: the file is named."""
    pytest.importorskip("torch")
    path = backend.save(backend.load(folder), tmp_path / "saved.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(lambda: backend.load(path), path)


def with_norm(change):
    """The final norm's weights changed."""
    name = "model.norm.weight"
    return lambda content: content | {"tensors": content["tensors"] | {name: change(content["tensors"][name])}}


def without(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


WRONG_CONTENTS = {
    "a number": lambda content: 3,
    "a plain state dict": lambda content: content["tensors"],
    "no tensors": without("tensors"),
    "no config": without("config"),
    "no version": without("version"),
    "tensors None": lambda content: content | {"tensors": None},
    "tensors empty": lambda content: content | {"tensors": {}},
    "tensors are numbers": lambda content: content | {"tensors": {"model.norm.weight": 3}},
    "tensors named by numbers": lambda content: content | {"tensors": {3: content["tensors"]["model.norm.weight"]}},
    "config is a number": lambda content: content | {"config": 3},
    "config is None": lambda content: content | {"config": None},
    "config is no JSON": lambda content: content | {"config": "{"},
    "files are a number": lambda content: content | {"files": 3},
    "a file is a string": lambda content: content | {"files": {"tokenizer.model": "bytes"}},
    "a file is of floats": lambda content: (
        content | {"files": {"tokenizer.model": content["tensors"]["model.norm.weight"]}}
    ),
    "format is a list": lambda content: content | {"format": ["tpa-gemma3"]},
    "version is a string": lambda content: content | {"version": "1.0"},
    "whole numbers": with_norm(lambda tensor: tensor.int()),
    "a sparse tensor": with_norm(lambda tensor: tensor.to_sparse()),
    "a complex tensor": with_norm(lambda tensor: tensor.cfloat()),
}


@pytest.mark.parametrize("wrong", WRONG_CONTENTS)
def test_a_pt_that_is_not_a_saved_model(backend, tmp_path, folder, wrong):
    """Another program's file, or one of ours with entries missing or of the wrong kind."""
    torch = pytest.importorskip("torch")
    path = backend.save(backend.load(folder), tmp_path / "saved.pt")
    content = torch.load(path, weights_only=True)
    torch.save(content, path)
    backend.load(path)
    torch.save(WRONG_CONTENTS[wrong](content), path)
    refused(lambda: backend.load(path), "load")


# ---- choices of a conversion ----


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"mode": "pca"}, ("mode", "contextual", "latent", "'pca'")),
        ({"k_mode": "dense"}, ("k_mode", "'dense'")),
        ({"v_mode": ""}, ("v_mode", "''")),
        ({"kv_dtype": "fp8"}, ("kv_dtype", "int4", "'fp8'")),
        ({"k_dtype": "float16"}, ("k_dtype", "'float16'")),
        ({"v_dtype": 8}, ("v_dtype", "8")),
        ({"k_rank": 0}, ("k_rank", ">= 1", "0")),
        ({"v_rank": -3}, ("v_rank", ">= 1", "-3")),
        ({"q_rank": 0}, ("q_rank", ">= 1", "0")),
        ({"k_rank": 1.5}, ("k_rank", "whole", "1.5")),
        ({"k_rank": True}, ("k_rank", "True")),
        ({"k_rank": "2"}, ("k_rank", "'2'")),
        ({"rate": 0}, ("rate", "8", "0")),
        ({"rate": 8.5}, ("rate", "8", "8.5")),
        ({"rate": 1.0, "kv_dtype": "int8"}, ("rate", "kv_dtype", "int8")),
        ({"rate": 1.0, "mode": "contextual"}, ("rate", "mode", "contextual")),
        ({"sinks": 65}, ("sinks", "64", "65")),
        ({"recent": None}, ("recent", "None")),
        ({"context": 0}, ("context", ">= 1", "0")),
        ({"layers": "most"}, ("layers", "all", "global", "'most'")),
        ({"layers": "0,7"}, ("layers", "6", "7")),
        ({"layers": ""}, ("layers", "''")),
        ({"per_layer": ()}, ("per_layer", "0", "7")),
    ],
)
def test_unknown_modes_ranks_and_dtypes_are_refused(backend, choice, words):
    """One line with the name, the rule and the value."""
    model = helpers.model(backend)
    refused(lambda: backend.convert(model, backend.TPAConfig(**choice)), "tpa config", *words)


def test_ranks_above_the_exact_one_are_clamped_and_said(backend):
    """A rank that buys nothing is not an error: it becomes the exact one, and a note names both."""
    model = backend.convert(helpers.model(backend), TPAConfig(k_rank=9, v_rank=2, q_rank=77))
    assert [(pair.k.rank, pair.v.rank) for pair in model.pairs] == [(2, 2)] * 7
    assert len(model.notes) == 2
    assert "k_rank 9" in model.notes[0] and "2" in model.notes[0]
    assert "q_rank 77" in model.notes[1] and "4" in model.notes[1]


def test_a_tpa_model_is_not_converted_again(backend):
    """Its weights are the dense ones, but its factors are not; and calibration needs a tokenizer."""
    model = helpers.model(backend)
    refused(lambda: backend.convert(backend.convert(model)), "convert", "already")
    refused(lambda: backend.convert(model, calibration="some text to calibrate on"), "tokenizer")


# ---- damage ----


def settle(path, original, ids=IDS[:, :3]):
    """Load a damaged model: a TPAError of one line, or a model that runs and holds the original weights."""
    try:
        model = tpa_ref.load(path)
        with np.errstate(all="ignore"):
            assert np.isfinite(model(ids)).all()
    except TPAError as problem:
        assert str(problem) and "\n" not in str(problem), repr(str(problem))
        return
    if original is not None:
        for name, value in helpers.to_named(model.weights).items():
            np.testing.assert_array_equal(value, original[name])


def damaged(content, wounds):
    """Bytes with some of them flipped, cut out, doubled, or everything from one place on missing."""
    content = bytearray(content)
    for kind, where, value in wounds:
        if not content:
            break
        at = where % len(content)
        if kind == "flip":
            content[at] ^= value or 1
        elif kind == "set":
            content[at] = value
        elif kind == "remove":
            del content[at : at + 1 + value % 20]
        elif kind == "double":
            content[at:at] = content[at : at + 1 + value % 20]
        else:
            del content[at:]
    return bytes(content)


KIND = st.sampled_from(["flip", "set", "set", "remove", "double", "cut"])
BYTE = st.one_of(st.integers(0, 255), st.sampled_from(list(b'0123456789e.-+"{}[],:n\n')))
WOUNDS = st.lists(st.tuples(KIND, st.integers(0, 2**20), BYTE), min_size=1, max_size=4)
DAMAGE = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def original():
    return tensors(helpers.config())


@DAMAGE
@given(wounds=WOUNDS)
def test_damaged_config_of_a_tpa_model(saved, original, wounds):
    """Random bytes of config.json: TPAError or a model that works, never another exception."""
    content = (saved / "config.json").read_bytes()
    (saved / "config.json").write_bytes(damaged(content, wounds))
    try:
        settle(saved, original)
    finally:
        (saved / "config.json").write_bytes(content)


@DAMAGE
@given(wounds=WOUNDS)
def test_damaged_index(tmp_path, original, wounds):
    """Random bytes of the index of shards."""
    folder = tmp_path / "sharded"
    if not folder.exists():
        write_sharded(folder)
    file = folder / "model.safetensors.index.json"
    content = file.read_bytes()
    file.write_bytes(damaged(content, wounds))
    try:
        settle(folder, original)
    finally:
        file.write_bytes(content)


@DAMAGE
@given(wounds=WOUNDS, keep_length=st.booleans())
def test_damaged_safetensors_header(saved, original, wounds, keep_length):
    """Random bytes of the header, its length set right or left as it was."""
    file = saved / "model.safetensors"
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = damaged(content[8:end], wounds)
    length = content[:8] if keep_length else struct.pack("<Q", len(header))
    file.write_bytes(length + header + content[end:])
    try:
        settle(saved, original)
    finally:
        file.write_bytes(content)


@DAMAGE
@given(wounds=WOUNDS)
def test_damaged_pt(tmp_path, wounds):
    """Random bytes of a .pt; numbers among the weights may change unseen, but nothing else may happen."""
    pytest.importorskip("torch")
    path, good = tmp_path / "saved.pt", tmp_path / "good.pt"
    if not good.exists():
        tpa_ref.save(tpa_ref.convert(tpa_ref.load(write_folder(tmp_path / "model"))), good)
    content = good.read_bytes()
    ends = 6000  # pickled names in front, the directory of the archive at the end: there damage means something
    front, middle, tail = content[:ends], content[ends:-ends], content[-ends:]
    half = len(wounds) // 2
    path.write_bytes(damaged(front, wounds[:half]) + middle + damaged(tail, wounds[half:]))
    settle(path, None)


HOSTILE: list = [None, True, -1, 0, 1.5, 1e999, float("nan"), 10**400, "x", "a\nb", [], {}, {"a": 1}]


def test_hostile_values_in_every_place_of_a_config(saved, original):
    """Each value of config.json, the TPA entry's included, replaced by nonsense: TPAError or a model that works."""
    content = json.loads((saved / "config.json").read_text())
    places = [(content, key) for key in content]
    places += [(content["tpa"], key) for key in content["tpa"]]
    places += [(content["tpa"]["config"], key) for key in content["tpa"]["config"]]
    places += [(content["tpa"]["factors"], 2), (content["tpa"]["factors"][2], 0)]
    places += [
        (content["tpa"]["factors"][2][side], key) for side in (0, 1) for key in ("mode", "rank", "dtype", "error")
    ]
    escaped = []
    for holder, key in places:
        kept = holder[key]
        for value in HOSTILE:
            holder[key] = value
            (saved / "config.json").write_text(json.dumps(content))
            try:
                settle(saved, original)
            except Exception as problem:
                escaped.append(f"{key} = {str(value)[:20]!r}: {type(problem).__name__} {str(problem)[:60]}")
        holder[key] = kept
    assert not escaped, f"{len(escaped)} escaped:\n" + "\n".join(escaped)
