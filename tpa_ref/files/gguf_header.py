"""The header of a GGUF file: what it says about the model, and where its tensors lie.

    "GGUF", version, number of tensors, number of values      little-endian, 4 + 4 + 8 + 8 bytes
    values        name, type, value; an array: type of its items, their number, the items
    tensors       name, number of axes, their lengths (the fastest first), type of its blocks, offset of its data
    data          from the next multiple of general.alignment on

github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads it as well, but takes 16 s for the 262,144
tokens of Gemma and believes every length. Here nothing is taken that does not lie in the file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TPAError

NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))  # type of a value: its `struct` letter
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MOST_AXES, LONGEST_NAME = 4, 64


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its blocks, in bytes start ... stop."""

    shape: tuple[int, ...]  # the slowest axis first, as in NumPy
    kind: Any  # a gguf.GGMLQuantizationType
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """Everything a file says before its data, which is mapped and not read."""

    path: Path
    data: np.ndarray  # all bytes of the file
    values: dict[str, Any]  # str, int, float, bool, lists of str, arrays of numbers
    tensors: dict[str, Tensor]

    def number(self, key: str, default: float | None = None) -> Any:
        """A number of the metadata; without a default it must be there."""
        value = self.values.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            found = "none" if value is None else type(value).__name__
            raise TPAError(f"load: {key} of {self.path} must be a number, got {found}")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text of the metadata."""
        value = self.values.get(key, default)
        if value is not None and not isinstance(value, str):
            raise TPAError(f"load: {key} of {self.path} must be a text, got {type(value).__name__}")
        return value


class Bytes:
    """A place in the bytes of a file, which moves forward."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        """The next bytes; IndexError where the file has no more."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise IndexError
        return self.data[start : self.at]

    def number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize(letter)))[0]

    def string(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        letter = NUMBERS[kind]
        return np.frombuffer(self.take(count * struct.calcsize(letter)), np.dtype(letter).newbyteorder("<"))


def read_header(path: Path, gguf: Any) -> Header:
    """The header of a file, every length in it checked. gguf: the package, which knows the types of blocks."""
    if not path.stat().st_size:
        raise TPAError(f"load: {path} is empty")
    data = np.memmap(path, mode="r")
    source = Bytes(data.data)
    try:
        _check_start(path, source)
        tensor_count, value_count = source.number("Q"), source.number("Q")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            _put(path, values, source.string(), source.value(source.number("I")))
        tensors = _read_tensors(path, source, tensor_count, values.get("general.alignment", 32), gguf)
    except IndexError:
        raise TPAError(f"load: {path} is truncated or damaged: its header goes on after the last byte") from None
    except UnicodeDecodeError:
        raise TPAError(f"load: {path} is damaged: a text in its header is not UTF-8") from None
    except (KeyError, OverflowError, ValueError) as problem:
        raise TPAError(f"load: {path} is damaged: its header holds an unknown type: {problem}") from None
    return Header(path, data, values, tensors)


def _check_start(path: Path, source: Bytes) -> None:
    magic, version = bytes(source.take(4)), source.number("I")
    if magic != b"GGUF":
        raise TPAError(f"load: {path} must begin with b'GGUF', got {magic!r}")
    if version and version % 2**16 == 0:
        raise TPAError(f"load: {path} is big-endian, and only little-endian files are read")
    if version not in VERSIONS:
        raise TPAError(f"load: the GGUF version of {path} must be 2 or 3, got {version}")


def _put(path: Path, held: dict[str, Any], name: str, value: Any) -> None:
    if name in held:
        raise TPAError(f"load: {path} holds {name[:80]!r} twice")
    held[name] = value


def _read_tensors(path: Path, source: Bytes, count: int, alignment: Any, gguf: Any) -> dict[str, Tensor]:
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise TPAError(f"load: general.alignment of {path} must lie in 1 ... 2^20, got {alignment!r:.60}")
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, axes = source.string(), source.number("I")
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise TPAError(
                f"load: names in {path} must be {LONGEST_NAME} printable characters at most, got {name[:80]!r}"
            )
        if not 1 <= axes <= MOST_AXES:
            raise TPAError(f"load: {name!r} of {path} must have 1 to {MOST_AXES} axes, got {axes}")
        lengths = tuple(source.number("Q") for _ in range(axes))
        _put(path, found, name, (lengths[::-1], source.number("I"), source.number("Q")))
    start = -(-source.at // alignment) * alignment
    return {name: _tensor(path, name, *said, start, len(source.data), gguf) for name, said in found.items()}


def _tensor(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, size: int, gguf: Any
) -> Tensor:
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise TPAError(f"load: {name!r} of {path} has blocks of a type that gguf does not know: {kind}") from None
    numbers, bytes_each = gguf.GGML_QUANT_SIZES[known]
    if not all(shape) or shape[-1] % numbers:
        raise TPAError(f"load: rows of {name!r} in {path} must be blocks of {numbers}, got the shape {shape}")
    if len(shape) == 1 and numbers > 1:
        raise TPAError(f"load: {name!r} of {path} is a vector, which must not be in blocks, got {known.name}")
    start += offset
    stop = start + math.prod(shape) // numbers * bytes_each
    if stop > size:
        raise TPAError(f"load: {path} is truncated or damaged: {name!r} ends at byte {stop:,} of {size:,}")
    return Tensor(shape, known, start, stop)
