"""The tests of the image tests: each classic mistake of a port of Gemma's image tower turns the comparison red."""

from __future__ import annotations

from dataclasses import replace

import helpers
import numpy as np
import pytest
from helpers import TOLERANCE, in_kind, part, relative, to_numpy

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from test_vision import vision_config

import random_checkpoint as rc
from tpa_ref.files.formats import Entry
from tpa_ref.gemma import vision

CLEARLY = 100  # a mistake must exceed the tolerance by this factor
LAYOUT = "3 i 5 i 30"


def causal_only(backend, patch):
    patch(vision, "last_seen", lambda is_image_bq, positions_bq: None)


def text_sees_the_next_image(backend, patch):
    right = vision.last_seen

    def last_seen(is_image_bq, positions_bq):
        wider = is_image_bq.copy()
        wider[:, :-1] |= is_image_bq[:, 1:]  # the start token counts as a part of the image
        return right(wider, positions_bq)

    patch(vision, "last_seen", last_seen)


def all_images_are_one_block(backend, patch):
    right = vision.last_seen

    def last_seen(is_image_bq, positions_bq):
        return np.where(is_image_bq, right(is_image_bq, positions_bq)[is_image_bq].max(), positions_bq)

    patch(vision, "last_seen", last_seen)


def image_tokens_see_past_the_window(backend, patch):
    masks = part(backend, "core.masks")
    right = masks.visible

    def visible(q, k, window, last=None):
        if last is None:
            return right(q, k, window)
        return right(q, k, window) | (right(q, k, None, last) & (last > q)[:, :, None])

    patch(masks, "visible", visible)


def pooled_in_the_order_of_patches(backend, patch):
    def pool(x_ipz, config):  # every 16 patches that follow each other, instead of squares of 4 x 4
        return x_ipz.reshape(len(x_ipz), config.tokens_per_image, -1, x_ipz.shape[-1]).mean(2)

    patch(part(backend, "gemma.vision"), "pool", pool)


def pooled_column_by_column(backend, patch):
    vision = part(backend, "gemma.vision")
    right = vision.pool

    def pool(x_ipz, config):
        i, t, z = (pooled := right(x_ipz, config)).shape
        return pooled.reshape(i, config.tokens_per_side, -1, z).swapaxes(1, 2).reshape(i, t, z)

    patch(vision, "pool", pool)


def rows_and_columns_swapped(backend, patch):
    vision = part(backend, "gemma.vision")
    right = vision.embed_patches
    patch(vision, "embed_patches", lambda pixels, w, config: right(pixels.swapaxes(2, 3), w, config))


def scaled_image_embeddings(backend, patch):
    vision = part(backend, "gemma.vision")
    right = vision.embed_images

    def embed_images(pixels, w, config, trace):
        return right(pixels, w, config, trace) * w.W_project_zm.shape[1] ** 0.5

    patch(vision, "embed_images", embed_images)


def images_in_the_wrong_order(backend, patch):
    vision = part(backend, "gemma.vision")
    right = vision.embed_images

    def embed_images(pixels, w, config, trace):
        order = list(range(len(pixels)))[::-1]
        return right(pixels[order], w, config, trace)

    patch(vision, "embed_images", embed_images)


def soft_norm_times_w(backend, patch):
    vision = part(backend, "gemma.vision")
    right = vision.rms_norm
    patch(vision, "rms_norm", lambda x, w, eps: right(x, w - 1, eps))


def layer_norm_times_one_plus_w(backend, patch):
    vision = part(backend, "gemma.vision")
    right = vision.layer_norm
    patch(vision, "layer_norm", lambda x, w, bias, eps: right(x, w + 1, bias, eps))


def layer_norm_without_bias(backend, patch):
    vision = part(backend, "gemma.vision")
    right = vision.layer_norm
    patch(vision, "layer_norm", lambda x, w, bias, eps: right(x, w, bias * 0, eps))


def no_position_embedding(backend, patch):
    vision = part(backend, "gemma.vision")
    right = vision.embed_patches
    patch(vision, "embed_patches", lambda pixels, w, config: right(pixels, w, config) - w.position_pz)


def no_final_norm(backend, patch):
    vision = part(backend, "gemma.vision")
    right = vision.layer_norm
    calls = []

    def layer_norm(x, w, bias, eps):
        calls.append(w)
        return x if len(calls) % 5 == 0 else right(x, w, bias, eps)  # two in each of two blocks, then the final one

    patch(vision, "layer_norm", layer_norm)


MISTAKES = {
    "tokens of an image see only those before them": (causal_only, "dense"),
    "the same with TPA": (causal_only, "latent"),
    "the start token sees the image": (text_sees_the_next_image, "dense"),
    "all images are one block": (all_images_are_one_block, "dense"),
    "tokens of an image see past the window": (image_tokens_see_past_the_window, "dense"),
    "pooled in the order of the patches": (pooled_in_the_order_of_patches, "dense"),
    "pooled column by column": (pooled_column_by_column, "dense"),
    "rows and columns swapped": (rows_and_columns_swapped, "dense"),
    "image embeddings scaled by sqrt(m)": (scaled_image_embeddings, "dense"),
    "images in the wrong order": (images_in_the_wrong_order, "dense"),
    "norm of soft tokens times w": (soft_norm_times_w, "dense"),
    "LayerNorm times 1 + w": (layer_norm_times_one_plus_w, "dense"),
    "LayerNorm without bias": (layer_norm_without_bias, "dense"),
    "no position embedding": (no_position_embedding, "dense"),
    "no final norm": (no_final_norm, "dense"),
}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """(folder, what `transformers` makes of a text with two images); four soft tokens an image, a window of six."""
    hf, folder = helpers.saved(tmp_path_factory.mktemp("seeing"), text={"sliding_window": 6})
    return folder, helpers.hf_logits(hf, np.array([helpers.text(LAYOUT)]), helpers.pixels(2))


def error(backend, seeing, kind):
    folder, expected = seeing
    model = in_kind(backend, backend.load(folder), kind)
    return relative(model([helpers.text(LAYOUT)], images=helpers.pixels(2)), expected)


@pytest.mark.parametrize("kind", ["dense", "latent"])
def test_control(backend, seeing, kind):
    """Without a mistake the comparison is green."""
    assert error(backend, seeing, kind) < TOLERANCE["transformers"]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_turns_the_comparison_red(backend, seeing, monkeypatch, name):
    """With the mistake the error is far beyond the tolerance."""
    patcher, kind = MISTAKES[name]
    patcher(backend, monkeypatch.setattr)
    assert error(backend, seeing, kind) > CLEARLY * TOLERANCE["transformers"]


def test_a_projector_that_is_not_transposed(backend, tmp_path, monkeypatch):
    """Where both its sides are as long no shape tells; the comparison of the two layouts does."""
    config = vision_config(hidden_size=24)
    for form in ("ckpt", "hf-multimodal"):
        rc.write_checkpoint(config, form, tmp_path / form, dtype=torch.float32)
    tokens_bq, images = [helpers.text(LAYOUT)], helpers.pixels(2)

    def difference():
        pair = (backend.load(tmp_path / "ckpt", config=config), backend.load(tmp_path / "hf-multimodal"))
        return relative(*(to_numpy(model(tokens_bq, images=images)) for model in pair))

    assert difference() < TOLERANCE["float32"]
    read = Entry.read
    monkeypatch.setattr(Entry, "read", lambda entry, framework: read(replace(entry, transposed=False), framework))
    assert difference() > CLEARLY * TOLERANCE["transformers"]
