"""Random checkpoints: every format holds the same model under its own names, and loads like a downloaded one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import sentencepiece  # noqa: E402
from conftest import relative  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import random_checkpoint as rc  # noqa: E402
import tpa_ref  # noqa: E402
from tpa_ref import GemmaConfig, TPAError  # noqa: E402
from tpa_ref.config import layer_pattern  # noqa: E402
from tpa_ref.weights import hf_names, to_named  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PROTO = (ROOT / "assets" / "tiny-gemma3" / "tokenizer.model").read_bytes()
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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of the small model by format; hf and ckpt-sharded are cut into shards of 100 kB."""
    folder = tmp_path_factory.mktemp("written")
    for layout in rc.FORMATS:
        shard_bytes = 1e5 if layout in ("hf", "ckpt-sharded") else 4e9
        rc.write_checkpoint(folder / layout, small_config(), layout, PROTO, shard_bytes=shard_bytes)
    return folder


def reference(seed=0, dtype=torch.bfloat16, ranks=None, config=None):
    """All weights by their names in `hf_names`."""
    config = config or small_config()
    return {name: rc.random_tensor(config, name, dtype, seed, ranks) for name in hf_names(config)}


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


def test_more_rows_keep_the_first_ones():
    """262,208 and 262,144 embedding rows are the same model: whole blocks of rows do not depend on what follows."""
    narrow = dict(hidden_size=4, head_dim=2, query_pre_attn_scalar=2)
    name, rows = "model.embed_tokens.weight", 2 * rc.BLOCK_ROWS
    fewer, more = (
        rc.random_tensor(small_config(vocab_size=count, **narrow), name, torch.bfloat16, 0)
        for count in (rows, rows + 7)
    )
    assert torch.equal(fewer, more[:rows]) and not torch.equal(fewer[: rc.BLOCK_ROWS], fewer[rc.BLOCK_ROWS :])


def test_logits_are_of_normal_size():
    """The bf16 model of the PyTorch backend, and the reference: logits around 1, all finite."""
    import tpa_torch
    from tpa_ref.weights import from_named

    config = small_config(hidden_size=128, num_layers=12, is_global=layer_pattern(12))
    named = reference(config=config)
    ids = np.random.default_rng(0).integers(0, ROWS, (1, 40))
    logits = tpa_torch.Model(config, from_named(named, config))(ids).float()
    assert torch.isfinite(logits).all() and 0.5 < logits.std() < 2 and logits.abs().max() < 30


@pytest.mark.parametrize("ranks", [(7, 10, 13), (3, 5, 9), (12, 14, 15)])
def test_spectra_have_the_ranks_asked_for(ranks):
    """The ranks that hold 90, 95 and 98 % of the energy, and the energy of a white matrix, after rounding to bf16."""
    config = small_config()
    wanted = {(layer, letter): ranks for layer in range(6) for letter in "qkv"}
    found, white = reference(ranks=wanted), reference()
    for name, value in found.items():
        if rc.projection(name) is None:
            assert torch.equal(value, white[name])
            continue
        assert measured_ranks(value) == ranks, name
        assert value.float().square().mean() ** 0.5 == pytest.approx(rc.MATRIX_GAIN * config.hidden_size**-0.5, 0.01)


def measured_ranks(matrix):
    energy = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    return tuple(int(np.searchsorted(np.cumsum(energy) / energy.sum(), share)) + 1 for share in rc.SHARES)


def test_spectra_of_the_real_1b():
    """The shipped table covers every layer, and matrices of full size have its ranks."""
    ranks, config = rc.read_ranks(), GemmaConfig.gemma3_1b()
    assert set(ranks) == {(layer, letter) for layer in range(26) for letter in "qkv"}
    assert ranks[5, "q"] == (271, 375, 511) and ranks[25, "v"] == (205, 225, 240)
    for layer, letter in ((5, "q"), (0, "k"), (1, "v"), (17, "k")):
        name = f"model.layers.{layer}.self_attn.{letter}_proj.weight"
        assert measured_ranks(rc.random_tensor(config, name, torch.bfloat16, 0, ranks)) == ranks[layer, letter]
    for (_, letter), wanted in ranks.items():  # all others by arithmetic
        s = rc.singular_values(wanted, 1024 if letter == "q" else 256, energy=3.0)
        assert measured_ranks(torch.diag(torch.from_numpy(s[:256]))) == wanted or letter == "q"
        assert (np.diff(s) <= 0).all() and (s**2).sum() == pytest.approx(3.0)


# ---- the formats ----


def test_hf_names_shapes_and_shards(written):
    """What the shards hold is `hf_names`, no more, and the index says where and how many bytes."""
    folder = written / "hf"
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == rc.shard_names("model", "safetensors", len(files)) and len(files) > 2
    held = {file: load_file(folder / file) for file in files}
    assert same({name: value for file in held.values() for name, value in file.items()}, reference())
    index = read_json(folder / "model.safetensors.index.json")
    assert index["weight_map"] == {name: file for file in files for name in held[file]}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in reference().values())
    largest = max((folder / file).stat().st_size for file in files[1:])
    assert largest < 1e5 + 5000 and len(held[files[0]]) == 1  # the embedding alone is larger than a shard
    assert GemmaConfig.from_hf(folder / "config.json") == small_config()


@pytest.mark.parametrize("layout", rc.FORMATS)
def test_every_format_loads_as_the_same_model(written, layout):
    """Names, fused rows and scales are undone by the loader; int8 is within half a step of the largest weight."""
    folder = written / layout
    model = tpa_ref.load(folder, config=None if layout in rc.HUGGING_FACE else small_config())
    assert model.config == small_config() and model.tokenizer.vocab_size == ROWS
    expected = reference()
    for name, value in to_named(model.weights, model.config).items():
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
    old, new = {"rope_scaling", "sliding_window_pattern"}, {"layer_types", "rope_parameters"}
    assert (old if layout.endswith("old") else new) - {"sliding_window_pattern"} <= set(text)
    assert not (new if layout.endswith("old") else old) & set(text)
    assert GemmaConfig.from_hf(content) == small_config()


def test_the_old_config_of_4b_is_the_published_one():
    """Nothing but what differs from the class defaults of `transformers`."""
    config = rc.config_of_format(GemmaConfig.gemma3_4b(), "hf-multimodal-old")
    content = rc.config_json(config, "hf-multimodal-old", "bfloat16")
    assert content["text_config"] == {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }


@pytest.mark.parametrize("layout", ["hf-multimodal-old", "hf-multimodal"])
@pytest.mark.parametrize("variant", ["270m", "1b", "4b", "12b", "27b"])
def test_multimodal_config_of_every_size(layout, variant):
    """Read back it is the same model; the sizes that were published with vision have 64 rows more."""
    config = rc.config_of_format(GemmaConfig.of_variant(variant), layout)
    assert config.vocab_size == (262_208 if variant in ("4b", "12b", "27b") else 262_144)
    assert GemmaConfig.from_hf(rc.config_json(config, layout, "bfloat16")) == config


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
        assert relative(table.abs(), torch.ones(256, d // 2)) < 1e-6
    assert state["global_freqs_cis"][8, 0].angle() == pytest.approx(1.0)  # scaled by 8
    assert "text_token_embedder.weight" in rc.stored_names(replace(config, variant="4b"), "ckpt")


def test_ckpt_shards(written):
    """Bare dicts whose union is the single file's state, and an index of them all."""
    folder = written / "ckpt-sharded"
    files = sorted(file.name for file in folder.glob("*.bin"))
    assert files == rc.shard_names("pytorch_model", "bin", len(files)) and len(files) > 2
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
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_are_foretold(tmp_path, layout, dtype):
    """What is asked of the disk before the work is what the tensors take up; same seed, same bytes, other seed other."""
    config = small_config(num_layers=2, is_global=layer_pattern(2), variant="4b", vocab_size=4100)
    if layout in ("hf-multimodal-old", "hf-multimodal"):
        config = replace(config, variant="custom")  # 262,208 rows would be too many for a test
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        rc.write_checkpoint(tmp_path / folder, config, layout, PROTO, dtype, seed)
    contents = [
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        for folder in ("first", "again", "other")
    ]
    assert contents[0] == contents[1] and contents[0].keys() == contents[2].keys()
    assert {name for name in contents[0] if contents[0][name] != contents[2][name]} == {
        name for name in contents[0] if name.endswith((".safetensors", ".ckpt", ".bin"))
    }
    weights = sum(len(content) for name, content in contents[0].items() if name.endswith(("tensors", ".ckpt", ".bin")))
    foretold = sum(rc.stored_bytes(config, layout, rc.DTYPES[dtype]).values())
    assert foretold < weights < foretold + 40_000
    if layout in rc.HUGGING_FACE:
        content = read_json(tmp_path / "first" / "config.json")
        assert content.get("dtype", content.get("torch_dtype")) == dtype


@pytest.mark.parametrize("layout", rc.HUGGING_FACE)
def test_transformers_loads_it(written, layout):
    """No text tensor missing, none unexpected, and the numbers in their places."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options = {"output_loading_info": True, "dtype": torch.bfloat16}
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
    expected = {name.removeprefix("model."): value for name, value in reference().items()}
    assert same({name: value.detach() for name, value in text.named_parameters()}, expected)
    ids = np.random.default_rng(0).integers(3, 4000, (1, 50))
    with torch.no_grad():
        theirs = hf.float()(torch.from_numpy(ids)).logits
    assert relative(tpa_ref.load(written / layout)(ids), theirs) < 1e-4


# ---- the tokenizer ----


def test_synthetic_tokenizer_encodes_as_before():
    """As many pieces as asked for, the special ids where they were, and every text to the same ids and back."""
    small = sentencepiece.SentencePieceProcessor(model_proto=PROTO)
    large = sentencepiece.SentencePieceProcessor(model_proto=rc.synthetic_tokenizer(PROTO, 262_144))
    assert (small.vocab_size(), large.vocab_size()) == (4096, 262_144)
    texts = [
        "The return value is a list of 12345 numbers.",
        "words word004200 word 004096 word123456\n\n  indented\ttext",
        "<start_of_turn>user\nÜber 東京 \U0001f600<end_of_turn>\n",
        (ROOT / "assets" / "tiny-gemma3" / "evaluation.txt").read_text(encoding="utf-8")[:20_000],
    ]
    for text in texts:
        assert large.encode(text) == small.encode(text)
        assert large.decode(large.encode(text)) == text
    assert all(large.id_to_piece(token) == small.id_to_piece(token) for token in range(4096))
    assert large.decode([4096, 262_143]) == " word004096 word262143"
    assert large.get_score(4096) < min(small.get_score(token) for token in range(4096))
    assert rc.synthetic_tokenizer(PROTO, 4096) == PROTO
    with pytest.raises(TPAError, match="4096 pieces must be asked for, got 4095"):
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
    assert re.fullmatch(r"random Gemma 3 tiny \(ckpt\) written to model: 0\.02 GB in \d+\.\d s\n", done.stdout)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == PROTO
    assert tpa_ref.load(tmp_path / "model").config == GemmaConfig.tiny()


WRONG = {
    "taken": (["--out", "taken"], "taken exists"),
    "no folder": (["--out", "nowhere/model"], "nowhere"),
    "spectra": (["--out", "model", "--spectra"], "--spectra needs --variant 1b"),
    "shard size": (["--out", "model", "--shard-gb", "0"], "--shard-gb must be > 0, got 0.0"),
    "format": (["--out", "model", "--format", "gguf"], "gguf"),
    "nameless": ([], "--out"),
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


def test_a_full_disk_is_seen_before_the_work(monkeypatch, capsys, tmp_path):
    """Both sizes are named."""
    monkeypatch.setattr(rc.shutil, "disk_usage", lambda _: rc.shutil._ntuple_diskusage(9, 8, 10**9))
    code, _, error = call(monkeypatch, capsys, "--variant", "27b", "--format", "hf", "--out", tmp_path / "model")
    assert code == 2 and "54.0 GB" in error and "1.0 GB free" in error and error.count("\n") == 1


def test_nothing_is_left_of_an_interrupted_run(monkeypatch, capsys, tmp_path):
    """A failure midway removes what was written under the temporary name."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rc, "write_index", fail)
    options = ["--variant", "tiny", "--format", "hf", "--shard-gb", "0.005", "--out", tmp_path / "model"]
    code, _, error = call(monkeypatch, capsys, *options)
    assert code == 2 and "No space left on device" in error and not list(tmp_path.iterdir())
