"""Turns with one model and one cache: what was said before is not computed again. Lives once, serves both backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import TPAError
from .chat import check_system, next_turn, prompt_tokens, stop_tokens
from .generate import GREEDY, Sampling, TextStream, generate_tokens
from .tokenizer import place_images, require_tokenizer
from .vision import as_pixels, check_pixels, require_vision


class Conversation:
    """A model that is talked to. The cache keeps every turn; `undo` takes the last one back.

    max_len: tokens the cache has room for. chat: wrap every text in the model's chat template; without it texts simply
    follow each other. system: what the model is told before the first text.
    """

    def __init__(
        self,
        model: Any,
        max_len: int,
        chat: bool = True,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        system: str | None = None,
    ):
        check_system(system, chat)
        self.tokenizer = require_tokenizer(model, "generate")
        self.model, self.chat, self.max_new_tokens, self.sampling = model, chat, max_new_tokens, sampling
        self.stop, self.system = stop_tokens(model, chat), system
        self.max_len = min(max_len, model.config.max_positions)
        self.cache = model.new_cache(1, self.max_len)
        self.ids: list[int] = []  # everything said; the cache holds the beginning of it
        self.said: list[tuple[str, str]] = []  # the same as (role, text)
        self._turns: list[int] = []  # where each turn began
        self._images: list[np.ndarray] = []  # every image shown, [c,x,y]

    def say(self, text: str, images: Any = None) -> Iterator[str]:
        """Stream the model's answer to one more text, and to images [i,c,x,y] in it or before it."""
        shown = [] if images is None else list(check_pixels(as_pixels(images), require_vision(self.model.config)))
        asked = self._turn(text, len(shown))
        if len(self.ids) + len(asked) + self.max_new_tokens > self.max_len:
            raise TPAError(
                f"chat: {len(self.ids)} tokens said, {len(asked)} new and {self.max_new_tokens} of the answer exceed "
                f"the {self.max_len} of the cache; begin again with /reset"
            )
        self._turns.append(len(self.ids))
        self.ids += asked
        self._images += shown
        pending = self.ids[int(self.cache.lengths_b[0]) :]
        count = self._images_in(pending)
        seen = np.stack(self._images[-count:]) if count else None
        stream = TextStream(self.tokenizer)
        answer: list[str] = []
        steps = generate_tokens(self.model, pending, self.max_new_tokens, self.sampling, self.cache, seen, self.stop)
        try:
            for token in steps:
                if token not in self.stop:  # what ends a turn belongs to the next one
                    self.ids.append(token)
                    answer.append(stream.push(token))
                    yield answer[-1]
            answer.append(stream.push())
            yield answer[-1]
        finally:
            self.said += [("user", text), ("model", "".join(answer))]

    def undo(self) -> bool:
        """Take the last turn back; False where there is none. Past the window its text must be read anew."""
        if not self._turns:
            return False
        self.ids, self.said = self.ids[: self._turns.pop()], self.said[:-2]
        del self._images[self._images_in(self.ids) :]
        try:
            self.cache.truncate(len(self.ids))
        except TPAError:  # window layers have overwritten what they would need
            self.cache.reset()
        return True

    def reset(self) -> None:
        """Forget everything."""
        self.ids, self.said, self._turns, self._images = [], [], [], []
        self.cache.reset()

    def _images_in(self, ids: list[int]) -> int:
        vision = self.model.config.vision
        return ids.count(vision.image_token) // vision.tokens_per_image if vision else 0

    def _with_system(self, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return turns if self.system is None else [("system", self.system), *turns]

    def _turn(self, text: str, images: int = 0) -> list[int]:
        if not text.strip():
            raise TPAError("chat: the text must not be empty")
        if not self.ids:
            return prompt_tokens(self.model, text, self.chat, images, self.system)
        vision = self.model.config.vision
        text = place_images(text, images) if vision else text
        if self.chat:
            return next_turn(self.tokenizer, self.model.side_files, self._with_system(self.said), text, vision)
        return self.tokenizer.encode(text, bos=False, vision=vision)
