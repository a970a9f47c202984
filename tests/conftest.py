"""Fixtures that all tests share: the two backends, and small random Gemma 3 checkpoints of `transformers`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from helpers import TEXT_LENGTH, RandomGemma, hf_run

if importlib.util.find_spec("torch"):
    import torch

    if not torch.cuda.is_available():  # Triton reads it when it is imported, which other libraries may do first
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["tpa_ref", "tpa_torch"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """The package under test: the NumPy reference, and its PyTorch twin where torch is installed."""
    if request.param == "tpa_torch":
        pytest.importorskip("torch").set_num_threads(1)
    return importlib.import_module(request.param)


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
