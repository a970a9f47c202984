"""GGUF files give the model they were made of: what the `gguf` package writes, `transformers` and we read alike.

The names of tensors are those of the package's own tables. In three points `transformers` reads less than is there:
RoPE scaling, query scale, image tower. There the file is compared with a Hugging Face folder of the same weights.
"""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
from dataclasses import replace

import helpers
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from helpers import TOLERANCE, refused, relative, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import tpa_ref
from tpa_ref import TPAError
from tpa_ref.files import formats, gguf_format, stream
from tpa_ref.files.found import inspect
from tpa_ref.gemma.config import GemmaConfig, VisionConfig
from tpa_ref.gemma.tokenizer import Tokenizer
from tpa_ref.gemma.weights import is_vision

gguf = pytest.importorskip("gguf")
schema = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
KIND = gguf.GGMLQuantizationType

IDS = helpers.tokens(40, batch=2, seed=3)
VOCAB = 400
# Rows of 256 for the K-quants; a query scale of 256, which is all that `transformers` knows for a GGUF.
SIZES = dict(
    vocab_size=VOCAB, hidden_size=256, head_dim=256, query_pre_attn_scalar=256, intermediate_size=256,
    rope_scale_global=1.0,
)  # fmt: skip
KINDS = {
    "embed_tokens": "Q8_0", "q_proj": "Q4_K", "k_proj": "Q5_0", "v_proj": "Q6_K", "o_proj": "Q4_0", "gate_proj": "F16",
    "up_proj": "BF16", "down_proj": "Q5_1",
}  # fmt: skip


# ---- writing ----


def blocks(kind, rows, columns, seed=0):
    """Random blocks of K-quants [rows, bytes], whose float16 scales are such that weights are around 0.1."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    made = np.random.default_rng(seed).integers(0, 256, (rows, columns // numbers, size), np.uint8)
    at, scales = {"Q4_K": (0, (5e-4, 5e-4)), "Q6_K": (208, (1e-4,))}[kind.name]
    made[..., at : at + 2 * len(scales)] = np.array(scales, np.float16).view(np.uint8)
    return made.reshape(rows, -1)


def in_blocks(value, kind, seed=0):
    """(bytes of the blocks, the numbers they mean)."""
    quantized = blocks(kind, *value.shape, seed) if kind.name.endswith("_K") else gguf.quants.quantize(value, kind)
    return quantized, gguf.quants.dequantize(quantized, kind)


def gguf_name(name, layers):
    """What the package calls a tensor of Hugging Face."""
    arch = gguf.MODEL_ARCH.MMPROJ if is_vision(name) else gguf.MODEL_ARCH.GEMMA3
    base, _, end = name.replace("_projection_weight", "_projection.weight").rpartition(".")
    return f"{gguf.get_tensor_name_map(arch, layers).get_name(base)}.{end}"


def write_tensors(writer, named, layers, kinds):
    """Norms as 1 + w, matrices in blocks; returns the numbers that the file means, by their names here."""
    meant = {}
    for seed, (name, value) in enumerate(named.items()):
        kind = next((KIND[kind] for part, kind in kinds.items() if f"{part}." in name), KIND.F32)
        stored, meant[name] = in_blocks(value, kind, seed) if value.ndim == 2 else (value, value)
        if name.endswith("norm.weight"):
            stored = value + np.float32(1)
        writer.add_tensor(gguf_name(name, layers), stored, raw_dtype=kind if value.ndim == 2 else None)
    return meant


def metadata(writer, config):
    """What llama.cpp's converter writes of a config."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope_base_global)
    if config.rope_scale_global != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scale_global)


def add_tokenizer(writer, proto):
    """A SentencePiece model as llama.cpp's converter writes it: markers as control pieces, spaces as spaces."""
    model = schema.ModelProto.FromString(proto)
    types = [3 if piece.type == 4 and piece.piece.startswith("<") else piece.type for piece in model.pieces]
    tokens = [x.piece.replace("▁", " ") if kind == 4 else x.piece for x, kind in zip(model.pieces, types)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types(types)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(106)
    writer.add_chat_template("{{ messages }}")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(path, config=None, named=None, kinds=KINDS, more=lambda writer: None, tokenizer=True, **split):
    """A GGUF of random weights; returns the weights that it means."""
    config = config or helpers.config(**SIZES)
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, "gemma3", **split)
    metadata(writer, config)
    if tokenizer:
        add_tokenizer(writer, helpers.tokenizer_proto(VOCAB, turns=True))
    more(writer)
    meant = write_tensors(writer, helpers.tensors(config) if named is None else named, config.num_layers, kinds)
    finish(writer)
    return meant


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(file, the weights that it means)."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return path, write(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small file."""
    path = tmp_path_factory.mktemp("small") / "model.gguf"
    config = helpers.config(num_layers=1, hidden_size=16, vocab_size=VOCAB, is_global=(True,), intermediate_size=16)
    write(path, config, kinds={})
    return path.read_bytes()


# ---- the same model ----


def theirs(path):
    """The logits of `transformers` for the file, which it reads itself. (`from_pretrained` also needs `accelerate`.)"""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    torch.set_num_threads(1)
    hf = transformers.Gemma3ForCausalLM(
        transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    ).eval()
    left = hf.load_state_dict(load_gguf_checkpoint(path, True, hf)["tensors"], strict=False)
    assert left.missing_keys in ([], ["lm_head.weight"]) and not left.unexpected_keys
    hf.tie_weights()
    with torch.no_grad():
        return helpers.to_numpy(hf(torch.tensor(IDS)).logits)


def test_held_in_8_bits_as_they_are_stored(made):
    """Blocks of whole numbers behind one scale: to the last bit. Others: the largest of 32 numbers in 127 steps."""
    torch, tpa_torch = pytest.importorskip("torch"), pytest.importorskip("tpa_torch")
    path, meant = made
    loader = tpa_torch.files.checkpoint.Loader(inspect(path), "float32", torch.device("cpu"), "int8")
    seen = set()
    for name, numbers in meant.items():
        held, part = loader.read(name), next((part for part in KINDS if f"{part}." in name), None)
        if part is None or numbers.ndim != 2:
            continue
        got, expected = held.wide().numpy(), np.asarray(numbers, np.float32)
        if KINDS[part] in ("Q8_0", "Q5_0", "Q4_0"):
            assert np.array_equal(got, expected), name
        else:
            groups = expected.reshape(len(expected), -1, 32)
            step = np.abs(groups).max(-1, keepdims=True) / 127
            assert (np.abs(got.reshape(groups.shape) - groups) <= 0.51 * step + 1e-7).all(), name
            assert not np.array_equal(got, expected), name
        seen.add(KINDS[part])
    assert seen == set(KINDS.values())


def error(backend, path):
    return relative(helpers.logits(backend.load(path), IDS), theirs(path))


def test_logits_are_those_of_transformers(backend, made):
    """Eight types of blocks, in both backends."""
    assert error(backend, made[0]) < TOLERANCE["transformers"]


def test_a_mistake_is_seen(backend, made, monkeypatch):
    """Norms left at 1 + w."""
    read = gguf_format.GgufFile.read
    monkeypatch.setattr(
        gguf_format.GgufFile,
        "read",
        lambda self, key, *how: read(self, key, *how) + key.endswith("norm.weight"),
    )
    assert error(backend, made[0]) > 100 * TOLERANCE["transformers"]


def test_logits_are_those_of_an_equal_folder(backend, tmp_path):
    """With RoPE scaling, another query scale and another window, which `transformers` does not take from a GGUF."""
    config = helpers.config(**SIZES | {"head_dim": 64, "query_pre_attn_scalar": 64, "rope_scale_global": 8.0})
    meant = write(tmp_path / "gguf" / "model.gguf", config)
    folder = write_folder(tmp_path / "hf", config, meant)
    ours = helpers.logits(backend.load(tmp_path / "gguf" / "model.gguf"), IDS)
    assert relative(ours, helpers.logits(backend.load(folder), IDS)) < TOLERANCE["float32"]


WIDENED = [kind for kind in KIND if gguf_format.can_widen(kind)]


@pytest.mark.parametrize("kind", WIDENED, ids=lambda kind: kind.name)
def test_every_type_of_block(backend, tmp_path, monkeypatch, kind):
    """Widened piece by piece they are what the package makes of them in one go."""
    monkeypatch.setattr(gguf_format, "CHUNK", 600)
    size = gguf.GGML_QUANT_SIZES[kind][1] * 512 // gguf.GGML_QUANT_SIZES[kind][0]
    data = np.random.default_rng(0).integers(0, 256, (5, size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_tensor("x", data, raw_dtype=kind)
    finish(writer)
    file = gguf_format.GgufFile(gguf_format.read_header(tmp_path / "model.gguf", gguf))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, kind)
    got = helpers.back(file.read("x", "pt" if helpers.is_torch(backend) else "numpy"))
    assert got.dtype == np.float32 and got.shape == (5, 512)
    np.testing.assert_array_equal(got, expected)


def test_only_what_is_asked_for_is_read(made, monkeypatch):
    """One tensor takes no more memory than itself and a piece, and opening the file less than that."""
    monkeypatch.setattr(gguf_format, "CHUNK", 2**12)
    tracemalloc.start()
    opened = formats.open_checkpoint(made[0])[0]
    first = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    x = opened["model.layers.0.self_attn.q_proj.weight"].read("numpy")
    second = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first < x.nbytes and second < x.nbytes * 1.4


# ---- config ----

FLAGS = [True, False, True, True, False, True, True]
CHANGES = {
    "a period": (lambda w: w.add_sliding_window_pattern(3), {"is_global": (False, False, True) * 2 + (False,)}),
    "flags": (lambda w: w.add_sliding_window_pattern(FLAGS), {"is_global": tuple(not x for x in FLAGS)}),
    "local base": (lambda w: w.add_float32("gemma3.rope.freq_base_swa", 5e3), {"rope_base_local": 5e3}),
    "scaling": (lambda w: w.add_rope_scaling_factor(4.0), {"rope_scale_global": 4.0}),
    "old scaling": (lambda w: w.add_float32("gemma3.rope.scale_linear", 2.0), {"rope_scale_global": 2.0}),
    "no scaling": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE), {}),
    "no cap": (lambda w: w.add_final_logit_softcapping(0.0), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_file_says(small, tmp_path, change):
    """Metadata beyond the usual ones."""
    more, expected = CHANGES[change]
    config = helpers.config(vocab_size=VOCAB, rope_scale_global=1.0)
    write(tmp_path / "model.gguf", config, kinds={}, more=more)
    assert inspect(tmp_path / "model.gguf").config == replace(config, **expected)


class Said(gguf_format.Header):
    """A header of a published size, in values alone."""

    def __init__(self, config, **more):
        values = {
            "general.architecture": "gemma3", "gemma3.block_count": config.num_layers, "gemma3.context_length": 131_072,
            "gemma3.embedding_length": config.hidden_size, "gemma3.attention.head_count": config.num_heads,
            "gemma3.attention.head_count_kv": config.num_kv_heads, "gemma3.attention.key_length": config.head_dim,
            "gemma3.feed_forward_length": config.intermediate_size, "gemma3.attention.sliding_window": 1024,
        }  # fmt: skip
        super().__init__(None, None, values | more, {})


@pytest.mark.parametrize("variant", ["4b", "12b", "27b"])
def test_published_sizes(variant):
    """The query scale of 27B and the RoPE scaling from 4B on, which a file need not hold."""
    config = GemmaConfig.of_variant(variant)
    assert GemmaConfig.from_hf(gguf_format.read_config(Said(config), [], config.vocab_size)) == config
    plain = {"gemma3.rope.scaling.type": "none"}
    said = GemmaConfig.from_hf(gguf_format.read_config(Said(config, **plain), [], config.vocab_size))
    assert said == replace(config, rope_scale_global=1.0)


def test_a_model_without_windows():
    """llama.cpp: no window, no local layer."""
    said = Said(GemmaConfig.gemma3_4b(), **{"gemma3.attention.sliding_window": 0})
    assert all(GemmaConfig.from_hf(gguf_format.read_config(said, [], 9)).is_global)


def test_what_is_said_of_texts(made):
    """Ends of texts and the chat template are used, and kept."""
    beside = inspect(made[0]).side_files
    assert beside.stop_tokens == {1, 106} and beside.config["bos_token_id"] == 2
    assert beside.chat_template == "{{ messages }}"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_dtype_that_is_saved(backend, made, tmp_path, dtype):
    """Weights are stored in the dtype that is computed in; as a default that is the one of bfloat16 checkpoints."""
    assert inspect(made[0]).stored_dtype == "bfloat16"
    if dtype == "bfloat16" and not helpers.is_torch(backend):
        pytest.skip("NumPy has none")
    model = backend.load(made[0], dtype=dtype)
    assert model.stored_dtype == ("float32" if dtype == "float64" else dtype)
    backend.save(model, tmp_path / "saved")
    again = backend.load(tmp_path / "saved", dtype=dtype)
    np.testing.assert_array_equal(helpers.logits(again, IDS), helpers.logits(model, IDS))


def test_an_output_projection(tmp_path):
    """The same bytes as the embedding: tied. Others: a head of its own."""
    config = helpers.config(vocab_size=VOCAB, num_layers=1, is_global=(True,))
    named = helpers.tensors(config)
    for name, value in (
        ("same", named["model.embed_tokens.weight"]),
        ("other", named["model.embed_tokens.weight"] + 1),
    ):
        more = lambda writer, value=value: writer.add_tensor("output.weight", value)  # noqa: E731
        write(tmp_path / f"{name}.gguf", config, named, {}, more)
        model = tpa_ref.load(tmp_path / f"{name}.gguf")
        assert model.config.tied == (name == "same")
        np.testing.assert_array_equal(model.weights.head_vm, value)


# ---- tokenizer ----

TEXTS = (
    "the return value", "  two  spaces   and more ", "\tx\n\n\ny", "12 345", "naïve ☃ 🎉",
    "<start_of_turn>user\nhi<end_of_turn>", "▁", "", "<unused7>",
)  # fmt: skip


def test_token_ids(made):
    """Those of the tokenizer that went in, and its texts."""
    ours = inspect(made[0]).tokenizer
    original = sentencepiece.SentencePieceProcessor(model_proto=helpers.tokenizer_proto(VOCAB, turns=True))
    for text in TEXTS:
        ids = ours.encode(text, bos=False)
        assert ids == original.encode(text) and ours.decode(ids) == original.decode(ids)
    assert ours.encode("<start_of_turn>", bos=False) == [105]


def test_spaces_inside_pieces():
    """Pieces that llama.cpp writes with spaces are found in texts."""
    proto = schema.ModelProto.FromString(helpers.tokenizer_proto(VOCAB, turns=True))
    proto.pieces[50].piece = "▁▁▁"
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece.replace("▁▁▁", "   ") for piece in proto.pieces],
        "tokenizer.ggml.scores": np.array([piece.score for piece in proto.pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([piece.type for piece in proto.pieces], np.int32),
    }
    header = gguf_format.Header(None, None, values, {})
    assert 50 in Tokenizer(gguf_format.tokenizer_proto(header)).encode("x   y")


# ---- several files ----


def test_parts(backend, made, tmp_path):
    """All parts are found by the folder and by each of them."""
    write(tmp_path / "parts" / "model.gguf", split_max_tensors=40)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) == 3 and parts[1].name == "model-00002-of-00003.gguf"
    expected = helpers.logits(backend.load(made[0]), IDS)
    for path in (tmp_path / "parts", *parts):
        np.testing.assert_array_equal(helpers.logits(backend.load(path), IDS), expected)


def test_wrong_parts(made, tmp_path):
    """One is missing, two are exchanged, one is of another model, one was renamed."""
    folder = tmp_path / "parts"
    write(folder / "model.gguf", split_max_tensors=40)
    parts = sorted(folder.iterdir())
    held = [part.read_bytes() for part in parts]
    parts[1].unlink()
    refused(lambda: inspect(folder), "one of 3 parts", parts[1].name)
    parts[1].write_bytes(held[2])
    refused(lambda: inspect(folder), parts[1], "part 1 of 3", "split.no 2")
    write(tmp_path / "other" / "model.gguf", split_max_tensors=41)
    parts[1].write_bytes((tmp_path / "other" / parts[1].name).read_bytes())
    refused(lambda: inspect(folder), "must hold 93 tensors, got 94")
    (tmp_path / "alone.gguf").write_bytes(held[0])
    refused(lambda: inspect(tmp_path / "alone.gguf"), "part 0 of 1", "split.count 3")


def test_which_file_of_a_folder(made, tmp_path):
    """One model; other formats come first."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(made[0].read_bytes())
    refused(lambda: inspect(tmp_path), "2 .gguf models", "a.gguf")
    assert inspect(tmp_path / "b.gguf").quantized
    (tmp_path / "b.gguf").unlink()
    assert inspect(tmp_path).quantized
    write_folder(tmp_path)
    assert not inspect(tmp_path).quantized


# ---- images ----


def write_seeing(folder, named, config, swapped=False, more=lambda writer: None):
    """The text model and its image tower; swapped: fc1 and fc2 as the first converter called them."""
    text = {name: value for name, value in named.items() if not is_vision(name)}
    write(folder / "model.gguf", config, text, {}, tokenizer=False)
    writer, vision = gguf.GGUFWriter(folder / "mmproj-model-f32.gguf", "clip"), config.vision
    writer.add_string("clip.projector_type", "gemma3")
    for key, value in (
        ("image_size", vision.image_size), ("patch_size", vision.patch_size), ("embedding_length", vision.hidden_size),
        ("feed_forward_length", vision.intermediate_size), ("block_count", vision.num_layers),
        ("attention.head_count", vision.num_heads),
    ):  # fmt: skip
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.norm_eps)
    for name, value in named.items():
        if is_vision(name):
            key = gguf_name(name, vision.num_layers)
            if swapped:
                key = re.sub("ffn_(up|down)", lambda x: "ffn_down" if x[1] == "up" else "ffn_up", key)
            writer.add_tensor(key, value + np.float32(1) if "soft_emb_norm" in name else value)
    more(writer)
    finish(writer)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """(the model of `transformers`, its weights, its config with the image token that GGUF files imply)."""
    pytest.importorskip("transformers")
    hf, folder = helpers.saved(tmp_path_factory.mktemp("seeing"), text={"query_pre_attn_scalar": 16})
    found = inspect(folder)
    named = {name: np.array(entry.read("numpy")) for name, entry in found.entries.items()}
    default = VisionConfig()
    vision = replace(
        found.config.vision,
        **{name: getattr(default, name) for name in ("image_token", "start_token", "end_token")},
    )
    return hf, named, replace(found.config, vision=vision)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("by_folder", [False, True])
def test_images(backend, seeing, tmp_path, swapped, by_folder):
    """The image tower beside the model gives what it gives in a Hugging Face folder, in both of its spellings."""
    hf, named, config = seeing
    write_seeing(tmp_path / "model", named, config, swapped)
    model = backend.load(tmp_path / "model" if by_folder else tmp_path / "model" / "model.gguf")
    assert model.config == config
    tokens_bq, images = np.array([helpers.text("9 i 14 i 3")]), helpers.pixels(2)
    expected = helpers.hf_logits(hf, tokens_bq, images)
    ids = np.where(tokens_bq == helpers.IMAGE, config.vision.image_token, tokens_bq)
    assert relative(model(ids, images=images), expected) < TOLERANCE["transformers"]


def test_wrong_towers(seeing, tmp_path):
    """One alone, one of another kind, a model in its place."""
    _, named, config = seeing
    folder = tmp_path / "model"
    write_seeing(folder, named, config)
    tower = folder / "mmproj-model-f32.gguf"
    refused(lambda: inspect(tower), "image tower", "model's .gguf")
    tower.write_bytes(tower.read_bytes().replace(b"gemma3", b"llava9"))
    refused(lambda: inspect(folder), "'gemma3' projector", "'llava9'")
    tower.write_bytes((folder / "model.gguf").read_bytes())
    refused(lambda: inspect(folder), "twice")


def test_several_towers_in_a_folder(seeing, tmp_path):
    """Of one tower in several precisions the finest is read; that of another model is left alone."""
    _, named, config = seeing
    folder = tmp_path / "model"
    write_seeing(folder, named, config)
    (folder / "mmproj-0.gguf").write_bytes((folder / "mmproj-model-f32.gguf").read_bytes()[:5000])
    assert inspect(folder / "model.gguf").config.vision == config.vision
    narrow = helpers.config(vocab_size=VOCAB, hidden_size=32)
    write(folder / "small.gguf", narrow, helpers.tensors(narrow), {})
    assert inspect(folder / "small.gguf").config.vision is None


# ---- conversion and export ----


def test_conversion_from_disk_to_disk(backend, tmp_path):
    """Layer by layer as in memory, with the tokenizer of the file, also after an interruption."""
    path, text = tmp_path / "model.gguf", helpers.TEXT * 10
    config = helpers.config(vocab_size=VOCAB, hidden_size=64, intermediate_size=64)
    write(path, config, kinds=dict.fromkeys(KINDS, "Q8_0"))
    dense = backend.load(path)
    whole = backend.convert(dense, None, backend.calibrate(dense, text, max_tokens=300))

    def stop(items):
        for number, item in enumerate(items):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        backend.convert_checkpoint(path, tmp_path / "tpa", None, text, max_tokens=300, progress=stop)
    assert (tmp_path / ".tpa.partial").is_dir()
    loaded = backend.load(backend.convert_checkpoint(path, tmp_path / "tpa", None, text, max_tokens=300))
    np.testing.assert_array_equal(helpers.logits(loaded, IDS), helpers.logits(whole, IDS))
    assert loaded.tokenizer.files == dense.tokenizer.files


def test_the_recipe_knows_every_file(seeing, tmp_path):
    """A changed image tower begins a conversion anew."""
    _, named, config = seeing
    write_seeing(tmp_path / "model", named, config)
    converted = tpa_ref.convert(tpa_ref.load(tmp_path / "model"))
    files = json.loads(stream.recipe(tmp_path / "model", converted, None, 9))["files"]
    assert [name.rpartition("/")[2] for name, *_ in files] == ["model.gguf", "mmproj-model-f32.gguf"]


def test_export(made, tmp_path):
    """A dense Hugging Face folder in bfloat16."""
    folder = stream.export(made[0], tmp_path / "dense")
    named = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    assert set(named) == set(made[1])
    for name, value in made[1].items():
        assert named[name].dtype == ml_dtypes.bfloat16
        # 1 + w is stored as float32, so w comes back with an error of 2^-24.
        np.testing.assert_allclose(named[name].astype(np.float32), value, rtol=2**-8, atol=2**-23)
    assert inspect(folder).config == inspect(made[0]).config


# ---- bad input ----

REFUSED = {
    "final cap": (lambda w: w.add_final_logit_softcapping(30.0), "final_logit_softcapping"),
    "attention cap": (lambda w: w.add_attn_logit_softcapping(50.0), "attn_logit_softcapping"),
    "kind of scaling": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "'yarn'"),
    "flags for another count": (lambda w: w.add_sliding_window_pattern([True]), "one layer type per layer"),
    "text for a number": (lambda w: w.add_string("gemma3.rope.freq_base_swa", "x"), "must be a number, got str"),
    "bool for a number": (lambda w: w.add_bool("gemma3.rope.freq_base_swa", True), "must be a number, got bool"),
    "list for a number": (lambda w: w.add_array("split.no", [1, 2]), "split.no", "must be a number, got ndarray"),
    "number for a text": (lambda w: w.add_uint32("tokenizer.chat_template", 3), "must be a text, got int"),
    "list for a text": (lambda w: w.add_array("gemma3.rope.scaling.type", [1, 2]), "must be a text, got ndarray"),
    "alignment": (lambda w: w.add_uint32("general.alignment", 0), "general.alignment", "0"),
    "unknown tensor": (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(4, np.float32)), "unexpected"),
    "name of two lines": (lambda w: w.add_tensor("a\nb", np.ones(4, np.float32)), "printable"),
    "long name": (lambda w: w.add_tensor("a" * 65, np.ones(4, np.float32)), "64 printable characters"),
    "type of blocks": (lambda w: w.add_tensor("x", np.ones(4, np.int8)), "'x'", "I8", "cannot widen"),
    "tokens": (lambda w: w.add_string("tokenizer.ggml.tokens", "abc"), "must be 'llama'"),
    "NaN": (lambda w: w.add_float32("gemma3.rope.freq_base_swa", float("nan")), "rope_base_local"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_metadata(tmp_path, case):
    more, *words = REFUSED[case]
    config = helpers.config(vocab_size=VOCAB)
    write(tmp_path / "model.gguf", config, kinds={}, more=more, tokenizer=False)
    refused(lambda: inspect(tmp_path / "model.gguf"), *words)


def changed(name, value):
    """Changes one list of the tokenizer."""

    def change(writer):
        add_tokenizer(writer, helpers.tokenizer_proto(VOCAB, turns=True))
        held = writer.kv_data[0][f"tokenizer.ggml.{name}"]
        writer.kv_data[0][f"tokenizer.ggml.{name}"] = replace(held, value=value(held.value))

    return change


TOKENIZERS = {
    "another kind": (changed("model", lambda _: "gpt2"), "must be 'llama'", "'gpt2'"),
    "lengths": (changed("scores", lambda x: x[:-1]), "400 tokens, 399 scores"),
    "too few": (changed("tokens", lambda x: x[:2]), "2 tokens"),
    "types": (changed("token_type", lambda x: [*x[:-1], 77]), "types of 1 to 6", "77"),
    "NaN": (changed("scores", lambda x: [*x[:-1], float("nan")]), "finite scores"),
    "twice": (changed("tokens", lambda x: [*x[:-1], x[-2]]), "not a SentencePiece model"),
    "empty": (changed("tokens", lambda x: [*x[:-1], ""]), "not a SentencePiece model"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_refused_tokenizers(tmp_path, case):
    more, *words = TOKENIZERS[case]
    write(tmp_path / "model.gguf", helpers.config(vocab_size=VOCAB), kinds={}, more=more, tokenizer=False)
    refused(lambda: inspect(tmp_path / "model.gguf"), *words)


def test_another_architecture(tmp_path):
    for arch in ("llama", "gemma3n"):
        finish(gguf.GGUFWriter(tmp_path / "model.gguf", arch))
        refused(lambda: inspect(tmp_path / "model.gguf"), "architecture", "'gemma3'", repr(arch))


def word(value, size=8):
    return value.to_bytes(size, "little")


START = b"GGUF" + word(3, 4)
ONE = START + word(0) + word(1)  # value
NAMED = ONE + word(1) + b"a"
HEADERS = {
    "empty": (b"", "empty"),
    "another format": (b"GGML" + word(3, 4), "b'GGUF'"),
    "the first version": (b"GGUF" + word(1, 4) + bytes(99), "2 or 3, got 1"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + bytes(99), "big-endian"),
    "four bytes": (b"GGUF", "truncated"),
    "many tensors": (START + word(2**63) + word(0) + bytes(999), "axes"),
    "many values": (START + word(0) + word(2**64 - 1), "truncated"),
    "a long name": (ONE + word(2**62), "truncated"),
    "a long array": (NAMED + word(9, 4) + word(4, 4) + word(2**61), "truncated"),
    "long texts": (NAMED + word(9, 4) + word(8, 4) + word(2**61), "truncated"),
    "no UTF-8": (ONE + word(1) + b"\xff" + word(4, 4) + word(1, 4), "UTF-8"),
    "an unknown type": (NAMED + word(99, 4), "unknown type: 99"),
    "an array of arrays": (NAMED + word(9, 4) + word(9, 4) + word(1), "unknown type: 9"),
    "an empty list alone": (NAMED + word(9, 4) + word(4, 4) + word(0), "architecture"),
    "a name twice": (START + word(0) + word(2) + 2 * (word(1) + b"a" + word(4, 4) + word(1, 4)), "'a' twice"),
}
TENSORS = {
    "no axes": ((0, b"", 0, 0), "axes, got 0"),
    "five axes": ((5, word(1) * 5, 0, 0), "axes, got 5"),
    "nothing": ((1, word(0), 0, 0), "shape (0,)"),
    "a row of half a block": ((1, word(16), 8, 0), "blocks of 32"),
    "an unknown type": ((1, word(1), 4711, 0), "does not know: 4711"),
    "more than the file": ((2, word(2**40) * 2, 0, 0), "ends at byte"),
    "behind the file": ((1, word(1), 0, 2**60), "ends at byte"),
}


@pytest.mark.parametrize("case", sorted(HEADERS.keys() | TENSORS.keys()))
def test_refused_headers(backend, tmp_path, case):
    """One line each, and no memory for what is not there."""
    if case in HEADERS:
        content, *words = HEADERS[case]
    else:
        (axes, lengths, kind, offset), *words = TENSORS[case]
        content = START + word(1) + word(0) + word(1) + b"x" + word(axes, 4) + lengths + word(kind, 4) + word(offset)
        content += bytes(200)
    (tmp_path / "model.gguf").write_bytes(content)
    tracemalloc.start()
    refused(lambda: backend.load(tmp_path / "model.gguf"), *words)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_truncated_anywhere(small, tmp_path):
    """Cut at any place, a file is refused."""
    path = tmp_path / "model.gguf"
    for length in [*range(0, 400, 7), *range(400, len(small), len(small) // 50), len(small) - 33]:
        path.write_bytes(small[:length])
        refused(lambda: inspect(path))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes(small, tmp_path, data):
    """Bytes changed at random: a model, or one line; never a traceback, nor memory far beyond the file's size."""
    damaged = bytearray(small)
    header = small.index(b"token_embd") if data.draw(st.booleans()) else len(small)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.gguf"
    path.write_bytes(damaged)
    tracemalloc.start()
    try:
        tpa_ref.load(path)
    except TPAError as problem:
        assert "\n" not in str(problem)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10 * len(small) + 5_000_000


@pytest.mark.parametrize("package", ["gguf", "sentencepiece.sentencepiece_model_pb2"])
def test_a_missing_package(made, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused(lambda: inspect(made[0]), made[0], "not installed", "pip install -e .[gguf]")


def test_not_finite(backend, tmp_path):
    """A block whose scale is NaN is named by its tensor."""
    config = helpers.config(vocab_size=VOCAB)
    named = helpers.tensors(config)
    named["model.layers.3.mlp.up_proj.weight"][0, 0] = np.nan
    write(tmp_path / "model.gguf", config, named, {})
    refused(lambda: backend.load(tmp_path / "model.gguf"), "model.layers.3.mlp.up_proj.weight", "finite")
