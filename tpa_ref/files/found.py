"""A checkpoint that is looked at and checked before it is loaded: config, tokenizer, names, shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TPAError
from ..gemma.config import VARIANTS, GemmaConfig, VisionConfig, published
from ..gemma.pieces import JSON, MODEL
from ..gemma.side_files import SideFiles
from ..gemma.tokenizer import Tokenizer
from ..gemma.weights import EMBED, HEAD, hf_names, is_vision
from .entry import QUANTIZED, Entry
from .formats import check_version, open_checkpoint
from .names import named_entries, split_qkv
from .pairs import is_factor

BLOCK = 8192  # rows of an embedding table that are compared at once


@dataclass
class Found:
    """A checkpoint that has been looked at and checked, but not read."""

    config: GemmaConfig
    tpa: dict[str, Any] | None  # the "tpa" entry of a saved model's config
    tokenizer: Tokenizer | None
    stored_dtype: str
    entries: dict[str, Entry]  # by the names of `hf_names`, and tpa.* of a saved model
    side_files: SideFiles = field(default_factory=SideFiles)
    notes: list[str] = field(default_factory=list)  # what was ignored, one line each

    @property
    def quantized(self) -> bool:
        """A GGUF: loaded weights are stored in the dtype that they are computed in."""
        return any(entry.dtype == QUANTIZED for entry in self.entries.values())


def inspect(
    path: str | Path,
    variant: str | None = None,
    config: GemmaConfig | str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Found:
    """Recognise the format, read config and tokenizer, and check every tensor's name and shape. Only a head of
    its own is read, to be compared with the embedding table."""
    path = Path(path)
    if variant is not None and variant not in VARIANTS:
        raise TPAError(f"load: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    held, content, files = open_checkpoint(path)
    entries, notes = named_entries(held), _ignored(path, held)
    if isinstance(config, (str, Path)):
        given, config = Path(config), GemmaConfig.from_hf(config)
        files["config.json"] = given.read_bytes()
    config = _choose_config(path, variant, content if config is None else config, entries)
    entries, config, untied = _tied(path, entries, config)
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
        if str(saved_tpa.get("version")) in ("2", "3"):  # whose config.json said nothing that the model had said
            files.pop("config.json", None)
    entries, problems = split_qkv(entries, config)
    _check_tensors(path, entries, config, bool(saved_tpa), problems)
    side_files = SideFiles({name: content for name, content in files.items() if name not in (JSON, MODEL)})
    side_files.check()
    chosen, more = _tokenizer(path, tokenizer, files, side_files, config)
    return Found(config, saved_tpa, chosen, stored_dtype, entries, side_files, notes + untied + more)


def _ignored(path: Path, held: dict[str, Entry]) -> list[str]:
    """What is there and not read, as in `transformers`."""
    notes = []
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (path / single).is_file() and (path / f"{single}.index.json").is_file():
            notes.append(f"{single}.index.json is ignored: {single} is there")
    if tables := [key for key in held if key.endswith("inv_freq")]:
        notes.append(f"{tables[0]} is ignored: RoPE follows from the config")
    return notes


def _tied(
    path: Path, entries: dict[str, Entry], config: GemmaConfig
) -> tuple[dict[str, Entry], GemmaConfig, list[str]]:
    """Is the output projection the embedding table? The tensors decide: an equal one is not kept twice."""
    head, embed = entries.get(HEAD), entries.get(EMBED)
    if head is None:
        if not config.tied:
            raise TPAError(f"load: {path}: tie_word_embeddings is false, but there is no {HEAD}")
        return entries, config, []
    others = {name: entry for name, entry in entries.items() if name != HEAD}
    if embed is None and config.tied:
        return others | {EMBED: head}, config, []
    if embed is not None and same_numbers(embed, head):
        return others, replace(config, tied=True), []
    notes = [f"{HEAD} differs from the embedding table: it is used"] if config.tied else []
    return entries, replace(config, tied=False), notes


def same_numbers(a: Entry, b: Entry) -> bool:
    """Are two matrices equal? Read in blocks of rows."""
    if a.shape != b.shape or len(a.shape) != 2:
        return False
    blocks = [slice(start, min(start + BLOCK, a.shape[0])) for start in range(0, a.shape[0], BLOCK)]
    return all(np.array_equal(*(replace(x, rows=rows).read("numpy") for x in (a, b))) for rows in blocks)


def _tokenizer(
    path: Path, given: str | Path | None, files: dict[str, bytes], side_files: SideFiles, config: GemmaConfig
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer given or found, checked against the vocabulary; what is odd about it."""
    own = {name: content for name, content in files.items() if name in (JSON, MODEL)}
    if given is None and not own:
        return None, []
    known = side_files.added_tokens, side_files.hidden_tokens
    chosen = Tokenizer.from_file(given, *known) if given else Tokenizer(own, str(path), *known)
    pieces, rows = chosen.vocab_size, config.vocab_size
    if not pieces <= rows <= 2 * pieces:
        raise TPAError(
            f"load: the tokenizer must fit the embedding, which may have rows to spare, "
            f"got {pieces} tokens for {rows} rows"
        )
    if chosen.marks_turns or side_files.chat_template is not None:
        return chosen, []
    return chosen, ["<start_of_turn> is not one token of this tokenizer: no chat in Gemma's template"]


def _stored_dtype(path: Path, kinds: set[str]) -> str:
    """The narrowest dtype that holds all weights."""
    if QUANTIZED in kinds:
        return "bfloat16"  # what Gemma 3 was trained in: finer than blocks
    allowed = ("float64", "float32", "float16", "bfloat16")
    if unknown := sorted(kinds - set(allowed)):
        raise TPAError(f"load: {path}: weights must be bfloat16, float16, float32 or float64, got {unknown[0]}")
    if {"float16", "bfloat16"} <= kinds:
        kinds = kinds | {"float32"}
    return next((dtype for dtype in allowed if dtype in kinds), "float32")


def _choose_config(path: Path, variant: str | None, config: Any, entries: dict[str, Entry]) -> GemmaConfig:
    """The config given or found, else the published one of the size that is shown; `variant` contradicts neither."""
    numbers = [int(found[1]) for name in entries if (found := re.match(r"model\.layers\.(\d{1,4})\.", name))]
    embedding = entries.get(EMBED) or entries.get(HEAD)
    rows, width = embedding.shape if embedding and len(embedding.shape) == 2 else (0, 0)
    size = max(numbers, default=-1) + 1, width
    if config is not None:
        chosen = config if isinstance(config, GemmaConfig) else GemmaConfig.from_hf(config)
        size = chosen.num_layers, chosen.hidden_size
    elif (named := published(*size)) is not None:  # with the published image tower, or none
        chosen = replace(named, vision=VisionConfig() if any(map(is_vision, entries)) else None)
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
