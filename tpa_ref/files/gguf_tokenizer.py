"""Gemma's tokenizer inside a GGUF file, as the SentencePiece model it was made of."""

from __future__ import annotations

import numpy as np

from ..errors import TPAError
from ..gemma.tokenizer import BOS, EOS, PAD, UNK
from .gguf_header import Header

# Types of pieces, the same numbers in GGUF and SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2


def tokenizer_proto(header: Header) -> bytes | None:
    """The bytes of a tokenizer.model from the metadata of a file; None where it has no tokens.

    Settings that a GGUF leaves out are those of the published tokenizer: no normalization, no space put in front, byte
    fallback, digits one by one.
    """
    if "tokenizer.ggml.tokens" not in header.values:
        return None
    tokens, scores, types = _read_pieces(header)
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError:
        raise TPAError(
            f"load: the tokenizer of {header.path} needs protobuf, which is not installed: pip install -e .[gguf]"
        ) from None
    model = ModelProto()
    kinds = [piece_type(index, kind) for index, kind in enumerate(types)]
    for token, score, kind in zip(tokens, scores, kinds):
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


def _read_pieces(header: Header) -> tuple[list[str], list[float], list[int]]:
    """Text, score and type of each piece; what is no SentencePiece model is refused."""
    where = f"load: the tokenizer of {header.path} must"
    if (kind := header.text("tokenizer.ggml.model")) != "llama":
        raise TPAError(f"{where} be 'llama' (SentencePiece), got {kind!r:.60}")
    tokens, scores, types = (header.values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    if not (isinstance(tokens, list) and isinstance(scores, np.ndarray) and isinstance(types, np.ndarray)):
        raise TPAError(f"{where} have a list of tokens, one of scores and one of types, got something else")
    if not UNK < len(tokens) == len(scores) == len(types):
        raise TPAError(
            f"{where} have a score and a type for each of at least {UNK + 1} tokens, got {len(tokens)} tokens, "
            f"{len(scores)} scores and {len(types)} types"
        )
    if scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise TPAError(f"{where} have finite scores, got {scores.dtype} with {scores[~np.isfinite(scores)][:1]}")
    if types.dtype.kind not in "iu" or not np.isin(types, range(NORMAL, BYTE + 1)).all():
        raise TPAError(f"{where} have types of {NORMAL} to {BYTE}, got {types.dtype} up to {types.max()}")
    return tokens, scores.tolist(), types.tolist()
