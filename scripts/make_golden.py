"""Golden arrays for tests/core/test_golden.py, made by the code of `transformers`: RoPE, masks, RMSNorm and GELU.

    python scripts/make_golden.py            # writes tests/golden/*.npz
    python scripts/make_golden.py --check    # makes them anew and compares with the stored files

Every file carries the versions it was made with. The inputs are stored beside the outputs, so reading them needs NumPy
only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Gemma3TextConfig, masking_utils
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3RotaryEmbedding, apply_rotary_pos_emb

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
VERSIONS = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}

HEAD_DIM = 32
POSITIONS = (0, 1, 2, 3, 17, 128, 511, 512, 1023, 1024, 4095)
LENGTH, WINDOW = 12, 5
LENGTHS = (12, 7)  # of the two rows of the padded batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored files instead of writing")
    check = parser.parse_args().check
    GOLDEN.mkdir(parents=True, exist_ok=True)
    different = 0
    for name, make in (("rope", rope), ("masks", masks), ("pointwise", pointwise)):
        arrays = make()
        path = GOLDEN / f"{name}.npz"
        if check:
            stored = np.load(path)
            same = set(arrays) <= set(stored.files) and all(
                np.allclose(stored[key], array, rtol=0, atol=1e-6) for key, array in arrays.items()
            )
            different += not same
            print(f"{path.name}: {'same' if same else 'DIFFERENT'}")
        else:
            versions = {f"version_{package}": np.array(version) for package, version in VERSIONS.items()}
            np.savez_compressed(path, **arrays, **versions)  # type: ignore[arg-type]
            print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 1 if different else 0


def text_config(scale: float = 1.0) -> Gemma3TextConfig:
    """A Gemma 3 config with both kinds of layers and, if asked for, linear scaling on the global ones."""
    scaling = {"rope_type": "linear", "factor": scale} if scale != 1.0 else None
    config = Gemma3TextConfig(
        num_hidden_layers=6,
        head_dim=HEAD_DIM,
        hidden_size=64,
        num_attention_heads=2,
        sliding_window=WINDOW,
        rope_scaling=scaling,  # type: ignore[call-arg]  # `rope_parameters` today; both are read
    )
    config._attn_implementation = "eager"
    return config


def rope() -> dict[str, np.ndarray]:
    """cos, sin and a rotated vector for base 10,000 (local), 1,000,000 (global) and the latter with linear scale 8."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, len(POSITIONS), HEAD_DIM, generator=generator)  # transformers: [b, heads, k, d]
    positions = torch.tensor([POSITIONS])
    made = {"positions_bk": positions.numpy(), "x_bhkd": x.numpy()}
    for name, scale, kind in (
        ("local", 1.0, "sliding_attention"),
        ("global", 1.0, "full_attention"),
        ("global8", 8.0, "full_attention"),
        ("local8", 8.0, "sliding_attention"),  # the scale is for global layers alone: equals "local"
    ):
        cos, sin = Gemma3RotaryEmbedding(text_config(scale))(x, positions, kind)
        rotated, _ = apply_rotary_pos_emb(x, x, cos, sin)
        made |= {
            f"{name}_cos_bkd": cos.numpy(),
            f"{name}_sin_bkd": sin.numpy(),
            f"{name}_rotated_bhkd": rotated.numpy(),
        }
    return made


def masks() -> dict[str, np.ndarray]:
    """1 where a query sees a key: a padded batch of two whole texts, and a chunk of three queries after nine keys."""
    config = text_config()
    embeds = torch.zeros(2, LENGTH, config.hidden_size)
    padding = torch.arange(LENGTH)[None] < torch.tensor(LENGTHS)[:, None]
    whole: dict[str, Any] = {
        "causal": masking_utils.create_causal_mask(config, embeds, padding.long(), None),
        "window": masking_utils.create_sliding_window_causal_mask(config, embeds, padding.long(), None),
    }
    chunk: dict[str, Any] = {
        name: masking_utils.eager_mask(1, 3, LENGTH, q_offset=LENGTH - 3, mask_function=function)
        for name, function in (
            ("causal", masking_utils.causal_mask_function),
            ("window", masking_utils.sliding_window_causal_mask_function(WINDOW)),
        )
    }
    made = {"lengths_b": np.array(LENGTHS), "window_size": np.array(WINDOW)}
    made |= {f"{name}_bqk": (mask[:, 0] == 0).numpy().astype(np.uint8) for name, mask in whole.items()}
    made |= {f"{name}_chunk_bqk": (mask[:, 0] == 0).numpy().astype(np.uint8) for name, mask in chunk.items()}
    return made


def pointwise() -> dict[str, np.ndarray]:
    """RMSNorm with gain 1 + w on vectors of very different size (one of them zero), and the tanh GELU."""
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor([1e-4, 1e-2, 1.0, 30.0, 1e4, 0.0])[:, None]
    x = torch.randn(6, HEAD_DIM, generator=generator) * size
    norm = Gemma3RMSNorm(HEAD_DIM, eps=1e-6)
    norm.weight.data = torch.randn(HEAD_DIM, generator=generator)
    gelu_in = torch.linspace(-12, 12, 97, dtype=torch.float64)
    return {
        "norm_x": x.numpy(),
        "norm_w": norm.weight.detach().numpy(),
        "norm_y": norm(x).detach().numpy(),
        "gelu_x": gelu_in.numpy(),
        "gelu_y": ACT2FN["gelu_pytorch_tanh"](gelu_in).numpy(),
    }


if __name__ == "__main__":
    sys.exit(main())
