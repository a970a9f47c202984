"""Text that the model writes, to calibrate on: no other text is as sure to be of the kind that it will write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..gemma.generate import Sampling, generate_rows
from ..gemma.tokenizer import END_OF_TURN, require_tokenizer

ROWS = 32  # texts that are written side by side


def own_text(model: Any, tokens: int, seed: int = 0, progress: Callable = iter) -> str:
    """At least so many tokens, drawn as they are (temperature 1), in texts that begin with BOS alone.

    A model made for chat is given the beginning of a user's turn, and writes the question as well as the answer.

    progress: wraps the steps, of which each writes one token of every text.
    """
    tokenizer = require_tokenizer(model, "calibrate")
    chat = tokenizer.marks_turns and model.side_files.chat_template is not None
    beginning = tokenizer.encode("<start_of_turn>user\n" if chat else "")
    stop = model.side_files.stop_tokens - ({END_OF_TURN} if chat else set())
    length = min(-(-tokens // ROWS), model.config.max_positions - len(beginning))
    texts: list[str] = []
    written = 0
    while written < tokens:
        rows: list[list[int]] = [[] for _ in range(ROWS)]
        steps = generate_rows(model, [beginning] * ROWS, length, Sampling(1.0, seed=seed), stop=stop)
        for chosen in progress(steps):
            for row, token in zip(rows, chosen, strict=True):
                row += [] if token is None or token in stop else [token]
        texts += [tokenizer.decode(beginning[1:] + row) for row in rows]
        written += max(1, sum(map(len, rows)))
        seed += 1
    return "\n\n".join(texts)
