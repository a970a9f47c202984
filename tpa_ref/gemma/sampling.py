"""How the next token is chosen: greedy, temperature, top-k and top-p, seeded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TPAError


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the most likely token. Otherwise one drawn from softmax(logits / temperature) after both cuts:
    top_k keeps the k most likely; top_p the fewest most likely ones whose probabilities reach p.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self, config: Any, prompt: int, new: int) -> None:
        """Every rule on the arguments of `generate`, for a prompt of so many tokens and so many new ones."""
        if prompt < 1:
            raise TPAError("generate: the prompt must have at least one token, got 0")
        if new < 1:
            raise TPAError(f"generate: max_new_tokens must be >= 1, got {new}")
        if prompt + new > config.max_positions:
            raise TPAError(
                f"generate: prompt of {prompt} and {new} new tokens exceed the model's {config.max_positions} positions"
            )
        if not 0 <= self.temperature < float("inf"):
            raise TPAError(f"generate: temperature must be a number >= 0, got {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise TPAError(f"generate: seed must lie in 0 ... 2^63 - 1, got {self.seed}")
        if self.top_k is not None and self.top_k < 1:
            raise TPAError(f"generate: top_k must be >= 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise TPAError(f"generate: top_p must lie in (0, 1], got {self.top_p}")

    def choose(self, logits_v: np.ndarray, rng: np.random.Generator) -> int:
        """One token.

        >>> Sampling().choose(np.array([0.0, 2.0, 1.0]), np.random.default_rng(0))
        1
        """
        if self.temperature == 0:
            return int(logits_v.argmax())
        order = np.argsort(-logits_v, kind="stable")[: self.top_k or len(logits_v)]
        logits = logits_v[order].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature makes -inf of the others, which is what it means
            p = np.exp((logits - logits.max()) / self.temperature)
        p /= p.sum()
        if self.top_p is not None:
            p = p[: int(np.searchsorted(np.cumsum(p), self.top_p - 1e-12)) + 1]
            p /= p.sum()
        return int(order[rng.choice(len(p), p=p)])
