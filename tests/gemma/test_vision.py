"""Images: both backends compute what `transformers` computes, in every mode at full rank, in every layout of a text,
from every format of a checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import replace

import helpers
import numpy as np
import pytest
from helpers import KINDS, TOLERANCE, in_kind, refused, relative, to_numpy

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

import random_checkpoint as rc
import tpa_ref
import tpa_torch
from tpa_ref import GemmaConfig, TPAError
from tpa_ref.files.formats import Entry
from tpa_ref.files.found import _choose_config
from tpa_ref.gemma import generate
from tpa_ref.gemma.config import VisionConfig
from tpa_ref.gemma.weights import LayersOnDisk, hf_names, is_vision
from tpa_ref.trace import Trace, compare


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """(the model of `transformers`, its folder)."""
    return helpers.saved(tmp_path_factory.mktemp("seeing"))


LAYOUTS = {
    "one image in the middle": "9 i 14",
    "first, and then longer than the window": "i 40",
    "last": "20 i",
    "three with text between": "3 i 5 i 13 i 30",
    "side by side": "4 i i 8",
    "without start and end": "bare 9 bare bare 5",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_whole_text(backend, seeing, layout, kind):
    """Logits of a whole text with images, dense or in any mode at full rank."""
    hf, folder = seeing
    tokens_bq, images = np.array([helpers.text(layout)]), helpers.pixels(helpers.images_in(layout))
    model = in_kind(backend, backend.load(folder), kind)
    expected = helpers.hf_logits(hf, tokens_bq, images)
    assert relative(model(tokens_bq, images=images), expected) < TOLERANCE["transformers"]


def test_a_window_shorter_than_the_image(backend, tmp_path):
    """In a window layer a token of an image sees only as far back as the window, and all of its image ahead."""
    hf, folder = helpers.saved(tmp_path, text={"sliding_window": 3}, mm_tokens_per_image=16)
    vision = backend.load(folder).config.vision
    tokens_bq, images = np.array([helpers.text("7 i 9 i 3", tokens=16)]), helpers.pixels(2)
    assert (vision.tokens_per_image, vision.pool) == (16, 2)
    for kind in ("dense", "latent"):
        model = in_kind(backend, backend.load(folder), kind)
        expected = helpers.hf_logits(hf, tokens_bq, images)
        assert relative(model(tokens_bq, images=images), expected) < TOLERANCE["transformers"]
        cache = model.new_cache(1, 64)
        pieces = [
            to_numpy(model(tokens_bq[:, a:b], cache=cache, images=images[c:d]))
            for a, b, c, d in ((0, 30, 0, 1), (30, 56, 1, 2))
        ]
        assert relative(np.concatenate(pieces, 1), expected) < TOLERANCE["transformers"]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_then_token_by_token(backend, seeing, kind):
    """Chunks with and without images through the cache, then single tokens far past the window and the images."""
    hf, folder = seeing
    tokens_bq, images = np.array([helpers.text("3 i 5 i 13 i 30")]), helpers.pixels(3)
    model = in_kind(backend, backend.load(folder), kind)
    cache = model.new_cache(1, 80)
    pieces, start = [], 0
    for size, first, last in [(6 + 3, 0, 1), (5, 1, 1), (6 + 13 + 6, 1, 3), *[(1, 3, 3)] * 30]:
        shown = images[first:last] if last > first else None
        pieces.append(to_numpy(model(tokens_bq[:, start : start + size], cache=cache, images=shown)))
        start += size
    assert start == tokens_bq.shape[1]
    expected = helpers.hf_logits(hf, tokens_bq, images)
    assert relative(np.concatenate(pieces, 1), expected) < TOLERANCE["transformers"]


@pytest.mark.parametrize("kind", ["dense", "contextual", "latent"])
def test_a_batch_with_padding(backend, seeing, kind):
    """Rows with images in different places and of different lengths: each as if it were alone."""
    model = in_kind(backend, backend.load(seeing[1], dtype="float64"), kind)
    layouts, images = ["3 i 5 i 4", "21", "i 30", "2"], helpers.pixels(3)
    rows = [helpers.text(layout, seed) for seed, layout in enumerate(layouts)]
    tokens_bq, lengths_b = generate.padded(rows)
    tokens_bq[3, 2:9] = helpers.IMAGE  # padding may be anything
    together = to_numpy(model(tokens_bq, lengths_b=lengths_b, images=images))
    begun = 0
    for row, (ids, layout) in enumerate(zip(rows, layouts, strict=True)):
        count = helpers.images_in(layout)
        alone = model([ids], images=images[begun : begun + count] if count else None)
        assert relative(together[row : row + 1, : len(ids)], alone) < TOLERANCE["float64"], row
        begun += count


@pytest.mark.parametrize("size", [3, 5, 1000])
def test_prefill_cuts_no_image(backend, seeing, monkeypatch, size):
    """Prefill of a batch in chunks smaller than an image gives the logits behind each row's whole text."""
    model = backend.load(seeing[1], dtype="float64")
    monkeypatch.setattr(generate, "PREFILL_CHUNK", size)
    layouts, images = ["3 i 5 i 4", "21", "i 30"], helpers.pixels(3)
    rows = [helpers.text(layout, seed) for seed, layout in enumerate(layouts)]
    L_bv = generate.prefill(model, rows, model.new_cache(3, 64), images=images)
    for row, (ids, shown) in enumerate(zip(rows, (images[:2], None, images[2:]), strict=True)):
        assert relative(L_bv[row], model([ids], images=shown)[0, -1]) < TOLERANCE["float64"]


def test_chunks_are_as_long_as_allowed():
    """No chunk is longer than asked for unless an image is, and none could take in the next piece."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        layouts = [" ".join(rng.choice(["1", "2", "7", "bare"], 8)) for _ in range(rng.integers(1, 4))]
        tokens_bq, _ = generate.padded([helpers.text(layout) for layout in layouts])
        is_image_bq, size = tokens_bq == helpers.IMAGE, int(rng.integers(1, 12))
        made = generate.chunks(is_image_bq, size)
        assert [0, *[end for _, end in made]] == [*[start for start, _ in made], tokens_bq.shape[1]]
        uncut = [q for q in range(1, tokens_bq.shape[1]) if not (is_image_bq[:, q - 1] & is_image_bq[:, q]).any()]
        for start, end in made[:-1]:
            assert end in uncut
            assert end - start <= size or not [q for q in uncut if start < q < end]
            assert not [q for q in uncut if end < q <= start + size]


def test_greedy_generation(backend, seeing):
    """Every token after two images is the most likely one by `transformers`; a placeholder is never said."""
    hf, folder = seeing
    model, images = backend.load(folder), helpers.pixels(2)
    ids = helpers.text("3 i 5 i 4")
    said = list(generate.generate_tokens(model, ids, 12, images=images))
    whole = np.array([ids + said])
    assert helpers.hf_logits(hf, whole, images)[0, len(ids) - 1 : -1].argmax(-1).tolist() == said
    vision = replace(model.config.vision, image_token=said[0])
    model.config = replace(model.config, vision=vision)
    renamed = [said[0] if token == helpers.IMAGE else 5 if token == said[0] else token for token in ids]
    assert said[0] not in generate.generate_tokens(model, renamed, 12, images=images)


def test_every_stage_is_the_same_in_both_backends(seeing):
    """From the patches of each image to the logits, in float64."""
    tokens_bq, images = [helpers.text("3 i 5 i 4")], helpers.pixels(2).astype(np.float64)
    traces = []
    for backend in (tpa_ref, tpa_torch):
        traces.append(Trace())
        backend.load(seeing[1], dtype="float64")(tokens_bq, images=images, trace=traces[-1])
    names = list(traces[0].stages)
    assert names == list(traces[1].stages)
    tower = [f"vision.0.{name}" for name in ("patches_ipz", "layers.0_ipz", "layers.1_ipz", "pooled_itz", "tokens_itm")]
    assert names[:6] == [*tower, "vision.1.patches_ipz"]
    kept = [
        {name: np.where(to_numpy(x) < -1e37, 0, to_numpy(x)) for name, x in trace.stages.items()} for trace in traces
    ]
    assert compare(*kept, TOLERANCE["float64"], show=[].append) is None


def test_bfloat16(seeing):
    """A bf16 model takes pixels of any float, and a bf16 tensor; the logits are those of float32, roughly."""
    tokens_bq, images = [helpers.text("3 i 5 i 4")], helpers.pixels(2)
    expected = to_numpy(tpa_torch.load(seeing[1])(tokens_bq, images=images))
    model = tpa_torch.load(seeing[1], dtype="bfloat16")
    logits = [to_numpy(model(tokens_bq, images=x)) for x in (images, torch.tensor(images).bfloat16())]
    for found in logits:
        assert np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()) < 0.2


# ---- formats ----


def vision_config(**changes):
    """A small model for `random_checkpoint`, with an image tower as wide as nothing else."""
    fields = dict(
        vocab_size=300, hidden_size=40, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=56,
        sliding_window=9, query_pre_attn_scalar=10, max_positions=256, is_global=(False,) * 5 + (True,),
        rope_scale_global=8.0,
        vision=VisionConfig(32, 4, 3, 24, 2, 3, 36, 1e-6, 4, helpers.IMAGE, helpers.START, helpers.END),
    )  # fmt: skip
    return GemmaConfig(**fields | changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same random multimodal model in every format."""
    folder = tmp_path_factory.mktemp("written")
    for form in rc.FORMATS[1:]:
        limit = 100_000 if form == "ckpt-sharded" else 1 << 30
        rc.write_checkpoint(vision_config(), form, folder / form, limit, dtype=torch.float32)
    return folder


TOKENS, IMAGES = np.array([helpers.text("3 i 15 i 4")]), helpers.pixels(2)


@pytest.mark.parametrize("form", rc.FORMATS[1:])
def test_every_format_is_the_same_model(backend, written, form):
    """gemma_pytorch's layout, with its transposed projector, and both generations of Hugging Face's give equal logits;
    so does `transformers`. int8 rounds the text model and the projector.
    """
    import transformers

    config = vision_config() if form.startswith("ckpt") else None
    logits_bqv = to_numpy(backend.load(written / form, config=config)(TOKENS, images=IMAGES))
    hf = transformers.Gemma3ForConditionalGeneration.from_pretrained(written / "hf-multimodal", dtype=torch.float32)
    expected = helpers.hf_logits(hf.eval(), TOKENS, IMAGES)
    assert relative(logits_bqv, expected) < (0.1 if form == "ckpt-int8" else TOLERANCE["transformers"])
    blind = helpers.hf_logits(hf, TOKENS, helpers.pixels(2, seed=1))
    assert relative(blind, expected) > 0.2  # the images matter


def test_gemma_pytorchs_names(written):
    """The .ckpt has the names that google/gemma_pytorch gives its modules, and the projector as a Linear of [m, z]."""
    held = torch.load(written / "ckpt" / "model.ckpt", weights_only=True)["model_state_dict"]
    shapes = {name: list(value.shape) for name, value in held.items()}
    expected = {
        "siglip_vision_model.patch_embedding.weight": [24, 3, 4, 4],
        "siglip_vision_model.patch_embedding.bias": [24],
        "siglip_vision_model.position_embedding.weight": [64, 24],
        "siglip_vision_model.encoder_blocks.1.self_attn.o_proj.weight": [24, 24],
        "siglip_vision_model.encoder_blocks.0.layer_norm2.bias": [24],
        "siglip_vision_model.encoder_blocks.0.mlp.fc1.weight": [36, 24],
        "siglip_vision_model.final_norm.weight": [24],
        "mm_soft_embedding_norm.weight": [24],
        "mm_input_projection.weight": [40, 24],
    }
    assert expected.items() <= shapes.items()
    assert "text_token_embedder.weight" in shapes


@pytest.mark.parametrize("prefix", ["vision_tower.", "vision_tower.vision_model.", "model.vision_tower.vision_model."])
def test_every_prefix_of_the_image_tower(backend, written, tmp_path, prefix):
    """With and without `vision_model.`, a pooling head that Gemma does not use and numbers of positions aside."""
    held = {}
    for name, value in load_file(written / "hf-multimodal" / "model.safetensors").items():
        held[name.replace("model.vision_tower.", prefix)] = value
    held[f"{prefix}head.probe"], held[f"{prefix}embeddings.position_ids"] = torch.ones(1, 1, 24), torch.arange(64)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((written / "hf-multimodal" / "config.json").read_text())
    found, expected = (backend.load(folder)(TOKENS, images=IMAGES) for folder in (tmp_path, written / "hf-multimodal"))
    np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))


def changed(written, folder, change, config=None):
    """A copy of the multimodal folder with other tensors or another config."""
    held = load_file(written / "hf-multimodal-old" / "model.safetensors")
    change(held)
    folder.mkdir(exist_ok=True)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((written / "hf-multimodal-old" / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(content))
    return folder


PATCH = "vision_tower.vision_model.embeddings.patch_embedding.weight"


def test_all_that_is_wrong_with_an_image_tower_is_named(backend, written, tmp_path):
    """Missing, misshapen, unexpected and infinite tensors, like those of the text model."""

    def change(held):
        held[PATCH] = held[PATCH][:, :, :2].contiguous()
        del held["multi_modal_projector.mm_soft_emb_norm.weight"]
        held["vision_tower.vision_model.extra.weight"] = torch.ones(2)

    words = "missing multi_modal_projector.mm_soft_emb_norm.weight", f"{PATCH} must be [24, 3, 4, 4], got [24, 3, 2, 4]"
    refused(lambda: backend.load(changed(written, tmp_path, change)), *words, "unexpected vision_tower.vision_model.ex")
    infinite = changed(written, tmp_path, lambda held: held[PATCH].fill_(np.inf))
    refused(lambda: backend.load(infinite), PATCH, "finite")


def test_without_an_image_tower_the_text_model_remains(backend, written, tmp_path):
    """No tensor of the tower, or no word of it in the config: a text model, to which images cannot be given."""

    def drop(held):
        for name in [name for name in held if is_vision(name)]:
            del held[name]

    text = np.array([helpers.text("20")])
    expected = to_numpy(backend.load(written / "hf-multimodal-old")(text))
    for folder in (
        changed(written, tmp_path / "a", drop),
        changed(written, tmp_path / "b", lambda held: None, {"vision_config": None}),
    ):
        model = backend.load(folder)
        assert model.config.vision is None and model.weights.vision is None
        np.testing.assert_array_equal(to_numpy(model(text)), expected)
        refused(lambda model=model: model(text, images=IMAGES), "text only")
        refused(lambda model=model: generate.prefill(model, text, None, images=IMAGES), "text only")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"vision_config": [1]}, "vision_config"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act"),
        ({"vision_config": {"num_attention_heads": 7}}, "multiple of 7"),
        ({"vision_config": {"patch_size": 15}}, "image_size"),
        ({"vision_config": {"hidden_size": "wide"}}, "hidden_size"),
        ({"mm_tokens_per_image": 5}, "tokens"),
        ({"mm_tokens_per_image": 9}, "patches of a side"),
        ({"image_token_index": -1}, "image_token"),
    ],
    ids=str,
)
def test_a_wrong_vision_config_is_named(written, wrong, words):
    """One line that says which value of the config cannot be."""
    content = json.loads((written / "hf-multimodal" / "config.json").read_text())
    if isinstance(wrong.get("vision_config"), dict):
        wrong = {"vision_config": content["vision_config"] | wrong["vision_config"]}
    refused(lambda: GemmaConfig.from_hf(content | wrong), words)


def test_a_published_ckpt_has_the_published_tower():
    """A multimodal .ckpt of a published size, without any config: the default image tower is what it must hold."""
    entries = {
        "model.layers.33.self_attn.q_norm.weight": Entry((256,), "bfloat16"),
        "model.embed_tokens.weight": Entry((262_144, 2560), "bfloat16"),
        PATCH: Entry((1152, 3, 14, 14), "bfloat16"),
    }
    config = _choose_config("model.ckpt", None, None, entries)
    assert config == replace(GemmaConfig.gemma3_4b(), vision=VisionConfig())
    count = sum(int(np.prod(shape)) for name, shape in hf_names(config).items() if name.startswith("vision_tower"))
    assert round(count / 1e6) == 417  # as the Gemma 3 report has it
    del entries[PATCH]
    assert _choose_config("model.ckpt", None, None, entries) == GemmaConfig.gemma3_4b()


# ---- saved and converted ----


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pt"])
@pytest.mark.parametrize("mode", ["dense", "latent"])
def test_a_saved_model_keeps_its_image_tower(backend, written, tmp_path, suffix, mode):
    """In all three forms, dense and converted: equal config, equal logits."""
    model = in_kind(backend, backend.load(written / "ckpt", config=vision_config()), mode, kv_dtype="int8")
    again = backend.load(backend.save(model, tmp_path / f"saved{suffix}"))
    assert again.config == model.config and again.config.vision is not None
    logits = [to_numpy(m(TOKENS, images=IMAGES)) for m in (model, again)]
    np.testing.assert_array_equal(*logits)


def test_saved_in_shards(backend, written, tmp_path, monkeypatch):
    """A large folder has a file for the image tower beside those of the layers."""
    from tpa_ref.files import checkpoint

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1000)
    model = backend.load(written / "ckpt", config=vision_config())
    folder = backend.save(model, tmp_path / "saved")
    assert len(list(folder.glob("model-*-of-00008.safetensors"))) == 8
    np.testing.assert_array_equal(*(to_numpy(m(TOKENS, images=IMAGES)) for m in (model, backend.load(folder))))


def test_from_disk_to_disk_and_back(backend, written, tmp_path):
    """A conversion layer by layer keeps the image tower, goes on after an interruption, and exports to what
    `transformers` reads.
    """
    import transformers

    choice = backend.TPAConfig(mode="fixed-b", k_rank=4, v_rank=4)
    source = written / "hf-multimodal"

    def interrupted(layers):
        yield from list(layers)[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend.convert_checkpoint(source, tmp_path / "tpa", choice, progress=interrupted)
    again = backend.load(backend.convert_checkpoint(source, tmp_path / "tpa", choice))
    model = backend.convert(backend.load(source), choice)
    assert relative(again(TOKENS, images=IMAGES), model(TOKENS, images=IMAGES)) < TOLERANCE["float32"]
    dense = backend.load(source)(TOKENS, images=IMAGES)
    assert relative(again(TOKENS, images=IMAGES), dense) > 1e-3  # it is a truncation

    exported = backend.export(tmp_path / "tpa", tmp_path / "dense")
    assert len(list(exported.glob("*.safetensors"))) == 8
    np.testing.assert_array_equal(to_numpy(backend.load(exported)(TOKENS, images=IMAGES)), to_numpy(dense))
    hf, info = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        exported, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative(dense, helpers.hf_logits(hf.eval(), TOKENS, IMAGES)) < TOLERANCE["transformers"]


def test_on_disk_no_more_than_a_block_of_the_tower_is_held(backend, written):
    """With blocks read when they are needed, images give the same logits."""
    far, near = (backend.load(written / "hf-multimodal", on_disk=on_disk) for on_disk in (True, False))
    assert isinstance(far.weights.vision.layers, LayersOnDisk) and len(far.weights.vision.layers) == 2
    np.testing.assert_array_equal(*(to_numpy(model(TOKENS, images=IMAGES)) for model in (far, near)))


# ---- bad input ----


def test_images_and_placeholders_must_match(backend, seeing):
    """More images than placeholders and the reverse, half an image, one in two pieces: one line with both numbers."""
    model = backend.load(seeing[1])
    two = [helpers.text("3 i 5 i 4")]
    refused(lambda: model(two, images=helpers.pixels(3)), "3 images", "3 x 4", "got 8")
    refused(lambda: model(two, images=helpers.pixels(1)), "1 images", "got 8")
    refused(lambda: model(two), "0 images", "got 8")
    refused(lambda: model([helpers.text("9")], images=helpers.pixels(1)), "1 images", "got 0")
    refused(lambda: model([two[0][:6]], images=helpers.pixels(1)), "1 x 4", "got 2")
    split = [5, *[helpers.IMAGE] * 3, 6, helpers.IMAGE]
    refused(lambda: model([split], images=helpers.pixels(1)), "must stand together", "got 3 at 1")
    refused(lambda: list(generate.generate_tokens(model, two[0], 2, images=helpers.pixels(3))), "3 images", "got 8")
    with pytest.raises(TPAError, match="0 \\.\\.\\. 299"):  # another id outside of the vocabulary is no placeholder
        model([[5, helpers.IMAGE + 1]])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 3, 31, 32), np.float32), "[1, 3, 31, 32]"),
        (np.zeros((3, 32, 32), np.float32), "[3, 32, 32]"),
        (np.zeros((1, 32, 32, 3), np.float32), "[1, 32, 32, 3]"),
        (np.zeros((1, 3, 32, 32), np.uint8), "uint8"),
        (np.full((1, 3, 32, 32), np.nan, np.float32), "finite"),
    ],
    ids=["size", "no image axis", "channels last", "bytes", "nan"],
)
def test_pixels_of_the_wrong_kind(backend, seeing, images, words):
    """Wrong size, wrong axes, bytes, NaN: said in one line, whatever array it is."""
    model, tokens_bq = backend.load(seeing[1]), [helpers.text("3 i 4")]
    refused(lambda: model(tokens_bq, images=images), words)
    refused(lambda: model(tokens_bq, images=torch.from_numpy(images)), words)


def test_no_images_may_be_an_empty_array(backend, seeing):
    """A text without placeholders and an array of no images is a text."""
    model, tokens_bq = backend.load(seeing[1]), [helpers.text("9")]
    np.testing.assert_array_equal(to_numpy(model(tokens_bq, images=helpers.pixels(0))), to_numpy(model(tokens_bq)))
