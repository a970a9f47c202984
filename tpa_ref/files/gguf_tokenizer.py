"""Gemma's tokenizer inside a GGUF file, as the SentencePiece model it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TPAError
from ..gemma.tokenizer import BOS, EOS, PAD, UNK

# Types of pieces, the same numbers in GGUF and SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2


def tokenizer_proto(values: dict[str, Any], path: Path) -> bytes | None:
    """The bytes of a tokenizer.model from the metadata of a file; None where it has no tokens.

    Settings that a GGUF leaves out are those of the published tokenizer: no normalization, no space put in front, byte
    fallback, digits one by one.
    """
    tokens, scores, types = (values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    if tokens is None:
        return None
    _check(values, tokens, scores, types, path)
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError:
        raise TPAError(
            f"load: the tokenizer of {path} needs protobuf, which is not installed: pip install -e .[gguf]"
        ) from None
    model = ModelProto()
    kinds = [piece_type(index, kind) for index, kind in enumerate(types.tolist())]
    for token, score, kind in zip(tokens, scores.tolist(), kinds):
        # llama.cpp writes the spaces of some pieces as spaces; SentencePiece escapes them in pieces as in texts.
        model.pieces.add(piece=token.replace(" ", "▁"), score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = BPE, len(tokens), BYTE in kinds
    trainer.split_digits = trainer.allow_whitespace_only_pieces = True
    for name, index in (("pad", PAD), ("eos", EOS), ("bos", BOS), ("unk", UNK)):
        setattr(trainer, f"{name}_id", index)
        setattr(trainer, f"{name}_piece", tokens[index])
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    return model.SerializeToString()


def piece_type(index: int, kind: int) -> int:
    """The type that SentencePiece must be told.

    GGUF calls <start_of_turn> and thousands of others control pieces, as which no text would ever become them.

    >>> [piece_type(index, CONTROL) for index in (BOS, UNK, 105)] == [CONTROL, UNKNOWN, USER_DEFINED]
    True
    """
    if index in (PAD, EOS, BOS):
        return CONTROL
    if index == UNK:
        return UNKNOWN
    return USER_DEFINED if kind == CONTROL else kind


def _check(values: dict[str, Any], tokens: Any, scores: Any, types: Any, path: Path) -> None:
    """Refuse what is no SentencePiece model."""
    kind = values.get("tokenizer.ggml.model")
    if kind != "llama":
        raise TPAError(f"load: the tokenizer of {path} must be 'llama' (SentencePiece), got {kind!r:.60}")
    if not isinstance(tokens, list) or not all(hasattr(x, "dtype") for x in (scores, types)):
        raise TPAError(f"load: the tokenizer of {path} must have tokens, and a score and a type for each")
    if not UNK < len(tokens) == len(scores) == len(types):
        raise TPAError(
            f"load: the tokenizer of {path} must have a score and a type for each token, got {len(tokens)} tokens, "
            f"{len(scores)} scores and {len(types)} types"
        )
    if scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise TPAError(f"load: the scores in the tokenizer of {path} must be finite floats, got {scores.dtype}")
    if types.dtype.kind not in "iu" or not set(types.tolist()) <= set(range(NORMAL, 7)):
        raise TPAError(f"load: the types of pieces in the tokenizer of {path} must lie in 1 ... 6, got others")
