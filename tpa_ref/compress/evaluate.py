"""How much a TPA cache changes the model: KL, top-1 agreement, perplexity and recall, on text it has not seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TPAError
from ..gemma.texts import read_text, text_windows
from . import recall

DISTANCES = (150, 300, 500, 700, 900)  # tokens between a fact and the question, beyond the tiny model's window of 128


def evaluate(
    dense: Any,
    tpa: Any,
    text_or_path: str | Path,
    max_tokens: int = 16_384,
    length: int | None = None,
    recall_prompts: int = 10,
    progress: Callable = iter,
) -> dict[str, Any]:
    """Figures of `tpa` against `dense` on a text, in windows that each begin with BOS:

    tokens; kl (mean), kl_median, kl_p95, kl_p99, kl_max of KL(dense || tpa) in nats per position; top1, the share of
    positions where both predict the same token; ppl_dense, ppl_tpa; kl_by_position, the mean over positions from each
    key up to the next, which shows drift with length; recall_dense, recall_tpa, the share of recall questions answered
    right (`recall_prompts` per distance; 0 leaves them out and gives None).
    """
    found: list[dict[str, np.ndarray]] = []
    for window in progress(list(text_windows(dense, text_or_path, max_tokens, length))):
        if len(window) < 2:
            continue
        tokens_bq = np.array([window])
        compared = dense.compare(dense.hidden(tokens_bq), tpa, tpa.hidden(tokens_bq), tokens_bq[0, 1:])
        found.append(compared | {"position": np.arange(len(window))})
    if not found:
        raise TPAError("evaluate: the text must have at least two tokens")
    figures = summary({name: np.concatenate([part[name] for part in found]) for name in found[0]})
    filler = dense.tokenizer.encode(read_text(text_or_path), bos=False)
    for name, model in (("recall_dense", dense), ("recall_tpa", tpa)):
        by_distance = recall_accuracy(model, filler, recall_prompts)
        figures[name] = float(np.mean(list(by_distance.values()))) if by_distance else None
        figures[f"{name}_by_distance"] = by_distance
    return figures


def summary(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """The figures of `evaluate` from one number per position (see `Model.compare`)."""
    kl = found["kl"].astype(np.float64)
    return {
        "tokens": len(kl),
        "kl": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p95": float(np.percentile(kl, 95)),
        "kl_p99": float(np.percentile(kl, 99)),
        "kl_max": float(kl.max()),
        "top1": float(found["same"].mean()),
        "ppl_dense": float(np.exp(found["nll"].astype(np.float64).mean())),
        "ppl_tpa": float(np.exp(found["nll_other"].astype(np.float64).mean())),
        "kl_by_position": mean_by_position(kl, found["position"]),
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
            prompt, answer = recall.prompt_and_answer(rng, model.tokenizer, list(filler), distance)
            hidden = model.hidden(np.array([[model.tokenizer.bos, *prompt, *answer]]))[:, -len(answer) - 1 : -1]
            said = model.to_numpy(model.logits(hidden)[0].argmax(-1))
            right += bool((said == np.array(answer)).all())
        accuracy[distance] = right / prompts
    return accuracy
