"""Turns with one model and one cache: what was said before is not computed again. Lives once, serves both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .errors import TPAError
from .generate import TextStream, require_tokenizer
from .tokenizer import END_OF_TURN, STOP


class Conversation:
    """A model that is talked to. The cache keeps every turn; `undo` takes the last one back.

    generate_tokens: that of the model's backend. max_len: tokens the cache has room for. chat: wrap every text in
    Gemma's chat template; without it texts simply follow each other. sampling: arguments of `generate_tokens`.
    """

    def __init__(
        self,
        model: Any,
        generate_tokens: Callable[..., Iterator[int]],
        max_len: int,
        chat: bool = True,
        max_new_tokens: int = 256,
        **sampling: Any,
    ):
        self.tokenizer = require_tokenizer(model)
        self.model, self.chat, self.max_new_tokens, self.sampling = model, chat, max_new_tokens, sampling
        self.max_len = min(max_len, model.config.max_positions)
        self.cache = model.new_cache(1, self.max_len)
        self.ids: list[int] = []  # everything said; the cache holds the beginning of it
        self._turns: list[int] = []  # where each turn began
        self._generate_tokens = generate_tokens

    def say(self, text: str) -> Iterator[str]:
        """Stream the model's answer to one more text."""
        asked = self._turn(text)
        if len(self.ids) + len(asked) + self.max_new_tokens > self.max_len:
            raise TPAError(
                f"chat: {len(self.ids)} tokens said, {len(asked)} new and {self.max_new_tokens} of the answer exceed "
                f"the {self.max_len} of the cache; begin again with /reset"
            )
        self._turns.append(len(self.ids))
        self.ids += asked
        pending = self.ids[int(self.cache.lengths_b[0]) :]
        stream = TextStream(self.tokenizer)
        for token in self._generate_tokens(self.model, pending, self.max_new_tokens, cache=self.cache, **self.sampling):
            self.ids.append(token)
            if token not in STOP:
                yield stream.push(token)
        yield stream.rest()

    def undo(self) -> bool:
        """Take the last turn back; False where there is none. Past the window its text must be read anew."""
        if not self._turns:
            return False
        self.ids = self.ids[: self._turns.pop()]
        try:
            self.cache.truncate(len(self.ids))
        except TPAError:  # window layers have overwritten what they would need
            self.cache.reset()
        return True

    def reset(self) -> None:
        """Forget everything."""
        self.ids, self._turns = [], []
        self.cache.reset()

    def _turn(self, text: str) -> list[int]:
        if not text.strip():
            raise TPAError("chat: the text must not be empty")
        if not self.chat:
            return self.tokenizer.encode(text, bos=not self.ids)
        if not self.ids:
            return self.tokenizer.encode_chat([("user", text)])
        closed = "" if self.ids[-1] == END_OF_TURN else "<end_of_turn>"
        said = f"{closed}\n<start_of_turn>user\n{text.strip()}<end_of_turn>\n<start_of_turn>model\n"
        return self.tokenizer.encode(said, bos=False)
