"""What tests share: tolerances, comparisons, small models without `transformers` and with it, a small tokenizer.

Plain functions, no fixtures (those are in conftest.py). `part`, `to` and `back` let one test serve both backends.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tpa_ref.errors import TPAError
from tpa_ref.gemma.config import GemmaConfig, layer_pattern
from tpa_ref.gemma.weights import from_named, hf_names, joined, joined_vision
from tpa_ref.trace import Trace

ROOT = Path(__file__).resolve().parent.parent

# How far two runs of the same computation may be apart, relative to the largest magnitude (see `relative`).
TOLERANCE = {
    "float64": 1e-10,
    "float32": 1e-5,
    "transformers": 1e-4,  # our logits against the float32 logits of `transformers`, after all layers
}

# The five ways to cache K and V: dense, and the four modes at full rank, where each must be exact.
KINDS = ("dense", "contextual", "fixed-a", "fixed-b", "latent")

TEXT_LENGTH = 60


def to_numpy(x: Any) -> np.ndarray:
    """A NumPy array or a torch tensor of either backend, as a float64 (or integer) NumPy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.double() if x.is_floating_point() else x).numpy()
    x = np.asarray(x)
    return x if x.dtype.kind in "iub" else x.astype(np.float64)


def relative(a: Any, b: Any) -> float:
    """max |a - b| / max |b|: how wrong a is when b is right. NaN in either gives infinity."""
    a, b = to_numpy(a), to_numpy(b)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    error = float(np.abs(a - b).max() / np.abs(b).max())
    return error if np.isfinite(error) else float("inf")


def refused(call: Callable[[], Any], *words: Any) -> str:
    """The call raises `TPAError` with one line that holds every word; returns the line."""
    with pytest.raises(TPAError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message and "\r" not in message, repr(message)
    for word in words:
        assert str(word) in message, message
    return message


def in_kind(backend: ModuleType, model: Any, kind: str, **choices: Any) -> Any:
    """A dense model turned into one of `KINDS`; without further choices at full rank and full precision."""
    if kind == "dense":
        return model
    choices = choices or {"k_rank": 10**6, "v_rank": 10**6, "kv_dtype": "float32"}
    return backend.convert(model, backend.TPAConfig(mode=kind, **choices))


def run_whole(model: Any, tokens_bq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits, O_lbqhe) of a whole text without a cache; O is what the attention of each layer gives before W_O.

    It is compared besides the logits, because the norm after W_O takes away any wrong factor on the values.
    """
    trace = Trace()
    logits_bqv = to_numpy(model(tokens_bq, trace=trace))
    return logits_bqv, np.stack([to_numpy(x) for name, x in trace.stages.items() if name.endswith("attn.O_bqhe")])


def largest_relative(O_lbqhe: np.ndarray, expected_lbqhe: np.ndarray) -> float:
    """`relative` of the worst layer, each measured by its own magnitude."""
    return max(relative(ours, theirs) for ours, theirs in zip(O_lbqhe, expected_lbqhe, strict=True))


def run_cached(model: Any, tokens_bq: np.ndarray, chunks: tuple[int, ...], max_len: int = 64) -> tuple[Any, np.ndarray]:
    """(cache, logits of every position): prefill in `chunks`, then the rest of the text token by token."""
    cache = model.new_cache(tokens_bq.shape[0], max_len)
    sizes = [*chunks, *[1] * (tokens_bq.shape[1] - sum(chunks))]
    ends = np.cumsum(sizes)
    pieces = [
        to_numpy(model(tokens_bq[:, end - size : end], cache=cache)) for size, end in zip(sizes, ends, strict=True)
    ]
    return cache, np.concatenate(pieces, 1)


MODES = ("contextual", "fixed-a", "fixed-b", "latent")


# ---- one test, two backends ----


def part(backend: Any, name: str) -> Any:
    """A module of a backend by its path inside, `part(backend, "core.rope")`; the reference's if it is written once."""
    try:
        return importlib.import_module(f"{backend.__name__}.{name}")
    except ModuleNotFoundError as problem:
        if problem.name and not f"{backend.__name__}.{name}".startswith(problem.name):
            raise
        return importlib.import_module(f"tpa_ref.{name}")


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


def fitted(backend: Any, name: str, rank: int, X_bkgd: np.ndarray, dtype: str = "float64") -> Any:
    """A mode (or "dense") whose constant arrays are made of the second moment of some tokens."""
    g, d = X_bkgd.shape[2:]
    if name == "dense":
        return part(backend, "core.dense").Dense(g, d, dtype=dtype)
    X_tx = X_bkgd.reshape(-1, g * d)
    M_gdgd = (sum(np.outer(x, x) for x in X_tx) / len(X_tx)).reshape(g, d, g, d)
    made = part(backend, "core.mode").MODES[name].fit(g, d, rank, dtype, M_gdgd, X_bkgd.mean((0, 1)))
    return made.with_arrays({name: None if x is None else to(backend, x) for name, x in made.arrays().items()})


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


def model(
    backend: Any, of: GemmaConfig | None = None, dtype: str = "float32", seed: int = 0, device: str = "cpu"
) -> Any:
    """A dense model with random weights, straight from arrays."""
    of = of or config()
    named = {name: to(backend, value.astype(dtype)) for name, value in tensors(of, seed).items()}
    if device != "cpu":
        named = {name: value.to(device) for name, value in named.items()}
    return backend.Model(of, from_named(named, of))


def to_named(weights: Any) -> dict[str, Any]:
    """All `Weights` by their Hugging Face names: the inverse of `from_named`."""
    named = {"model.embed_tokens.weight": weights.embed_vm, "model.norm.weight": weights.final_norm_m}
    for layer, block in enumerate(weights.layers):
        named |= joined(block, f"model.layers.{layer}.")
    return named | dict(joined_vision(weights.vision) if weights.vision else ())


def tokens(count: int, batch: int = 1, vocab: int = 300, seed: int = 0) -> np.ndarray:
    """Random token ids [b,q]."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, count))


def logits(of: Any, ids: np.ndarray, **more: Any) -> np.ndarray:
    """Logits of a model of either backend as a NumPy array."""
    return back(of(ids, **more))


# ---- a small tokenizer ----


class Bytes:
    """A tokenizer that needs no file: byte b is token 3 + b."""

    vocab_size, bos = 300, 2

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [2] * bos + [3 + byte for byte in text.encode()]


CALIBRATION = "".join(chr(32 + (7 * i * i + 3 * i) % 90) for i in range(2000)) + "\n"

TEXT = (
    "the return value is the sum of all the numbers in the list and the function returns it\n"
    "note that the list of values must not be empty and that the number of items is counted once\n"
    "for each item in the list call the function with the item and store what it returns\n"
)


@functools.cache
def tokenizer_proto(vocab: int = 300, turns: bool = False, dummy_prefix: bool = False) -> bytes:
    """A SentencePiece model with byte fallback and Gemma's special ids. turns: the turn tokens at 105 and 106 as well
    (101 pieces more, so give a vocabulary of 400). dummy_prefix: a space before every text, which Gemma has not.
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
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


# ---- `transformers` ----


@dataclass
class RandomGemma:
    """A random checkpoint, a text, and what `transformers` makes of it in float32: logits, and the attention's output
    of each layer before W_O.
    """

    path: Path
    hf: Any
    tokens_bq: np.ndarray
    logits_bqv: np.ndarray
    O_lbqhe: np.ndarray


def hf_run(hf: Any, tokens_bq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logits, outputs of the attention heads of each layer) of a `transformers` model, as float64."""
    import torch

    outputs: list[np.ndarray] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(to_numpy(inputs[0])))
        for layer in hf.model.layers
    ]
    with torch.no_grad():
        logits_bqv = to_numpy(hf(torch.tensor(tokens_bq)).logits)
    for hook in hooks:
        hook.remove()
    return logits_bqv, np.stack(outputs).reshape(len(outputs), *tokens_bq.shape, hf.config.num_attention_heads, -1)


# ---- images ----

TOKENS = 4  # soft tokens of an image
IMAGE, START, END = 301, 297, 298  # the placeholder lies outside of the vocabulary, as it may
VOCAB = 300
SIZE, PATCH = 32, 4  # 8 x 8 patches, averaged 4 x 4


def hf_config(**changes: Any) -> Any:
    """A `Gemma3Config` with a window of 11, shorter than every text, and pixels of 8 x 8 patches."""
    import transformers

    text = dict(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=11,
        query_pre_attn_scalar=21,
        max_position_embeddings=512,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    vision = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    tokens = dict(mm_tokens_per_image=TOKENS, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END)
    return transformers.Gemma3Config(
        text_config=text | changes.pop("text", {}), vision_config=vision | changes.pop("vision", {}), **tokens | changes
    )


def hf_model(config: Any) -> Any:
    """Random weights: norms around what they multiply with, all others enlarged, so that no gain is 1 and no attention
    flat; the image tower has biases to be forgotten.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    hf = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "layer_norm" in name or ("layernorm" in name and "vision" in name):
                weight.normal_(1 if name.endswith("weight") else 0, 0.3)
            elif "norm" in name or name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif "multi_modal_projector" in name:
                weight.normal_(0, 1)
            elif "embedding" in name and "vision" in name:
                weight.normal_(0, 0.5)
            else:
                weight.mul_(4)
    return hf


def saved(folder: Path, **changes: Any) -> tuple[Any, Path]:
    """(the model, the folder that `transformers` saved it in)."""
    hf = hf_model(hf_config(**changes))
    hf.save_pretrained(folder)
    return hf, folder


def text(layout: str, seed: int = 0, tokens: int = TOKENS) -> list[int]:
    """Ids by a layout such as "2 i 5 bare": so many words, an image with its start and end tokens, one without."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for item in layout.split():
        if item == "i":
            ids += [START, *[IMAGE] * tokens, END]
        elif item == "bare":
            ids += [IMAGE] * tokens
        else:
            ids += rng.integers(3, START, int(item)).tolist()
    return ids


def images_in(layout: str) -> int:
    return sum(item in ("i", "bare") for item in layout.split())


def pixels(count: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    """Random pixels [i,c,x,y] in -1 ... 1, float32."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, size, size)).astype(np.float32)


def hf_logits(hf: Any, tokens_bq: np.ndarray, images: np.ndarray | None) -> np.ndarray:
    """Logits of `transformers` in float32, with the mask that its own processor asks for."""
    import torch

    ids = torch.tensor(tokens_bq)
    options = {} if images is None else {"pixel_values": torch.tensor(images)}
    with torch.no_grad():
        return to_numpy(hf(ids, token_type_ids=(ids == hf.config.image_token_id).int(), **options).logits)
