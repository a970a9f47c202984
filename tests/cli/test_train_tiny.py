"""The trainer trains the model that the packages run, on text that does not leak into evaluation."""

from __future__ import annotations

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import tiny_corpus
import train_tiny
from tpa_ref import GemmaConfig, Model
from tpa_ref.compress import recall
from tpa_ref.gemma.config import layer_pattern
from tpa_ref.gemma.weights import from_named


def small_config():
    return GemmaConfig(
        vocab_size=90,
        hidden_size=24,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=40,
        sliding_window=16,
        query_pre_attn_scalar=8,
        max_positions=256,
        is_global=layer_pattern(6),
    )


def test_trained_graph_is_the_model():
    """The trainer's fused forward pass gives the logits of the NumPy reference."""
    config = small_config()
    parameters = {name: p.detach() for name, p in train_tiny.initial_parameters(config, seed=1).items()}
    tokens_bq = np.random.default_rng(0).integers(0, config.vocab_size, (2, 64))
    hidden = train_tiny.forward(parameters, config, torch.from_numpy(tokens_bq))
    logits_bqv = (hidden @ parameters["model.embed_tokens.weight"].T).numpy()
    arrays = {name: p.numpy() for name, p in parameters.items()}
    expected_bqv = Model(config, from_named(arrays, config))(tokens_bq)
    np.testing.assert_allclose(logits_bqv, expected_bqv, atol=1e-5 * np.abs(expected_bqv).max())


def test_documents_of_different_splits_share_no_run_of_words():
    """A near-duplicate paragraph is kept once, so that no evaluation paragraph was trained on."""
    sentence = " ".join(f"word{i}" for i in range(40))
    tail = " ".join(f"other{i}" for i in range(60))
    kept = tiny_corpus.drop_near_duplicates(
        {"a": sentence + "\n\n" + tail, "b": tail.replace(" ", "  ") + "\n\n" + "x " * 150}
    )
    assert tail in kept["a"] and "other1" not in kept["b"]


def test_splits_are_stable():
    """Where a document goes depends on its name alone."""
    names = [f"module {i}.py" for i in range(2000)]
    share = [sum(tiny_corpus.split_of(name) == split for name in names) / len(names) for split in tiny_corpus.SPLITS]
    np.testing.assert_allclose(share, [0.90, 0.04, 0.06], atol=0.03)
    assert tiny_corpus.split_of("module abc.py") == "evaluation"


def test_recall_prompt_states_the_fact_at_the_distance():
    """The value asked for stands exactly `distance` tokens before the answer, and once only."""
    ids: dict[str, int] = {}

    class Words:
        def encode(self, text, bos):
            words = text.replace("\n", " \n ").replace(".", " .").split(" ")
            return [ids.setdefault(word, len(ids)) for word in words if word]

    for distance in (150, 300, 900):
        filler = list(range(10_000, 12_000))
        prompt, answer = recall.prompt_and_answer(random.Random(distance), Words(), filler, distance)
        where = [i for i, token in enumerate(prompt + answer) if token == answer[0]]
        assert len(answer) == 1 and where == [len(prompt) - distance, len(prompt)]


def test_batches_repeat_and_stages_follow():
    """A step's batch is the same whenever asked; sequences get longer in the second half."""

    class Words:
        vocab_size = 1000

        def encode(self, text, bos):
            return [len(word) for word in text.split()]

    data = train_tiny.Sequences(np.arange(5000), Words(), "some words " * 2000, seed=3, steps=10)
    for step, length in ((0, 256), (9, 1024)):
        first, weight = data.batch(step, 2048)
        again, _ = data.batch(step, 2048)
        assert first.shape == (2048 // length, length + 1) and weight.shape == (2048 // length, length)
        assert torch.equal(first, again)


def test_learning_rate_ends_at_zero():
    """Warm-up, then linear to zero."""
    assert train_tiny.learning_rate(1000, 1000, 1.0) == 0
    assert (
        train_tiny.learning_rate(0, 1000, 1.0)
        < train_tiny.learning_rate(39, 1000, 1.0)
        > train_tiny.learning_rate(500, 1000, 1.0)
    )
