"""GGUF files of llama.cpp: Gemma 3 quantized in blocks (or not), and the image tower in a file of its own beside it.

    model.gguf                                the text model, its config and its tokenizer
    model-00001-of-00003.gguf ...             the same in parts
    mmproj*.gguf                              image tower and projector

What the converter did to the tensors is undone: it renames them, and stores Gemma's norms as 1 + w (the image tower's
LayerNorms as they are). Sources: conversion/gemma.py and tools/mtmd/clip.cpp of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TPAError
from ..gemma.pieces import MODEL
from ..gemma.weights import EMBED, HEAD, PROJECTOR, TOWER, VISION_BLOCKS
from .entry import QUANTIZED, Container, Entry
from .gguf_config import read_config
from .gguf_header import Header, Tensor, read_header
from .gguf_tokenizer import tokenizer_proto

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
CHUNK = 2**20  # so many numbers are widened at once

NAMES = {
    "token_embd.weight": EMBED,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
    "v.patch_embd.weight": f"{TOWER}embeddings.patch_embedding.weight",
    "v.patch_embd.bias": f"{TOWER}embeddings.patch_embedding.bias",
    "v.position_embd.weight": f"{TOWER}embeddings.position_embedding.weight",
    "v.post_ln.weight": f"{TOWER}post_layernorm.weight",
    "v.post_ln.bias": f"{TOWER}post_layernorm.bias",
    "mm.soft_emb_norm.weight": f"{PROJECTOR}mm_soft_emb_norm.weight",
    "mm.input_projection.weight": f"{PROJECTOR}mm_input_projection_weight",
}
IN_A_BLOCK = {  # behind blk.N.
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
IN_A_VISION_BLOCK = {  # behind v.blk.N.
    "ln1": "layer_norm1",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


# ---- which files ----


def gguf_files(path: Path) -> list[Path]:
    """The files of a model, by one of them or by their folder: its parts in order, then the image tower's, if any."""
    folder = path if path.is_dir() else path.parent
    found = sorted(file for file in folder.glob("*.gguf") if file.is_file())
    towers = [file for file in found if is_tower(file)]
    models = [file for file in (found if path.is_dir() else [path]) if not is_tower(file)]
    if not models and not towers:
        return []
    if not models:
        raise TPAError(f"load: {towers[0]} is an image tower; give the model's .gguf, which is read with it")
    if len(different := {PART.sub(r"\1-of-\3", file.name) for file in models}) > 1:
        raise TPAError(f"load: {folder} holds {len(different)} .gguf models; name one of them: {models[0].name}, ...")
    # The same tower often lies there in several precisions: the finest is taken.
    return parts_of(models[0]) + sorted(towers, key=lambda file: -file.stat().st_size)[:1]


def is_tower(file: Path) -> bool:
    """Is this, by its name, the file of an image tower?

    >>> is_tower(Path("mmproj-F16.gguf")), is_tower(Path("gemma-3-4b-it-Q4_K_M.gguf"))
    (True, False)
    """
    return "mmproj" in file.name.lower()


def parts_of(file: Path) -> list[Path]:
    """The file, or where it is one part of several, all of them in order."""
    name = PART.fullmatch(file.name)
    if name is None:
        return [file]
    parts = []
    for number in range(int(name[3])):
        parts.append(file.with_name(f"{name[1]}-{number + 1:05d}-of-{name[3]}.gguf"))
        if not parts[-1].is_file():
            raise TPAError(f"load: {file.name} is one of {int(name[3])} parts, and {parts[-1]} is not there")
    return parts or [file]


def _check_parts(headers: list[Header]) -> None:
    """The parts of a model are in order, of one model, and complete."""
    for number, header in enumerate(headers):
        said = header.number("split.no", 0), header.number("split.count", 0)
        if said != (number, len(headers)) and (len(headers) > 1 or any(said)):
            raise TPAError(
                f"load: {header.path} must be part {number} of {len(headers)}, got split.no {said[0]} and split.count "
                f"{said[1]}"
            )
    count = sum(len(header.tensors) for header in headers)
    if (total := headers[0].number("split.tensors.count", count)) != count:
        raise TPAError(f"load: the parts of {headers[0].path} must hold {total} tensors, got {count}")


# ---- tensors ----


class GgufFile:
    """The tensors of a file, mapped and not read."""

    def __init__(self, header: Header):
        self.path, self.header = header.path, header

    def read(self, key: str, framework: str, rows: slice = slice(None)) -> Any:
        """One tensor, or some rows of it, as float32, its blocks widened a million numbers at a time; Gemma's norms
        without the 1.
        """
        tensor = self.header.tensors[key]
        numbers, bytes_each = import_gguf(self.path).GGML_QUANT_SIZES[tensor.kind]
        blocks = self.header.data[tensor.start : tensor.stop].reshape(tensor.shape[0], -1)[rows].reshape(-1, bytes_each)
        x, step = np.empty((len(blocks), numbers), np.float32), -(-CHUNK // numbers)
        with np.errstate(all="ignore"):  # what is not finite is named by the loader
            for at in range(0, len(blocks), step):
                # All blocks as one row: that is fastest, and blocks do not know of rows.
                x[at : at + step] = widen(blocks[at : at + step].reshape(1, -1), tensor.kind).reshape(-1, numbers)
            if key.endswith("norm.weight"):
                x -= 1
        x = x.reshape(-1, *tensor.shape[1:])
        if framework == "numpy":
            return x
        import torch

        return torch.from_numpy(x)

    def codes(self, key: str, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray] | None:
        """See `Entry.codes`: of blocks of 32 whole numbers behind a scale. With a scale of one these are the codes."""
        tensor = self.header.tensors[key]
        if tensor.kind.name not in ("Q8_0", "Q5_0", "Q4_0"):
            return None
        whole = self.header.data[tensor.start : tensor.stop].reshape(tensor.shape[0], -1)[rows]
        blocks = whole.reshape(-1, import_gguf(self.path).GGML_QUANT_SIZES[tensor.kind][1])
        codes, one = np.empty((len(blocks), 32), np.int8), np.frombuffer(np.float16(1).tobytes(), np.uint8)
        for at in range(0, len(blocks), step := CHUNK // 32):
            part = blocks[at : at + step].copy()
            part[:, :2] = one
            codes[at : at + step] = widen(part.reshape(1, -1), tensor.kind).reshape(-1, 32)
        scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16)
        return codes.reshape(len(whole), -1), scale.reshape(len(whole), -1)


def widen(data: np.ndarray, kind: Any) -> np.ndarray:
    """Bytes of whole blocks as float32."""
    from gguf.quants import dequantize

    return dequantize(data, kind)


@cache
def can_widen(kind: Any) -> bool:
    """Does the package know how? It says so only when it is asked."""
    from gguf import GGML_QUANT_SIZES

    try:
        widen(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def import_gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise TPAError(f"load: reading {path} needs gguf, which is not installed: pip install -e .[gguf]") from None
    return gguf


def hf_name(key: str) -> str:
    """The name of `weights.hf_names`; what has none keeps its own, and is reported as unexpected.

    >>> hf_name("blk.3.attn_q.weight"), hf_name("v.blk.0.ln1.bias")
    ('model.layers.3.self_attn.q_proj.weight', 'vision_tower.vision_model.encoder.layers.0.layer_norm1.bias')
    """
    found = re.fullmatch(r"(v\.)?blk\.(\d+)\.(\w+)\.(weight|bias)", key)
    if found is None:
        return NAMES.get(key, key)
    is_vision, layer, name, end = found.groups()
    ours = (IN_A_VISION_BLOCK if is_vision else IN_A_BLOCK).get(name)
    return f"{VISION_BLOCKS if is_vision else 'model.layers.'}{layer}.{ours}.{end}" if ours else key


def _entries(headers: list[Header]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for header in headers:
        file = GgufFile(header)
        for key, tensor in header.tensors.items():
            if not can_widen(tensor.kind):
                raise TPAError(f"load: {key!r} of {header.path} is {tensor.kind.name}, which gguf cannot widen")
            name = hf_name(_unswapped(key, header.tensors))
            if name in entries:
                raise TPAError(f"load: {name} is held twice, in {entries[name].file.path.name} and {file.path}")
            entries[name] = Entry(tensor.shape, QUANTIZED, file, key)
    return entries


def _unswapped(key: str, tensors: dict[str, Tensor]) -> str:
    """The name that a tensor of the image tower should have: the first converter called fc1 ffn_down and fc2 ffn_up.

    clip.cpp: they are swapped where ffn_down takes the width of the tower, that of its norms.
    """
    block, _, end = key.rpartition(".ffn_")
    down, norm = tensors.get(f"{block}.ffn_down.weight"), tensors.get(f"{block}.ln2.weight")
    if not block.startswith("v.blk.") or down is None or norm is None or down.shape[-1:] != norm.shape:
        return key
    return f"{block}.ffn_{end.replace('up', 'down') if 'up' in end else end.replace('down', 'up')}"


def _belongs(tower: Header, model: Header) -> bool:
    """Does an image tower project into this model, and not into another one in the same folder?"""
    projection = tower.tensors.get("mm.input_projection.weight")
    return projection is None or model.values.get("gemma3.embedding_length") in projection.shape


# ---- both ----


def open_gguf(files: list[Path]) -> Container:
    """Tensors, config.json, tokenizer.model and chat template of files that `gguf_files` found."""
    gguf = import_gguf(files[0])
    headers = [read_header(file, gguf) for file in files]
    parts = [header for header in headers if not is_tower(header.path)]
    headers = parts + [header for header in headers if is_tower(header.path) and _belongs(header, parts[0])]
    _check_parts(parts)
    entries = _entries(headers)
    embedding = entries.get(EMBED)
    content = read_config(parts[0], headers[len(parts) :], embedding.shape[0] if embedding else 0)
    beside = {"config.json": json.dumps(content).encode()}
    if template := parts[0].text("tokenizer.chat_template"):
        beside["chat_template.jinja"] = template.encode()
    if proto := tokenizer_proto(parts[0]):
        beside[MODEL] = proto
    return Container(entries, content, beside)
