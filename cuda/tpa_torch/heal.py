"""Healing: a short distillation that teaches a converted model to live with its smaller cache.

The dense model is the teacher. Trained are only the maps between a token and its cache, and W_O behind it:

    every mode                  W_K and W_V; in `contextual` their product with x is factorized per token
    spectral, latent, fixed-b   encoder, basis, mean and map of the words of K and of V
    fixed-a                     the constant A

everything else stays as it was. The loss is KL(dense || TPA) of the predictions plus the relative error of the states
behind every attention. Codes are rounded on the way forward and passed through on the way back (straight-through).

No cache is needed: pre-RoPE K and V of a whole text are replaced by what the cache would give back, which is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.atomic import replacing
from tpa_ref.compress.calibrate import read_text, text_windows
from tpa_ref.core.factorize import Factorization
from tpa_ref.errors import TPAError
from tpa_ref.gemma.weights import LayerWeights, Weights
from tpa_ref.trace import Watch

from .compress import token_prediction as words
from .compress.calibrate import calibrate
from .compress.convert import convert
from .core import cache as kv
from .core import factorize
from .core.norm import rms_norm
from .gemma.model import Model

WINDOW = 512
ROWS = 256  # positions whose logits are held at once
STATES = 0.1  # weight of the error of the states beside the KL
WIDE = 1024  # hidden size from which on activations are computed again on the way back
CHECKED = 8  # windows that are kept aside
CHECKS = 10
REGRESSED = 262_144  # tokens for the maps of the words; more change little


@dataclass
class Healing:
    """How a healing went: the loss of every step (KL in nats, state error), and the checks between them."""

    steps: int = 0
    kl: list[float] = field(default_factory=list)
    states: list[float] = field(default_factory=list)
    checked: list[tuple[int, float]] = field(default_factory=list)  # (steps done, KL on the windows kept aside)


def heal(
    tpa: Model,
    dense: Model,
    text_or_path: str | Path,
    steps: int = 200,
    batch: int = 4,
    learning_rate: float = 0.01,
    seed: int = 0,
    max_tokens: int = 4_000_000,
    state: str | Path | None = None,
    progress: Callable = iter,
    words: bool = False,
) -> Model:
    """A healed copy of a converted model. What was trained is described above; the history is `healed.healing`.

    The last windows of the text are not trained on. KL is checked there ten times, and the best state so far, the one
    before the first step included, is what is returned.

    text_or_path: text that neither planning nor evaluation uses. steps of `batch` windows each. learning_rate: relative
    change of a weight per step, at most, falling to zero. state: a file to go on from after an interruption. progress:
    wraps the steps, for instance `tqdm.tqdm`. words: begin with maps of the words in place of constant means; a
    regression on this text finds in minutes what the steps would look for in hours.
    """
    check_pair(tpa, dense, steps, batch, learning_rate, words)
    if words:
        tpa = with_maps_of_words(tpa, dense, read_text(text_or_path), None if state is None else Path(state).parent)
    windows = [window for window in text_windows(dense, text_or_path, max_tokens, WINDOW) if len(window) > 1]
    aside = windows[len(windows) - min(CHECKED, len(windows) // 4) :]
    windows = windows[: len(windows) - len(aside)]
    student = Student(tpa)
    best = Best(student)
    optimizer = torch.optim.AdamW(student.trained(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    history = Healing(steps)
    first = load_state(state, student, optimizer, history, best, tpa) if state else 0
    if first == 0:
        best.check(history, 0, dense, aside)
    draws = batches(windows, batch, seed)
    for step in progress(range(steps)):
        chosen = next(draws)
        if step < first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        optimizer.zero_grad(set_to_none=True)
        kl, states = 0.0, 0.0
        for window in chosen:
            kl_part, states_part = losses(student, dense, window)
            ((kl_part + STATES * states_part) / len(chosen)).backward()
            kl, states = kl + kl_part.item() / len(chosen), states + states_part.item() / len(chosen)
        torch.nn.utils.clip_grad_norm_(student.trained(), 1.0)
        optimizer.step()
        history.kl.append(kl)
        history.states.append(states)
        if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
            best.check(history, step + 1, dense, aside)
        if state and ((step + 1) % 20 == 0 or step + 1 == steps):
            save_state(state, student, optimizer, history, best, tpa)
    best.restore()
    healed = student.model()
    healed.healing = history
    return healed


def with_maps_of_words(tpa: Model, dense: Model, text: str, cache_dir: Path | None) -> Model:
    """The conversion made anew at the same rate: what the words tell of K and V on this text is no longer coded."""
    assert tpa.tpa is not None
    part = spread(text, REGRESSED * 4)
    moments = calibrate(dense, part, max_tokens=REGRESSED, cache_dir=cache_dir, predict=True)
    return convert(dense, replace(tpa.tpa, predict=True), moments)


def spread(text: str, size: int, pieces: int = 256) -> str:
    """About `size` characters in pieces from everywhere in a text.

    >>> spread("aaaabbbb", 4, pieces=2)
    'aabb'
    """
    if len(text) <= size:
        return text
    starts = np.linspace(0, len(text), pieces, endpoint=False).astype(int)
    return "".join(text[start : start + size // pieces] for start in starts)


def check_pair(tpa: Model, dense: Model, steps: int, batch: int, learning_rate: float, words: bool = False) -> None:
    """Every rule on the arguments of `heal`."""
    if tpa.tpa is None or dense.tpa is not None:
        raise TPAError("heal: a converted model and its dense original are needed, in this order")
    if tpa.config != dense.config:
        raise TPAError("heal: the two models must be of one config, got different ones")
    if steps < 1 or batch < 1:
        raise TPAError(f"heal: steps and batch must be >= 1, got {steps} and {batch}")
    if words and not any(how.dtype == "spectral" for how, _ in tpa.factors):
        raise TPAError("heal: words need a spectral conversion; this one stores no spectral codes")
    if not 0 < learning_rate < 1:
        raise TPAError(f"heal: learning_rate must lie in (0, 1), got {learning_rate}")


def batches(windows: list[list[int]], batch: int, seed: int) -> Iterator[list[list[int]]]:
    """Windows in random order, again and again."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while True:
        while len(order) < batch:
            order += rng.permutation(len(windows)).tolist()
        yield [windows[order.pop(0)] for _ in range(batch)]


def schedule(step: int, steps: int) -> float:
    """Warm up over the first twentieth, then a half cosine to zero.

    >>> [round(schedule(step, 100), 2) for step in (0, 4, 52, 99)]
    [0.2, 1.0, 0.5, 0.0]
    """
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm - 1)))


# ---- what is trained ----


class Student:
    """A converted model whose maps are W0 + scale theta; scale is the size of a row of W0, so steps are relative."""

    def __init__(self, tpa: Model):
        self.tpa = tpa
        self.start: dict[str, Tensor] = {}
        self.theta: dict[str, Tensor] = {}
        for layer, (how_k, how_v) in enumerate(tpa.factors):
            if how_k.mode == "dense" and how_v.mode == "dense":
                continue
            block = tpa.weights.layers[layer]
            self._train(f"{layer}.WO", block.WO_mhe)
            for side, how, W in (("k", how_k, block.WK_gdm), ("v", how_v, block.WV_gem)):
                if how.mode != "dense":
                    self._train(f"{layer}.{side}.W", W)
                for name, value in how.constants().items():
                    if value is not None and value.numel():
                        self._train(f"{layer}.{side}.{name}", value)

    def _train(self, name: str, value: Tensor) -> None:
        self.start[name] = value.detach().clone().float()
        self.theta[name] = torch.zeros_like(self.start[name]).requires_grad_()

    def trained(self) -> list[Tensor]:
        return list(self.theta.values())

    def now(self, name: str, otherwise: Tensor | None) -> Any:
        """The present value of a weight; `otherwise` where it is not trained."""
        if name not in self.theta:
            return otherwise
        W0 = self.start[name]
        scale = W0.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6 * float(W0.abs().max()) + 1e-12)
        return W0 + scale * self.theta[name]

    def block(self, layer: int) -> LayerWeights:
        """The weights of a layer as they are now."""
        w = self.tpa.weights.layers[layer]
        dtype = w.WO_mhe.dtype
        return replace(
            w,
            WO_mhe=self.now(f"{layer}.WO", w.WO_mhe).to(dtype),
            WK_gdm=self.now(f"{layer}.k.W", w.WK_gdm).to(dtype),
            WV_gem=self.now(f"{layer}.v.W", w.WV_gem).to(dtype),
        )

    def factors(self, layer: int) -> kv.LayerFactors:
        """How a layer caches K and V, with the constants as they are now."""
        k, v = (
            replace(how, **{name: self.now(f"{layer}.{side}.{name}", x) for name, x in how.constants().items()})
            for side, how in zip("kv", self.tpa.factors[layer], strict=True)
        )
        return k, v

    @torch.no_grad()
    def model(self) -> Model:
        """A model with these weights."""
        tpa, layers = self.tpa, range(self.tpa.config.num_layers)
        weights = Weights(tpa.weights.embed_vm, [self.block(layer) for layer in layers], tpa.weights.final_norm_m)
        if getattr(tpa.weights, "vision", None) is not None:
            weights.vision = tpa.weights.vision
        factors = [self.factors(layer) for layer in layers]
        return type(tpa)(tpa.config, weights, tpa.tokenizer, tpa.tpa, factors, tpa.query_factors, tpa.stored_dtype)


class Best:
    """The weights with the least KL on the windows kept aside, so far."""

    def __init__(self, student: Student):
        self.student, self.kl = student, math.inf
        self.theta: dict[str, Tensor] = {}

    @torch.no_grad()
    def check(self, history: Healing, step: int, dense: Model, windows: list[list[int]]) -> None:
        """Measure, and keep the weights if they are the best; without windows the last ones are."""
        kl = [float(losses(self.student, dense, window)[0]) for window in windows]
        found = sum(kl) / len(kl) if kl else -float(step)
        history.checked += [(step, found)] if kl else []
        if found < self.kl:
            self.kl, self.theta = found, {name: x.detach().clone() for name, x in self.student.theta.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Give the student the best weights back."""
        for name, value in self.theta.items():
            self.student.theta[name].copy_(value)


def cached(
    K_bkgd: Tensor, V_bkge: Tensor, how: kv.LayerFactors, sinks: int, Z_bkz: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a cache gives back of K (before RoPE) and V, differentiable: two arrays [b,k,g,d]. Z: the words."""
    sides, g = (K_bkgd.float(), V_bkge.float()), K_bkgd.shape[2]
    if how[1].dtype == "shared":
        parts_k, parts_v = factorize.encode_pair(*sides, how, Z_bkz)
        parts_k = {part: rounded(x, how[0]) for part, x in parts_k.items()}
        both = kv.completed(parts_k, parts_v, how, Z_bkz)
        made = [factorize.decode(parts, one, g) for parts, one in zip(both, how, strict=True)]
    else:
        made = [cached_alone(X_bkgd, one) for X_bkgd, one in zip(sides, how, strict=True)]
    if sinks:
        made = [torch.cat([X[:, :sinks], Y[:, sinks:]], 1) for X, Y in zip(sides, made, strict=True)]
    return made[0].to(K_bkgd.dtype), made[1].to(V_bkge.dtype)


def cached_alone(X_bkgd: Tensor, how: Factorization) -> Tensor:
    """The same of K or V that shares nothing with the other."""
    if how.mode == "dense":
        return X_bkgd
    if how.mode == "contextual":
        return Projector.apply(X_bkgd @ X_bkgd.mT, how.rank) @ X_bkgd
    parts = factorize.encode(X_bkgd, how)
    return factorize.decode({part: rounded(x, how) for part, x in parts.items()}, how, X_bkgd.shape[2])


class Projector(torch.autograd.Function):
    """The projection U U^T on the R leading eigenvectors of a symmetric matrix, which makes contextual factors of K:
    U U^T K, with U from K K^T.

    Its differential has the terms u_i^T dG u_j / (lambda_i - lambda_j) of a kept i and a dropped j. Where the two are
    almost equal the choice between them is arbitrary, so gaps are softened by a part of the largest eigenvalue.

    Shapes: G [...,g,g] -> [...,g,g].
    """

    SOFT = 0.05

    @staticmethod
    def forward(ctx: Any, G_xgg: Tensor, rank: int) -> Tensor:
        values_xg, U_xgs = torch.linalg.eigh(G_xgg)
        ctx.save_for_backward(values_xg, U_xgs)
        ctx.rank = rank
        kept_xgs = U_xgs[..., -rank:]
        return kept_xgs @ kept_xgs.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        values_xg, U_xgs = ctx.saved_tensors
        D_xgg = U_xgs.mT @ (gradients[0] + gradients[0].mT) @ U_xgs / 2
        gap_xgg = (values_xg[..., :, None] - values_xg[..., None, :]).abs()
        soft_x11 = Projector.SOFT * values_xg[..., -1:, None] + 1e-12
        kept_g = torch.arange(values_xg.shape[-1], device=values_xg.device) >= values_xg.shape[-1] - ctx.rank
        across_gg = kept_g[:, None] != kept_g
        weight_xgg = across_gg * gap_xgg / (gap_xgg.square() + soft_x11.square())
        return U_xgs @ (weight_xgg * D_xgg) @ U_xgs.mT, None


def rounded(x: Tensor, how: Factorization) -> Tensor:
    """What is stored of coefficients, with the gradient of no rounding at all (straight-through)."""
    with torch.no_grad():
        stored = kv.store({"C" if how.mode == "latent" else "B": x}, how)
        part = next(iter(stored))
        if how.dtype == "spectral":
            back = kv.load(stored, how, 0, 0)[part]
        else:
            back = kv.quantize.dequantize(stored[part], kv.part_dtype(part, x.ndim, how.dtype), x.shape[-1])
    return x + (back.to(x.dtype) - x).detach()


# ---- the loss ----


def losses(student: Student, dense: Model, window: list[int]) -> tuple[Tensor, Tensor]:
    """(mean KL(dense || student) in nats, mean relative error of the states behind attention) of one window."""
    run = recomputed if dense.config.hidden_size >= WIDE else lambda step, *arguments: step(*arguments)
    tokens_bq = np.array([window])
    views = dense.views(np.arange(len(window))[None])
    with torch.no_grad():
        targets: list[Tensor] = []
        watch = Watch({"attn.residual_bqm": lambda _, x: targets.append(x)})
        teacher_bqm = dense.embed(tokens_bq)
        for layer, w in enumerate(dense.weights.layers):
            teacher_bqm = dense.block(teacher_bqm, layer, w, views, None, watch)
        teacher_bqm = rms_norm(teacher_bqm, dense.weights.final_norm_m, dense.config.rms_eps)
    x_bqm, errors = dense.embed(tokens_bq), []
    Z_bqz = words.window_words(x_bqm)
    for layer in range(dense.config.num_layers):
        x_bqm, error = run(student_block, student, dense, layer, x_bqm, views, targets[layer], Z_bqz)
        errors.append(error)
    x_bqm = rms_norm(x_bqm, dense.weights.final_norm_m, dense.config.rms_eps)
    total = x_bqm.new_zeros((), dtype=torch.float32)
    for part_bqm, part_teacher_bqm in zip(x_bqm.split(ROWS, 1), teacher_bqm.split(ROWS, 1), strict=True):
        total = total + run(divergence, dense, part_bqm, part_teacher_bqm)
    return total / len(window), torch.stack(errors).mean()


def recomputed(step: Callable, *arguments: Any) -> Any:
    """The result of a step whose activations are not kept for the way back but computed again."""
    from torch.utils.checkpoint import checkpoint  # which takes a second to import

    return checkpoint(step, *arguments, use_reentrant=False)


def student_block(
    student: Student, dense: Model, layer: int, x_bqm: Tensor, views: Any, target_bqm: Tensor, Z_bqz: Tensor
) -> tuple[Tensor, Tensor]:
    """(state behind a layer whose K and V went through the cache, relative error of that behind its attention)."""
    found: list[Tensor] = []
    watch = Watch({"attn.residual_bqm": lambda _, x: found.append(x)})
    through_cache = ThroughCache(dense, student.factors(layer), student.tpa.exact(layer).sinks, Z_bqz)
    y_bqm = through_cache.block(x_bqm, layer, student.block(layer), views, None, watch)
    error = (found[0].float() - target_bqm.float()).square().sum() / target_bqm.float().square().sum()
    return y_bqm, error


class ThroughCache(Model):
    """A dense model whose K (before RoPE) and V are what a cache would give back of them."""

    def __init__(self, dense: Model, how: kv.LayerFactors, sinks: int, Z_bqz: Tensor):
        super().__init__(dense.config, dense.weights, dense.tokenizer)
        self.how, self.sinks, self.Z_bqz = how, sinks, Z_bqz

    def project_keys_and_values(self, a_bkm: Tensor, layer: int, w: LayerWeights, trace: Any) -> tuple[Tensor, Tensor]:
        K_bkgd, V_bkge = super().project_keys_and_values(a_bkm, layer, w, trace)
        return cached(K_bkgd, V_bkge, self.how, self.sinks, self.Z_bqz)


def divergence(dense: Model, x_bqm: Tensor, teacher_bqm: Tensor) -> Tensor:
    """Sum of KL(teacher || student) over positions, from final hidden states."""
    embed_vm = dense.weights.embed_vm
    Q_bqv = F.linear(x_bqm, embed_vm).float().log_softmax(-1)
    P_bqv = F.linear(teacher_bqm, embed_vm).float().log_softmax(-1)
    return (P_bqv.exp() * (P_bqv - Q_bqv)).sum()


# ---- going on after an interruption ----


def save_state(path: str | Path, student: Student, optimizer: Any, history: Healing, best: Best, tpa: Model) -> None:
    content = {
        "theta": {name: value.detach() for name, value in student.theta.items()},
        "optimizer": optimizer.state_dict(),
        "history": vars(history),
        "best": {"kl": best.kl, "theta": best.theta},
        "tpa": repr(tpa.tpa),
    }
    with replacing(Path(path)) as temporary:
        torch.save(content, temporary)


def load_state(path: str | Path, student: Student, optimizer: Any, history: Healing, best: Best, tpa: Model) -> int:
    """The step to go on with: 0 where there is no state; another conversion's or another length's is refused."""
    if not Path(path).is_file():
        return 0
    try:
        content = torch.load(path, weights_only=True)
        same = content["tpa"] == repr(tpa.tpa) and content["history"]["steps"] == history.steps
        if not same:
            raise TPAError(f"heal: {path} is the state of another healing; remove it or name another file")
        with torch.no_grad():
            for name, value in student.theta.items():
                value.copy_(content["theta"][name])
        optimizer.load_state_dict(content["optimizer"])
        history.kl, history.states = content["history"]["kl"], content["history"]["states"]
        history.checked = content["history"]["checked"]
        best.kl, best.theta = content["best"]["kl"], content["best"]["theta"]
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, TypeError, UnpicklingError) as problem:
        raise TPAError(f"heal: {path} holds no state of a healing: {str(problem).splitlines()[0]}") from None
    return len(history.kl)
