"""Every format gives the model that wrote it: gemma_pytorch's files by hand, the others by `transformers`."""

from __future__ import annotations

import json
from dataclasses import replace

import helpers
import numpy as np
import pytest
from helpers import TOLERANCE, refused, relative, tensors, to_numpy, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpa_ref import GemmaConfig, TPAError
from tpa_ref.files.names import our_name

torch = pytest.importorskip("torch")
IDS = helpers.tokens(40, batch=2, seed=3)


def gemma_pytorch(config, embedder="embedder", seed=0):
    """The tensors of `helpers.tensors` as google/gemma_pytorch names, fuses and accompanies them."""
    named = {name: torch.from_numpy(value) for name, value in tensors(config, seed).items()}
    state = {f"{embedder}.weight": named.pop("model.embed_tokens.weight")}
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}.self_attn"
        fused = [named.pop(f"{at}.{part}_proj.weight") for part in "qkv"]
        state[f"{at}.qkv_proj.weight"] = torch.cat(fused)
        for part, name in (("q", "query"), ("k", "key")):
            state[f"{at}.{name}_norm.weight"] = named.pop(f"{at}.{part}_norm.weight")
    buffers = {f"{kind}_freqs_cis": torch.ones(9, 8, dtype=torch.complex64) for kind in ("local", "global")}
    return state | named | buffers


def quantized(state):
    """gemma_pytorch's int8 variant: one scale a row for every matrix."""
    made = {}
    for name, value in state.items():
        if value.ndim != 2 or value.is_complex():
            made[name] = value
            continue
        scale = value.abs().amax(1) / 127
        made[name] = (value / scale[:, None]).round().to(torch.int8)
        made[f"{name}_scaler"] = scale
    return made


def logits(backend, path, config, **more):
    return helpers.logits(backend.load(path, config=config, **more), IDS)


def expected(backend, config, seed=0):
    return helpers.logits(helpers.model(backend, config, seed=seed), IDS)


# ---- google/gemma_pytorch ----


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("embedder", ["embedder", "text_token_embedder"])
@pytest.mark.parametrize("bare", [False, True])
def test_ckpt(backend, tmp_path, embedder, g, bare):
    """A .ckpt, the dict itself or under model_state_dict, has the logits of its weights; buffers are ignored."""
    config = helpers.config(num_kv_heads=g)
    state = gemma_pytorch(config, embedder)
    torch.save(state if bare else {"model_state_dict": state}, tmp_path / "model.ckpt")
    for path in (tmp_path / "model.ckpt", tmp_path):
        assert relative(logits(backend, path, config), expected(backend, config)) < TOLERANCE["float32"]


def test_ckpt_rows_are_q_then_k_then_v(backend, tmp_path):
    """The seeded mistake: K and V exchanged in the fused rows is another model."""
    config = helpers.config()
    state = gemma_pytorch(config)
    h, g, d = config.num_heads, config.num_kv_heads, config.head_dim
    for name in [name for name in state if "qkv" in name]:
        q, k, v = state[name].split([h * d, g * d, g * d])
        state[name] = torch.cat([q, v, k])
    torch.save({"model_state_dict": state}, tmp_path / "model.ckpt")
    assert relative(logits(backend, tmp_path, config), expected(backend, config)) > 0.01


@pytest.mark.parametrize("zipped", [True, False])
def test_bfloat16_ckpt(backend, tmp_path, zipped):
    """bf16 weights, in a file of today or of torch before 1.6, which cannot be mapped."""
    config = helpers.config()
    state = {name: value if value.is_complex() else value.bfloat16() for name, value in gemma_pytorch(config).items()}
    torch.save({"model_state_dict": state}, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    write_folder(tmp_path / "hf", config, helpers.bfloat16(tensors(config)))
    model = backend.load(tmp_path / "model.ckpt", config=config)
    assert model.stored_dtype == "bfloat16"
    same = relative(helpers.logits(model, IDS), helpers.logits(backend.load(tmp_path / "hf"), IDS))
    assert same < TOLERANCE["float32"]


def sharded(folder, state, shards=3):
    """A folder of bare dicts and the index that names them."""
    folder.mkdir()
    names = [f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin" for number in range(shards)]
    for number, name in enumerate(names):
        torch.save(dict(list(state.items())[number::shards]), folder / name)
    weight_map = {key: names[number % shards] for number, key in enumerate(state)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_sharded_folder_of_gemma_pytorch(backend, tmp_path):
    """Three shards and an index."""
    config = helpers.config()
    folder = sharded(tmp_path / "model", gemma_pytorch(config, "text_token_embedder"))
    assert relative(logits(backend, folder, config), expected(backend, config)) < TOLERANCE["float32"]
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    refused(lambda: backend.load(folder, config=config), "pytorch_model-00002-of-00003.bin", "index")


def test_one_key_in_two_pickled_shards(backend, tmp_path):
    """Which of the two is meant nobody can know."""
    config = helpers.config()
    folder = sharded(tmp_path / "model", gemma_pytorch(config))
    file = folder / "pytorch_model-00003-of-00003.bin"
    torch.save(torch.load(file, weights_only=True) | {"model.norm.weight": torch.ones(config.hidden_size)}, file)
    refused(lambda: backend.load(folder, config=config), "model.norm.weight", "twice")


@pytest.mark.parametrize("as_shards", [False, True])
def test_int8_with_scales(backend, tmp_path, as_shards):
    """w = weight * weight_scaler[:, None], exactly; within rounding of the model it came from."""
    config = helpers.config()
    state = quantized(gemma_pytorch(config))
    path = tmp_path / "model.ckpt"
    if as_shards:
        path = sharded(tmp_path / "model", state)
    else:
        torch.save({"model_state_dict": state}, path)
    back = {
        name: value.float() * state[f"{name}_scaler"][:, None] if f"{name}_scaler" in state else value
        for name, value in state.items()
        if not name.endswith("_scaler")
    }
    torch.save({"model_state_dict": back}, tmp_path / "back.ckpt")
    ours = logits(backend, path, config)
    assert relative(ours, logits(backend, tmp_path / "back.ckpt", config)) < TOLERANCE["float32"]
    assert 1e-4 < relative(ours, expected(backend, config)) < 0.3


def test_int8_with_scales_held_so(tmp_path):
    """The codes as they are, a row's scale for every 32, Q, K and V taken apart; too fine a scale is rounded."""
    tpa_torch = pytest.importorskip("tpa_torch")
    config = helpers.config(hidden_size=64)
    state = quantized(gemma_pytorch(config))
    for name in [name for name in state if name.endswith("_scaler")]:
        state[name] = state[name].half().float()
    fine = "model.layers.1.mlp.up_proj.weight_scaler"
    state[fine] = state[fine] * 1.0001
    torch.save({"model_state_dict": state}, tmp_path / "model.ckpt")
    model, held = (tpa_torch.load(tmp_path / "model.ckpt", config=config, **how) for how in ({}, {"weights": "int8"}))
    for layer, (ours, exact) in enumerate(zip(held.weights.layers, model.weights.layers, strict=True)):
        for name in ("WQ_hdm", "WV_gem", "WO_mhe", "W_up_fm"):
            same = torch.equal(getattr(ours, name).wide(), getattr(exact, name))
            assert same != (layer == 1 and name == "W_up_fm"), name
    assert torch.equal(held.weights.embed_vm.wide(), model.weights.embed_vm)


def test_int8_without_its_scales_is_refused(backend, tmp_path):
    """Scales of another length, or none at all."""
    config = helpers.config()
    state = quantized(gemma_pytorch(config))
    name = "model.layers.2.mlp.up_proj.weight"
    torch.save(state | {f"{name}_scaler": torch.ones(3)}, tmp_path / "short.ckpt")
    refused(lambda: backend.load(tmp_path / "short.ckpt", config=config), name, "[40, 48]", "[3]")
    torch.save({key: value for key, value in state.items() if key != f"{name}_scaler"}, tmp_path / "none.ckpt")
    refused(lambda: backend.load(tmp_path / "none.ckpt", config=config), "int8")


def test_all_that_is_wrong_with_a_ckpt_is_named_together(backend, tmp_path):
    """Missing, unexpected and misshapen tensors in one line, the fused one by its name in the file."""
    config = helpers.config()
    state = gemma_pytorch(config)
    state["model.layers.1.self_attn.qkv_proj.weight"] = torch.ones(7, 48)
    state["model.extra.weight"] = state.pop("model.norm.weight")
    torch.save({"model_state_dict": state}, tmp_path / "model.ckpt")
    words = ["1.self_attn.qkv_proj.weight must be [128, 48], got [7, 48]", "missing model.norm.weight"]
    refused(lambda: backend.load(tmp_path, config=config), *words, "unexpected model.extra.weight")


def test_vision_tensors_are_left_out(backend, tmp_path):
    """An image tower that the config does not know of does not disturb the text model."""
    config = helpers.config()
    vision = {
        "siglip_vision_model.encoder_blocks.0.mlp.fc1.weight": torch.ones(2, 2),
        "mm_soft_embedding_norm.weight": torch.ones(4),
        "mm_input_projection.weight": torch.ones(48, 4),
    }
    torch.save({"model_state_dict": gemma_pytorch(config, "text_token_embedder") | vision}, tmp_path / "model.ckpt")
    assert relative(logits(backend, tmp_path, config), expected(backend, config)) < TOLERANCE["float32"]


@pytest.mark.parametrize("content", [[1, 2], {"model_state_dict": 3}, {"a": "text"}, {"a": torch.ones(2).to_sparse()}])
def test_a_pickle_of_something_else(backend, tmp_path, content):
    """Plain values are no model, and say so in one line."""
    torch.save(content, tmp_path / "model.ckpt")
    refused(lambda: backend.load(tmp_path / "model.ckpt", config=helpers.config()), "model.ckpt")


def test_a_ckpt_that_is_no_published_size_needs_a_config(backend, tmp_path):
    """The size is guessed from the shapes; a variant that contradicts them is explained with both sizes."""
    torch.save({"model_state_dict": gemma_pytorch(helpers.config())}, tmp_path / "model.ckpt")
    refused(lambda: backend.load(tmp_path), "7 layers of width 48", "config=")
    refused(lambda: backend.load(tmp_path, variant="4b"), "34 layers of width 2560", "7 of 48")


def test_two_ckpt_files_in_a_folder(backend, tmp_path):
    """Which one is meant must be said."""
    for name in ("a.ckpt", "b.ckpt"):
        torch.save({"model_state_dict": gemma_pytorch(helpers.config())}, tmp_path / name)
    refused(lambda: backend.load(tmp_path, config=helpers.config()), "2 .ckpt files", "a.ckpt")


@pytest.mark.parametrize("variant", ["270m", "1b", "4b", "12b", "27b"])
def test_the_variant_is_guessed_from_the_shapes(variant):
    """Layers and width name a published size; 262,144 and 262,208 embedding rows are both its own."""
    from tpa_ref.files.formats import Entry
    from tpa_ref.files.found import _choose_config
    from tpa_ref.gemma.weights import hf_names

    config = GemmaConfig.of_variant(variant)
    entries = {name: Entry(shape, "bfloat16") for name, shape in hf_names(config).items()}
    for named in (None, variant):
        assert _choose_config("model.ckpt", named, None, entries) == config
    entries["model.embed_tokens.weight"] = Entry((262_208, config.hidden_size), "bfloat16")
    assert _choose_config("model.ckpt", None, None, entries) == replace(config, vocab_size=262_208)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wounds=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=30), at_end=st.booleans())
def test_damaged_ckpt(backend, tmp_path, wounds, at_end):
    """Random bytes of a .ckpt, where its names and its directory are: a TPAError of one line, or a model."""
    config, good, path = helpers.config(num_layers=1), tmp_path / "good.ckpt", tmp_path / "model.ckpt"
    if not good.exists():
        torch.save({"model_state_dict": gemma_pytorch(config)}, good)
    content = bytearray(good.read_bytes())
    size = 4000
    for where, value in wounds:
        content[(len(content) - size if at_end else 0) + int(where * (size - 1))] = value
    path.write_bytes(content)
    try:
        assert backend.load(path, config=config).config == config
    except TPAError as problem:
        assert ("\n" not in str(problem) and str(path) in str(problem)) or "model." in str(problem)


# ---- Hugging Face, all three prefixes, written by transformers ----


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A tiny `Gemma3ForConditionalGeneration` and the logits of its text part."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = dict(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=11, query_pre_attn_scalar=21, max_position_embeddings=512,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299, image_token_id=299
    )
    hf = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            weight.normal_(0, 0.3) if "norm" in name else weight.mul_(4)
    folder = tmp_path_factory.mktemp("multimodal")
    hf.save_pretrained(folder)
    ids = np.random.default_rng(0).integers(3, 298, (2, 60))
    with torch.no_grad():
        return folder, ids, to_numpy(hf(torch.tensor(ids)).logits)


def renamed(folder, target, rename):
    """A copy of a safetensors folder with other tensor names."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    save_file({rename(key): value for key, value in load_file(folder / "model.safetensors").items()},
              target / "model.safetensors", {"format": "pt"})  # fmt: skip
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def core(key):
    """`layers...` of a text tensor, whatever prefix this version of transformers wrote."""
    ours = our_name(key)
    return None if ours is None or not ours.startswith("model.") else ours.removeprefix("model.")


@pytest.mark.parametrize("prefix", ["as written", "language_model.model.", "model.language_model.", "model."])
def test_prefixes_of_three_generations(backend, multimodal, tmp_path, prefix):
    """The text part of a multimodal checkpoint gives the logits of `transformers`, under every prefix there was."""
    folder, ids, theirs = multimodal
    if prefix != "as written":
        folder = renamed(folder, tmp_path / "m", lambda key: f"{prefix}{core(key)}" if core(key) else key)
    assert relative(backend.load(folder)(ids), theirs) < TOLERANCE["transformers"]


def test_a_pytorch_model_bin(backend, random_gemma, tmp_path):
    """What older versions of transformers saved."""
    gemma = random_gemma(2, 4, scaled=True)
    torch.save(gemma.hf.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((gemma.path / "config.json").read_text())
    assert relative(backend.load(tmp_path)(gemma.tokens_bq), gemma.logits_bqv) < TOLERANCE["transformers"]


def test_a_sparse_config_takes_the_class_defaults():
    """The published 4B config.json leaves most keys out; they come from the classes of `transformers`."""
    transformers = pytest.importorskip("transformers")
    sparse = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    ours = GemmaConfig.from_hf({"model_type": "gemma3", "text_config": sparse})
    theirs = transformers.Gemma3Config(text_config=dict(sparse)).get_text_config()
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.head_dim, ours.vocab_size) == (theirs.head_dim, theirs.vocab_size)
    assert (ours.max_positions, ours.rms_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.query_pre_attn_scalar == theirs.query_pre_attn_scalar
    assert [not flag for flag in ours.is_global] == [kind == "sliding_attention" for kind in theirs.layer_types]
    assert ours.variant == "4b"
