"""The two tokenizer file formats, with one interface.

    tokenizer.json    read with the `tokenizers` library, as `transformers` does
    tokenizer.model   read with SentencePiece

Special tokens in a text (`<bos>`, `<|im_start|>`) mean what they mean in `transformers`: themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import TPAError

JSON, MODEL = "tokenizer.json", "tokenizer.model"
GEMMA_BOS = 2  # where a tokenizer names none


class Pieces(Protocol):
    """Text <-> token ids."""

    size: int  # embedding rows that its vocabulary needs, added tokens apart
    bos: int  # what every text begins with

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def read_pieces(files: Mapping[str, bytes], source: str, added: Mapping[str, int], hidden: frozenset[int]) -> Pieces:
    """The tokenizer in some files; tokenizer.json decides where it is there, as in `transformers`.

    added: tokens beside those of a tokenizer.model; hidden: ids that are no part of its texts. Without the `tokenizers`
    library tokenizer.model is used if it encodes every added token alike.
    """
    if JSON not in files:
        return SentencePieces(files[MODEL], source, added, hidden)
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        if MODEL in files:
            pieces = SentencePieces(files[MODEL], source, added, hidden)
            if all(pieces.encode(text) == [token] for text, token in json_added(files[JSON], source).items()):
                return pieces
        raise TPAError(
            f"tokenizer: reading {JSON} of {source} needs the tokenizers library, which is not installed: "
            f"pip install tokenizers"
        ) from None
    return JsonPieces(files[JSON], source, added, hidden)


class SentencePieces:
    """A tokenizer.model."""

    def __init__(self, proto: bytes, source: str, added: Mapping[str, int], hidden: frozenset[int]):
        import sentencepiece  # imported here: logits need no tokenizer

        try:
            if not proto:
                raise RuntimeError
            self._pieces = read = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError:
            raise TPAError(f"tokenizer: {source} is not a SentencePiece model") from None
        self.bos = GEMMA_BOS if read.bos_id() < 0 else read.bos_id()
        self.size: int = read.vocab_size()
        # SentencePiece recognises these in no text, and decodes them to nothing useful.
        special = {read.pad_id(), read.eos_id(), read.bos_id(), read.unk_id()} - {-1}
        self._hidden = hidden | special
        self._whole = {read.id_to_piece(token): token for token in special} | dict(added)
        self._added = {token: text for text, token in added.items() if token >= self.size}
        # Capturing, so that what is split at stays; the longest first
        longest_first = sorted(self._whole, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            ids += [self._whole[part]] if part in self._whole else self._pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens, and ids that mean nothing, are left out."""
        parts, run = [], []
        for token in [*(token for token in ids if token not in self._hidden), -1]:
            if 0 <= token < self.size:
                run.append(token)
            else:
                parts += [self._pieces.decode(run), self._added.get(token, "")]
                run = []
        return "".join(parts)


class JsonPieces:
    """A tokenizer.json."""

    def __init__(self, content: bytes, source: str, added: Mapping[str, int], hidden: frozenset[int]):
        import tokenizers

        try:
            self._pieces: Any = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as problem:  # the library raises plain ones
            raise TPAError(f"tokenizer: {source} is not a tokenizer.json: {str(problem)[:120]!r}") from None
        # What a training run left there
        self._pieces.no_truncation()
        self._pieces.no_padding()
        for text, token in sorted(added.items(), key=lambda pair: pair[1]):
            if self._pieces.token_to_id(text) is None:
                self._pieces.add_tokens([tokenizers.AddedToken(text, special=token in hidden, normalized=False)])
        found = self._pieces.token_to_id("<bos>")
        self.bos = GEMMA_BOS if found is None else found
        self.size: int = self._pieces.get_vocab_size(with_added_tokens=False)

    def encode(self, text: str) -> list[int]:
        return list(self._pieces.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens, and ids that mean nothing, are left out."""
        return self._pieces.decode([token for token in ids if 0 <= token < 2**32])


def json_added(content: bytes, source: str) -> dict[str, int]:
    """The added tokens of a tokenizer.json."""
    try:
        return {token["content"]: token["id"] for token in json.loads(content)["added_tokens"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TPAError(f"tokenizer: {source} is not a tokenizer.json") from None
