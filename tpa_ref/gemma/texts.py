"""Texts as windows of tokens, as calibration and evaluation read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import TPAError
from .tokenizer import require_tokenizer

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = PACKAGE / "texts" if (PACKAGE / "texts").is_dir() else PACKAGE.parent / "assets" / "texts"  # or a clone


def shipped(name: str) -> str:
    """A text of assets/texts: `calibration` and `holdout` of many kinds, `prose`, `code`; no document is in two."""
    return (SHIPPED / f"{name}.txt").read_text(encoding="utf-8")


def read_text(text_or_path: str | Path) -> str:
    """A text, or the content of the UTF-8 file of that name. A single line that names a file is taken as a path."""
    if not isinstance(text_or_path, str | Path):
        raise TPAError(f"text: a text or a path is needed, got {type(text_or_path).__name__}")
    if isinstance(text_or_path, Path) or ("\n" not in text_or_path and len(text_or_path) < 4096):
        path = Path(text_or_path)
        try:
            if isinstance(text_or_path, Path) or path.is_file():
                return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as problem:
            byte = problem.object[problem.start]
            raise TPAError(f"text: {path} is not UTF-8: byte {problem.start} is {byte:#x}") from None
        except OSError as problem:
            if isinstance(text_or_path, Path):
                raise TPAError(f"text: cannot read {path}: {problem.strerror or problem}") from None
    one_word = bool(text_or_path) and len(text_or_path) < 4096 and not any(map(str.isspace, text_or_path))
    if one_word and (Path(text_or_path).suffix or {"/", "\\"} & set(text_or_path) or Path(text_or_path).is_dir()):
        raise TPAError(f"text: no such file: {text_or_path}")
    return str(text_or_path)


def text_windows(
    model: Any, text_or_path: str | Path, max_tokens: int, length: int | None = None
) -> Iterator[list[int]]:
    """The text as token windows of at most `length` (default: 1024 or the model's positions), BOS on every one."""
    tokenizer = require_tokenizer(model, "text")
    length = min(length or 1024, model.config.max_positions)
    ids = tokenizer.encode(read_text(text_or_path), bos=False)[:max_tokens]
    if not ids:
        raise TPAError("text: at least one token is needed, got an empty text")
    for start in range(0, len(ids), length - 1):
        yield [tokenizer.bos, *ids[start : start + length - 1]]
