"""Decoding as one fixed program: every buffer stays where it is, so that a GPU can replay the whole step as a graph.

`Model` asks the host for positions and lengths; here they are tensors on the device, the next token is chosen on the
device, and nothing of a step waits for anything. On CUDA the step is captured once (a CUDA graph) and replayed for each
token. Elsewhere the same step runs as it is written, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.core.cache import LayerCache
from tpa_ref.core.factorize import Factorization
from tpa_ref.gemma.tokenizer import STOP
from tpa_ref.gemma.weights import LayerWeights
from tpa_ref.trace import Tracer, no_trace

from ..core import attention, factorize, masks, rope
from ..core import cache as kv
from ..core.norm import rms_norm
from ..gemma.model import Model
from . import kernels

SQUARINGS = 12  # the Gram matrix to the power 2^12: neighbours a hundredth apart are e^-40 of each other


# ---- per-token factors that never wait ----


def leading_vectors(M_xgg: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of positive semidefinite matrices as rows, [...,g,g] -> [...,R,g], as orthogonal iteration.

    `eigh` looks at its result before it returns, so it cannot be part of a graph. A power of M, by squaring, leaves of
    its columns the leading vector alone; it is taken out of M, and the next one follows. Where eigenvalues agree to
    more digits than the power resolves, the vector is one of their span, which loses as little. A zero matrix gives
    zeros.
    """
    eye_gg = torch.eye(M_xgg.shape[-1], dtype=M_xgg.dtype, device=M_xgg.device)
    rest_xgg = eye_gg.expand_as(M_xgg)  # the projection on what is orthogonal to all vectors found
    found = []
    for _ in range(rank):
        P_xgg = of_unit_size(M_xgg)
        for _ in range(SQUARINGS):
            P_xgg = of_unit_size(P_xgg @ P_xgg)
        P_xgg = rest_xgg @ P_xgg
        column = P_xgg.square().sum(-2, keepdim=True).argmax(-1, keepdim=True)  # [...,1,1]
        u_xg1 = of_unit_length(P_xgg.gather(-1, column.expand(*P_xgg.shape[:-1], 1)))
        u_xg1 = of_unit_length(rest_xgg @ u_xg1)  # once more: what rounding left of the others
        found.append(u_xg1)
        rest_xgg = rest_xgg - u_xg1 @ u_xg1.mT
        M_xgg = rest_xgg @ M_xgg @ rest_xgg
    return torch.cat(found, -1).mT


def of_unit_size(M_xgg: Tensor) -> Tensor:
    """By the largest entry: no square can overflow, and what rounding left of a zero matrix is no division by zero."""
    return M_xgg / M_xgg.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)


def of_unit_length(u_xg1: Tensor) -> Tensor:
    return u_xg1 / u_xg1.square().sum(-2, keepdim=True).sqrt().clamp(min=1e-30)


def contextual_factors(X_bkgd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`factorize.contextual_factors` without `eigh`."""
    if X_bkgd.shape[2] == 1:
        return factorize.contextual_factors(X_bkgd, rank)
    d = X_bkgd.shape[-1]
    if X_bkgd.dtype != torch.float64 and d >= 16 and d & (d - 1) == 0 and kernels.runs_on(X_bkgd.device):
        return kernels.contextual_factors(X_bkgd, rank, SQUARINGS)  # all of what follows in one launch
    X32 = X_bkgd if X_bkgd.dtype == torch.float64 else X_bkgd.float()
    U_bksg = factorize.steady_signs(leading_vectors(X32 @ X32.mT, rank))
    return (rank * U_bksg).to(X_bkgd.dtype), (U_bksg @ X32).to(X_bkgd.dtype)


def encode_pair(
    K_bkgd: Tensor, V_bkge: Tensor, how: tuple[Factorization, Factorization], Z_bkz: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`factorize.encode_pair` without `eigh`."""
    if how[1].dtype == "shared":
        return factorize.encode_pair(K_bkgd, V_bkge, how, Z_bkz)
    k, v = (encode(X_bkgd, one) for X_bkgd, one in zip((K_bkgd, V_bkge), how, strict=True))
    return k, v


def encode(X_bkgd: Tensor, how: Factorization) -> dict[str, Tensor]:
    """`factorize.encode` without `eigh`."""
    if how.mode != "contextual":
        return factorize.encode(X_bkgd, how)
    A_bksg, B_bksd = contextual_factors(X_bkgd, how.rank)
    return {"A": A_bksg.flatten(2), "B": B_bksd}


# ---- one layer on static buffers ----


class NewTokens:
    """What the layers need to know of the new token of each row, in the place of `model.Views`.

    position_b: where it goes; runs_b: rows that take part, the others neither write nor see anything; text_bt: the
    text by position (`words.numbered`), where something is predicted from it.
    """

    def __init__(
        self, model: Model, cache: kv.Cache, position_b: Tensor, runs_b: Tensor, text_bt: Tensor | None = None
    ):
        self.text_bt = text_bt
        self.model, self.cache, self.position_b, self.runs_b = model, cache, position_b, runs_b
        query_b, length_b = torch.where(runs_b, position_b, -1), position_b + runs_b
        self.step = kernels.Step(query_b.int(), length_b.int())
        self._tables: dict[bool, tuple[Tensor, Tensor]] = {}

    def query_tables(self, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the new positions, [b,1,d/2] each."""
        kind = self.model.config.is_global[layer]
        if kind not in self._tables:
            cos, sin = self.model.rope_table(layer, self.cache.max_len)
            at_b = self.position_b.clamp(max=self.cache.max_len - 1)
            self._tables[kind] = cos[at_b][:, None], sin[at_b][:, None]
        return self._tables[kind]

    def words(self, position_bk: Tensor) -> Tensor:
        """z of the tokens at some positions, [b,k] -> [b,k,2m]."""
        assert self.text_bt is not None
        own_bk, previous_bk = (
            torch.where(at_bk >= 0, self.text_bt.gather(1, at_bk.clamp(min=0)), 0)
            for at_bk in (position_bk, position_bk - 1)
        )
        return self.model.word_table(own_bk, previous_bk)

    def write(self, held: LayerCache, sides: tuple[kv.Parts, kv.Parts]) -> None:
        """Store the new tokens in their slots; where a row takes no part, what was there stays."""
        runs_b = self.runs_b if held.windowed else self.runs_b & (self.position_b < held.slots)
        slot_b, row_b = self.position_b % held.slots, torch.arange(len(runs_b), device=runs_b.device)
        new = [kv.store(parts, how) for parts, how in zip(sides, held.how, strict=True)]
        for side, fresh in zip(held.stored, new, strict=True):
            for part, fields in side.items():
                for name, array in fields.items():
                    written = fresh[part][name][:, 0].to(array.dtype)
                    runs = runs_b.reshape(-1, *[1] * (written.ndim - 1))
                    array[row_b, slot_b] = torch.where(runs, written, array[row_b, slot_b])


class StaticModel(Model):
    """The same model, whose layers take the new tokens from the device (`NewTokens`) instead of from the host."""

    def __init__(self, model: Model):
        super().__init__(
            model.config, model.weights, model.tokenizer, model.tpa, model.factors, model.query_factors,
            model.stored_dtype,
        )  # fmt: skip
        self._tables = model._tables
        kind = getattr(torch, self.dtype)
        self.encoders = [(in_dtype(k, kind), in_dtype(v, kind)) for k, v in self.factors]

    def attend(
        self, a_bqm: Tensor, layer: int, w: LayerWeights, views: Any, cache: kv.Cache | None, trace: Tracer
    ) -> Tensor:
        """`Model.attend` of one new token a row."""
        assert cache is not None
        eps, held = self.config.rms_eps, cache.layers[layer]
        how_k, how_v = self.encoders[layer]
        tables_q = views.query_tables(layer)
        Q_bqhd = rope.rotate(rms_norm(self.project_queries(a_bqm, layer, w), w.q_norm_d, eps), *tables_q)
        K_bkgd, V_bkge = self.project_keys_and_values(a_bqm, layer, w, trace)

        read = kv.reads_words([(how_k, how_v)])
        Z_bqz = views.words(views.position_b[:, None]) if read else None
        parts_k, parts_v = encode_pair(K_bkgd, V_bkge, (how_k, how_v), Z_bqz)
        if how_k.rotated:
            part = "X" if how_k.mode == "dense" else "B"
            parts_k[part] = rope.rotate(parts_k[part], *tables_q)
        views.write(held, (parts_k, parts_v))
        for exact in (held.sinks, held.recent):
            if exact is not None:
                views.write(exact, ({"X": rope.rotate(K_bkgd, *tables_q)}, {"X": V_bkge}))

        served = kernels.usable(self.device, self.config, self.factors[layer], Q_bqhd.dtype)
        if served:
            O_bqhe = kernels.attend(Q_bqhd, self, layer, cache, views.step)
        else:
            O_bqhe = attend_in_torch(Q_bqhd, self, layer, cache, views.step, views.words if read else None)
        return F.linear(O_bqhe.flatten(2), w.WO_mhe.flatten(1))


def in_dtype(how: Factorization, dtype: torch.dtype) -> Factorization:
    """Constant arrays in the dtype that they multiply, so that no step converts them anew."""
    arrays: dict[str, Any] = {name: None if x is None else x.to(dtype) for name, x in how.constants().items()}
    return replace(how, **arrays)


def attend_in_torch(
    Q_bqhd: Tensor,
    model: Model,
    layer: int,
    cache: kv.Cache,
    step: kernels.Step,
    words: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What `kernels.attend` computes, from whole buffers and masks of positions: [b,1,h,d] -> [b,1,h,e].

    words: z of the tokens at some positions.
    """
    config, held, exact = model.config, cache.layers[layer], model.exact(layer)
    query_bq, g = step.query_b[:, None].long(), config.num_kv_heads
    cos, sin = model.rope_table(layer, cache.max_len)
    logits, values = [], []
    for kind, part in (("coded", held), ("sinks", held.sinks), ("recent", held.recent)):
        if part is None:
            continue
        length_b = step.length_b.long() if part.windowed or kind == "coded" else step.length_b.clamp(max=part.slots)
        position_bk = slot_positions(length_b, part.slots)
        seen_bqk = masks.visible(query_bq, position_bk, config.window(layer))
        seen_bqk = masks.of_segment(kind, seen_bqk, query_bq, position_bk, exact.sinks, exact.recent)
        Z_bkz = words(position_bk) if words is not None and kv.reads_words([part.how]) else None
        parts_k, parts_v = kv.load_pair(part.stored, part.how, g, config.head_dim, Q_bqhd.dtype, Z_bkz)
        tables = cos[position_bk.clamp(min=0)], sin[position_bk.clamp(min=0)]
        L_bhqk = attention.scores(Q_bqhd, parts_k, part.how[0], g, tables, config.query_scale)
        L_bhqk = L_bhqk if model.dtype == "float64" else L_bhqk.float()
        logits.append(masks.apply_mask(L_bhqk, seen_bqk))
        values.append((parts_v, part.how[1]))
    P_bhqk = attention.softmax(torch.cat(logits, -1)).to(Q_bqhd.dtype)
    each = P_bhqk.split([L.shape[-1] for L in logits], -1)
    return torch.stack([attention.values(P, *of, g) for P, of in zip(each, values, strict=True)]).sum(0)


def slot_positions(length_b: Tensor, slots: int) -> Tensor:
    """`cache.slot_positions` of whole buffers, on the device: [b] -> [b,slots]."""
    last_b1 = length_b[:, None] - 1
    slot_k = torch.arange(slots, device=length_b.device)
    return (last_b1 - (last_b1 - slot_k) % slots).clamp(min=-1)


# ---- the next token, on the device ----


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the most likely one."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def uniform(self, steps: int, device: torch.device) -> Tensor:
        """One number in [0, 1) a step, drawn before the first: every row has the same, as if it were alone."""
        rng = torch.Generator().manual_seed(self.seed)
        return torch.rand(steps, generator=rng, dtype=torch.float64).float().clamp(max=1 - 2**-24).to(device)

    def choose(self, L_bv: Tensor, uniform: Tensor) -> Tensor:
        """One token a row [b]: where the cumulated probability of the kept ones passes the uniform number."""
        if self.temperature == 0:
            return L_bv.argmax(-1)
        count = L_bv.shape[-1] if self.top_k is None else min(self.top_k, L_bv.shape[-1])
        L_bv, order_bv = L_bv.topk(count, dim=-1)
        P_bv = torch.softmax((L_bv - L_bv[:, :1]) / self.temperature, -1)
        if self.top_p is not None:
            before_bv = P_bv.cumsum(-1) - P_bv
            P_bv = torch.where(before_bv < self.top_p - 1e-7, P_bv, 0.0)
            P_bv[:, 0].clamp_(min=1e-30)
        total_bv = P_bv.cumsum(-1)
        passed_bv = total_bv <= uniform * total_bv[:, -1:]
        return order_bv.gather(-1, passed_bv.sum(-1, keepdim=True).clamp(max=count - 1))[:, 0]


class GraphDecoder:
    """Decodes what a cache holds, one token a row and step.

    After `begin` (with the hidden states of a prefill) `token_b` holds the first new token of each row, and every
    `step` feeds it and puts the next one in its place: -1 where a row has stopped. The host learns nothing of it, so
    the cache's own lengths stand still until `settle`.
    """

    def __init__(self, model: Model, cache: kv.Cache, sampling: Sampling | None = None, steps: int = 4096):
        self.model, self.cache, self.sampling = StaticModel(model), cache, sampling or Sampling()
        device = model.device
        self.embed_factor = model.embed_factor
        self.stop_s = torch.tensor(sorted(STOP), device=device)
        self.uniform_t = self.sampling.uniform(steps, device)
        self.time = torch.zeros(1, dtype=torch.int64, device=device)
        self.position_b = torch.from_numpy(np.array(cache.lengths_b, np.int64)).to(device)
        self.token_b = torch.full((cache.batch,), -1, dtype=torch.int64, device=device)
        self.runs_b = torch.zeros(cache.batch, dtype=torch.bool, device=device)
        self.text_bt: Tensor | None = None
        if cache.text_bt is not None:
            self.text_bt = torch.from_numpy(cache.text_bt.astype(np.int64)).to(device)
        self.graph: Any = None

    @torch.inference_mode()
    def begin(self, x_bqm: Tensor) -> Tensor:
        """The first new token of each row, from the hidden states [b,1,m] of the last tokens of the prompts."""
        if self.model.device.type == "cuda" and self.graph is None:
            self._capture()  # no row runs yet, so nothing is written
            self.time.zero_()
        self.runs_b.fill_(True)
        self._next(x_bqm)
        return self.token_b

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Feed `token_b`, advance, and put the next token of each row there; returns the same buffer."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.token_b

    def settle(self) -> None:
        """Tell the cache how long its rows are. Waits for the device."""
        lengths_b = self.position_b.cpu().numpy()
        self.cache.lengths_b = lengths_b
        self.cache._highest_b = np.maximum(self.cache._highest_b, lengths_b)
        if self.text_bt is not None and self.cache.text_bt is not None:
            self.cache.text_bt[:] = self.text_bt.cpu().numpy()

    def _capture(self) -> None:
        """Record one step. It is run twice before, so that all kernels are compiled and all constants made."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _step(self) -> None:
        model, weights = self.model, self.model.weights
        if self.text_bt is not None:
            at_b1 = self.position_b.clamp(max=self.cache.max_len - 1)[:, None]
            number_b1 = torch.where(self.runs_b, self.token_b + 1, self.text_bt.gather(1, at_b1)[:, 0])[:, None]
            self.text_bt.scatter_(1, at_b1, number_b1)
        tokens = NewTokens(model, self.cache, self.position_b, self.runs_b, self.text_bt)
        x_bqm = F.embedding(self.token_b.clamp(min=0)[:, None], weights.embed_vm) * self.embed_factor
        for layer, block in enumerate(weights.layers):
            x_bqm = model.block(x_bqm, layer, block, tokens, self.cache, no_trace)  # type: ignore[arg-type]
        self.position_b += self.runs_b
        self._next(rms_norm(x_bqm, weights.final_norm_m, model.config.rms_eps))

    def _next(self, x_bqm: Tensor) -> None:
        """Choose the next tokens; a row that stopped says -1, and one that says <eos> or <end_of_turn> now stops."""
        L_bv = self.model.logits(x_bqm)[:, 0]
        if self.model.config.vision is not None:  # the placeholder of an image is no word
            L_bv[:, self.model.config.vision.image_token].fill_(-torch.inf)
        chosen_b = self.sampling.choose(L_bv, self.uniform_t[self.time])
        self.token_b.copy_(torch.where(self.runs_b, chosen_b, -1))
        self.runs_b.logical_and_((self.token_b[:, None] != self.stop_s).all(-1))
        self.time.add_(1).clamp_(max=len(self.uniform_t) - 1)


# ---- for `generate` ----


def serves(model: Model, cache: kv.Cache, max_new_tokens: int) -> bool:
    """Is decoding captured? On CUDA, where the kernels read every layer and the cache has room for all tokens."""
    return (
        isinstance(model, Model)
        and model.device.type == "cuda"
        and int(np.max(cache.lengths_b)) + max_new_tokens - 1 <= cache.max_len
        and all(kernels.usable(model.device, model.config, how, getattr(torch, model.dtype)) for how in model.factors)
    )


def stream(
    model: Model, cache: kv.Cache, x_bqm: Tensor, max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int | None]]:
    """`generate.generate_rows` behind its prefill. The device is a step ahead of what the host has read."""
    decoder = GraphDecoder(model, cache, sampling, max_new_tokens + 1)
    start_b, fed_b = np.array(cache.lengths_b), np.zeros(cache.batch, np.int64)
    decoder.begin(x_bqm)
    try:
        for number in range(1, max_new_tokens + 1):
            arrived = Copy(decoder.token_b)
            if number < max_new_tokens:
                decoder.step()
            tokens = [None if token < 0 else token for token in arrived.wait()]
            yield tokens
            runs_b = np.array([token is not None and token not in STOP for token in tokens])
            if not runs_b.any() or number == max_new_tokens:
                return
            fed_b += runs_b
    finally:  # a token that the device was ahead counts as taken back
        decoder.settle()
        cache.lengths_b = start_b + fed_b


class Copy:
    """A tensor on its way to the host."""

    def __init__(self, x: Tensor):
        self.done: Any = None
        if x.device.type != "cuda":
            self.x = x.clone()
            return
        self.x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.x.copy_(x, non_blocking=True)
        self.done = torch.cuda.Event()
        self.done.record()

    def wait(self) -> list[int]:
        if self.done is not None:
            self.done.synchronize()
        return self.x.tolist()
