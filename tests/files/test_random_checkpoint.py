"""Random checkpoints: every format holds the same model under its own names, and loads like a downloaded one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import sentencepiece
from helpers import ROOT, relative, to_named
from safetensors.torch import load_file

import random_checkpoint as rc
import tpa_ref
from tpa_ref import GemmaConfig, TPAError
from tpa_ref.files.found import inspect
from tpa_ref.gemma.config import layer_pattern
from tpa_ref.gemma.weights import hf_names

PROTO = (ROOT / "assets" / "tiny-gemma3" / "tokenizer.model").read_bytes()
HUGGING_FACE = ("hf", "hf-multimodal-old", "hf-multimodal")
ROWS = 4200  # 104 more than the shipped tokenizer has pieces


def small_config(**changes):
    """Six layers, the last one global and scaled; no published size has its width."""
    fields = dict(
        vocab_size=ROWS,
        hidden_size=24,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=40,
        sliding_window=16,
        query_pre_attn_scalar=10,
        max_positions=512,
        is_global=layer_pattern(6),
        rope_scale_global=8.0,
    )
    return GemmaConfig(**(fields | changes))


def write(folder, layout, config=None, shard_bytes=4 << 30, **numbers):
    """A checkpoint of the small model with a tokenizer of its size, as the command puts them together."""
    config = config or small_config()
    rc.write_checkpoint(config, layout, folder, shard_bytes, **numbers)
    (folder / "tokenizer.model").write_bytes(rc.synthetic_tokenizer(PROTO, config.vocab_size))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of the small model by format; hf and ckpt-sharded are cut into shards of 30 kB."""
    folder = tmp_path_factory.mktemp("written")
    for layout in rc.FORMATS:
        write(folder / layout, layout, shard_bytes=30_000 if layout in ("hf", "ckpt-sharded") else 4 << 30)
    return folder


def reference(seed=0, config=None, **more):
    """All weights by their names in `hf_names`."""
    planned = rc.planned_tensors(config or small_config(), "hf", seed=seed, **more)
    return {tensor.name: tensor.make() for tensor in planned}


def shard_names(stem, suffix, count):
    return [f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}" for number in range(count)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def pickled(path):
    return torch.load(path, weights_only=True)


# ---- the weights ----


def test_every_tensor_depends_on_seed_and_name_alone():
    """Same seed, same numbers, in whatever order; another seed or name, others."""
    config = small_config()
    first, again, other = reference(0), reference(0), reference(1)
    assert same(first, again)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    gates = [first[f"model.layers.{layer}.mlp.gate_proj.weight"] for layer in range(config.num_layers)]
    assert not torch.equal(gates[0], gates[1])
    assert {name: tuple(value.shape) for name, value in first.items()} == hf_names(config)


def test_logits_are_of_normal_size():
    """The bf16 model of the PyTorch backend, and the reference: logits around 1, all finite."""
    import tpa_torch
    from tpa_ref.gemma.weights import from_named

    config = small_config(hidden_size=128, num_layers=12, is_global=layer_pattern(12))
    named = reference(config=config)
    ids = np.random.default_rng(0).integers(0, ROWS, (1, 40))
    logits = tpa_torch.Model(config, from_named(named, config))(ids).float()
    assert torch.isfinite(logits).all() and 0.5 < logits.std() < 2 and logits.abs().max() < 30


def measured_ranks(matrix):
    """The ranks that hold 90, 95 and 98 % of the sum of squared singular values."""
    G = matrix.double().numpy()
    G = G @ G.T if len(G) < G.shape[1] else G.T @ G
    energy = np.linalg.eigvalsh(G)[::-1]
    return tuple(int(np.searchsorted(np.cumsum(energy) / energy.sum(), share)) + 1 for share in (0.90, 0.95, 0.98))


def test_the_table_covers_the_real_1b():
    """Three ranks for Q, K and V of every layer, under the names of these tensors."""
    spectra = rc.read_spectra()
    assert set(spectra) == {name for name in hf_names(GemmaConfig.gemma3_1b()) if name.split("_proj")[0][-1] in "qkv"}
    assert spectra["model.layers.5.self_attn.q_proj.weight"] == (271, 375, 511)
    assert spectra["model.layers.25.self_attn.v_proj.weight"] == (205, 225, 240)


def test_spectra_keep_the_energy_and_all_other_tensors():
    """Only the matrices named decay, and their energy is that of the white ones."""
    name = "model.layers.2.self_attn.k_proj.weight"
    white, found = reference(), reference(spectra={name: (7, 10, 13)})
    assert [key for key in white if not torch.equal(white[key], found[key])] == [name]
    assert found[name].float().norm() == pytest.approx(float(white[name].float().norm()), rel=1e-3)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_spectra_have_the_ranks_of_the_table(part):
    """Full-size matrices of the 1B, rounded to bf16, have the ranks of the real ones."""
    shapes, spectra = hf_names(GemmaConfig.gemma3_1b()), rc.read_spectra()
    for layer in range(26) if part != "q" else (5, 6):  # an SVD of Q takes ten times as long
        name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
        made = rc.with_spectrum(
            rc.random_tensor(name, shapes[name], torch.bfloat16, 0), spectra[name], rc.generator_of(name, 1)
        )
        assert measured_ranks(made) == spectra[name], name


def test_spectra_of_different_matrices_are_independent():
    """K and V of one layer, and K of two layers, have nothing to do with each other."""
    names = [f"model.layers.{at}_proj.weight" for at in ("0.self_attn.k", "0.self_attn.v", "1.self_attn.k")]
    found = reference(spectra=dict.fromkeys(names, (7, 10, 13)))
    first, *others = (found[name].float().flatten() for name in names)
    for other in others:
        assert abs(torch.nn.functional.cosine_similarity(first, other, dim=0)) < 0.3


# ---- the formats ----


def test_hf_names_shapes_and_shards(written):
    """What the shards hold is `hf_names`, no more, and the index says where and how many bytes."""
    folder = written / "hf"
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == shard_names("model", "safetensors", len(files)) and len(files) > 2
    held = {file: load_file(folder / file) for file in files}
    assert same({name: value for file in held.values() for name, value in file.items()}, reference())
    index = read_json(folder / "model.safetensors.index.json")
    assert index["weight_map"] == {name: file for file in files for name in held[file]}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in reference().values())
    largest = max((folder / file).stat().st_size for file in files[1:])
    assert largest < 30_000 + 5_000 and len(held[files[0]]) == 1  # the embedding alone is larger than a shard
    assert GemmaConfig.from_hf(folder / "config.json") == small_config()


@pytest.mark.parametrize("layout", rc.FORMATS)
def test_every_format_loads_as_the_same_model(written, layout):
    """Names, fused rows and scales are undone by the loader; int8 is within half a step of the largest weight."""
    folder = written / layout
    model = tpa_ref.load(folder, config=None if layout in HUGGING_FACE else small_config())
    assert model.config == small_config() and model.tokenizer.vocab_size == ROWS
    expected = reference()
    for name, value in to_named(model.weights).items():
        if layout == "ckpt-int8" and value.ndim == 2:
            step = expected[name].float().abs().amax(1, keepdim=True).numpy() / 127
            assert (np.abs(value - expected[name].float().numpy()) <= 0.5001 * step).all(), name
        else:
            assert np.array_equal(value, expected[name].float().numpy()), name


@pytest.mark.parametrize(
    ("layout", "prefix"), [("hf-multimodal-old", "language_model.model."), ("hf-multimodal", "model.language_model.")]
)
def test_multimodal_names_and_config(written, layout, prefix):
    """Text tensors below the prefix of their generation, and a nested config with the keys of their generation."""
    found = load_file(written / layout / "model.safetensors")
    assert same(found, {prefix + name.removeprefix("model."): value for name, value in reference().items()})
    content = read_json(written / layout / "config.json")
    text = content["text_config"]
    assert content["model_type"] == "gemma3" and text["model_type"] == "gemma3_text"
    old, new = {"rope_scaling", "rope_theta", "rope_local_base_freq"}, {"rope_parameters"}
    present, absent = (old, new) if layout == "hf-multimodal-old" else (new, old)
    assert present <= set(text) and not absent & set(text)
    assert GemmaConfig.from_hf(content) == small_config()


@pytest.mark.parametrize("layout", ["hf-multimodal-old", "hf-multimodal"])
@pytest.mark.parametrize("variant", ["270m", "1b", "4b", "12b", "27b"])
def test_multimodal_config_of_every_size(layout, variant):
    """Read back it is the same model."""
    config = GemmaConfig.of_variant(variant)
    assert GemmaConfig.from_hf(rc.config_json(config, layout)) == config


def test_ckpt_names_and_fused_rows(written):
    """gemma_pytorch's names; the fused rows are Q, then K, then V; complex buffers that loaders must ignore."""
    config, expected = small_config(), reference()
    state = pickled(written / "ckpt" / "model.ckpt")["model_state_dict"]
    layer_names = (
        "self_attn.qkv_proj self_attn.o_proj self_attn.query_norm self_attn.key_norm mlp.gate_proj mlp.up_proj "
        "mlp.down_proj input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
    ).split()
    names = {f"model.layers.{layer}.{name}.weight" for layer in range(6) for name in layer_names}
    assert set(state) == names | {"embedder.weight", "model.norm.weight", "local_freqs_cis", "global_freqs_cis"}
    at, d = "model.layers.4.self_attn", config.head_dim
    q, k, v = state[f"{at}.qkv_proj.weight"].split([4 * d, 2 * d, 2 * d])
    for part, value in (("q_proj", q), ("k_proj", k), ("v_proj", v), ("k_norm", state[f"{at}.key_norm.weight"])):
        assert torch.equal(value, expected[f"{at}.{part}.weight"]), part
    for kind in ("local", "global"):
        table = state[f"{kind}_freqs_cis"]
        assert table.dtype == torch.complex64 and table.shape == (256, d // 2)
    multimodal = rc.planned_tensors(replace(config, variant="4b"), "ckpt")
    assert multimodal[0].name == "text_token_embedder.weight"


def test_ckpt_shards(written):
    """Bare dicts whose union is the single file's state, and an index of them all."""
    folder = written / "ckpt-sharded"
    files = sorted(file.name for file in folder.glob("*.bin"))
    assert files == shard_names("pytorch_model", "bin", len(files)) and len(files) > 2
    held = {file: pickled(folder / file) for file in files}
    state = {name: value for shard in held.values() for name, value in shard.items()}
    assert same(state, pickled(written / "ckpt" / "model.ckpt")["model_state_dict"])
    index = read_json(folder / "pytorch_model.bin.index.json")
    assert index["weight_map"] == {name: file for file in files for name in held[file]}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())


def test_int8(written):
    """int8 with one float32 scale a row for every matrix, norms as they were; within one step of the float tensor."""
    state = pickled(written / "ckpt" / "model.ckpt")["model_state_dict"]
    found = pickled(written / "ckpt-int8" / "model.ckpt")["model_state_dict"]
    matrices = [name for name, value in state.items() if value.ndim == 2 and not value.is_complex()]
    assert set(found) == set(state) | {f"{name}_scaler" for name in matrices}
    for name, value in state.items():
        if name not in matrices:
            assert torch.equal(found[name], value)
            continue
        scaler = found[f"{name}_scaler"]
        assert found[name].dtype == torch.int8 and scaler.dtype == torch.float32 and scaler.shape == value.shape[:1]
        assert ((found[name] * scaler[:, None] - value.float()).abs() <= scaler[:, None]).all()
        assert (found[name].abs().amax(1) == 127).all()


@pytest.mark.parametrize("layout", rc.FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_seed_same_bytes(tmp_path, layout, dtype):
    """Every file is the same for the same seed, the tensors are others for another; the dtype is the one asked for."""
    config = small_config(num_layers=2, is_global=layer_pattern(2), vocab_size=4100)
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1)):
        write(folder, layout, config, dtype=dtype, seed=seed)
    first, again, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert first == again and first.keys() == other.keys()
    differ = {name for name in first if first[name] != other[name]}
    assert differ == {name for name in first if name.endswith((".safetensors", ".ckpt", ".bin"))}
    planned = sum(tensor.nbytes for tensor in rc.planned_tensors(config, layout, dtype))
    assert planned < sum(len(first[name]) for name in differ) < planned + 40_000
    stored = "float32" if layout == "ckpt-int8" else str(dtype).removeprefix("torch.")
    assert inspect(folders[0], config=config).stored_dtype == stored


@pytest.mark.parametrize("layout", HUGGING_FACE)
def test_transformers_loads_it(written, layout):
    """No text tensor missing, none unexpected, and the numbers in their places."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options = {"output_loading_info": True, "dtype": torch.float32}
    if layout == "hf":
        hf, info = transformers.Gemma3ForCausalLM.from_pretrained(written / layout, **options)
        text = hf.model
    else:
        vision = dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        config = transformers.Gemma3Config.from_pretrained(written / layout, vision_config=vision)
        hf, info = transformers.Gemma3ForConditionalGeneration.from_pretrained(
            written / layout, config=config, **options
        )
        text = hf.model.language_model
    assert [name for name in info["missing_keys"] if "vision" not in name and "projector" not in name] == []
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = {name.removeprefix("model."): value.float() for name, value in reference().items()}
    assert same({name: value.detach() for name, value in text.named_parameters()}, expected)
    ids = np.random.default_rng(0).integers(3, 4000, (1, 50))
    with torch.no_grad():
        theirs = hf(torch.from_numpy(ids)).logits
    assert relative(tpa_ref.load(written / layout)(ids), theirs) < 1e-4


# ---- the tokenizer ----


def test_synthetic_tokenizer_encodes_as_before():
    """As many pieces as asked for, the special ids where they were, and every text to the same ids and back."""
    small = sentencepiece.SentencePieceProcessor(model_proto=PROTO)
    large = sentencepiece.SentencePieceProcessor(model_proto=rc.synthetic_tokenizer(PROTO, 262_144))
    assert (small.vocab_size(), large.vocab_size()) == (4096, 262_144)
    texts = [
        "The return value is a list of 12345 numbers.",
        "words word4200 <word 4200> <word4096> 123456\n\n  indented\ttext",
        "<start_of_turn>user\nÜber 東京 \U0001f600<end_of_turn>\n",
        (ROOT / "assets" / "tiny-gemma3" / "evaluation.txt").read_text(encoding="utf-8")[:20_000],
    ]
    for text in texts:
        assert large.encode(text) == small.encode(text)
        assert large.decode(large.encode(text)) == text
    assert all(large.id_to_piece(token) == small.id_to_piece(token) for token in range(4096))
    assert large.decode([4096, 262_143]) == " <word 4096> <word 262143>"
    assert large.get_score(4096) < min(small.get_score(token) for token in range(4096))
    assert rc.synthetic_tokenizer(PROTO, 4096) == PROTO
    with pytest.raises(TPAError, match="4095 pieces are fewer than the 4096"):
        rc.synthetic_tokenizer(PROTO, 4095)


# ---- the command ----


def call(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of the script in this process."""
    monkeypatch.setattr(sys, "argv", ["random_checkpoint.py", *map(str, arguments)])
    code = 0
    try:
        rc.cli.run(rc.main)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command(tmp_path):
    """The tiny model as a user writes it: one line at the end, a folder that loads, nothing left beside it."""
    command = [sys.executable, str(ROOT / "scripts" / "random_checkpoint.py"), "--variant", "tiny", "--format", "ckpt"]
    done = subprocess.run([*command, "--out", "model"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert re.fullmatch(r"tiny as ckpt: 0\.02 GB in model, \d+ s\n", done.stdout)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == PROTO
    assert tpa_ref.load(tmp_path / "model").config == GemmaConfig.tiny()


@pytest.mark.parametrize("layout", ["hf-multimodal-old", "hf-multimodal"])
def test_command_with_an_image_tower(monkeypatch, capsys, tmp_path, layout):
    """The tiny model with a small tower: it loads with it, by `transformers` too, and reads an image."""
    transformers = pytest.importorskip("transformers")
    options = ["--variant", "tiny", "--format", layout, "--vision", "--dtype", "float32", "--out", tmp_path / "model"]
    code, _, error = call(monkeypatch, capsys, *options)
    assert code == 0, error
    model = tpa_ref.load(tmp_path / "model")
    assert replace(model.config, vision=None) == GemmaConfig.tiny() and model.config.vision == rc.TINY_VISION
    ids = model.tokenizer.encode("<start_of_image>What is this?", vision=rc.TINY_VISION)
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 224, 224)).astype(np.float32)
    hf = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        theirs = hf(tokens, pixel_values=torch.tensor(pixels), token_type_ids=(tokens == 4096).int()).logits
    assert relative(model([ids], images=pixels), theirs) < 1e-4


WRONG = {
    "taken": (["--out", "taken"], "taken exists"),
    "no folder": (["--out", "nowhere/model"], "nowhere"),
    "spectra": (["--out", "model", "--spectra"], "only those of 1b are published, got --variant tiny"),
    "shard size": (["--out", "model", "--shard-gb", "0"], "--shard-gb must be > 0, got 0.0"),
    "format": (["--out", "model", "--format", "gguf"], "gguf"),
    "nameless": ([], "--out"),
    "vision in a text format": (["--out", "model", "--vision"], "tiny as hf is not a model that reads images"),
    "name too long": (["--out", "x" * 300], "File name too long"),
}


@pytest.mark.parametrize("arguments, words", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line(monkeypatch, capsys, tmp_path, arguments, words):
    """Exit code 2, one line on stderr, and nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    code, out, error = call(monkeypatch, capsys, "--variant", "tiny", "--format", "hf", *arguments)
    assert code == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1, error
    assert words in error
    assert [file.name for file in tmp_path.iterdir()] == ["taken"] and not any((tmp_path / "taken").iterdir())


def test_nothing_is_left_of_an_interrupted_run(monkeypatch, capsys, tmp_path):
    """A failure midway removes what was written under the temporary name."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rc, "synthetic_tokenizer", fail)
    options = ["--variant", "tiny", "--format", "hf", "--shard-gb", "0.005", "--out", tmp_path / "model"]
    code, _, error = call(monkeypatch, capsys, *options)
    assert code == 2 and "No space left on device" in error and not list(tmp_path.iterdir())
