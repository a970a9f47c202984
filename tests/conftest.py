"""What all tests share: the two backends, the tolerances, and small random Gemma 3 checkpoints of `transformers`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tpa_ref.trace import Trace

if importlib.util.find_spec("torch"):
    import torch

    if not torch.cuda.is_available():  # Triton reads it when it is imported, which other libraries may do first
        os.environ["TRITON_INTERPRET"] = "1"

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


def submodule(backend: ModuleType, name: str) -> ModuleType:
    """A module of a backend by name; some are hidden behind a function of the same name (`tpa_ref.generate`)."""
    import small

    return small.part(backend, name)


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


@pytest.fixture(params=["tpa_ref", "tpa_torch"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """The package under test: the NumPy reference, and its PyTorch twin where torch is installed."""
    if request.param == "tpa_torch":
        pytest.importorskip("torch").set_num_threads(1)
    return importlib.import_module(request.param)


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


@pytest.fixture(scope="session")
def random_gemma(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RandomGemma]:
    """Makes small random Gemma 3 checkpoints with `transformers`; equal arguments give the same one again.

    Norm weights are drawn around zero and all others enlarged, so that no gain is 1 and no attention flat. The
    query scale is not head_dim, as in the 27B model.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)

    @functools.cache
    def make(
        g: int = 2, h: int = 4, head_dim: int = 16, window: int = 11, scaled: bool = False, layers: int = 7
    ) -> RandomGemma:
        torch.manual_seed(0)
        config = transformers.Gemma3TextConfig(
            vocab_size=300,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=h,
            num_key_value_heads=g,
            head_dim=head_dim,
            sliding_window=window,
            query_pre_attn_scalar=head_dim + 5,
            max_position_embeddings=512,
            **({"rope_scaling": {"rope_type": "linear", "factor": 8.0}} if scaled else {}),
        )
        hf = transformers.Gemma3ForCausalLM(config).eval()
        with torch.no_grad():
            for name, weight in hf.named_parameters():
                if "norm" in name:
                    weight.normal_(0, 0.3)
                else:
                    weight.mul_(4)
        path = tmp_path_factory.mktemp("gemma")
        hf.save_pretrained(path)
        tokens_bq = np.random.default_rng(0).integers(3, 300, (2, TEXT_LENGTH))
        return RandomGemma(path, hf, tokens_bq, *hf_run(hf, tokens_bq))

    return make


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
