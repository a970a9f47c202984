"""Sizes by arithmetic: KV caches, the two baselines and TPA, and models. Lives once and serves both backends.

Every ratio of this project is given against both baselines, always bf16 and batch 1:
    full      a dense cache of context length in every layer (what google/gemma_pytorch allocates)
    windowed  a dense cache whose window layers hold only their window (the best dense cache; the fair baseline)
"""

from __future__ import annotations

import math
from typing import Any

from .config import GemmaConfig
from .weights import hf_names

BF16 = 2


def token_bytes_dense(config: GemmaConfig) -> int:
    """K and V of one token in one layer, bf16.

    >>> token_bytes_dense(GemmaConfig.gemma3_1b())
    1024
    """
    return 2 * BF16 * config.num_kv_heads * config.head_dim


def full_bytes(config: GemmaConfig, n: int) -> int:
    """full(T) = 2 * 2 * g * d * (G + L) * T.

    >>> full_bytes(GemmaConfig.gemma3_4b(), 32768) / 2**30
    4.25
    """
    return token_bytes_dense(config) * config.num_layers * n


def windowed_bytes(config: GemmaConfig, n: int) -> int:
    """windowed(T) = 2 * 2 * g * d * (G * T + L * min(T, w)).

    >>> round(windowed_bytes(GemmaConfig.gemma3_4b(), 32768) / 2**30, 3)
    0.738
    """
    return token_bytes_dense(config) * sum(config.slots(layer, n) for layer in range(config.num_layers))


def parameter_count(config: GemmaConfig) -> int:
    """Numbers in all weights.

    >>> parameter_count(GemmaConfig.tiny())
    7549952
    """
    return sum(map(math.prod, hf_names(config).values()))


def weights_bytes(dense: Any, tpa: Any) -> dict[str, int]:
    """Bytes of the weights in memory; TPA adds its model constants and, with a q rank, exchanges W_Q."""
    embed_vm = dense.weights.embed_vm  # whose numbers take as many bytes as nearly all others
    size = parameter_count(dense.config) * embed_vm.nbytes // math.prod(embed_vm.shape)
    extra = sum(x.nbytes for pair in tpa.pairs for mode in pair.modes for x in mode.arrays().values() if x is not None)
    for query, block in zip(tpa.query_factors, dense.weights.layers, strict=True):
        if query is not None:
            extra += query[0].nbytes + query[1].nbytes - block.WQ_hdm.nbytes
    return {"dense": size, "tpa": size + extra}


def table(config: GemmaConfig, rows: list[tuple[str, int, int]]) -> str:
    """The memory table: rows of (label, tokens, TPA bytes).

    >>> print(table(GemmaConfig.gemma3_1b(), [("now", 1000, 5_000_000)]))
    KV cache       tokens          full      windowed           TPA   full/TPA  windowed/TPA
    now             1,000     25.39 MiB     14.91 MiB      4.77 MiB       5.3x          3.1x
    """
    lines = ["KV cache       tokens          full      windowed           TPA   full/TPA  windowed/TPA"]
    for label, n, tpa in rows:
        full, windowed = full_bytes(config, n), windowed_bytes(config, n)
        lines.append(
            f"{label:<12}{n:>9,}{human(full):>14}{human(windowed):>14}{human(tpa):>14}"
            f"{full / tpa:>10.1f}x{windowed / tpa:>13.1f}x"
        )
    return "\n".join(lines)


def human(size: float) -> str:
    """A size in the unit that fits it.

    >>> human(1536), human(3 * 2**30)
    ('1.50 KiB', '3.00 GiB')
    """
    for unit, least in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= least:
            return f"{size / least:.2f} {unit}"
    return f"{size:.0f} B"


def kv_report(config: GemmaConfig, measured: Any, context: int, tpa_bytes: int) -> dict[str, Any]:
    """The "kv" entry of a report: what a really filled cache holds, and the three sizes at `context` tokens."""
    full, windowed = full_bytes(config, context), windowed_bytes(config, context)
    return {
        "measured_tokens": int(measured.max_len),
        "measured_bytes": int(measured.nbytes),
        "context": context,
        "tpa_bytes": tpa_bytes,
        "full_bytes": full,
        "windowed_bytes": windowed,
        "ratio_vs_full": full / tpa_bytes,
        "ratio_vs_windowed": windowed / tpa_bytes,
    }
