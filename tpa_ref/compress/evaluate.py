"""How much a TPA cache changes the model: KL, top-1 agreement, perplexity and recall, on text it has not seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TPAError
from ..gemma.tokenizer import BOS
from . import recall
from .calibrate import read_text, text_windows

DISTANCES = (150, 300, 500, 700, 900)  # tokens between a fact and the question, beyond the tiny model's window of 128
CHUNK = 256  # positions whose logits are held at once: 262,144 words make them large


def evaluate(
    dense: Any,
    tpa: Any,
    text_or_path: str | Path,
    max_tokens: int = 16_384,
    length: int | None = None,
    recall_prompts: int = 10,
    progress: Any = iter,
) -> dict[str, Any]:
    """Figures of `tpa` against `dense` on a text, in windows that each begin with BOS:

    tokens; kl (mean), kl_p95, kl_p99, kl_max of KL(dense || tpa) in nats per position; top1, the share of positions
    where both predict the same token; ppl_dense, ppl_tpa; kl_by_position, the mean over positions from each key up to
    the next, which shows drift with length; recall_dense, recall_tpa, the share of recall questions answered right
    (`recall_prompts` per distance; 0 leaves them out and gives None).
    """
    kl, same, nll_dense, nll_tpa, positions = [], [], [], [], []
    for window in progress(list(text_windows(dense, text_or_path, max_tokens, length))):
        if len(window) < 2:
            continue
        tokens_bq = np.array([window])
        hidden_dense, hidden_tpa = dense.hidden(tokens_bq), tpa.hidden(tokens_bq)
        for start in range(0, len(window), CHUNK):
            part = slice(start, start + CHUNK)
            P_bqv = log_softmax(dense.logits(hidden_dense[:, part]))
            Q_bqv = log_softmax(tpa.logits(hidden_tpa[:, part]))
            kl.append(kl_divergence(P_bqv, Q_bqv)[0])
            same.append((P_bqv.argmax(-1) == Q_bqv.argmax(-1))[0])
            following = tokens_bq[0, start + 1 : start + 1 + P_bqv.shape[1]]
            steps = np.arange(len(following))
            nll_dense.append(-P_bqv[0, steps, following])
            nll_tpa.append(-Q_bqv[0, steps, following])
            positions.append(start + np.arange(P_bqv.shape[1]))
    figures = summary(*(np.concatenate(values) for values in (kl, same, nll_dense, nll_tpa, positions)))
    filler = dense.tokenizer.encode(read_text(text_or_path), bos=False)
    for name, model in (("recall_dense", dense), ("recall_tpa", tpa)):
        by_distance = recall_accuracy(model, filler, recall_prompts)
        figures[name] = float(np.mean(list(by_distance.values()))) if by_distance else None
        figures[f"{name}_by_distance"] = by_distance
    return figures


def log_softmax(L_bqv: np.ndarray) -> np.ndarray:
    """Logits -> log probabilities over the last axis."""
    L_bqv = L_bqv - L_bqv.max(-1, keepdims=True)
    return L_bqv - np.log(np.exp(L_bqv).sum(-1, keepdims=True))


def kl_divergence(P_bqv: np.ndarray, Q_bqv: np.ndarray) -> np.ndarray:
    """KL(P || Q) = sum p (log p - log q) in nats, from log probabilities: [b,q,v] twice -> [b,q].

    >>> log = np.log(np.array([[[0.5, 0.5]]])), np.log(np.array([[[0.25, 0.75]]]))
    >>> kl_divergence(*log).round(4).tolist()
    [[0.1438]]
    """
    return np.maximum((np.exp(P_bqv) * (P_bqv - Q_bqv)).sum(-1), 0)


def summary(
    kl: np.ndarray, same: np.ndarray, nll_dense: np.ndarray, nll_tpa: np.ndarray, positions: np.ndarray
) -> dict[str, Any]:
    """The figures of `evaluate` from one number per position."""
    if not len(nll_dense):
        raise TPAError("evaluate: the text must have at least two tokens")
    return {
        "tokens": len(kl),
        "kl": float(kl.mean()),
        "kl_p95": float(np.percentile(kl, 95)),
        "kl_p99": float(np.percentile(kl, 99)),
        "kl_max": float(kl.max()),
        "top1": float(same.mean()),
        "ppl_dense": float(np.exp(nll_dense.mean())),
        "ppl_tpa": float(np.exp(nll_tpa.mean())),
        "kl_by_position": mean_by_position(kl, positions),
    }


def mean_by_position(values: np.ndarray, positions: np.ndarray, first: int = 128) -> dict[int, float]:
    """Means over stretches of positions that double in length, by where each begins.

    >>> mean_by_position(np.array([1.0, 3.0, 5.0]), np.array([0, 1, 300]))
    {0: 2.0, 256: 5.0}
    """
    stretch = np.where(positions < first, 0, 2 ** np.floor(np.log2(np.maximum(positions, 1))))
    return {int(start): float(values[stretch == start].mean()) for start in np.unique(stretch)}


def recall_accuracy(
    model: Any, filler: Sequence[int], prompts: int, distances: Sequence[int] = DISTANCES, seed: int = 0
) -> dict[int, float]:
    """Share of recall questions whose answer the model gives greedily, by distance in tokens."""
    accuracy = {}
    for distance in distances if prompts else ():
        if distance + 200 > model.config.max_positions:
            continue
        rng = random.Random(f"{seed} {distance}")
        right = 0
        for _ in range(prompts):
            prompt, answer = recall.prompt_and_answer(
                rng, lambda text: model.tokenizer.encode(text, bos=False), list(filler), distance
            )
            ids = [BOS, *prompt, *answer]
            hidden = model.hidden(np.array([ids]))[:, -len(answer) - 1 : -1]
            right += bool((model.logits(hidden)[0].argmax(-1) == np.array(answer)).all())
        accuracy[distance] = right / prompts
    return accuracy
