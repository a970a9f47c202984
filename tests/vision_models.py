"""Small random Gemma 3 models that read images, made by `transformers`, and what it makes of texts with images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import to_numpy

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
