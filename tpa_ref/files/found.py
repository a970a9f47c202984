"""A checkpoint that is looked at and checked before a tensor is read: config, tokenizer, names, shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TPAError
from ..gemma.config import VARIANTS, GemmaConfig, VisionConfig
from ..gemma.tokenizer import Tokenizer
from ..gemma.weights import hf_names, is_vision
from .entry import QUANTIZED, Entry
from .formats import check_version, open_checkpoint
from .names import named_entries, split_qkv
from .pairs import is_factor

SPARE_ROWS = 64  # embedding rows a checkpoint may have beyond the tokenizer's pieces


@dataclass
class Found:
    """A checkpoint that has been looked at and checked, but not read."""

    config: GemmaConfig
    tpa: dict[str, Any] | None  # the "tpa" entry of a saved model's config
    tokenizer: Tokenizer | None
    stored_dtype: str
    entries: dict[str, Entry]  # by the names of `hf_names`, and tpa.* of a saved model
    quantized: bool = False  # a GGUF: loaded weights are stored in the dtype that they are computed in


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
    held, content, proto = open_checkpoint(path)
    entries = named_entries(held)
    config = _choose_config(path, variant, content if config is None else config, entries)
    # An image tower that only the config or only the file knows of is left out.
    if config.vision is None:
        entries = {name: entry for name, entry in entries.items() if not is_vision(name)}
    elif not any(map(is_vision, entries)):
        config = replace(config, vision=None)
    stored_dtype = _stored_dtype(path, {e.dtype for name, e in entries.items() if not name.startswith("tpa.")})
    saved_tpa = (content or {}).get("tpa")
    if saved_tpa is not None:
        if not isinstance(saved_tpa, dict):
            raise TPAError(f"load: the tpa entry of {path} must be an object, got {type(saved_tpa).__name__}")
        check_version(path, saved_tpa.get("version"))
    entries, problems = split_qkv(entries, config)
    _check_tensors(path, entries, config, bool(saved_tpa), problems)
    chosen = Tokenizer.from_file(tokenizer) if tokenizer else None
    if chosen is None and proto:
        chosen = Tokenizer(proto, str(path))
    if chosen and not chosen.vocab_size <= config.vocab_size <= chosen.vocab_size + SPARE_ROWS:
        raise TPAError(
            f"load: the tokenizer's pieces must match the embedding rows (up to {SPARE_ROWS} spare), "
            f"got {chosen.vocab_size} pieces and {config.vocab_size} rows"
        )
    quantized = any(entry.dtype == QUANTIZED for entry in entries.values())
    return Found(config, saved_tpa, chosen, stored_dtype, entries, quantized)


def _stored_dtype(path: Path, kinds: set[str]) -> str:
    """The widest dtype of the weights; refused where Gemma 3 cannot live in it."""
    if QUANTIZED in kinds:
        return "bfloat16"  # what Gemma 3 was trained in: finer than blocks
    if "float16" in kinds:
        raise TPAError(
            f"load: {path} holds float16 weights, but Gemma 3's activations exceed its range: use bfloat16 or float32"
        )
    allowed = ("float64", "float32", "bfloat16")
    if unknown := sorted(kinds - set(allowed)):
        raise TPAError(f"load: {path}: weights must be bfloat16, float32 or float64, got {unknown[0]}")
    return next((dtype for dtype in allowed if dtype in kinds), "float32")


def _choose_config(path: Path, variant: str | None, config: Any, entries: dict[str, Entry]) -> GemmaConfig:
    """The config given or found, else the published one of the size that is shown; `variant` contradicts neither."""
    numbers = [int(found[1]) for name in entries if (found := re.match(r"model\.layers\.(\d{1,4})\.", name))]
    embedding = entries.get("model.embed_tokens.weight")
    rows, width = embedding.shape if embedding and len(embedding.shape) == 2 else (0, 0)
    size = max(numbers, default=-1) + 1, width
    published = {(made.num_layers, made.hidden_size): made for made in map(GemmaConfig.of_variant, VARIANTS)}
    if config is not None:
        chosen = config if isinstance(config, GemmaConfig) else GemmaConfig.from_hf(config)
        size = chosen.num_layers, chosen.hidden_size
    elif size in published:  # with the published image tower, or none
        chosen = replace(published[size], vision=VisionConfig() if any(map(is_vision, entries)) else None)
    elif variant is None:
        raise TPAError(
            f"load: {path} comes without config.json and its {size[0]} layers of width {width} are no published "
            f"size; give config= (--config)"
        )
    wanted = GemmaConfig.of_variant(variant) if variant is not None else chosen
    if size != (wanted.num_layers, wanted.hidden_size):
        raise TPAError(
            f"load: variant {variant} has {wanted.num_layers} layers of width {wanted.hidden_size}, "
            f"but {path} has {size[0]} of {size[1]}"
        )
    # Both numbers of embedding rows occur for one and the same model.
    return replace(chosen, vocab_size=rows) if {rows, chosen.vocab_size} <= {262_144, 262_208} else chosen


def _check_tensors(
    path: Path, entries: dict[str, Entry], config: GemmaConfig, is_tpa: bool, problems: list[str]
) -> None:
    """Every expected tensor is there with its shape, and nothing else: one error names all that is not so."""
    expected = hf_names(config)
    problems = problems + [f"missing {name}" for name in expected if name not in entries]
    problems += [
        f"{name} must be {list(expected[name])}, got {list(entry.shape)}"
        for name, entry in entries.items()
        if name in expected and entry.shape != expected[name]
    ]
    problems += [
        f"unexpected {name}" for name in entries if name not in expected and not (is_tpa and is_factor(name, config))
    ]
    if problems:
        more = f" ... and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise TPAError(f"load: {path} does not fit its config: {'; '.join(problems[:4])}{more}")
