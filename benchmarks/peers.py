"""This project beside `transformers` and llama.cpp on the real Gemma 3 270M: speed, memory and KL, on the CPU.

    make peers                                                     # all of it, on a machine that does nothing else
    python benchmarks/peers.py --contexts 512 2048 --repeats 1     # minutes

All read the same tokens of the shipped texts and go on with their own most likely ones; batch 1. They take turns, and
after the last the next round begins. Our settings and `transformers` compute in bfloat16, llama.cpp (the package
`xllamacpp`) from the 4 to 8 bits of the file. What is not installed is left out.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
from functools import cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import common
from common import ROOT, Clock, describe, options, publish, table
from contestants import PIECE, Contestant, LlamaCpp, Ours, Run, Transformers
from tqdm import tqdm

import tpa_torch
from get_gemma import TARGET
from tpa_ref import plots
from tpa_ref.errors import TPAError
from tpa_ref.gemma.texts import shipped
from tpa_ref.gemma.tokenizer import require_tokenizer

# tpa: of TPAConfig, without it the dense cache. load: of tpa_torch.load, beside the dtype
SETTINGS: dict[str, dict[str, Any]] = {
    "ours, dense bfloat16": {},
    "ours, exact int8": {"tpa": {"mode": "fixed-a", "k_rank": 99, "v_rank": 99, "kv_dtype": "int8"}},
    "ours, the default": {"tpa": {}},
    "ours, prefer size": {"tpa": {"rate": 2.6, "prefer": "size"}},
    "ours, dense, int8 weights": {"load": {"weights": "int8"}},
    "ours, the default, int8 weights": {"tpa": {}, "load": {"weights": "int8"}},
}
TRANSFORMERS = "transformers, bfloat16"
LLAMA_CPP = {f"llama.cpp, {kind} cache": kind for kind in ("f16", "q8_0", "q4_0")}
NAMES = [*SETTINGS, TRANSFORMERS, *LLAMA_CPP]

WINDOW = 2_048  # tokens of a text that the KL is measured on
WARM_UP = 64


# ---- who takes part ----


def optional(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        print(f"{library} is not installed: left out")
        return None


def taking_part(names: list[str], dense: Any, args: Any) -> dict[str, Contestant]:
    """Those of the names that can be had here; dense: the float32 model, which calibrates."""
    load = cache(lambda more: tpa_torch.load(args.ckpt, **{"dtype": "bfloat16", **json.loads(more)}))
    moments = cache(lambda: calibrated(dense, args.calibration_tokens))
    found: dict[str, Contestant] = {}
    for name in [name for name in names if name in SETTINGS]:
        model, choices = load(json.dumps(SETTINGS[name].get("load", {}))), SETTINGS[name].get("tpa")
        if choices is not None:
            text = None if "mode" in choices else moments()  # the exact modes need none
            model = tpa_torch.convert(model, tpa_torch.TPAConfig(**choices), text)
        found[name] = Ours(model)
    if TRANSFORMERS in names and (library := optional("transformers")):
        found[TRANSFORMERS] = Transformers(library, load("{}"))
    if set(LLAMA_CPP) & set(names) and (library := optional("xllamacpp")):
        kinds = {name: kind for name, kind in LLAMA_CPP.items() if name in names}
        found |= {name: LlamaCpp(library, args.ckpt, kind, args.threads, dense) for name, kind in kinds.items()}
    return found


def calibrated(dense: Any, tokens: int) -> Any:
    bar = options.progress_bar("calibrating")
    return tpa_torch.calibrate(
        dense, shipped("calibration"), max_tokens=tokens, progress=bar, cache_dir=ROOT / "runs" / "peers"
    )


def software(found: dict[str, Contestant]) -> dict[str, str]:
    """Versions, and the instructions that llama.cpp was built for."""
    llama = next((x for x in found.values() if isinstance(x, LlamaCpp)), None)
    said = {"transformers": version("transformers")} if TRANSFORMERS in found else {}
    if llama is None:
        return said
    built_for = re.findall(r"(\w+) = 1", llama.library.get_system_info())
    return said | {"xllamacpp": version("xllamacpp"), "llama.cpp built for": " ".join(built_for)}


# ---- measuring ----


def divergence(dense: Any, found: dict[str, Contestant], tokens: int) -> dict[str, float]:
    """The KL of everybody's predictions to those of the float32 model, on held-out prose."""
    if not tokens:
        return {}
    bar = tqdm(found.items(), desc="KL")
    figures = partial(tpa_torch.evaluate, max_tokens=tokens, length=WINDOW, recall_prompts=0)
    return {name: figures(dense, contestant, shipped("prose"))["kl"] for name, contestant in bar}


def rounds(found: dict[str, Contestant], ids: list[int], args: Any) -> list[dict[str, Any]]:
    """Times and sizes of everybody at every context."""
    for contestant in tqdm(found.values(), desc="warming up"):
        contestant.run(ids[:WARM_UP], 2)
    runs: dict[tuple[int, str], list[Run]] = {(n, name): [] for n in args.contexts for name in found}
    bar = tqdm([place for _ in range(args.repeats) for place in runs], desc="measuring")
    pace: dict[str, float] = {}  # seconds a token of the prefill before, which grows with the context
    for context, name in bar:
        if context * pace.get(name, 0) > args.patience:
            continue
        bar.set_postfix_str(f"{name} at {context:,}")
        run = found[name].run(ids[:context], args.tokens)
        pace[name] = run.prefill_s / context
        runs[context, name].append(run)
        speeds = context / run.prefill_s, 1 / statistics.median(run.token_s)
        bar.write("{} at {:,}: prefill {:,.0f}, decode {:,.1f} tokens/s".format(name, context, *speeds))
    return [summed_up(context, name, of) for (context, name), of in runs.items() if of]


def summed_up(context: int, name: str, runs: list[Run]) -> dict[str, Any]:
    """Medians over all runs of one contestant, and what they are medians of."""
    prefill_s, token_s = [run.prefill_s for run in runs], [run.token_s for run in runs]
    return {
        "name": name,
        "context": context,
        "prefill_tokens_per_s": context / statistics.median(prefill_s),
        "decode_tokens_per_s": 1 / statistics.median(chain(*token_s)),
        "cache_bytes": runs[-1].cache_bytes,
        "weights_bytes": runs[-1].weights_bytes,
        "prefill_s": prefill_s,
        "token_s": token_s,
    }


# ---- showing ----


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def kl_cell(content: dict[str, Any], name: str) -> str:
    return f"{content['kl'][name]:.5f}" if name in content["kl"] else ""


def text(content: dict[str, Any]) -> str:
    """Every contestant at every context."""
    header = ["context", "", "prefill, tokens/s", "decode, tokens/s", "cache, MiB", "weights, MiB", "KL"]
    rows = [
        [
            f"{row['context']:,}", row["name"], f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s']:,.1f}", mib(row["cache_bytes"]), mib(row["weights_bytes"]),
            kl_cell(content, row["name"]),
        ]
        for row in content["rows"]
    ]  # fmt: skip
    title = "### Beside `transformers` and llama.cpp: Gemma 3 270M from its GGUF, batch 1\n"
    return "\n".join([title, describe(content["machine"]), "", table(header, rows), note(content), ""])


def note(content: dict[str, Any]) -> str:
    """How it was measured."""
    said, has_llama = content["software"], any(row["name"] in LLAMA_CPP for row in content["rows"])
    parts = [
        f"Medians of {content['repeats']} interleaved runs, decode of {content['tokens']} tokens after the context in "
        "each. Ours and `transformers` hold the weights in bfloat16 but where it says otherwise, llama.cpp as they are "
        "in the file, in 4 to 8 bits."
    ]
    if "transformers" in said:
        parts.append(f"transformers {said['transformers']}: DynamicCache(config=...), {PIECE:,} tokens at once.")
    if has_llama:
        parts.append(
            f"llama.cpp: xllamacpp {said['xllamacpp']}, built for {said['llama.cpp built for']} (from source it would "
            "use all that a processor has); times and sizes by its own report, flash attention on, window layers with "
            "room for their window and a batch of 512."
        )
    if content["kl"]:
        parts.append(
            f"KL in nats to the dense float32 model, on {content['kl_tokens']:,} tokens of held-out prose in windows "
            f"of {WINDOW:,}; it counts the rounding of weights and products as well as the cache."
        )
    if len(content["rows"]) < len(content["contexts"]) * len({row["name"] for row in content["rows"]}):
        parts.append(f"Empty: the prefill would have taken more than {content['patience']:g} s.")
    if content["kl"] and has_llama:
        parts.append("llama.cpp's server gives final states, of which the logits are computed in float32.")
    return " ".join(parts)


def short(content: dict[str, Any]) -> str:
    """The essential rows: everybody at the shortest and the longest context."""
    first, last = min(content["contexts"]), max(content["contexts"])
    of = {(row["context"], row["name"]): row for row in content["rows"]}
    rows = []
    for name in dict.fromkeys(row["name"] for row in content["rows"]):
        begin, end = of[first, name], of.get((last, name))
        at_end = [f"{end['prefill_tokens_per_s']:,.0f}", f"{end['decode_tokens_per_s']:,.1f}"] if end else ["", ""]
        cells = [at_end[0], f"{begin['decode_tokens_per_s']:,.1f}", at_end[1], mib(end["cache_bytes"]) if end else ""]
        rows.append([name, *cells, mib(begin["weights_bytes"]), kl_cell(content, name)])
    header = ["", f"prefill of {last:,}, tokens/s", f"decode at {first:,}", f"decode at {last:,}"]
    header += [f"cache at {last:,}, MiB", "weights, MiB", "KL"]
    machine = content["machine"]
    where = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}."
    return "\n".join([table(header, rows), f"{note(content)} {where}", ""])


def draw(content: dict[str, Any], axis: Any) -> None:
    """Speed against size: each line is a contestant, each point a context."""
    for number, name in enumerate(dict.fromkeys(row["name"] for row in content["rows"])):
        here = [row for row in content["rows"] if row["name"] == name]
        sizes, speeds = ([row[key] for row in here] for key in ("cache_bytes", "decode_tokens_per_s"))
        style = "osD^v<>P*"[number % 9] + ("-", "--", ":", "-.")[number % 4]
        kind = "tpa" if name in SETTINGS else "windowed" if name in LLAMA_CPP else "full"
        axis.plot([size / 2**20 for size in sizes], speeds, style, color=plots.INK[kind], label=name)
    axis.set(xscale="log", xlabel="KV cache (MiB)", ylabel="decode, tokens/s", ylim=(0, None))
    axis.set_xticks([3, 5, 10, 20, 40, 100], ["3", "5", "10", "20", "40", "100"])
    axis.minorticks_off()
    axis.set_title("Decode and memory at " + ", ".join(f"{n:,}" for n in content["contexts"]) + " tokens")
    axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def parsed() -> Any:
    parser = common.parser(__doc__ or "")
    parser.set_defaults(threads=2, repeats=3)
    parser.add_argument("--ckpt", type=Path, default=TARGET, help="default: what scripts/get_gemma.py fetches")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2_048, 8_192, 30_000])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a run, whose median is taken")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NAMES, help=f"of: {'; '.join(NAMES)}")
    parser.add_argument("--patience", type=float, default=90, help="seconds that anybody may read a context")
    parser.add_argument("--kl-tokens", type=int, default=4 * WINDOW, help="of the text the KL is measured on; 0: no KL")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    args = parser.parse_args()
    if args.device != "cpu" or args.clock != "wall":
        raise TPAError("peers: measured on a CPU, by the wall clock")
    if unknown := set(args.only) - set(NAMES):
        raise TPAError(f"--only: {min(unknown)!r} is not one of {'; '.join(NAMES)}")
    if not args.ckpt.is_file():
        raise TPAError(f"peers: no {args.ckpt.name} here: python scripts/get_gemma.py fetches it")
    return args


def main() -> None:
    args = parsed()
    clock = Clock(args)
    dense = tpa_torch.load(args.ckpt)
    ids = require_tokenizer(dense, "peers").encode(shipped("prose") + shipped("holdout"))
    most = min(len(ids), dense.config.max_positions - args.tokens)
    if not WARM_UP <= min(args.contexts) <= max(args.contexts) <= most or args.tokens < 1:
        raise TPAError(f"peers: contexts must lie in {WARM_UP} ... {most} and --tokens be >= 1")
    found = taking_part(args.only, dense, args)
    if not found:
        raise TPAError("peers: nobody is left to measure")
    content = {name: getattr(args, name) for name in ("contexts", "tokens", "repeats", "kl_tokens", "patience")}
    content |= {"machine": common.machine(clock), "software": software(found)}
    content["rows"] = rounds(found, ids, args)
    content["kl"] = divergence(dense, found, args.kl_tokens)
    publish("peers", args, content, text(content), partial(draw, content))
    Path(args.out, "peers_summary.md").write_text(short(content), encoding="utf-8")


if __name__ == "__main__":
    options.run(main)
