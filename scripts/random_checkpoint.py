"""Write a random but well-conditioned Gemma 3 checkpoint of any size, in any of the formats people have.

    python scripts/random_checkpoint.py --variant 1b --format ckpt --out /tmp/random-1b
    python scripts/random_checkpoint.py --variant 4b --format hf-multimodal --out /tmp/random-4b

The published weights are gated; these have their names, shapes, dtypes and sizes, so that loading, conversion, memory
and speed can be measured without them. What such a model says means nothing, and neither does its KL or perplexity.

Formats: `hf` (text only), `hf-multimodal-old` and `hf-multimodal` (both generations of prefixes and config keys),
`ckpt`, `ckpt-sharded` and `ckpt-int8` (google/gemma_pytorch). `--vision` adds the image tower to 4b, 12b and 27b, and a
small one to the multimodal formats of `tiny`. Every folder gets a synthetic tokenizer of the right size: the tiny
model's, and placeholders behind it. `--spectra` gives W_Q, W_K and W_V of the 1B the decay of singular values that the
real ones have (assets/gemma3_1b_weight_spectra.csv).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tpa_ref.atomic import replacing
from tpa_ref.cli import options as cli
from tpa_ref.errors import TPAError
from tpa_ref.files.names import GEMMA_PYTORCH_TOWER
from tpa_ref.gemma.config import VARIANTS, GemmaConfig, VisionConfig
from tpa_ref.gemma.weights import PROJECTOR, TOWER, VisionWeights, hf_names, is_vision, names_of

FORMATS = ("hf", "hf-multimodal-old", "hf-multimodal", "ckpt", "ckpt-sharded", "ckpt-int8")
SPECTRA = ROOT / "assets" / "gemma3_1b_weight_spectra.csv"
TINY_TOKENIZER = cli.TINY / "tokenizer.model"
PIECES = 262_144  # of Gemma 3's tokenizer
BLOCK = 1 << 26  # numbers drawn at a time
# For `tiny`: 16 x 16 patches, 16 soft tokens; start and end are pieces that its tokenizer does not use.
TINY_VISION = VisionConfig(224, 14, 3, 64, 2, 4, 128, 1e-6, 16, image_token=4096, start_token=6, end_token=7)
Spectrum = dict[str, tuple[int, int, int]]  # tensor name -> ranks that hold 90, 95 and 98 % of the energy


@dataclass(frozen=True)
class Planned:
    """A tensor of a file that is not made yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


# ---- the numbers ----


def generator_of(name: str, seed: int) -> torch.Generator:
    """Random numbers that belong to a name, whatever is drawn before them."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Norms around 0 (their factor is 1 + w; the image tower's LayerNorms: around 1), everything else 1/sqrt(fan in):
    every stage has numbers of size 1.

    The numbers depend on the name and the seed alone, so the same tensor is the same in every format and order.
    """
    generator = generator_of(name, seed)
    size = 0.1 if len(shape) == 1 else int(np.prod(shape[1:])) ** -0.5
    centre = float(name.startswith(TOWER) and "norm" in name and name.endswith(".weight"))
    made = torch.empty(shape, dtype=dtype)
    rows = max(1, BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        block = made[start : start + rows]
        block.copy_(torch.randn(block.shape, generator=generator) * size + centre)
    return made


def with_spectrum(white: Tensor, ranks: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """A matrix with the energy of `white`, and 90, 95 and 98 % of it in the first so many singular values.

    Between these points the energy is spread evenly. A share is reached half a rank early, so that rounding does not
    move the rank. generator: draws the singular vectors. Shapes: [n, m] -> [n, m].
    """
    n, m = white.shape
    full = min(n, m)
    points = np.array([0, *(rank - 0.5 for rank in ranks), full])
    energy = np.interp(np.arange(full + 1), points, [0, 0.9, 0.95, 0.98, 1.0])
    values = np.sort(np.diff(energy))[::-1].copy() ** 0.5
    left = torch.linalg.qr(torch.randn(n, full, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(m, full, generator=generator))[0]
    made = (left * torch.from_numpy(values).float()) @ right.mT
    return (made * (white.float().norm() / made.norm())).to(white.dtype)


def read_spectra(path: Path = SPECTRA) -> Spectrum:
    """The published table, by tensor name."""
    spectra: Spectrum = {}
    with path.open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            for part in "qkv":
                name = f"model.layers.{row['layer']}.self_attn.{part}_proj.weight"
                low, middle, high = (int(row[f"{part}_rank{share}"]) for share in (90, 95, 98))
                spectra[name] = low, middle, high
    return spectra


# ---- the names of each format ----


def all_tensors(config: GemmaConfig, dtype: torch.dtype, seed: int, spectra: Spectrum) -> dict[str, Planned]:
    """The model's tensors under the names of `weights.hf_names`."""

    def maker(name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        def make() -> Tensor:
            white = random_tensor(name, shape, dtype, seed)
            if name not in spectra:
                return white
            return with_spectrum(white, spectra[name], generator_of(f"{name} bases", seed))

        return make

    return {name: Planned(name, shape, dtype, maker(name, shape)) for name, shape in hf_names(config).items()}


def planned_tensors(
    config: GemmaConfig, form: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, spectra: Spectrum | None = None
) -> list[Planned]:
    """Everything that a checkpoint of this format holds, by the names it has there."""
    text = all_tensors(config, dtype, seed, spectra or {})
    if form == "hf":
        return list(text.values())
    if form == "hf-multimodal-old":
        return [replace(tensor, name=multimodal_name(tensor.name, old=True)) for tensor in text.values()]
    if form == "hf-multimodal":
        return [replace(tensor, name=multimodal_name(tensor.name)) for tensor in text.values()]
    tensors = list(gemma_pytorch_tensors(text, config))
    return [part for tensor in tensors for part in int8_tensors(tensor)] if form == "ckpt-int8" else tensors


def multimodal_name(name: str, old: bool = False) -> str:
    """A tensor's name in a multimodal Hugging Face file of either generation."""
    if is_vision(name):
        return name if old else f"model.{name.replace(TOWER, 'vision_tower.')}"
    return f"language_model.{name}" if old else f"model.language_model.{name.removeprefix('model.')}"


def gemma_pytorch_vision(tensor: Planned) -> Planned:
    """A tensor of the image tower under google/gemma_pytorch's name; its projector is transposed."""
    if tensor.name == names_of(VisionWeights)["W_project_zm"]:
        make = lambda: tensor.make().T.contiguous()  # noqa: E731
        return Planned("mm_input_projection.weight", tensor.shape[::-1], tensor.dtype, make)
    if tensor.name.startswith(PROJECTOR):
        return replace(tensor, name="mm_soft_embedding_norm.weight")
    name = tensor.name.removeprefix(TOWER)
    for theirs, ours in GEMMA_PYTORCH_TOWER.items():
        name = name.replace(ours, theirs, 1)
    return replace(tensor, name=f"siglip_vision_model.{name}")


def gemma_pytorch_tensors(text: dict[str, Planned], config: GemmaConfig) -> Iterator[Planned]:
    """google/gemma_pytorch's names, Q, K and V fused, and the complex buffers that its files carry along."""
    for name, tensor in text.items():
        if is_vision(name):
            yield gemma_pytorch_vision(tensor)
        elif name.endswith("embed_tokens.weight"):
            multimodal = config.vision is not None or config.variant in ("4b", "12b", "27b")
            yield replace(tensor, name="text_token_embedder.weight" if multimodal else "embedder.weight")
        elif name.endswith("q_proj.weight"):
            parts = [text[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            shape = (sum(part.shape[0] for part in parts), tensor.shape[1])
            make = lambda parts=parts: torch.cat([part.make() for part in parts])  # noqa: E731
            yield Planned(name.replace("q_proj", "qkv_proj"), shape, tensor.dtype, make)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            yield replace(tensor, name=name.replace(".q_norm.", ".query_norm.").replace(".k_norm.", ".key_norm."))
    shape = (min(256, config.max_positions), config.head_dim // 2)
    for kind in ("local", "global"):
        make_buffer = lambda shape=shape: torch.ones(shape, dtype=torch.complex64)  # noqa: E731
        yield Planned(f"{kind}_freqs_cis", shape, torch.complex64, make_buffer)


def int8_tensors(tensor: Planned) -> list[Planned]:
    """A matrix as int8 with one float32 scale a row; everything else, and the image tower, as it is."""
    if len(tensor.shape) != 2 or not tensor.name.endswith(".weight") or tensor.name.startswith("siglip"):
        return [tensor]

    def scale(weight: Tensor) -> Tensor:
        return weight.float().abs().amax(1).clamp(min=1e-12) / 127

    def quantized() -> Tensor:
        weight = tensor.make()
        return (weight.float() / scale(weight)[:, None]).round().to(torch.int8)

    return [
        Planned(tensor.name, tensor.shape, torch.int8, quantized),
        Planned(f"{tensor.name}_scaler", tensor.shape[:1], torch.float32, lambda: scale(tensor.make())),
    ]


def config_json(config: GemmaConfig, form: str) -> dict:
    """The config.json of a Hugging Face format."""
    text = replace(config, vision=None).to_hf()
    if form == "hf":
        return text
    whole: dict[str, Any] = config.to_hf() if config.vision else {"model_type": "gemma3"}
    whole["architectures"] = ["Gemma3ForConditionalGeneration"]
    if form == "hf-multimodal":
        scaling = {"rope_type": "linear", "factor": config.rope_scale_global}
        full = scaling if config.rope_scale_global != 1 else {"rope_type": "default"}
        for key in ("rope_theta", "rope_local_base_freq", "rope_scaling"):
            del text[key]
        text["rope_parameters"] = {
            "full_attention": {**full, "rope_theta": config.rope_base_global},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_base_local},
        }
    return whole | {"text_config": text}


# ---- files ----


def shards_of(tensors: list[Planned], limit: int) -> list[list[Planned]]:
    """Tensors in order, as many to a file as fit below `limit` bytes."""
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(held.nbytes for held in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def write_checkpoint(
    config: GemmaConfig, form: str, folder: Path, shard_bytes: int = 4 << 30, progress: Callable = iter, **numbers
) -> None:
    """Write the tensors (and config.json) into a new folder, one file in memory at a time. numbers: dtype, seed,
    spectra of `planned_tensors`.
    """
    folder.mkdir()
    tensors = planned_tensors(config, form, **numbers)
    pickled = form.startswith("ckpt")
    shards = [tensors] if form in ("ckpt", "ckpt-int8") else shards_of(tensors, shard_bytes)
    stem, suffix = ("pytorch_model", ".bin") if form == "ckpt-sharded" else ("model", ".safetensors")
    indexed = form == "ckpt-sharded" or len(shards) > 1
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(progress(shards), 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" if indexed else f"{stem}{suffix}"
        made = {tensor.name: tensor.make() for tensor in shard}
        weight_map |= dict.fromkeys(made, name)
        if form in ("ckpt", "ckpt-int8"):
            torch.save({"model_state_dict": made}, folder / "model.ckpt")
        elif pickled:
            torch.save(made, folder / name)
        else:
            save_file(made, folder / name, {"format": "pt"})
    if indexed:
        content = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not pickled:
        (folder / "config.json").write_text(json.dumps(config_json(config, form), indent=2) + "\n", encoding="utf-8")


def synthetic_tokenizer(proto: bytes, pieces: int) -> bytes:
    """The SentencePiece model in `proto` with placeholder pieces behind its own, `pieces` in all.

    Protobuf messages merge when their bytes are joined, so the new entries of the repeated field 1, each a message
    {1: piece, 2: score, 3: type NORMAL = 1}, are simply appended.
    """
    import sentencepiece

    present = sentencepiece.SentencePieceProcessor(model_proto=proto).vocab_size()
    if present > pieces:
        raise TPAError(f"tokenizer: {pieces} pieces are fewer than the {present} there are already")
    made = bytearray(proto)
    for number in range(present, pieces):
        text = f"\u2581<word {number}>".encode()
        entry = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", -float(number)) + b"\x18\x01"
        made += b"\x0a" + _varint(len(entry)) + entry
    return bytes(made)


def _varint(value: int) -> bytes:
    """Protobuf's whole numbers: seven bits a byte, the eighth says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), required=True)
    parser.add_argument("--format", choices=FORMATS, default="hf")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--spectra", action="store_true", help="the real decay of singular values; 1b only")
    parser.add_argument("--vision", action="store_true", help="with the image tower; not for hf, 270m and 1b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=4.0)
    args = parser.parse_args()
    if args.spectra and args.variant != "1b":
        raise TPAError(f"--spectra: only those of 1b are published, got --variant {args.variant}")
    large = args.variant in ("4b", "12b", "27b")
    if args.vision and (args.format == "hf" or not (large or (args.variant == "tiny" and "multi" in args.format))):
        raise TPAError(f"--vision: {args.variant} as {args.format} is not a model that reads images")
    target = Path(args.out)
    if os.path.lexists(target):
        raise TPAError(f"--out: {target} exists already; choose another place or remove it")
    if not target.absolute().parent.is_dir():
        raise TPAError(f"--out: the folder of {target} does not exist: {target.absolute().parent}")
    if args.shard_gb <= 0:
        raise TPAError(f"--shard-gb must be > 0, got {args.shard_gb}")
    config = GemmaConfig.of_variant(args.variant)
    if args.format.startswith("hf-multimodal") and large:
        config = replace(config, vocab_size=262_208)
    if args.vision:
        config = replace(config, vision=VisionConfig() if large else TINY_VISION)
    start = time.perf_counter()
    with replacing(target) as folder:
        write_checkpoint(
            config,
            args.format,
            folder,
            int(args.shard_gb * 1e9),
            cli.progress_bar("writing"),
            dtype=getattr(torch, args.dtype),
            seed=args.seed,
            spectra=read_spectra() if args.spectra else None,
        )
        proto = TINY_TOKENIZER.read_bytes()
        pieces = config.vocab_size if args.variant == "tiny" else PIECES
        (folder / "tokenizer.model").write_bytes(synthetic_tokenizer(proto, pieces))
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{args.variant} as {args.format}: {size / 1e9:.2f} GB in {target}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    cli.run(main)
