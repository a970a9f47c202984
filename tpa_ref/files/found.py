"""A checkpoint that is looked at and checked before a tensor is read: config, tokenizer, names, shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TPAError
from ..gemma.config import VARIANTS, GemmaConfig, VisionConfig
from ..gemma.tokenizer import Tokenizer
from ..gemma.weights import hf_names, is_vision
from . import formats, names
from .formats import Entry
from .pairs import is_factor

SPARE_ROWS = 64  # embedding rows a checkpoint may have beyond the tokenizer's pieces


@dataclass
class Found:
    """A checkpoint that has been looked at and checked, but not read."""

    path: Path
    config: GemmaConfig
    tpa: dict[str, Any] | None  # the "tpa" entry of a saved model's config
    tokenizer: Tokenizer | None
    stored_dtype: str
    entries: dict[str, Entry]  # by the names of `hf_names`, and tpa.* of a saved model


def inspect(
    path: str | Path,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Found:
    """Recognise the format, read config and tokenizer, and check every tensor's name and shape, without reading one."""
    path = Path(path)
    if variant is not None and variant not in VARIANTS:
        raise TPAError(f"load: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    container = formats.open_checkpoint(path)
    entries = names.named_entries(container.entries)
    found_config = names.with_rows(_choose_config(path, container.content, variant, config, entries), entries)
    found_config, entries = names.with_vision(found_config, entries)
    stored_dtype = _stored_dtype(path, {e.dtype for name, e in entries.items() if not name.startswith("tpa.")})
    saved_tpa = container.content.get("tpa") if container.content else None
    if saved_tpa is not None and not isinstance(saved_tpa, dict):
        raise TPAError(f"load: the tpa entry of {path} must be an object, got {type(saved_tpa).__name__}")
    if saved_tpa is not None:
        formats.check_version(path, saved_tpa.get("version"))
    entries, problems = names.split_qkv(entries, found_config)
    check_tensors(path, {name: entry.shape for name, entry in entries.items()}, found_config, saved_tpa, problems)
    words = Tokenizer.from_file(tokenizer) if tokenizer else None
    if words is None and container.proto:
        words = Tokenizer(container.proto, str(path))
    if words and not words.vocab_size <= found_config.vocab_size <= words.vocab_size + SPARE_ROWS:
        raise TPAError(
            f"load: the tokenizer's pieces must match the embedding rows (up to {SPARE_ROWS} spare), "
            f"got {words.vocab_size} pieces and {found_config.vocab_size} rows"
        )
    return Found(path, found_config, saved_tpa, words, stored_dtype, entries)


def _stored_dtype(path: Path, kinds: set[str]) -> str:
    """The widest dtype of the weights; refused where Gemma 3 cannot live in it."""
    if "float16" in kinds:
        raise TPAError(
            f"load: {path} holds float16 weights, but Gemma 3's activations exceed its range: use bfloat16 or float32"
        )
    allowed = ("float64", "float32", "bfloat16")
    if unknown := sorted(kinds - set(allowed)):
        raise TPAError(f"load: {path}: weights must be bfloat16, float32 or float64, got {unknown[0]}")
    return next((dtype for dtype in allowed if dtype in kinds), "float32")


def _choose_config(
    path: Path,
    content: dict[str, Any] | None,
    variant: str | None,
    config: GemmaConfig | str | Path | None,
    entries: dict[str, Entry],
) -> GemmaConfig:
    """The config given, else the one beside the weights, else the published one of this size; no contradictions."""
    layers, width = names.shown_size(entries)
    if isinstance(config, GemmaConfig):
        chosen = config
    elif config is not None:
        chosen = GemmaConfig.from_hf(Path(config))
    elif content is not None:
        chosen = GemmaConfig.from_hf(content)
    else:
        sizes = {(made.num_layers, made.hidden_size): made for made in (make() for make in VARIANTS.values())}
        if (layers, width) in sizes:  # published sizes have the published image tower, or none
            chosen = replace(sizes[layers, width], vision=VisionConfig() if any(map(is_vision, entries)) else None)
        elif variant is not None:  # its size is contradicted below
            chosen = GemmaConfig.of_variant(variant)
        else:
            raise TPAError(
                f"load: {path} comes without config.json and its {layers} layers of width {width} are no published "
                f"size; give config= (--config)"
            )
    if variant is not None:
        wanted = GemmaConfig.of_variant(variant)
        shown = (layers, width) if content is None and config is None else (chosen.num_layers, chosen.hidden_size)
        if shown != (wanted.num_layers, wanted.hidden_size):
            raise TPAError(
                f"load: variant {variant} has {wanted.num_layers} layers of width {wanted.hidden_size}, "
                f"but {path} has {shown[0]} of {shown[1]}"
            )
    return chosen


def check_tensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    config: GemmaConfig,
    saved_tpa: dict[str, Any] | None,
    problems: Iterable[str] = (),
) -> None:
    """Every expected tensor is there with its shape, and nothing else: one error names all that is not so."""
    expected = hf_names(config)
    problems = list(problems)
    problems += [f"missing {name}" for name in expected if name not in shapes]
    problems += [
        f"{name} must be {list(expected[name])}, got {list(shape)}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    problems += [
        f"unexpected {name}" for name in shapes if name not in expected and not (saved_tpa and is_factor(name, config))
    ]
    if problems:
        more = f" ... and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise TPAError(f"load: {path} does not fit its config: {'; '.join(problems[:4])}{more}")
