"""Gemma's tokenizer. Lives once and serves both backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TPAError
from .config import VisionConfig
from .pieces import JSON, MODEL, read_pieces

PAD, EOS, BOS, UNK = 0, 1, 2, 3
START_OF_TURN, END_OF_TURN = 105, 106
DEFAULT_STOP = frozenset({EOS, END_OF_TURN})  # where no file of a model says what ends a text
START_OF_IMAGE = "<start_of_image>"  # where an image goes in a text


class Tokenizer:
    """Text <-> token ids. `files` are what it was read from, kept so that a saved model can carry them."""

    def __init__(
        self,
        files: bytes | Mapping[str, bytes],
        source: str = "tokenizer.model",
        added: Mapping[str, int] | None = None,
        hidden: frozenset[int] = frozenset(),
    ):
        """files: a tokenizer.model, or several files by name. added: tokens beside those of a tokenizer.model; hidden:
        ids that are no part of its texts.
        """
        self.files = {MODEL: files} if isinstance(files, bytes) else dict(files)
        self._pieces = read_pieces(self.files, source, added or {}, hidden)
        self.vocab_size, self.bos = self._pieces.size, self._pieces.bos
        self.marks_turns = self._pieces.encode("<start_of_turn>") == [START_OF_TURN]

    @classmethod
    def from_file(
        cls, path: str | Path, added: Mapping[str, int] | None = None, hidden: frozenset[int] = frozenset()
    ) -> Tokenizer:
        """From a tokenizer.model or a tokenizer.json."""
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as problem:
            raise TPAError(f"tokenizer: cannot read {path}: {problem.strerror or problem}") from None
        return cls({JSON if path.suffix == ".json" else MODEL: content}, str(path), added, hidden)

    def encode(self, text: str, bos: bool = True, vision: VisionConfig | None = None) -> list[int]:
        """Token ids of plain text, BOS first: without it Gemma's predictions are meaningless.

        vision: each <start_of_image> becomes an image's tokens, with an empty line before and after them.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes that were no UTF-8
            raise TPAError("tokenizer: the text must be UTF-8, got bytes that are not") from None
        ids = [self.bos] if bos else []
        parts = text.split(START_OF_IMAGE) if vision else [text]
        for number, part in enumerate(parts):
            if vision and number > 0:
                ids += image_tokens(vision)
            before, after = "\n\n" * (number > 0), "\n\n" * (number < len(parts) - 1)
            ids += self._pieces.encode(before + part + after)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([int(token) for token in ids])


def require_tokenizer(model: Any, stage: str) -> Tokenizer:
    """The model's tokenizer, or one line that says how to give one."""
    if model.tokenizer is None:
        raise TPAError(
            f"{stage}: the model has no tokenizer, and text needs one; give its file with tokenizer= (--tokenizer)"
        )
    return model.tokenizer


def image_tokens(vision: VisionConfig) -> list[int]:
    """What stands for one image: a start, the placeholders of its soft tokens, an end.

    >>> image_tokens(VisionConfig(tokens_per_image=4))
    [255999, 262144, 262144, 262144, 262144, 256000]
    """
    return [vision.start_token, *[vision.image_token] * vision.tokens_per_image, vision.end_token]


def place_images(prompt: str, count: int) -> str:
    """The prompt with a <start_of_image> for each of `count` images: where it has them, else in front of it.

    >>> place_images("What is this?", 1)
    '<start_of_image>What is this?'
    """
    found = prompt.count(START_OF_IMAGE)
    if found == 0:
        return START_OF_IMAGE * count + prompt
    if found != count:
        raise TPAError(
            f"images: the prompt must have one {START_OF_IMAGE} for each image, got {found} for {count} images"
        )
    return prompt
