"""Turns with one model and one cache: what was said before is not computed again. Lives once, serves both backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import TPAError
from .chat import chat_tokens, check_system, next_turn, prompt_tokens, stop_tokens
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
        self._before: list[tuple[list[int], list[tuple[str, str]]]] = []  # both, before each turn
        self._images: list[np.ndarray] = []  # every image shown, [c,x,y]

    def say(self, text: str, images: Any = None) -> Iterator[str]:
        """Stream the model's answer to one more text, and to images [i,c,x,y] in it or before it."""
        shown = [] if images is None else list(check_pixels(as_pixels(images), require_vision(self.model.config)))
        asked = self._asked(text, len(shown))
        if len(asked) + self.max_new_tokens > self.max_len:
            raise TPAError(
                f"chat: {len(self.ids)} tokens said, {len(asked) - len(self.ids)} new and {self.max_new_tokens} of the "
                f"answer exceed the {self.max_len} of the cache; begin again with /reset"
            )
        self._keep(asked)
        self._before.append((self.ids, self.said))
        self.ids, self.said = asked, [*self.said, ("user", text), ("model", "")]
        self._images += shown
        pending = self.ids[int(self.cache.lengths_b[0]) :]
        count = self._images_in(pending)
        seen = np.stack(self._images[-count:]) if count else None
        steps = generate_tokens(self.model, pending, self.max_new_tokens, self.sampling, self.cache, seen, self.stop)
        try:
            yield from self._answer(steps)
        except TPAError:
            self.undo()
            raise

    def _answer(self, steps: Iterator[int]) -> Iterator[str]:
        """Tokens as pieces of text. What ends a turn belongs to the next one."""
        stream = TextStream(self.tokenizer)
        for token in steps:
            if token not in self.stop:
                self.ids.append(token)
                yield self._said(stream.push(token))
        yield self._said(stream.push())

    def _said(self, piece: str) -> str:
        self.said[-1] = "model", self.said[-1][1] + piece
        return piece

    def undo(self) -> bool:
        """Take the last turn back; False where there is none. Past the window its text must be read anew."""
        if not self._before:
            return False
        ids, said = self._before.pop()
        self._keep(ids)
        self.ids, self.said = ids, said
        del self._images[self._images_in(ids) :]
        return True

    def _keep(self, ids: list[int]) -> None:
        """The cache forgets what does not begin a text of these ids."""
        shared = next((i for i, (a, b) in enumerate(zip(self.ids, ids)) if a != b), min(len(self.ids), len(ids)))
        try:
            self.cache.truncate(shared)
        except TPAError:  # window layers have overwritten what they would need
            self.cache.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.ids, self.said, self._before, self._images = [], [], [], []
        self.cache.reset()

    def _images_in(self, ids: list[int]) -> int:
        vision = self.model.config.vision
        return ids.count(vision.image_token) // vision.tokens_per_image if vision else 0

    def _asked(self, text: str, images: int = 0) -> list[int]:
        """The ids of everything said and of one more text, up to where the model's answer begins."""
        if not text.strip():
            raise TPAError("chat: the text must not be empty")
        if not self.ids:
            return prompt_tokens(self.model, text, self.chat, images, self.system)
        vision = self.model.config.vision
        text = place_images(text, images) if vision else text
        if not self.chat:
            return [*self.ids, *self.tokenizer.encode(text, bos=False, vision=vision)]
        said = self.said if self.system is None else [("system", self.system), *self.said]
        new = next_turn(self.tokenizer, self.model.side_files, said, text, vision)
        if new is None:  # earlier turns look otherwise now
            return chat_tokens(self.tokenizer, self.model.side_files, [*said, ("user", text)], vision)
        return [*self.ids, *new]
