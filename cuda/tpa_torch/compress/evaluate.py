"""How much a TPA cache changes the model. Twin of `tpa_ref.evaluate`, which explains the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_ref.compress.calibrate import read_text, text_windows
from tpa_ref.compress.evaluate import CHUNK, DISTANCES, mean_by_position, recall_accuracy, summary

__all__ = ["DISTANCES", "mean_by_position", "recall_accuracy", "summary"]


@torch.inference_mode()
def evaluate(
    dense: Any,
    tpa: Any,
    text_or_path: str | Path,
    max_tokens: int = 16_384,
    length: int | None = None,
    recall_prompts: int = 10,
    progress: Any = iter,
) -> dict[str, Any]:
    """Figures of `tpa` against `dense` on a text: tokens, kl (mean, p95, p99, max), top1, ppl and recall of both."""
    kl, same, nll_dense, nll_tpa, positions = [], [], [], [], []
    for window in progress(list(text_windows(dense, text_or_path, max_tokens, length))):
        if len(window) < 2:
            continue
        tokens_bq = torch.tensor([window], device=dense.device)
        hidden_dense, hidden_tpa = dense.hidden(tokens_bq), tpa.hidden(tokens_bq)
        for start in range(0, len(window), CHUNK):
            part = slice(start, start + CHUNK)
            P_bqv = log_softmax(dense.logits(hidden_dense[:, part]))
            Q_bqv = log_softmax(tpa.logits(hidden_tpa[:, part]))
            kl.append(kl_divergence(P_bqv, Q_bqv)[0])
            same.append((P_bqv.argmax(-1) == Q_bqv.argmax(-1))[0])
            following = tokens_bq[0, start + 1 : start + 1 + P_bqv.shape[1], None]
            nll_dense.append(-P_bqv[0, : len(following)].gather(1, following)[:, 0])
            nll_tpa.append(-Q_bqv[0, : len(following)].gather(1, following)[:, 0])
            positions.append(start + np.arange(P_bqv.shape[1]))
    parts = (_joined(kl), _joined(same), _joined(nll_dense), _joined(nll_tpa), np.concatenate(positions))
    figures = summary(*parts)
    filler = dense.tokenizer.encode(read_text(text_or_path), bos=False)
    for name, model in (("recall_dense", dense), ("recall_tpa", tpa)):
        by_distance = recall_accuracy(model, filler, recall_prompts)
        figures[name] = float(np.mean(list(by_distance.values()))) if by_distance else None
        figures[f"{name}_by_distance"] = by_distance
    return figures


def _joined(values: list[Tensor]) -> np.ndarray:
    return torch.cat(values).cpu().numpy().astype(np.float64)


def log_softmax(L_bqv: Tensor) -> Tensor:
    """Logits -> log probabilities over the last axis."""
    return torch.log_softmax(L_bqv, -1)


def kl_divergence(P_bqv: Tensor, Q_bqv: Tensor) -> Tensor:
    """KL(P || Q) = sum p (log p - log q) in nats, from log probabilities: [b,q,v] twice -> [b,q]."""
    return (P_bqv.exp() * (P_bqv - Q_bqv)).sum(-1).clamp(min=0)
