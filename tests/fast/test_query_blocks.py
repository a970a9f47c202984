"""Attention in blocks of queries gives what one block gives."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
import helpers

import tpa_torch
from tpa_ref import TPAConfig
from tpa_torch.fast import blocks


@pytest.fixture
def dense():
    return helpers.model(tpa_torch, dtype="float64")


@pytest.mark.parametrize("mode", ["dense", "contextual", "fixed-a", "fixed-b", "latent"])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_equal_whole(dense, monkeypatch, mode, padded):
    """Whole texts, padded batches and chunks into a ring: logits do not depend on the size of a block."""
    model = dense if mode == "dense" else tpa_torch.convert(dense, TPAConfig(mode=mode, kv_dtype="int8"))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 45))
    lengths = np.array([45, 13]) if padded else None
    found = {}
    for size in (7, 1000):
        monkeypatch.setattr(blocks, "QUERY_BLOCK", size)
        cache = model.new_cache(2, 64)
        first = model(tokens[:, :20], cache=cache).numpy()
        second = model(tokens[:, 20:], cache=cache).numpy()
        found[size] = model(tokens, lengths_b=lengths).numpy(), first, second
    for ours, theirs in zip(found[7], found[1000], strict=True):
        rows = [ours[0], ours[1, :13]] if padded and ours.shape[1] == 45 else [ours]
        expected = [theirs[0], theirs[1, :13]] if padded and theirs.shape[1] == 45 else [theirs]
        for got, wanted in zip(rows, expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-9 * np.abs(wanted).max())


def test_a_block_that_is_cut_too_short_is_seen(dense, monkeypatch):
    """The comparison above goes red when a block leaves out the oldest key of its window."""
    tokens = np.random.default_rng(0).integers(0, dense.config.vocab_size, (1, 45))
    whole = dense(tokens).numpy()
    right = blocks.query_blocks
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 7)
    shorter = lambda q, k, window, *rest: right(q, k, window and window - 1, *rest)  # noqa: E731
    monkeypatch.setattr(blocks, "query_blocks", shorter)
    assert np.abs(dense(tokens).numpy() - whole).max() > 1e-6 * np.abs(whole).max()
