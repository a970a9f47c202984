"""A whole model: prefill, decode and conversion, dense and TPA, beside `transformers` on the same weights.

    python benchmarks/end_to_end.py                                       # the shipped tiny model
    python benchmarks/end_to_end.py --models tiny 1b --work /tmp/sizes    # and random weights of 1B size (2 GB of disk)
    python benchmarks/end_to_end.py --models 1b --work /tmp/sizes --gemma-pytorch ../gemma_pytorch

Decode is measured one token after a cache that is full to the given context; what is in it is random, since that
changes no time. `transformers` runs with DynamicCache(config=...), whose window layers hold their window, as ours do.
--gemma-pytorch: a checkout of google/gemma_pytorch; its 1B model runs with random weights and a cache of full length.
"""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import ROOT, Clock, describe, fill, options, publish, table

import tpa_torch
from tpa_ref import plots
from tpa_ref.cli.machine import PeakMemory, anonymous_memory
from tpa_ref.errors import TPAError
from tpa_ref.gemma.generate import prefill
from tpa_ref.gemma.texts import shipped

SETTINGS: dict[str, dict[str, Any]] = {
    "contextual, exact": {"mode": "contextual", "k_rank": 99, "v_rank": 99},
    "exact int8 K and V": {"mode": "fixed-a", "k_rank": 99, "v_rank": 99, "kv_dtype": "int8"},
    "exact int8 K, spectral V rate 2": {"k_mode": "fixed-a", "rate": 2.0},
    "fixed-a int8 K, latent int8 V": {"k_mode": "fixed-a", "k_rank": 99, "v_mode": "latent", "kv_dtype": "int8"},
    "latent int8": {"mode": "latent", "kv_dtype": "int8"},
    "spectral rate 2.5": {"rate": 2.5},
    "spectral rate 2": {"rate": 2.0},
    "spectral rate 2, prefer size": {"rate": 2.0, "prefer": "size"},
}
CALIBRATION = 16_384  # tokens, as `run_test_tpa_1b.py` reads them
WITH_CALIBRATION = f"the default, calibrated on {CALIBRATION:,} tokens"
STEPS = 64  # tokens that a cache has room for behind the context


def checkpoint(name: str, work: str | None) -> Path:
    """The folder of a model; random ones are written where they are missing."""
    if name == "tiny":
        return options.TINY
    if work is None:
        raise TPAError(f"--work: a folder for the random weights of {name} is needed")
    folder = Path(work) / f"random-{name}"
    if not folder.exists():
        script = ["scripts/random_checkpoint.py", "--variant", name, "--out", str(folder)]
        subprocess.run([sys.executable, *script], cwd=ROOT, check=True)
    return folder


def read_whole(folder: Path) -> int:
    """Read the weights once, as a conversion must at least."""
    size, block = 0, bytearray(1 << 24)
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(block):
                size += count
    return size


def conversions(folder: Path, dtype: str, clock: Clock, settings: dict) -> list[dict[str, Any]]:
    """Seconds from the file to a converted model, from weights alone, beside reading the file."""
    read_whole(folder)

    def whole(choices: dict) -> None:
        tpa_torch.convert(tpa_torch.load(folder, device=clock.device, dtype=dtype), tpa_torch.TPAConfig(**choices))

    @torch.inference_mode(False)  # it goes backwards
    def calibrated() -> None:
        dense = tpa_torch.load(folder, device=clock.device, dtype=dtype)
        tpa_torch.convert(dense, None, tpa_torch.calibrate(dense, shipped("calibration"), max_tokens=CALIBRATION))

    reading = min(clock(lambda: read_whole(folder)) for _ in range(3))
    works = {name: partial(whole, choices) for name, choices in settings.items()} | {WITH_CALIBRATION: calibrated}
    return [{"setting": name, "seconds": clock(work), "read_seconds": reading} for name, work in works.items()]


def our_step(model: Any, context: int) -> Callable[[], Any]:
    """One token after a full cache."""
    cache = model.new_cache(1, context + STEPS)
    fill(cache, context)
    token = np.array([[5]])
    return lambda: model.logits(model.hidden(token, cache))


def transformers_model(folder: Path, like: Any) -> Any:
    """The same weights in `transformers`; None where it is not installed."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return None
    dtype = getattr(torch, like.dtype)
    return transformers.Gemma3ForCausalLM.from_pretrained(folder, dtype=dtype).to(like.device).eval()


def transformers_step(hf: Any, context: int) -> Callable[[], Any]:
    cache = importlib.import_module("transformers").DynamicCache(config=hf.config)
    shape = 1, hf.config.num_key_value_heads, context, hf.config.head_dim
    for layer in range(hf.config.num_hidden_layers):
        K, V = (torch.randn(shape, dtype=hf.dtype, device=hf.device) for _ in range(2))
        cache.update(K, V, layer)
    token = torch.tensor([[5]], device=hf.device)
    return lambda: hf(token, past_key_values=cache, use_cache=True).logits


def transformers_prefill(hf: Any, tokens_bq: np.ndarray) -> Callable[[], Any]:
    transformers = importlib.import_module("transformers")
    tokens = torch.from_numpy(tokens_bq).to(hf.device)
    return lambda: hf(
        tokens, past_key_values=transformers.DynamicCache(config=hf.config), use_cache=True, logits_to_keep=1
    )


def gemma_pytorch_step(checkout: str, tokenizer: Path, context: int, device: str) -> Callable[[], Any]:
    """One token of google/gemma_pytorch's 1B in bfloat16, with the masks and caches that its `generate` makes."""
    sys.path.insert(0, checkout)
    config = importlib.import_module("gemma.config").get_config_for_1b("bfloat16")
    config.tokenizer = str(tokenizer)
    config.max_position_embeddings = max(config.max_position_embeddings, context + STEPS)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = importlib.import_module("gemma.model").GemmaForCausalLM(config).to(device).eval()
    torch.set_default_dtype(before)
    for weight in model.parameters():
        weight.data.normal_(0, 0.02)
    length = context + STEPS
    shape = 1, length, config.num_key_value_heads, config.head_dim
    caches = [
        tuple(torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        for _ in range(config.num_hidden_layers)
    ]
    distance = context - torch.arange(length, device=device)
    hidden = -2.3819763e38
    mask = torch.where(distance < 0, hidden, 0.0)[None, None, None]
    local = torch.where((distance < 0) | (distance >= config.sliding_window_size), hidden, 0.0)[None, None, None]
    return lambda: model(
        torch.tensor([[5]], device=device),
        torch.tensor([context], device=device),
        None,
        caches,
        mask,
        torch.tensor(0, device=device),
        None,
        torch.tensor([1.0], device=device),
        torch.tensor([64], device=device),
        local_mask=local,
    )


def measure(name: str, args: Any, clock: Clock) -> dict[str, Any]:
    """Everything of one model."""
    folder = checkpoint(name, args.work)
    dtype = "float32" if name == "tiny" else "bfloat16"
    dense = tpa_torch.load(folder, device=args.device, dtype=dtype)
    settings = {s: SETTINGS[s] for s in args.settings or SETTINGS}
    models = {"dense": dense}
    for setting, choices in settings.items():
        models[setting] = tpa_torch.convert(dense, tpa_torch.TPAConfig(**choices))
    hf = transformers_model(folder, dense)
    found: dict[str, Any] = {"model": name, "dtype": dtype, "prefill": [], "decode": []}
    found["conversion"] = conversions(folder, dtype, clock, settings) if args.conversion else []

    tokens_bq = np.random.default_rng(0).integers(3, 4000, (1, args.prefill))
    works: dict[str, Callable[[], Any]] = {
        setting: lambda m=model: prefill(m, tokens_bq.tolist(), m.new_cache(1, args.prefill))  # type: ignore[misc]
        for setting, model in models.items()
    }
    if hf is not None:
        works["transformers"] = transformers_prefill(hf, tokens_bq)
    for setting, seconds in clock.medians(works).items():
        found["prefill"].append({"setting": setting, "tokens": args.prefill, "seconds": seconds})
        print(f"{name}: prefill {setting} {args.prefill / seconds:.0f} tokens/s", flush=True)
    for context in args.contexts:
        if context + STEPS > dense.config.max_positions:
            continue
        works = {setting: our_step(model, context) for setting, model in models.items()}
        if hf is not None:
            works["transformers"] = transformers_step(hf, context)
        if args.gemma_pytorch and name == "1b":
            works["google/gemma_pytorch"] = gemma_pytorch_step(
                args.gemma_pytorch, folder / "tokenizer.model", context, args.device
            )
        for setting, seconds in clock.medians(works).items():
            found["decode"].append({"setting": setting, "context": context, "seconds": seconds})
            print(f"{name}: decode at {context} {setting} {1 / seconds:.1f} tokens/s", flush=True)
        works.clear()
        gc.collect()
    return found


def long_prefill(tokens: int, clock: Clock) -> dict[str, Any]:
    """The tiny model reads a text far beyond its training: seconds, and memory beyond the weights."""
    dense = tpa_torch.load(options.TINY, device=clock.device)
    dense.config = replace(dense.config, max_positions=tokens)
    model = tpa_torch.convert(dense, tpa_torch.TPAConfig(rate=2.0))
    cache = model.new_cache(1, tokens)
    ids = np.random.default_rng(0).integers(3, 4000, tokens).tolist()
    before = anonymous_memory()
    with PeakMemory(clock.device) as peak:
        seconds = clock(lambda: prefill(model, [ids], cache))
    return {"tokens": tokens, "seconds": seconds, "bytes": peak.bytes - before, "cache_bytes": cache.nbytes}


def text(content: dict[str, Any]) -> str:
    """Tables of every model."""
    parts = ["### Whole models, batch 1\n", describe(content["machine"]) + "\n"]
    for found in content["models"]:
        parts.append(f"**{found['model']}, {found['dtype']}**\n")
        contexts = list(dict.fromkeys(row["context"] for row in found["decode"]))
        seconds = {(row["setting"], row["context"]): row["seconds"] for row in found["decode"]}
        lines = []
        for row in found["prefill"]:
            line = [row["setting"], f"{row['tokens'] / row['seconds']:,.0f}"]
            lines.append(line + [f"{1 / seconds[row['setting'], context]:,.1f}" for context in contexts])
        for setting in dict.fromkeys(row["setting"] for row in found["decode"]):
            if setting not in {row["setting"] for row in found["prefill"]}:
                lines.append([setting, ""] + [f"{1 / seconds[setting, context]:,.1f}" for context in contexts])
        header = [
            "tokens/s",
            f"prefill of {found['prefill'][0]['tokens']}",
            *(f"decode at {context:,}" for context in contexts),
        ]
        parts.append(table(header, lines))
        if found["conversion"]:
            lines = [
                [
                    row["setting"],
                    f"{row['seconds']:.1f}",
                    f"{row['read_seconds']:.1f}",
                    f"{row['seconds'] / row['read_seconds']:.1f}",
                ]
                for row in found["conversion"]
            ]
            parts.append(table(["conversion, else from weights alone", "s", "reading the file, s", "ratio"], lines))
    if long := content["long_prefill"]:
        parts.append(
            f"Prefill of {long['tokens']:,} tokens of the tiny model, spectral rate 2: {long['seconds']:.0f} s, "
            f"{long['bytes'] / 1e6:,.0f} MB beyond the weights and the cache of {long['cache_bytes'] / 1e6:.1f} MB.\n"
        )
    return "\n".join(parts)


def draw(models: list[dict[str, Any]], axis: Any) -> None:
    """Decode speed of the last model against context."""
    rows = models[-1]["decode"]
    styles = ("-", "--", ":", "-.")
    for number, setting in enumerate(dict.fromkeys(row["setting"] for row in rows)):
        here = [row for row in rows if row["setting"] == setting]
        colour = plots.INK["full" if "/" in setting or setting == "transformers" else "tpa"]
        colour = plots.INK["windowed"] if setting == "dense" else colour
        axis.plot(
            [row["context"] for row in here],
            [1 / row["seconds"] for row in here],
            "osD^v<>P*X"[number % 10] + styles[number % 4],
            color=colour,
            label=setting,
        )
    axis.set(xscale="log", xlabel="context (tokens)", ylabel="decode, tokens/s", ylim=(0, None))
    axis.set_title(f"Decode of a whole model: {models[-1]['model']}, {models[-1]['dtype']}")
    axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


@torch.inference_mode()
def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=["tiny"], help="tiny, or sizes of random weights (1b, 4b ...)")
    parser.add_argument("--work", metavar="FOLDER", help="where random weights are kept")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 1900, 8192, 32000])
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help=f"of: {'; '.join(SETTINGS)}")
    parser.add_argument("--long", type=int, default=32768, help="tokens of the long prefill of the tiny model; 0: none")
    parser.add_argument("--no-conversion", dest="conversion", action="store_false")
    parser.add_argument("--gemma-pytorch", metavar="FOLDER", help="a checkout of google/gemma_pytorch")
    args = parser.parse_args()
    for name in args.settings or []:
        if name not in SETTINGS:
            raise TPAError(f"--settings: {name!r} is not one of {'; '.join(SETTINGS)}")
    clock = Clock(args)
    content: dict[str, Any] = {"machine": common.machine(clock)}
    content["long_prefill"] = long_prefill(args.long, clock) if args.long else None
    content["models"] = [measure(name, args, clock) for name in args.models]
    publish("end_to_end", args, content, text(content), partial(draw, content["models"]))


if __name__ == "__main__":
    options.run(main)
