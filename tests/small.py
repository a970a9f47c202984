"""A tiny Gemma 3 for tests: config, random weights, checkpoint folders and a tokenizer, all without `transformers`.

Plain functions, no fixtures. `part`, `to` and `back` let one test serve both backends.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tpa_ref.gemma.config import GemmaConfig, layer_pattern
from tpa_ref.gemma.weights import from_named, hf_names

MODES = ("contextual", "fixed-a", "fixed-b", "latent")


# ---- one test, two backends ----


def part(backend: Any, name: str) -> Any:
    """A submodule of a backend, for instance `part(backend, "rope")`, in whatever folder it is."""
    old = {"spectral": "transform", "words": "token_prediction"}
    for folder in ("", "core.", "gemma.", "compress.", "files.", "fast."):
        full = f"{backend.__name__}.{folder}{old.get(name, name)}"
        try:
            if importlib.util.find_spec(full):
                return importlib.import_module(full)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(name)


def is_torch(backend: Any) -> bool:
    return backend.__name__ == "tpa_torch"


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def backends() -> list[Any]:
    """The packages that can be imported here: the reference and, where torch is installed, its twin."""
    return [importlib.import_module(name) for name in ("tpa_ref", "tpa_torch")[: 1 + has_torch()]]


def to(backend: Any, array: Any) -> Any:
    """A NumPy array as the backend wants it: itself, or a torch tensor."""
    if not is_torch(backend):
        return np.asarray(array)
    import torch

    return torch.from_numpy(np.array(array))


def back(array: Any) -> Any:
    """An array of either backend as a NumPy array."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    array = array.detach().cpu()
    if str(array.dtype) == "torch.bfloat16":
        array = array.float()
    return array.numpy()


# ---- a small model ----


def config(**changes: Any) -> GemmaConfig:
    """Seven layers (the sixth is global), window 11, linear scale 8 on the global layer; nothing published has it."""
    fields: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 48,
        "num_layers": 7,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 40,
        "sliding_window": 11,
        "query_pre_attn_scalar": 16,
        "max_positions": 128,
        "rope_scale_global": 8.0,
    }
    fields |= changes
    fields.setdefault("is_global", layer_pattern(fields["num_layers"]))
    return GemmaConfig(**fields)


def tensors(of: GemmaConfig, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights by their Hugging Face names, of a size at which attention and MLP outweigh the embedding."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in hf_names(of).items():
        size = 0.3 if len(shape) == 1 else 0.02 if "embed" in name else 2 * shape[-1] ** -0.5
        made[name] = (rng.standard_normal(shape) * size).astype(dtype)
    return made


def write_folder(
    folder: Path,
    of: GemmaConfig | None = None,
    weights: dict[str, np.ndarray] | None = None,
    tokenizer: bytes | None = None,
) -> Path:
    """A Hugging Face checkpoint folder."""
    of = of or config()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(of) if weights is None else weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(of.to_hf(), indent=2), encoding="utf-8")
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def write_sharded(folder: Path, of: GemmaConfig | None = None, shards: int = 3) -> Path:
    """The same, split over shards with an index, as large checkpoints come."""
    of = of or config()
    folder.mkdir(parents=True, exist_ok=True)
    named = tensors(of)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: named[name] for name in list(named)[number::shards]}
        save_file(held, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(of.to_hf()), encoding="utf-8")
    return folder


def bfloat16(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(ml_dtypes.bfloat16) for name, value in named.items()}


def model(backend: Any, of: GemmaConfig | None = None, dtype: str = "float32", seed: int = 0) -> Any:
    """A dense model with random weights, straight from arrays."""
    of = of or config()
    named = {name: to(backend, value.astype(dtype)) for name, value in tensors(of, seed).items()}
    return backend.Model(of, from_named(named, of))


def tokens(count: int, batch: int = 1, vocab: int = 300, seed: int = 0) -> np.ndarray:
    """Random token ids [b,q]."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, count))


def logits(of: Any, ids: np.ndarray, **more: Any) -> np.ndarray:
    """Logits of a model of either backend as a NumPy array."""
    return back(of(ids, **more))


# ---- a small tokenizer ----

TEXT = (
    "the return value is the sum of all the numbers in the list and the function returns it\n"
    "note that the list of values must not be empty and that the number of items is counted once\n"
    "for each item in the list call the function with the item and store what it returns\n"
)


@functools.cache
def tokenizer_proto(vocab: int = 300, turns: bool = False) -> bytes:
    """A SentencePiece model with byte fallback and Gemma's special ids. turns: the turn tokens at 105 and 106 as well
    (101 pieces more, so give a vocabulary of 400).
    """
    import sentencepiece

    special = [f"<unused{i}>" for i in range(101)] + ["<start_of_turn>", "<end_of_turn>", "\n"]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=out,
        vocab_size=vocab,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=special if turns else [],
        byte_fallback=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()
