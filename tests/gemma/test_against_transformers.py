"""The claim that everything else rests on: both backends compute what `transformers` computes."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from helpers import KINDS, TOLERANCE, hf_run, in_kind, largest_relative, relative, run_cached, run_whole, to_numpy

# KV heads, query heads per KV head, head dimension, window: all windows are shorter than the text of 60 tokens.
SHAPES = [(g, n, 8 if g == 4 else 16, window) for g, window in ((1, 11), (2, 7), (4, 16)) for n in (1, 2, 4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize(("g", "n", "head_dim", "window"), SHAPES)
def test_whole_text(backend, random_gemma, g, n, head_dim, window, scaled, kind):
    """Dense or in any mode at full rank, the logits of a whole text are those of `transformers`, and so is what the
    heads of every layer give before W_O, with its scale, which the logits do not show.
    """
    gemma = random_gemma(g, g * n, head_dim, window, scaled)
    logits_bqv, O_lbqhe = run_whole(in_kind(backend, backend.load(gemma.path), kind), gemma.tokens_bq)
    assert len(O_lbqhe) == 7
    errors = relative(logits_bqv, gemma.logits_bqv), largest_relative(O_lbqhe, gemma.O_lbqhe)
    assert max(errors) < TOLERANCE["transformers"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("g", "n", "scaled"), [(1, 4, False), (2, 2, True), (4, 1, False), (4, 4, True)])
def test_chunks_then_token_by_token(backend, random_gemma, g, n, scaled, kind):
    """Prefill in chunks longer and shorter than the ring, then decode to five windows: the logits stay the same."""
    gemma = random_gemma(g, g * n, 8 if g == 4 else 16, 11, scaled)
    model = in_kind(backend, backend.load(gemma.path), kind)
    _, logits_bqv = run_cached(model, gemma.tokens_bq, chunks=(20, 7, 8))
    error = relative(logits_bqv, gemma.logits_bqv)
    assert error < TOLERANCE["transformers"]


@pytest.mark.parametrize("kind", KINDS)
def test_decode_from_the_first_token(backend, random_gemma, kind):
    """A cache filled one token at a time, from empty to five windows, gives the logits of the whole text."""
    gemma = random_gemma(2, 4, scaled=True)
    model = in_kind(backend, backend.load(gemma.path), kind)
    _, logits_bqv = run_cached(model, gemma.tokens_bq, chunks=())
    error = relative(logits_bqv, gemma.logits_bqv)
    assert error < TOLERANCE["transformers"]


# ---- right padding ----

WIDTH = 30  # every padded chunk is this wide: far wider than the ring of 11
PADDED = {
    "uneven": [(13, 30, 5), (9, 0, 16)],
    "all rows alike": [(5, 5, 5), (9, 9, 9), (2, 2, 2)],
    "nothing padded": [(30, 30, 30)],
    "an empty row": [(0, 1, 30), (3, 2, 1)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(13, 30, 5), (5, 5, 5), (1, 29, 12)], ids=str)
def test_padded_batch_without_cache(backend, random_gemma, lengths, kind):
    """Each row of a padded batch gives what it gives alone: nothing sees the padding."""
    gemma = random_gemma(2, 4, scaled=True)
    model = in_kind(backend, backend.load(gemma.path, dtype="float64"), kind)
    tokens_bq = np.random.default_rng(1).integers(3, 300, (3, WIDTH))
    together = to_numpy(model(tokens_bq, lengths_b=np.array(lengths)))
    for row, length in enumerate(lengths):
        alone = model(tokens_bq[row : row + 1, :length])
        error = relative(together[row : row + 1, :length], alone)
        assert error < TOLERANCE["float64"], f"row {row}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", PADDED.values(), ids=PADDED)
def test_padded_prefill_then_decode(backend, random_gemma, chunks, kind):
    """Padded chunks through the cache, then token by token: each row goes on as if it were alone."""
    gemma = random_gemma(2, 4, scaled=True)
    model = in_kind(backend, backend.load(gemma.path, dtype="float64"), kind)
    rng = np.random.default_rng(1)
    text_bq = rng.integers(3, 300, (3, 60))
    cache = model.new_cache(3, 60)
    begun_b, rows = np.zeros(3, int), [[], [], []]
    for lengths in [*chunks, *[(1, 1, 1)] * 20]:
        lengths_b = np.array(lengths)
        tokens_bq = rng.integers(3, 300, (3, WIDTH if lengths in chunks else 1))  # padding is other text, not zeros
        for row, length in enumerate(lengths):
            tokens_bq[row, :length] = text_bq[row, begun_b[row] : begun_b[row] + length]
        logits_bqv = to_numpy(model(tokens_bq, cache=cache, lengths_b=lengths_b))
        for row, length in enumerate(lengths):
            rows[row].append(logits_bqv[row, :length])
        begun_b += lengths_b
    np.testing.assert_array_equal(cache.lengths_b, begun_b)
    for row, pieces in enumerate(rows):
        alone = to_numpy(model(text_bq[row : row + 1, : begun_b[row]]))[0]
        error = relative(np.concatenate(pieces), alone)
        assert error < TOLERANCE["float64"], f"row {row}"


# ---- bfloat16 ----


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_bfloat16(random_gemma, cached):
    """A bf16 run is as close to the float32 logits as the bf16 run of `transformers` is.

    Two bf16 programs round in different places (2^-9 relative each time, through seven layers whose attention is
    not flat), so they cannot agree better than each agrees with float32. Hence the yardstick is the rounding error
    of `transformers` itself: at most twice that against float32, three times against its bf16 logits (the sum of
    both distances). Root mean squares, because the largest of thousands of roundings is a matter of luck.
    """
    torch = pytest.importorskip("torch")
    import tpa_torch

    gemma = random_gemma(2, 4, scaled=True)
    theirs = hf_run(copy.deepcopy(gemma.hf).to(torch.bfloat16), gemma.tokens_bq)[0]
    model = tpa_torch.load(gemma.path, dtype="bfloat16")
    ours = run_cached(model, gemma.tokens_bq, (20, 15))[1] if cached else to_numpy(model(gemma.tokens_bq))

    def distance(a_bqv: np.ndarray, b_bqv: np.ndarray) -> float:
        return float(np.sqrt(np.square(a_bqv - b_bqv).mean() / np.square(gemma.logits_bqv).mean()))

    rounding = distance(theirs, gemma.logits_bqv)
    assert 1e-4 < rounding < 0.1  # it is bf16, and still the same model
    assert distance(ours, gemma.logits_bqv) < 2 * rounding
    assert distance(ours, theirs) < 3 * rounding


# ---- both generations of config.json ----

OLD_KEYS = {
    "rope_theta": 50_000.0,
    "rope_local_base_freq": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "sliding_window_pattern": 3,
}
NEW_KEYS = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
    "layer_types": ["full_attention" if (layer + 1) % 3 == 0 else "sliding_attention" for layer in range(7)],
}


def with_keys(gemma, folder, keys):
    """The checkpoint of `gemma` in another folder, its config with these keys and with none of the other style's."""
    content = json.loads((gemma.path / "config.json").read_text())
    for key in [*OLD_KEYS, *NEW_KEYS, "_sliding_window_pattern"]:
        content.pop(key, None)
    (folder / "config.json").write_text(json.dumps(content | keys))
    (folder / "model.safetensors").symlink_to(gemma.path / "model.safetensors")
    return folder


@pytest.mark.parametrize("keys", [OLD_KEYS, NEW_KEYS], ids=["old keys", "new keys"])
def test_both_config_styles(backend, random_gemma, tmp_path, keys):
    """Bases, scaling and layer pattern are read from the old and from the new key names, as `transformers` does."""
    import transformers

    gemma = random_gemma(2, 4)
    folder = with_keys(gemma, tmp_path, keys)
    theirs, _ = hf_run(transformers.Gemma3ForCausalLM.from_pretrained(folder).eval(), gemma.tokens_bq)
    assert relative(gemma.logits_bqv, theirs) > 0.05  # the keys matter
    error = relative(backend.load(folder)(gemma.tokens_bq), theirs)
    assert error < TOLERANCE["transformers"]


@pytest.mark.parametrize("style", ["old keys", "new keys", "both"])
def test_both_config_styles_mean_the_same(random_gemma, tmp_path, style):
    """The same model written in either style, or with both sets of keys at once, is the same GemmaConfig."""
    from tpa_ref import GemmaConfig

    keys = {"old keys": OLD_KEYS, "new keys": NEW_KEYS, "both": OLD_KEYS | NEW_KEYS}[style]
    config = GemmaConfig.from_hf(with_keys(random_gemma(2, 4), tmp_path, keys) / "config.json")
    assert (config.rope_base_global, config.rope_base_local, config.rope_scale_global) == (50_000.0, 500.0, 4.0)
    assert config.is_global == (False, False, True, False, False, True, False)
