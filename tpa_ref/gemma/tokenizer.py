"""Gemma's SentencePiece tokenizer and chat template. Lives once and serves both backends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TPAError
from .config import VisionConfig

PAD, EOS, BOS, UNK = 0, 1, 2, 3
START_OF_TURN, END_OF_TURN = 105, 106
STOP = frozenset({EOS, END_OF_TURN})
START_OF_IMAGE = "<start_of_image>"  # where an image goes in a text


class Tokenizer:
    """Text <-> token ids. `proto` are the bytes of a tokenizer.model, kept so that a saved model can carry them."""

    def __init__(self, proto: bytes, source: str = "tokenizer.model"):
        import sentencepiece  # imported here: logits need no tokenizer

        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError:
            raise TPAError(f"tokenizer: {source} is not a SentencePiece model") from None
        self.proto = proto
        self.vocab_size: int = self._pieces.vocab_size()

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as problem:
            raise TPAError(f"tokenizer: cannot read {path}: {problem.strerror or problem}") from None

    def encode(self, text: str, bos: bool = True, vision: VisionConfig | None = None) -> list[int]:
        """Token ids of plain text, BOS first: without it Gemma's predictions are meaningless.

        vision: each <start_of_image> becomes an image's tokens, with an empty line before and after them.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes that were no UTF-8
            raise TPAError("tokenizer: the text must be UTF-8, got bytes that are not") from None
        ids = [BOS] if bos else []
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


def chat_text(turns: Sequence[tuple[str, str]]) -> str:
    """Gemma's chat template, without BOS; a leading "system" text goes before the first user text.

    >>> chat_text([("user", " Hi ")])
    '<start_of_turn>user\\nHi<end_of_turn>\\n<start_of_turn>model\\n'
    """
    turns = list(turns)
    if turns and turns[0][0] == "system":
        if len(turns) < 2:
            raise TPAError("chat: a system text needs a user turn after it, got none")
        turns[:2] = [("user", f"{turns[0][1].strip()}\n\n{turns[1][1].strip()}")]
    for number, (role, _) in enumerate(turns):
        expected = "model" if number % 2 else "user"
        if role != expected:
            raise TPAError(f"chat: roles must alternate, turn {number} must be {expected!r}, got {role!r}")
    said = "".join(f"<start_of_turn>{role}\n{text.strip()}<end_of_turn>\n" for role, text in turns)
    return said + "<start_of_turn>model\n"
