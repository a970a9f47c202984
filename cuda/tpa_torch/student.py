"""What healing trains: a converted model whose maps change, what its cache gives back, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.core.mode import Tokens
from tpa_ref.gemma.token_vectors import numbered
from tpa_ref.gemma.weights import LayerWeights
from tpa_ref.trace import Watch

from .core.banded import Banded
from .core.contextual import Contextual
from .core.dense import Dense
from .core.mode import Mode
from .core.norm import rms_norm
from .core.pair import Joint, Pair
from .fast.spectral import BandedLatent
from .gemma.model import Model

ROWS = 256  # positions whose logits are held at once
WIDE = 1024  # hidden size from which on activations are computed again on the way back


class Student:
    """A converted model whose maps are W0 + scale theta; scale is the size of a row of W0, so steps are relative."""

    def __init__(self, tpa: Model):
        self.tpa = tpa
        self.start: dict[str, Tensor] = {}
        for layer, pair in enumerate(tpa.pairs):
            if pair.is_dense:
                continue
            block = tpa.weights.layers[layer]
            found = {"WO": block.WO_mhe}
            for side, mode, W in (("k", pair.k, block.WK_gdm), ("v", pair.v, block.WV_gem)):
                constants = {f"{side}.{name}": x for name, x in mode.arrays().items() if x is not None and x.numel()}
                found |= {f"{side}.W": W} | constants
            self.start |= {f"{layer}.{name}": x.detach().clone().float() for name, x in found.items()}
        self.theta = {name: torch.zeros_like(W0).requires_grad_() for name, W0 in self.start.items()}

    @torch.no_grad()
    def set_weights(self, theta: dict[str, Tensor]) -> None:
        """Go on from other thetas."""
        for name, value in self.theta.items():
            value.copy_(theta[name])

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
        names = {"WO_mhe": "WO", "WK_gdm": "k.W", "WV_gem": "v.W"}
        now = {field: self.now(f"{layer}.{name}", getattr(w, field)) for field, name in names.items()}
        return replace(w, **{field: x.to(w.WO_mhe.dtype) for field, x in now.items()})

    def pair(self, layer: int) -> Pair:
        """How a layer caches K and V, with the constants as they are now."""
        pair = self.tpa.pairs[layer]
        sides = [
            mode.with_arrays({name: self.now(f"{layer}.{side}.{name}", x) for name, x in mode.arrays().items()})
            for side, mode in zip("kv", pair.modes, strict=True)
        ]
        return type(pair)(*sides)

    @torch.no_grad()
    def model(self) -> Model:
        """A model with these weights."""
        tpa, layers = self.tpa, range(self.tpa.config.num_layers)
        weights = replace(tpa.weights, layers=[self.block(layer) for layer in layers])
        pairs = [self.pair(layer) for layer in layers]
        kept = tpa.query_factors, tpa.stored_dtype, tpa.side_files
        made = type(tpa)(tpa.config, weights, tpa.tokenizer, tpa.tpa, pairs, *kept)
        made.choices = tpa.choices
        return made


def cached(K_bkgd: Tensor, V_bkge: Tensor, pair: Any, sinks: int, tokens: Any) -> tuple[Tensor, Tensor]:
    """What a cache gives back of K (before RoPE) and V, differentiable: two arrays [b,k,g,d]."""
    sides, modes = (K_bkgd.float(), V_bkge.float()), (pair.k, pair.v)
    made: list[Tensor]
    if isinstance(pair, Joint):
        C_bks = sum(mode.encode(X_bkgd, tokens)["C"] for X_bkgd, mode in zip(sides, modes, strict=True))
        parts = rounded({"C": C_bks}, modes[0])
        made = [mode.decode(parts, tokens) for mode in modes]
    elif isinstance(pair, Banded):
        k, v = (StraightThrough(**vars(mode)) for mode in modes)
        _, K_bks = k.coded(sides[0])
        _, V_bks = v.coded(sides[1], K_bks)
        both: Any = k.decode({"C": K_bks}, tokens), v.decode({"C": V_bks}, tokens)
        made = list(both)
    else:
        made = [cached_alone(X_bkgd, mode, tokens) for X_bkgd, mode in zip(sides, modes, strict=True)]
    made = [torch.cat([X[:, :sinks], Y[:, sinks:]], 1) for X, Y in zip(sides, made, strict=True)]
    return made[0].to(K_bkgd.dtype), made[1].to(V_bkge.dtype)


class StraightThrough(BandedLatent):
    """The same codes, with the gradient of no rounding at all."""

    def coded_string(self, C_bks: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        string, decoded_bks = super().coded_string(C_bks.detach(), widths)
        return string, C_bks + (decoded_bks - C_bks).detach()


def cached_alone(X_bkgd: Tensor, mode: Any, tokens: Any) -> Tensor:
    """The same of K or V that shares nothing with the other."""
    if isinstance(mode, Dense):
        return X_bkgd
    if isinstance(mode, Contextual):
        return Projector.apply(X_bkgd @ X_bkgd.mT, mode.rank) @ X_bkgd
    return mode.decode(rounded(mode.encode(X_bkgd, tokens), mode), tokens)


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


def rounded(parts: dict[str, Any], mode: Mode) -> dict[str, Any]:
    """What is stored of some parts, with the gradient of no rounding at all (straight-through)."""
    with torch.no_grad():
        back = mode.load(mode.store(parts), torch.float32)
    return {part: x + (back[part].to(x.dtype) - x).detach() for part, x in parts.items()}


# ---- the loss ----


def losses(student: Student, dense: Model, window: list[int]) -> tuple[Tensor, Tensor]:
    """(mean KL(dense || student) in nats, mean relative error of the states behind attention) of one window."""
    run = recomputed if dense.config.hidden_size >= WIDE else lambda step, *arguments: step(*arguments)
    tokens_bq = np.array([window])
    at = dense.positions(np.arange(len(window))[None])
    with torch.no_grad():
        targets: list[Tensor] = []
        watch = Watch({"attn.residual_bqm": lambda _, x: targets.append(x)})
        teacher_bqm = dense.embed(tokens_bq)
        for layer, w in enumerate(dense.weights.layers):
            teacher_bqm = dense.block(teacher_bqm, layer, w, at, dense.whole_text(1, len(window)), watch)
        teacher_bqm = rms_norm(teacher_bqm, dense.weights.final_norm_m, dense.config.rms_eps)
    x_bqm, errors = dense.embed(tokens_bq), []
    numbers_bq = numbered(tokens_bq, np.ones_like(tokens_bq, bool))
    Z_bqz = dense.token_vectors(numbers_bq, np.arange(len(window))[None]) if student.tpa.reads_tokens else None
    for layer in range(dense.config.num_layers):
        x_bqm, error = run(student_block, student, dense, layer, x_bqm, at, targets[layer], Z_bqz)
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
    student: Student, dense: Model, layer: int, x_bqm: Tensor, at: Any, target_bqm: Tensor, Z_bqz: Any
) -> tuple[Tensor, Tensor]:
    """(state behind a layer whose K and V went through the cache, relative error of that behind its attention)."""
    found: list[Tensor] = []
    watch = Watch({"attn.residual_bqm": lambda _, x: found.append(x)})
    pair, config = student.pair(layer), dense.config
    sinks = student.tpa.exact.kept(pair, config.window(layer), config.max_positions).sinks
    through_cache = ThroughCache(dense, pair, sinks, Z_bqz)
    held = dense.whole_text(*x_bqm.shape[:2])
    y_bqm = through_cache.block(x_bqm, layer, student.block(layer), at, held, watch)
    error = (found[0].float() - target_bqm.float()).square().sum() / target_bqm.float().square().sum()
    return y_bqm, error


class ThroughCache(Model):
    """A dense model whose K (before RoPE) and V are what a cache would give back of them."""

    def __init__(self, dense: Model, pair: Any, sinks: int, Z_bqz: Any):
        super().__init__(dense.config, dense.weights, dense.tokenizer)
        self.pair, self.sinks, self.tokens = pair, sinks, Tokens((None, None), Z_bqz)

    def project_keys_and_values(self, a_bkm: Tensor, layer: int, w: LayerWeights, trace: Any) -> tuple[Tensor, Tensor]:
        K_bkgd, V_bkge = super().project_keys_and_values(a_bkm, layer, w, trace)
        return cached(K_bkgd, V_bkge, self.pair, self.sinks, self.tokens)


def divergence(dense: Model, x_bqm: Tensor, teacher_bqm: Tensor) -> Tensor:
    """Sum of KL(teacher || student) over positions, from final hidden states."""
    head_vm = dense.weights.head_vm
    Q_bqv = F.linear(x_bqm, head_vm).float().log_softmax(-1)
    P_bqv = F.linear(teacher_bqm, head_vm).float().log_softmax(-1)
    return (P_bqv.exp() * (P_bqv - Q_bqv)).sum()
