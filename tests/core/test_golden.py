"""RoPE, masks, RMSNorm and GELU against arrays that `transformers` made (scripts/make_golden.py)."""

from __future__ import annotations

import helpers
import numpy as np
import pytest

GOLDEN = helpers.ROOT / "tests" / "golden"
ROPE = {
    "local": (10_000.0, 1.0),
    "global": (1_000_000.0, 1.0),
    "global8": (1_000_000.0, 8.0),
    "local8": (10_000.0, 1.0),
}


@pytest.fixture(scope="module")
def golden():
    return {path.stem: np.load(path) for path in sorted(GOLDEN.glob("*.npz"))}


def test_golden_files_are_small_and_say_their_versions(golden):
    """What the golden arrays were made with is on record, and they do not weigh on the repository."""
    assert sorted(golden) == ["masks", "pointwise", "rope"]
    assert sum(path.stat().st_size for path in GOLDEN.glob("*.npz")) < 100_000
    for arrays in golden.values():
        for package in ("transformers", "torch", "numpy"):
            assert str(arrays[f"version_{package}"])[0].isdigit()


@pytest.mark.parametrize("kind", ROPE)
def test_rope_tables_are_those_of_transformers(backend, golden, kind):
    """Both bases, linear scale 8 on global layers only. transformers' float32 angles err by 1e-7 per position."""
    arrays = golden["rope"]
    base, scale = ROPE[kind]
    d = arrays["x_bhkd"].shape[-1]
    tables = helpers.part(backend, "core.rope").rope_tables(helpers.to(backend, arrays["positions_bk"]), d, base, scale)
    atol = 1e-6 + 1.2e-7 * arrays["positions_bk"][..., None]
    for name, table in zip(("cos", "sin"), tables, strict=True):
        expected = arrays[f"{kind}_{name}_bkd"]
        assert helpers.back(table).shape == (*arrays["positions_bk"].shape, d // 2)
        for half in (expected[..., : d // 2], expected[..., d // 2 :]):  # transformers writes every angle twice
            assert (np.abs(helpers.back(table) - half) <= atol).all()


@pytest.mark.parametrize("kind", ROPE)
def test_rotated_vectors_are_those_of_transformers(backend, golden, kind):
    """Half-split pairing, sign and order of the rotation: apply_rotary_pos_emb on the same vectors."""
    arrays = golden["rope"]
    rope = helpers.part(backend, "core.rope")
    x = np.swapaxes(arrays["x_bhkd"], 1, 2)
    tables = rope.rope_tables(helpers.to(backend, arrays["positions_bk"]), x.shape[-1], *ROPE[kind])
    rotated = helpers.back(rope.rotate(helpers.to(backend, x), *tables))
    expected = np.swapaxes(arrays[f"{kind}_rotated_bhkd"], 1, 2)
    atol = 2 * np.abs(x).max() * (1e-6 + 1.2e-7 * arrays["positions_bk"][0, :, None, None])
    assert (np.abs(rotated[0] - expected[0]) <= atol).all()


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_masks_of_whole_padded_texts_are_those_of_transformers(backend, golden, kind):
    """A window of w sees itself and w - 1 keys before it; padding on the right is never seen."""
    arrays = golden["masks"]
    lengths_b, window = arrays["lengths_b"], int(arrays["window_size"]) if kind == "window" else None
    expected = arrays[f"{kind}_bqk"].astype(bool)
    step = np.arange(expected.shape[1])
    positions = np.where(step < lengths_b[:, None], step, -1)
    seen = helpers.back(
        helpers.part(backend, "core.masks").visible(
            helpers.to(backend, positions), helpers.to(backend, positions), window
        )
    )
    for row, length in enumerate(lengths_b):  # what padding itself would see is of no concern
        np.testing.assert_array_equal(seen[row, :length], expected[row, :length])


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_masks_of_a_later_chunk_are_those_of_transformers(backend, golden, kind):
    """Three queries at positions 9, 10, 11 against all keys, which may stand in any order."""
    arrays = golden["masks"]
    window = int(arrays["window_size"]) if kind == "window" else None
    order = np.random.default_rng(0).permutation(12)
    queries, keys = np.array([[9, 10, 11]]), order[None]
    seen = helpers.part(backend, "core.masks").visible(helpers.to(backend, queries), helpers.to(backend, keys), window)
    np.testing.assert_array_equal(helpers.back(seen), arrays[f"{kind}_chunk_bqk"].astype(bool)[:, :, order])


def test_rms_norm_is_that_of_transformers(backend, golden):
    """x / rms(x) * (1 + w), for vectors from 1e-4 to 1e4 in size and for the zero vector."""
    arrays = golden["pointwise"]
    y = helpers.part(backend, "core.norm").rms_norm(
        helpers.to(backend, arrays["norm_x"]), helpers.to(backend, arrays["norm_w"]), 1e-6
    )
    assert helpers.back(y).dtype == np.float32
    np.testing.assert_allclose(helpers.back(y), arrays["norm_y"], rtol=2e-6, atol=1e-7)


def test_gelu_is_the_tanh_form_of_transformers(backend, golden):
    """The tanh approximation, not the exact GELU: they differ by up to 5e-4, far above the tolerance."""
    arrays = golden["pointwise"]
    y = helpers.part(backend, "gemma.mlp").gelu_tanh(helpers.to(backend, arrays["gelu_x"]))
    np.testing.assert_allclose(helpers.back(y), arrays["gelu_y"], rtol=0, atol=1e-12)
