"""Train assets/tiny-gemma3: a Gemma-3-shaped model of 7.5 M parameters on the text that comes with this environment.

    python scripts/train_tiny.py --out runs/tiny            # resumes by itself after an interruption
    python scripts/train_tiny.py --out runs/tiny --export assets/tiny-gemma3

About a tenth of the sequences are the recall task (`tpa_ref.compress.recall`), so that long-range attention is used
and can be measured. Learning rate to zero over the whole run; the weights with the best held-out loss are the ones
exported. Two CPU cores need under two hours, a GPU minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "cuda"), str(ROOT / "scripts")]

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm

import tiny_corpus
from tpa_ref.cli.report import describe_config
from tpa_ref.compress import recall
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.memory import parameter_count
from tpa_ref.gemma.tokenizer import Tokenizer
from tpa_ref.gemma.weights import LayerWeights, hf_names, names_of

LENGTH = 1024  # tokens of a training sequence
# (share of the run, tokens of a sequence, share of recall documents, share of repeated random tokens).
STAGES = ((0.65, 256, 0.1, 0.04), (0.35, 1024, 0.1, 0.02))
ANSWER_WEIGHT = 3.0  # an answer of the recall task counts like three tokens of text
COMMON = 0.4  # length of the part that all initial embeddings share
SHIPPED = {"evaluation": 250_000, "holdout": 120_000, "calibration": 120_000}  # characters exported with the model
BOS = 2


# ---- tokenizer: Gemma's special ids, 4096 pieces ----


def train_tokenizer(documents: list[str], target: Path, vocab_size: int) -> None:
    """A SentencePiece BPE model with pad 0, eos 1, bos 2, unk 3, mask 4 and the turn tokens at 105 and 106."""
    special = ["<mask>", "[multimodal]"] + [f"<unused{i}>" for i in range(99)]
    special += ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n"]
    lines = [line for text in documents for line in text.split("\n") if line]
    prefix = str(target.with_suffix("")) + ".tmp"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=prefix,
        vocab_size=vocab_size,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=special,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        character_coverage=0.9999,
        num_threads=2,
        minloglevel=2,
    )
    os.replace(prefix + ".model", target)
    os.remove(prefix + ".vocab")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(target))
    assert tokenizer.piece_to_id("<start_of_turn>") == 105 and tokenizer.piece_to_id("<end_of_turn>") == 106


# ---- the training data ----


class Sequences:
    """Seeded stream of training sequences: shuffled windows of the text, and every tenth a recall document."""

    def __init__(self, tokens: np.ndarray, tokenizer, filler: str, seed: int, steps: int = 1000):
        self.tokens, self.tokenizer, self.filler, self.seed, self.steps = tokens, tokenizer, filler, seed, steps

    def batch(self, step: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens [rows, length + 1], weight of each target [rows, length]) of one step, the same whenever asked."""
        rng = random.Random(f"{self.seed} {step}")
        length, recall_share, repeat_share = stage_of(step / self.steps)
        rows, weights = [], []
        for _ in range(tokens // length):
            kind = rng.random()
            if kind < recall_share:
                row, weight = self.recall_row(rng, length)
            elif kind < recall_share + repeat_share:
                row, weight = self.repeated_row(rng, length)
            else:
                start = rng.randrange(len(self.tokens) - length)
                row = np.concatenate([[BOS], self.tokens[start : start + length]])
                weight = np.ones(length, np.float32)
            rows.append(row)
            weights.append(weight)
        return torch.from_numpy(np.stack(rows)).long(), torch.from_numpy(np.stack(weights))

    def repeated_row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens, then the same again and again: only looking back predicts them. The first round is free."""
        period = rng.randint(12, length // 2)
        first = np.random.default_rng(rng.getrandbits(32)).integers(400, self.tokenizer.vocab_size, period)
        row = np.concatenate([[BOS], np.resize(first, length)])
        return row, (np.arange(length) >= period).astype(np.float32)

    def recall_row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One document of the recall task; its answers carry more weight than text."""
        row, weight = [BOS], []
        for text, is_answer in tiny_corpus.recall_document(rng, self.filler, characters=6 * length):
            ids = self.tokenizer.encode(text, bos=False)
            row += ids
            weight += [ANSWER_WEIGHT if is_answer else 1.0] * len(ids)
        assert len(weight) >= length, "recall document shorter than the sequence"
        return np.array(row[: length + 1]), np.array(weight[:length], np.float32)


def stage_of(progress: float) -> tuple[int, float, float]:
    """(sequence length, recall share, repetition share) at a point of the run, 0 ... 1."""
    end = 0.0
    for share, *stage in STAGES[:-1]:
        end += share
        if progress < end:
            return int(stage[0]), stage[1], stage[2]
    return STAGES[-1][1:]


# ---- the model: the same functions as tpa_torch, one fused graph ----


def initial_parameters(config: GemmaConfig, seed: int) -> dict[str, torch.Tensor]:
    """Embeddings of rms 1 after Gemma's sqrt(m), matrices 1/2 sqrt(fan in), norms 1 (w = 0), and `look_back`.

    The norms behind attention and MLP start at 1/sqrt(2 layers): at 1, two dozen random contributions of rms 1 would
    bury the token's own embedding. All embeddings share a component, so that a query can ask for a position alone.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in hf_names(config).items():
        if len(shape) == 1:
            behind = "post_attention" in name or "post_feedforward" in name
            value = torch.full(shape, (2 * config.num_layers) ** -0.5 - 1 if behind else 0.0)
        elif "embed" in name:
            common = F.normalize(torch.randn(shape[1], generator=generator), dim=0)
            own = torch.randn(shape, generator=generator) * config.hidden_size**-0.5
            value = COMMON * common + (1 - COMMON**2) ** 0.5 * own
        else:
            value = torch.randn(shape, generator=generator) * 0.5 * shape[1] ** -0.5
        parameters[name] = value
    for layer in (layer for layer, is_global in enumerate(config.is_global) if is_global and layer > 0):
        look_back(parameters, config, layer, generator)
    return {name: value.requires_grad_() for name, value in parameters.items()}


def look_back(parameters: dict[str, torch.Tensor], config: GemmaConfig, layer: int, generator: torch.Generator) -> None:
    """Start half the heads of a global layer and of the local one below as an "induction" circuit, in place.

    Recall is: find where the present token stood before, and say what followed it. From a random start a model this
    small needs far more than this run to discover that, so the two heads it takes start out drawn: the lower one looks
    one token back and hands on what stood there; the upper one looks for places whose predecessor is the present token
    and copies what it finds. Everything is then trained like the rest.

    The lower head's query and key are the constants p and R_1 p, so that q_m . k_n = p . R_(n-m+1) p is largest at
    n = m - 1. The upper head compares in the slowly turning half of its RoPE pairs, which barely move in 1,000 tokens.
    The first dimensions of the residual stream are kept nearly free of embeddings, for what is handed on.
    """
    d, m, queries_per_kv, half = config.head_dim, config.hidden_size, config.queries_per_kv, config.head_dim // 2
    groups = config.num_kv_heads // 2
    handed_on = groups * d  # leading dimensions of the residual stream
    embedding = parameters["model.embed_tokens.weight"]
    embedding[:, :handed_on] *= 0.3 / max(1e-6, embedding[:, :handed_on].std() * m**0.5)
    common = F.normalize(embedding.mean(0), dim=0)
    frequency = config.rope_base_local ** (-torch.arange(half) / half)
    p = (torch.arange(d) < 3).float()  # the three fastest pairs locate one token among the neighbours
    p_turned = torch.cat([p[:half] * frequency.cos(), p[:half] * frequency.sin()])
    slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, d)])

    def weight(layer: int, name: str) -> torch.Tensor:
        return parameters[f"model.layers.{layer}.self_attn.{name}.weight"]

    def reader() -> torch.Tensor:
        """A random projection of the token's own part of the residual stream: [d, m]."""
        value = torch.randn(d, m, generator=generator) * m**-0.5
        value[:, :handed_on] = 0
        return value - torch.outer(value @ common, common)

    for group in range(groups):
        rows = slice(group * d, (group + 1) * d)
        heads = range(group * queries_per_kv, (group + 1) * queries_per_kv)
        token, copied = reader(), reader()
        for at in (layer - 1, layer):
            weight(at, "k_proj")[rows] *= 0.2
            for head in heads:
                weight(at, "q_proj")[head * d : (head + 1) * d] *= 0.2
                weight(at, "o_proj")[:, head * d : (head + 1) * d] = 0
        weight(layer - 1, "k_proj")[rows] += torch.outer(p_turned, common)
        weight(layer - 1, "v_proj")[rows] = token
        weight(layer - 1, "o_proj")[rows, heads[0] * d : (heads[0] + 1) * d] = torch.eye(d)
        weight(layer, "k_proj")[group * d + slow] = torch.eye(m)[group * d : group * d + len(slow)]
        weight(layer, "v_proj")[rows] = copied
        for head in heads:
            weight(layer - 1, "q_proj")[head * d : (head + 1) * d] += torch.outer(p, common)
            weight(layer, "q_proj")[head * d + slow] = token[: len(slow)]
            weight(layer, "o_proj")[:, head * d : (head + 1) * d] = copied.T
    for at, gain in ((layer - 1, 2.0), (layer, 1.7)):
        weight(at, "o_proj")[:, groups * queries_per_kv * d :] *= 0.3
        weight(at, "q_norm").fill_(gain - 1)
        weight(at, "k_norm").fill_(gain - 1)
        parameters[f"model.layers.{at}.post_attention_layernorm.weight"].fill_(0.7 - 1)


def forward(
    parameters: dict[str, torch.Tensor], config: GemmaConfig, tokens_bq: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """Final hidden states [b, q, m] of whole sequences; every length must be a multiple of the window."""
    length = tokens_bq.shape[1]
    device = tokens_bq.device
    x_bqm = F.embedding(tokens_bq, parameters["model.embed_tokens.weight"]) * config.hidden_size**0.5
    tables = {flag: rope_tables(config, flag, length, device) for flag in (False, True)}
    mask = window_mask(config.sliding_window, length, device)
    for layer, is_global in enumerate(config.is_global):
        w = {field: parameters[f"model.layers.{layer}.{name}"] for field, name in names_of(LayerWeights).items()}
        a_bqm = rms_norm(x_bqm, w["attn_norm_m"])
        q = F.linear(a_bqm, w["WQ_hdm"]).unflatten(-1, (config.num_heads, config.head_dim))
        k = F.linear(a_bqm, w["WK_gdm"]).unflatten(-1, (config.num_kv_heads, config.head_dim))
        v = F.linear(a_bqm, w["WV_gem"]).unflatten(-1, (config.num_kv_heads, config.head_dim))
        q = rotate(rms_norm(q, w["q_norm_d"]), *tables[is_global])
        k = rotate(rms_norm(k, w["k_norm_d"]), *tables[is_global])
        n = config.queries_per_kv
        q, k, v = (
            q.transpose(1, 2),
            k.repeat_interleave(n, 2).transpose(1, 2),
            v.repeat_interleave(n, 2).transpose(1, 2),
        )
        if is_global:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=config.query_scale)
        else:
            o = windowed_attention(q, k, v, mask, config.sliding_window, config.query_scale)
        o = F.linear(o.transpose(1, 2).flatten(-2), w["WO_mhe"])
        x_bqm = x_bqm + F.dropout(rms_norm(o, w["post_attn_norm_m"]), dropout)
        a_bqm = rms_norm(x_bqm, w["mlp_norm_m"])
        gated = F.gelu(F.linear(a_bqm, w["W_gate_fm"]), approximate="tanh") * F.linear(a_bqm, w["W_up_fm"])
        x_bqm = x_bqm + F.dropout(rms_norm(F.linear(gated, w["W_down_mf"]), w["post_mlp_norm_m"]), dropout)
    return rms_norm(x_bqm, parameters["model.norm.weight"])


def rms_norm(x, w):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6) * (1 + w)).to(x.dtype)


def rope_tables(config: GemmaConfig, is_global: bool, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    base = config.rope_base_global if is_global else config.rope_base_local
    half = config.head_dim // 2
    frequency = base ** (-torch.arange(half, device=device) / half)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x, cos, sin):
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def window_mask(window: int, length: int, device) -> torch.Tensor:
    """Which of the 2w keys of its own and the previous block each query of a block sees: [blocks, w, 2w]."""
    i = torch.arange(window, device=device)[:, None]
    j = torch.arange(2 * window, device=device) - window
    seen = (j <= i) & (i - j < window)
    mask = seen.expand(length // window, -1, -1).clone()
    mask[0, :, :window] = False
    return mask[:, None]


def windowed_attention(q, k, v, mask, window, scale):
    """Block-local attention: a query's window lies in its own block of w keys and the one before."""
    b, h, length, d = q.shape
    blocks = length // window

    def with_previous(x):
        x = x.reshape(b, h, blocks, window, d)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], 3).transpose(1, 2).reshape(-1, h, 2 * window, d)

    q = q.reshape(b, h, blocks, window, d).transpose(1, 2).reshape(-1, h, window, d)
    o = F.scaled_dot_product_attention(
        q, with_previous(k), with_previous(v), attn_mask=mask.repeat(b, 1, 1, 1), scale=scale
    )
    return o.reshape(b, blocks, h, window, d).transpose(1, 2).reshape(b, h, length, d)


def loss_of(parameters, config, tokens, weight, dropout: float = 0.0) -> torch.Tensor:
    """Weighted mean cross entropy in nats per token."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        hidden = forward(parameters, config, tokens[:, :-1], dropout)
        logits = F.linear(hidden, parameters["model.embed_tokens.weight"])
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / weight.sum()


# ---- training ----


def held_out_loss(parameters, config, windows: torch.Tensor) -> float:
    """Mean nats per token over windows [n, LENGTH + 1] of unseen documents."""
    with torch.no_grad():
        losses = [
            float(loss_of(parameters, config, w, torch.ones(w[:, 1:].shape, device=w.device))) for w in windows.split(4)
        ]
    return sum(losses) / len(losses)


def recall_accuracy(parameters, config, tokenizer, filler: list[int], distance: int, count: int = 16) -> float:
    """Share of answers predicted right (all their tokens) when the fact stands `distance` tokens back."""
    rng = random.Random(f"recall {distance}")
    device = parameters["model.norm.weight"].device
    rows, answers = [], []
    for _ in range(count):
        prompt, answer = recall.prompt_and_answer(rng, tokenizer, filler, distance)
        row = [BOS, *prompt, *answer]
        answers.append(range(len(row) - len(answer) - 1, len(row) - 1))
        rows.append(row + [0] * (-len(row) % config.sliding_window))
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    right = 0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for row, where in zip(tokens, answers, strict=True):
            hidden = forward(parameters, config, row[None])[0, list(where)]
            guess = F.linear(hidden, parameters["model.embed_tokens.weight"]).argmax(-1)
            right += bool((guess == row[[i + 1 for i in where]]).all())
    return right / count


def windows_of(tokens: np.ndarray, length: int = LENGTH) -> torch.Tensor:
    """Non-overlapping windows with BOS in front: [n, length + 1]."""
    count = len(tokens) // length
    rows = tokens[: count * length].reshape(count, length)
    return torch.from_numpy(np.concatenate([np.full((count, 1), BOS), rows], 1)).long()


def learning_rate(step: int, steps: int, peak: float, warmup: int = 40) -> float:
    """Linear warm-up, then linear to zero."""
    return peak * min(1.0, (step + 1) / warmup) * max(0.0, 1 - step / steps)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    config = GemmaConfig.tiny()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits, tokenizer = prepare(out, config)
    filler = "\n\n".join(splits["train"].values())
    tokens = np.array(tokenizer.encode(filler, bos=False), np.int32)
    unseen = windows_of(np.array(tokenizer.encode("\n\n".join(splits["holdout"].values()), bos=False))).to(device)
    unseen = unseen[:: max(1, len(unseen) // 32)][:32]
    filler_ids = unseen[:, 1:].flatten().tolist()
    print(f"training tokens {len(tokens):,}; held-out windows {len(unseen)} x {LENGTH}", flush=True)

    parameters = {
        name: p.detach().to(device).requires_grad_() for name, p in initial_parameters(config, args.seed).items()
    }
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in parameters.items() if p.ndim != 2 or "embed" in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    done, best, log = resume(out, parameters, optimizer)
    compiled = torch.compile(loss_of) if args.compile else loss_of
    data = Sequences(tokens, tokenizer, filler, args.seed, args.steps)
    started = time.time()
    for step in tqdm(range(done, args.steps), initial=done, total=args.steps, unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        batch, weight = (x.to(device) for x in data.batch(step, args.batch))
        loss = compiled(parameters, config, batch, weight, args.dropout)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == args.steps
        if (step + 1) % args.evaluate_every == 0 or last:
            held = held_out_loss(parameters, config, unseen)
            accuracy = {d: recall_accuracy(parameters, config, tokenizer, filler_ids, d) for d in (150, 400, 900)}
            log.append(
                {
                    "step": step + 1,
                    "train": round(float(loss.detach()), 4),
                    "held_out": round(held, 4),
                    "recall": accuracy,
                }
            )
            print(json.dumps(log[-1]), f"{time.time() - started:.0f} s", flush=True)
            score = held if min(accuracy.values()) >= 0.95 else held + 1.0
            if score <= best:
                best = score
                write_atomically(out / "best.pt", parameters)
        if (step + 1) % 50 == 0 or last:
            state = {
                "parameters": parameters,
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "best": best,
            }
            write_atomically(out / "state.pt", state)
            (out / "log.json").write_text(json.dumps(log))


def write_atomically(path: Path, content) -> None:
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def resume(out: Path, parameters, optimizer):
    """(next step, best score so far, log) of an interrupted run, whose state is loaded in place."""
    if not (out / "state.pt").exists():
        return 0, math.inf, []
    state = torch.load(out / "state.pt", weights_only=True)
    with torch.no_grad():
        for name, value in state["parameters"].items():
            parameters[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    log = json.loads((out / "log.json").read_text()) if (out / "log.json").exists() else []
    return state["step"], state["best"], [entry for entry in log if entry["step"] <= state["step"]]


def prepare(out: Path, config: GemmaConfig):
    """(documents by split, tokenizer), made once and kept in the run folder."""
    corpus = out / "corpus.json"
    if not corpus.exists():
        corpus.write_text(json.dumps(tiny_corpus.collect()))
    splits = json.loads(corpus.read_text())
    path = out / "tokenizer.model"
    if not path.exists():
        rng = random.Random(0)
        examples = ["".join(text for text, _ in tiny_corpus.recall_document(rng, " " * 2000, 4000)) for _ in range(200)]
        train_tokenizer(list(splits["train"].values()) + examples, path, config.vocab_size)
    return splits, Tokenizer.from_file(path)


# ---- export ----


def export(args: argparse.Namespace) -> None:
    """Write the best weights of a run as a Hugging Face folder, with its texts, its card and its loss curve."""
    from safetensors.torch import save_file

    out, target = Path(args.out), Path(args.export)
    target.mkdir(parents=True, exist_ok=True)
    config = GemmaConfig.tiny()
    splits, tokenizer = prepare(out, config)
    best = torch.load(out / "best.pt", weights_only=True, map_location="cpu")
    parameters = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in best.items()}
    save_file(parameters, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    (target / "tokenizer.model").write_bytes((out / "tokenizer.model").read_bytes())
    texts = {name: excerpt(splits["train" if name == "calibration" else name], SHIPPED[name]) for name in SHIPPED}
    for name, text in texts.items():
        (target / f"{name}.txt").write_text(text, encoding="utf-8")

    (target / "NOTICE").write_text(NOTICE.format(sources=", ".join(tiny_corpus.sources()[1:])), encoding="utf-8")
    (target / "licenses").mkdir(exist_ok=True)
    for package, licence in tiny_corpus.licenses().items():
        (target / "licenses" / f"{package}.txt").write_text(licence, encoding="utf-8")

    # Figures of the weights as they are shipped: bfloat16, computed in float32.
    weights = {name: value.float() for name, value in parameters.items()}
    unseen = np.array(tokenizer.encode(texts["evaluation"], bos=False))
    seen = np.array(tokenizer.encode("\n\n".join(splits["train"].values()), bos=False))
    stride = max(1, len(seen) // LENGTH // 100)
    figures = {
        "loss_unseen_documents": held_out_loss(weights, config, windows_of(unseen)),
        "loss_training_documents": held_out_loss(weights, config, windows_of(seen)[::stride]),
        "recall": {
            d: recall_accuracy(weights, config, tokenizer, unseen.tolist(), d, count=40)
            for d in (150, 300, 500, 700, 900)
        },
        "training_tokens": len(seen),
        "evaluation_tokens": len(unseen),
        "log": json.loads((out / "log.json").read_text()),
        "sources": tiny_corpus.sources(),
        "torch": torch.__version__,
    }
    (target / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    (target / "README.md").write_text(card(figures, config), encoding="utf-8")
    plot_log(figures, target / "training.png")
    print(json.dumps({name: figures[name] for name in ("loss_unseen_documents", "loss_training_documents", "recall")}))


def excerpt(documents: dict[str, str], characters: int) -> str:
    """The beginnings of documents drawn at random, none longer than 6,000 characters, until there is enough."""
    names = random.Random(0).sample(sorted(documents), len(documents))
    return "\n\n".join(documents[name][:6000] for name in names)[:characters]


NOTICE = """The texts evaluation.txt, holdout.txt and calibration.txt, and the text that the weights were trained on,
are documentation, docstrings and comments of

- Python and its standard library, Copyright (c) 2001-2026 Python Software Foundation; All Rights Reserved; used and
  redistributed under the Python Software Foundation License Version 2 (https://docs.python.org/3/license.html);
- {sources}: used and redistributed under their licences, which stand in licenses/.

The texts are excerpts; near-duplicate paragraphs were removed. The weights and everything else in this folder are under
the Apache License 2.0 of this repository.
"""

CARD = """# tiny-gemma3

A language model of Gemma 3's structure in {parameters:.1f} M parameters: {description}.
Trained from nothing by `scripts/train_tiny.py`; it exists to show and test KV cache compression in seconds, and is
useful for nothing else.

| | |
|---|---|
| loss on unseen documents | {unseen:.3f} nats per token (perplexity {unseen_ppl:.1f}) |
| loss on training documents | {seen:.3f} nats per token; gap {gap:.3f} |
| recall on unseen text, by distance in tokens | {recall} |
| training text | {tokens:,} tokens: documentation, docstrings and comments of {sources} |
| steps | {steps:,}, of 2,048 tokens in sequences of 256, later 1,024; AdamW, learning rate to zero |
| torch | {torch} |

Unseen documents are whole modules or topics that a hash of their name keeps out of training; near-duplicate paragraphs
(one run of 24 words in common) are dropped before. `evaluation.txt` (for figures) and `holdout.txt` (for choices, among
them which step of the training to keep) are unseen, `calibration.txt` is an excerpt of the training text. A recall
prompt states eight facts ("Note: amber river."), goes on with text, and asks for one of them ("Recall: amber"). The
heads that recall needs started as an induction circuit (`look_back` in the script) and were trained with everything.

The tokenizer is a SentencePiece BPE model of 4,096 pieces with Gemma's special ids. Licence of the text: see NOTICE.

![Loss and recall over the steps of training.](training.png)
"""


def card(figures: dict, config: GemmaConfig) -> str:
    """The model card, all numbers from `figures`."""
    unseen, seen = figures["loss_unseen_documents"], figures["loss_training_documents"]
    return CARD.format(
        parameters=parameter_count(config) / 1e6,
        description=describe_config(config).split(": ", 1)[1].rsplit(", ", 1)[0],
        unseen=unseen,
        unseen_ppl=math.exp(unseen),
        seen=seen,
        gap=unseen - seen,
        recall=", ".join(f"{d}: {100 * value:.0f} %" for d, value in figures["recall"].items()),
        tokens=figures["training_tokens"],
        steps=figures["log"][-1]["step"],
        sources=", ".join(figures["sources"]),
        torch=figures["torch"],
    )


def plot_log(figures: dict, path: Path) -> None:
    """Loss curve and recall over the run."""
    from tpa_ref import plots

    figure, (left, right) = plots.new_figure(2)
    steps = [entry["step"] for entry in figures["log"]]
    left.plot(
        steps, [entry["train"] for entry in figures["log"]], ":", color=plots.INK["windowed"], label="training batch"
    )
    left.plot(
        steps, [entry["held_out"] for entry in figures["log"]], "-", color=plots.INK["tpa"], label="held-out documents"
    )
    left.set(xlabel="step", ylabel="nats per token", title="Loss")
    left.legend(frameon=False)
    for distance, style in zip(figures["log"][-1]["recall"], ("-", "--", ":"), strict=False):
        values = [100 * entry["recall"][distance] for entry in figures["log"]]
        right.plot(steps, values, style, color="black", label=f"{distance} tokens back")
    right.set(xlabel="step", ylabel="answered right (%)", title="Recall", ylim=(0, 105))
    right.legend(frameon=False)
    plots.write(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny", help="folder of the run: state, log, best weights")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=2048, help="tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", metavar="DIR", help="write the best weights of the run there instead of training")
    args = parser.parse_args()
    export(args) if args.export else train(args)


if __name__ == "__main__":
    main()
