"""Who takes part in `peers`: each reads a text, goes on with it, and says how long that took and what it held."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

import tpa_torch
from tpa_ref.errors import TPAError
from tpa_ref.gemma.generate import generate_tokens

PIECE = 2_048  # tokens that `transformers` reads at once: faster than all, and memory does not grow with their square


class Run(NamedTuple):
    """One text read and continued."""

    prefill_s: float
    token_s: list[float]
    cache_bytes: int
    weights_bytes: int


class Contestant(Protocol):
    """`hidden` and `logits` are what `evaluate` asks of a model."""

    def run(self, ids: list[int], new: int) -> Run: ...
    def hidden(self, tokens_bq: np.ndarray) -> Any: ...
    def logits(self, x_bqm: Any) -> Any: ...


class Ours:
    """A model of this project."""

    def __init__(self, model: Any):
        self.model, self.hidden, self.logits = model, model.hidden, model.logits

    def run(self, ids: list[int], new: int) -> Run:
        held = self.model.new_cache(1, len(ids) + new)
        first, *rest = seconds(generate_tokens(self.model, ids, new + 1, cache=held, stop=frozenset()))
        constants = self.model.weights, self.model.pairs, self.model._token_table
        return Run(first, rest, held.nbytes, stored_bytes(tensors(constants)))


class Transformers:
    """The same weights in `transformers`, with the cache whose window layers hold their window."""

    def __init__(self, library: Any, dense: Any):
        self.new_cache = library.DynamicCache
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            folder = tpa_torch.save(dense, Path(work) / "gemma")
            self.model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(self, ids: list[int], new: int) -> Run:
        held = self.new_cache(config=self.model.config)
        first, *rest = seconds(self.tokens(ids, new + 1, held))
        keys_and_values = [x for layer in held.layers for x in (layer.keys, layer.values)]
        return Run(first, rest, sum(x.nbytes for x in keys_and_values), stored_bytes(self.model.parameters()))

    @torch.inference_mode()
    def tokens(self, ids: list[int], count: int, held: Any) -> Iterator[int]:
        """Greedy, as `generate` with prefill_chunk_size."""
        pieces = list(torch.tensor([ids]).split(PIECE, dim=1))
        for _ in range(count):
            for piece in pieces:
                L_bqv = self.model(piece, past_key_values=held, logits_to_keep=1).logits
            pieces = [L_bqv[:, -1].argmax(-1, keepdim=True)]
            yield pieces[0].item()

    @torch.inference_mode()
    def hidden(self, tokens_bq: np.ndarray) -> torch.Tensor:
        held = self.new_cache(config=self.model.config)
        return self.model.model(torch.from_numpy(tokens_bq), past_key_values=held).last_hidden_state

    @torch.inference_mode()
    def logits(self, x_bqm: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(x_bqm).float()


class LlamaCpp:
    """The GGUF in the server of llama.cpp, which reports its times and sizes itself. A new server for every run."""

    def __init__(self, library: Any, checkpoint: Path, kind: str, threads: int, dense: Any):
        self.library, self.checkpoint, self.kind, self.threads = library, checkpoint, kind, threads
        self.logits = dense.logits  # the server gives final states of a text, but logits of its last token alone

    def server(self, tokens: int, **more: Any) -> Any:
        params = self.library.CommonParams()
        params.model.path = str(self.checkpoint)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        enabled = self.library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED  # or V cannot be quantized
        kind = getattr(self.library.ggml_type, f"GGML_TYPE_{self.kind.upper()}")
        choices = {
            "n_ctx": tokens, "n_parallel": 1, "n_gpu_layers": 0, "fit_params": False, "flash_attn_type": enabled,
            "cache_type_k": kind, "cache_type_v": kind,
            "cache_ram_mib": 0, "n_ctx_checkpoints": 0,  # copies of the cache, for other requests
            "verbosity": 4,  # sizes are reported
        }  # fmt: skip
        for name, value in (choices | more).items():
            setattr(params, name, value)
        return self.library.Server(params)

    def run(self, ids: list[int], new: int) -> Run:
        request = {
            "prompt": ids, "max_tokens": new + 1, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True,
            "cache_prompt": False, "stream": True, "timings_per_token": True,
        }  # fmt: skip
        pieces: list[dict[str, Any]] = []
        with stderr_of_c() as log:
            self.server(len(ids) + new + 1).handle_completions(request, pieces.append)
            said = read_back(log)
        found = [piece["timings"] for piece in pieces if "timings" in piece]
        if not found or found[0]["prompt_n"] != len(ids):
            raise TPAError(f"llama.cpp: no times of {len(ids)} tokens: {str(pieces[:1])[:160]}")
        until = {timing["predicted_n"]: timing["predicted_ms"] / 1000 for timing in found}  # the first token took none
        each = np.diff(list(until.values())) / np.diff(list(until))  # a piece of text can be two tokens
        sizes = (sum_of_mib(f"{what} buffer size", said) for what in ("KV", "model"))
        return Run(found[0]["prompt_ms"] / 1000, each.tolist(), *sizes)

    def hidden(self, tokens_bq: np.ndarray) -> torch.Tensor:
        """Final states [b,q,m] of one text, read through the cache."""
        ids, pooling = tokens_bq[0].tolist(), self.library.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        content = json.dumps({"input": ids, "embd_normalize": -1}).encode()
        with stderr_of_c():
            whole = {"n_batch": len(ids), "n_ubatch": len(ids)}
            server = self.server(len(ids), embedding=True, pooling_type=pooling, **whole)
            address = f"{server.listening_address}/embeddings"
            request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                states = json.load(answer)[0]["embedding"]
            del server
        return torch.tensor(states)[None]


def seconds(tokens: Iterable[int]) -> list[float]:
    """How long each token took."""
    marks = [time.perf_counter()]
    for _ in tokens:
        marks.append(time.perf_counter())
    return np.diff(marks).tolist()


def tensors(x: Any) -> Iterator[torch.Tensor]:
    """All that an object of ours holds."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict | list | tuple):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors(part)
    elif type(x).__module__.startswith("tpa_"):
        yield from tensors(getattr(x, "__dict__", {}))


def stored_bytes(found: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; what they share is counted once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


@contextmanager
def stderr_of_c() -> Iterator[Any]:
    """What is written to stderr meanwhile, also by a library of C, as a file."""
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(before, 2)
            os.close(before)


def read_back(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def sum_of_mib(what: str, log: str) -> int:
    """Bytes of all sizes of that name in a log.

    >>> sum_of_mib("KV buffer size", "CPU KV buffer size =   1.50 MiB\\nCPU KV buffer size = 0.50 MiB")
    2097152
    """
    return round(sum(float(size) for size in re.findall(rf"{what} =\s*([\d.]+) MiB", log)) * 2**20)
