"""The tests of the tests: each classic mistake of a Gemma or TPA port, put in on purpose, turns the comparison red.

Every mistake is one small patch of a package; the comparisons are those of `test_against_transformers`. Green without
a patch and far beyond the tolerance with each of them: so they see what they claim to see.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from helpers import TOLERANCE, in_kind, largest_relative, part, relative, run_cached, run_whole

CLEARLY = 100  # a mistake must exceed the tolerance by this factor


def everywhere(backend, patch, module, name, wrong):
    """Replace a function in all modules that have imported it; wrong: makes it from the right one."""
    right = getattr(part(backend, module), name)
    for imported, found in list(sys.modules.items()):
        if imported.partition(".")[0] in ("tpa_ref", "tpa_torch") and vars(found).get(name) is right:
            patch(found, name, wrong(right))


def flipped_rope_sign(backend, patch):
    everywhere(backend, patch, "core.rope", "rotate", lambda right: lambda x, cos, sin: right(x, cos, -sin))


def interleaved_rope_pairs(backend, patch):
    def wrong(right):
        def rotate(x_bkgd, cos, sin):
            d = x_bkgd.shape[-1]
            pairs = np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])  # feature 2i is paired with 2i + 1
            return right(x_bkgd[..., pairs], cos, sin)[..., np.argsort(pairs)]

        return rotate

    everywhere(backend, patch, "core.rope", "rotate", wrong)


def dropped_one_over_r_in_scores(backend, patch):
    contextual = part(backend, "core.contextual")
    right = contextual.scores_contextual
    patch(contextual, "scores_contextual", lambda Q, A, B, scale: right(Q, A, B, scale * A.shape[2]))


def dropped_one_over_r_in_values(backend, patch):
    contextual = part(backend, "core.contextual")
    right = contextual.values_contextual
    patch(contextual, "values_contextual", lambda P, A, B: right(P, A, B) * A.shape[2])


def norm_after_rope(backend, patch):
    model = part(backend, "gemma.model")
    right_norm = model.rms_norm
    waiting = []  # weights of the norms of Q and K that are still to be applied

    def rms_norm(x, w, eps):
        if x.ndim < 4:
            return right_norm(x, w, eps)
        waiting.append((w, eps))
        return x

    patch(model, "rms_norm", rms_norm)
    after = lambda right: lambda x, cos, sin: right_norm(right(x, cos, sin), *waiting.pop(0))  # noqa: E731
    everywhere(backend, patch, "core.rope", "rotate", after)


def window_too_long(backend, patch):
    masks = part(backend, "core.masks")
    right = masks.visible
    patch(masks, "visible", lambda q, k, window, *last: right(q, k, window and window + 1, *last))


def window_too_short(backend, patch):
    masks = part(backend, "core.masks")
    right = masks.visible
    patch(masks, "visible", lambda q, k, window, *last: right(q, k, window and window - 1, *last))


def unscaled_embedding(backend, patch):
    right = backend.Model.block

    def block(self, x_bqm, layer, *rest):
        return right(self, x_bqm / x_bqm.shape[-1] ** 0.5 if layer == 0 else x_bqm, layer, *rest)

    patch(backend.Model, "block", block)


def norm_times_w(backend, patch):
    model = part(backend, "gemma.model")
    right = model.rms_norm
    patch(model, "rms_norm", lambda x, w, eps: right(x, w - 1, eps))


def norm_without_weight(backend, patch):
    model = part(backend, "gemma.model")
    right = model.rms_norm
    patch(model, "rms_norm", lambda x, w, eps: right(x, w * 0, eps))


def wrong_head_grouping(backend, patch):
    def order(h, g):  # query head h belongs to KV head h % g instead of h // n
        heads = np.arange(h).reshape(-1, g).T.ravel()
        return heads, np.argsort(heads)

    def wrong_scores(right):
        def scores(self, Q_bqhd, parts, tokens, scale):
            heads, back = order(Q_bqhd.shape[2], self.g)
            return right(self, Q_bqhd[:, :, heads], parts, tokens, scale)[:, back]

        return scores

    def wrong_values(right):
        def values(self, P_bhqk, parts, tokens):
            heads, back = order(P_bhqk.shape[1], self.g)
            return right(self, P_bhqk[:, heads], parts, tokens)[:, :, back]

        return values

    for mode in part(backend, "core.dense").Dense, part(backend, "core.contextual").Contextual:
        patch(mode, "scores", wrong_scores(mode.scores))
        patch(mode, "values", wrong_values(mode.values))


def local_base_on_global_layers(backend, patch):
    right = backend.GemmaConfig.rope
    patch(backend.GemmaConfig, "rope", lambda self, flag: (self.rope_base_local, right(self, flag)[1]))


def global_base_on_local_layers(backend, patch):
    right = backend.GemmaConfig.rope
    patch(backend.GemmaConfig, "rope", lambda self, flag: (self.rope_base_global, right(self, flag)[1]))


def no_rope_scaling(backend, patch):
    right = backend.GemmaConfig.rope
    patch(backend.GemmaConfig, "rope", lambda self, flag: (right(self, flag)[0], 1.0))


def wrong_ring_slot(backend, patch):
    ring = part(backend, "core.cache").Ring
    right = ring.write

    def write(self, new, positions_bq):
        right(self, new, np.where(positions_bq >= 0, positions_bq + self.windowed, -1))

    patch(ring, "write", write)


# What is compared: logits of the whole text, logits through a cache, outputs of the heads of every layer.
WHOLE, CACHED, HEADS = "whole", "cached", "heads"
CONTROLS = [(run, kind) for run in (WHOLE, CACHED, HEADS) for kind in ("dense", "contextual", "latent")]

# name -> (patcher, what is compared, dense or a mode at full rank)
MISTAKES = {
    "flipped RoPE sign": (flipped_rope_sign, WHOLE, "dense"),
    "flipped RoPE sign, K rotated when read": (flipped_rope_sign, WHOLE, "latent"),
    "interleaved RoPE pairs": (interleaved_rope_pairs, WHOLE, "dense"),
    "interleaved RoPE pairs, b rotated": (interleaved_rope_pairs, WHOLE, "contextual"),
    "dropped 1/R in the scores": (dropped_one_over_r_in_scores, WHOLE, "contextual"),
    "dropped 1/R in the values": (dropped_one_over_r_in_values, HEADS, "contextual"),  # the logits: next test
    "norm after RoPE": (norm_after_rope, WHOLE, "dense"),
    "window one too long": (window_too_long, WHOLE, "dense"),
    "window one too short": (window_too_short, WHOLE, "dense"),
    "window one too short in a ring": (window_too_short, CACHED, "dense"),
    "unscaled embedding": (unscaled_embedding, WHOLE, "dense"),
    "norm times w instead of 1 + w": (norm_times_w, WHOLE, "dense"),
    "norm without its weight": (norm_without_weight, WHOLE, "dense"),
    "wrong head grouping": (wrong_head_grouping, WHOLE, "dense"),
    "wrong head grouping of b": (wrong_head_grouping, WHOLE, "contextual"),
    "local base on global layers": (local_base_on_global_layers, WHOLE, "dense"),
    "global base on local layers": (global_base_on_local_layers, WHOLE, "dense"),
    "no rope scaling": (no_rope_scaling, WHOLE, "dense"),
    "ring written at the wrong slot": (wrong_ring_slot, CACHED, "dense"),
    "ring of a mode written at the wrong slot": (wrong_ring_slot, CACHED, "contextual"),
    "ring of unrotated K written at the wrong slot": (wrong_ring_slot, CACHED, "latent"),
}


def error(backend, random_gemma, run, kind):
    """How far a run is from that of `transformers`: what `test_against_transformers` holds to its tolerance."""
    gemma = random_gemma(g=2, h=4, scaled=True)
    model = in_kind(backend, backend.load(gemma.path), kind)
    if run == CACHED:
        return relative(run_cached(model, gemma.tokens_bq, (20, 7, 8))[1], gemma.logits_bqv)
    logits_bqv, O_lbqhe = run_whole(model, gemma.tokens_bq)
    return relative(logits_bqv, gemma.logits_bqv) if run == WHOLE else largest_relative(O_lbqhe, gemma.O_lbqhe)


@pytest.mark.parametrize(("run", "kind"), CONTROLS)
def test_control(backend, random_gemma, run, kind):
    """Without a mistake every comparison used below is green."""
    assert error(backend, random_gemma, run, kind) < TOLERANCE["transformers"]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_turns_the_comparison_red(backend, random_gemma, monkeypatch, name):
    """With the mistake the error is far beyond the tolerance."""
    patcher, run, kind = MISTAKES[name]
    patcher(backend, monkeypatch.setattr)
    assert error(backend, random_gemma, run, kind) > CLEARLY * TOLERANCE["transformers"]


def test_the_logits_cannot_show_the_scale_of_the_values(backend, random_gemma, monkeypatch):
    """Why the heads' outputs are compared at all: Gemma norms what attention gives, so logits hide a wrong 1/R."""
    dropped_one_over_r_in_values(backend, monkeypatch.setattr)
    assert error(backend, random_gemma, WHOLE, "contextual") < TOLERANCE["transformers"]
    assert error(backend, random_gemma, HEADS, "contextual") > CLEARLY * TOLERANCE["transformers"]


def test_every_mistake_is_compared_with_its_control():
    """No mistake is judged by a comparison that was not shown to be green."""
    assert {(run, kind) for _, run, kind in MISTAKES.values()} <= set(CONTROLS)
