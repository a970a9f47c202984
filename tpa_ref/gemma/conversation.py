"""Turns with one model and one cache: what was said before is not computed again. Lives once, serves both backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import TPAError
from .generate import GREEDY, Sampling, TextStream, generate_tokens, prompt_tokens
from .tokenizer import END_OF_TURN, STOP, chat_text, place_images, require_tokenizer
from .vision import as_pixels, check_pixels, require_vision


class Conversation:
    """A model that is talked to. The cache keeps every turn; `undo` takes the last one back.

    max_len: tokens the cache has room for. chat: wrap every text in Gemma's chat template; without it texts simply
    follow each other.
    """

    def __init__(
        self, model: Any, max_len: int, chat: bool = True, max_new_tokens: int = 256, sampling: Sampling = GREEDY
    ):
        self.tokenizer = require_tokenizer(model, "generate")
        self.model, self.chat, self.max_new_tokens, self.sampling = model, chat, max_new_tokens, sampling
        self.max_len = min(max_len, model.config.max_positions)
        self.cache = model.new_cache(1, self.max_len)
        self.ids: list[int] = []  # everything said; the cache holds the beginning of it
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
        for token in generate_tokens(self.model, pending, self.max_new_tokens, self.sampling, self.cache, seen):
            self.ids.append(token)
            if token not in STOP:
                yield stream.push(token)
        yield stream.push()

    def undo(self) -> bool:
        """Take the last turn back; False where there is none. Past the window its text must be read anew."""
        if not self._turns:
            return False
        self.ids = self.ids[: self._turns.pop()]
        del self._images[self._images_in(self.ids) :]
        try:
            self.cache.truncate(len(self.ids))
        except TPAError:  # window layers have overwritten what they would need
            self.cache.reset()
        return True

    def reset(self) -> None:
        """Forget everything."""
        self.ids, self._turns, self._images = [], [], []
        self.cache.reset()

    def _images_in(self, ids: list[int]) -> int:
        vision = self.model.config.vision
        return ids.count(vision.image_token) // vision.tokens_per_image if vision else 0

    def _turn(self, text: str, images: int = 0) -> list[int]:
        if not text.strip():
            raise TPAError("chat: the text must not be empty")
        vision = self.model.config.vision
        text = text.strip() if self.chat else text
        if not self.ids:
            return prompt_tokens(self.tokenizer, text, self.chat, vision, images)
        text = place_images(text, images) if vision else text
        if self.chat:
            closed = "" if self.ids[-1] == END_OF_TURN else "<end_of_turn>"
            text = f"{closed}\n" + chat_text([("user", text)])
        return self.tokenizer.encode(text, bos=False, vision=vision)
