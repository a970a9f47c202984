"""Decoding as one fixed program: every buffer stays where it is, so that a GPU can replay the whole step as a graph.

`Model` asks the host for positions and lengths; here they are tensors on the device, the next token is chosen on the
device, and nothing of a step waits for anything. On CUDA the step is captured once (a CUDA graph) and replayed for each
token. Elsewhere the same step runs as it is written, which is how it is tested.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.core.cache import LayerCache, Ring
from tpa_ref.core.mode import Parts
from tpa_ref.gemma.generate import Sampling
from tpa_ref.trace import Tracer, no_trace

from ..core import contextual, masks
from ..core.banded import BandedLatent
from ..core.cache import Cache, Keys, Segment
from ..core.contextual import Contextual, fix_signs
from ..core.mode import Mode
from . import kernels
from .attend import plainly

CAPTURING = threading.Lock()  # of several threads one at a time: it begins by waiting for the whole device
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


class WithoutEigh(Contextual):
    """`contextual` whose factors never wait for the device."""

    def factor(self, X_bkgd: Tensor) -> tuple[Tensor, Tensor]:
        d = X_bkgd.shape[-1]
        if X_bkgd.shape[2] == 1:
            return contextual.factor(X_bkgd, self.rank)
        if X_bkgd.dtype != torch.float64 and d >= 16 and d & (d - 1) == 0 and kernels.runs_on(X_bkgd.device):
            return kernels.contextual_factors(X_bkgd, self.rank, SQUARINGS)  # all of what follows in one launch
        X32 = X_bkgd if X_bkgd.dtype == torch.float64 else X_bkgd.float()
        U_bksg = fix_signs(leading_vectors(X32 @ X32.mT, self.rank))
        return (self.rank * U_bksg).to(X_bkgd.dtype), (U_bksg @ X32).to(X_bkgd.dtype)


def static(mode: Any, dtype: torch.dtype) -> Mode:
    """The mode as a captured step encodes by it: nothing waits, and no step converts a constant array anew."""
    if isinstance(mode, Contextual):
        return WithoutEigh(**vars(mode))
    if isinstance(mode, BandedLatent):  # codes in the precision of its constants, which it converts nowhere
        return mode
    return mode.with_arrays({name: None if x is None else x.to(dtype) for name, x in mode.arrays().items()})


# ---- one layer on static buffers ----


class NewTokens:
    """The new token of each row, in the place of `gemma.positions.Positions`.

    position_b: where it goes; runs_b: rows that take part, the others neither write nor see anything; text_bt: the
    numbered ids by position, where something is predicted from them.
    """

    def __init__(
        self,
        model: Any,
        is_global: bool,
        max_len: int,
        position_b: Tensor,
        runs_b: Tensor,
        text_bt: Tensor | None = None,
    ):
        self.model, self.is_global, self.max_len, self.text_bt = model, is_global, max_len, text_bt
        self.position_b, self.runs_b = position_b, runs_b
        query_b, length_b = torch.where(runs_b, position_b, -1), position_b + runs_b
        self.step = kernels.Step(query_b.int(), length_b.int())
        self.positions_bq, self.last_seen_bq = query_b[:, None], None

    @cached_property
    def new_tokens(self) -> At:
        """What is known of the new tokens."""
        return At(self, self.position_b[:, None].clamp(max=self.max_len - 1))

    def write(self, ring: Ring, new: Parts) -> None:
        """Store the new tokens in their slots; where a row takes no part, what was there stays."""
        runs_b = self.runs_b if ring.windowed else self.runs_b & (self.position_b < ring.slots)
        slot_b, row_b = self.position_b % ring.slots, torch.arange(len(runs_b), device=runs_b.device)
        for name, array in ring.arrays.items():
            written = new[name][:, 0].to(array.dtype)
            runs = runs_b.reshape(-1, *[1] * (written.ndim - 1))
            array[row_b, slot_b] = torch.where(runs, written, array[row_b, slot_b])


class At:
    """What is known of the tokens at some positions [b,k] (-1: none), by tensors on the device alone."""

    def __init__(self, new: NewTokens, position_bk: Tensor):
        self.new, self.position_bk = new, position_bk

    def of(self, keys: slice) -> At:
        """A slice of them."""
        return At(self.new, self.position_bk[:, keys])

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin, [b,k,d/2] each."""
        cos, sin = self.new.model.rope_table(self.new.is_global, self.new.max_len)
        at_bk = self.position_bk.clamp(min=0)
        return cos[at_bk], sin[at_bk]

    @cached_property
    def Z_bkz(self) -> Tensor:
        """The token vectors [b,k,2m]."""
        text_bt = self.new.text_bt
        assert text_bt is not None
        own_bk, previous_bk = (
            torch.where(at_bk >= 0, text_bt.gather(1, at_bk.clamp(min=0)), 0)
            for at_bk in (self.position_bk, self.position_bk - 1)
        )
        return self.new.model.token_table(own_bk, previous_bk)


class StaticKeys(Keys):
    """What one layer holds with the new tokens in it: whole buffers, and masks of positions on the device."""

    def seen(  # type: ignore[override]
        self, segment: Segment, queries: slice = slice(None), keys: slice = slice(None)
    ) -> Tensor:
        query_bq, position_bk, exact = self.at.positions_bq, segment.positions_bk, self.held.exact
        seen_bqk = masks.visible(query_bq, position_bk, self.held.window)
        return masks.segment_mask(segment.kind, seen_bqk, query_bq, position_bk, exact.sinks, exact.recent)


class StaticCache:
    """A cache that is written to on the device: lengths are tensors, and the host is told of nothing."""

    def __init__(self, cache: Cache, dtype: torch.dtype):
        self.cache = cache
        self.encoders: list[dict[str, Any]] = [
            {
                kind: type(ring.pair)(*(static(mode, dtype) for mode in ring.pair.modes))
                for kind, ring in held.rings.items()
            }
            for held in cache.layers
        ]

    def append(self, layer: int, K_bkgd: Tensor, V_bkge: Tensor, at: NewTokens, trace: Tracer) -> StaticKeys:
        """As `Cache.append`."""
        held = self.cache.layers[layer]
        for kind, ring in held.rings.items():
            at.write(ring, self.encoders[layer][kind].encode(K_bkgd, V_bkge, at.new_tokens))
        return StaticKeys([], at, held, self.cache.lengths_b)


def attend(Q_bqhd: Tensor, keys: StaticKeys, model: Any) -> Tensor:
    """By the kernels where they can read the layer, else by PyTorch: [b,1,h,d] -> [b,1,h,e]."""
    held, at, scale = keys.held, keys.at, model.config.query_scale
    if kernels.usable(Q_bqhd.device, held.pair, Q_bqhd.dtype):
        return kernels.decode(Q_bqhd, held, at.step, model.rope_table(at.is_global, at.max_len), scale)
    return attend_in_torch(Q_bqhd, held, at, scale)


def attend_in_torch(Q_bqhd: Tensor, held: LayerCache, at: NewTokens, scale: float) -> Tensor:
    """What the kernels compute, by the functions of `core`: [b,1,h,d] -> [b,1,h,e]."""
    segments = []
    for kind, ring in held.rings.items():
        length_b = at.step.length_b.long()
        position_bk: Any = slot_positions(length_b.clamp(max=ring.slots) if kind == "sinks" else length_b, ring.slots)
        known: Any = At(at, position_bk)
        segments.append(Segment(kind, ring.pair, ring.arrays, position_bk, known))
    return plainly(Q_bqhd, StaticKeys(segments, at, held, np.zeros(0)), scale, no_trace)


def slot_positions(length_b: Tensor, slots: int) -> Tensor:
    """`cache.slot_positions` of whole buffers, on the device: [b] -> [b,slots]."""
    last_b1 = length_b[:, None] - 1
    slot_k = torch.arange(slots, device=length_b.device)
    return (last_b1 - (last_b1 - slot_k) % slots).clamp(min=-1)


# ---- the next token, on the device ----


def uniform_numbers(sampling: Sampling, steps: int, rows: int, device: torch.device) -> Tensor:
    """One number in [0, 1) a step and row [t,b], drawn before the first: those that `Sampling.choose` would draw."""
    u_tb = np.stack([rng.random(steps) for rng in sampling.generators(rows)], -1)
    return torch.from_numpy(u_tb.astype(np.float32)).clamp(max=1 - 2**-24).to(device)


def choose(sampling: Sampling, L_bv: Tensor, uniform_b1: Tensor) -> Tensor:
    """One token a row [b]: where the cumulated probability of the kept ones passes the row's uniform number."""
    if sampling.temperature == 0:
        return L_bv.argmax(-1)
    count = min(sampling.top_k or L_bv.shape[-1], L_bv.shape[-1])
    order_bv = torch.arange(count, device=L_bv.device).expand(len(L_bv), -1)
    if count < L_bv.shape[-1] or sampling.top_p is not None:
        L_bv, order_bv = L_bv.topk(count, dim=-1)
    P_bv = torch.softmax((L_bv - L_bv.amax(-1, keepdim=True)) / sampling.temperature, -1)
    if sampling.top_p is not None:
        before_bv = P_bv.cumsum(-1) - P_bv
        P_bv = torch.where(before_bv < sampling.top_p - 1e-7, P_bv, 0.0)
        P_bv[:, 0].clamp_(min=1e-30)
    total_bv = P_bv.cumsum(-1)
    passed_bv = total_bv <= uniform_b1 * total_bv[:, -1:]
    return order_bv.gather(-1, passed_bv.sum(-1, keepdim=True).clamp(max=count - 1))[:, 0]


class GraphDecoder:
    """Decodes what a cache holds, one token a row and step.

    model: a `gemma.model.StaticModel`. After `begin` (with the logits behind a prefill) `token_b` holds the first new
    token of each row, and every `step` feeds it and puts the next one in its place: -1 where a row has stopped. The
    host learns nothing of it, so the cache's own lengths stand still until `settle`.
    """

    def __init__(
        self,
        model: Any,
        cache: Cache,
        sampling: Sampling | None = None,
        steps: int = 4096,
        stop: frozenset[int] | None = None,
    ):
        self.model, self.cache, self.sampling = model, cache, sampling or Sampling()
        self.static = StaticCache(cache, getattr(torch, model.dtype))
        device = model.device
        self.embed_factor = model.embed_factor
        stop = model.side_files.stop_tokens if stop is None else stop
        self.stop_s = torch.tensor(sorted(stop), dtype=torch.int64, device=device)
        self.uniform_tb = uniform_numbers(self.sampling, steps, cache.batch, device)
        self.time = torch.zeros(1, dtype=torch.int64, device=device)
        self.position_b = torch.from_numpy(np.array(cache.lengths_b, np.int64)).to(device)
        self.token_b = torch.full((cache.batch,), -1, dtype=torch.int64, device=device)
        self.runs_b = torch.zeros(cache.batch, dtype=torch.bool, device=device)
        self.text_bt: Tensor | None = None
        if cache.text_bt is not None:
            self.text_bt = torch.from_numpy(cache.text_bt.astype(np.int64)).to(device)
        self.graph: Any = None

    @torch.inference_mode()
    def begin(self, L_bv: Tensor) -> Tensor:
        """The first new token of each row, from the logits [b,v] behind the prompts."""
        if self.model.device.type == "cuda" and self.graph is None:
            self._capture()  # no row runs yet, so nothing is written
            self.time.zero_()
        self.runs_b.fill_(True)
        self._next(L_bv.to(self.model.device))
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
        self.cache.reach(self.position_b.cpu().numpy())
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
        with CAPTURING, torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self._step()

    def _step(self) -> None:
        model, weights = self.model, self.model.weights
        if self.text_bt is not None:
            at_b1 = self.position_b.clamp(max=self.cache.max_len - 1)[:, None]
            number_b1 = torch.where(self.runs_b, self.token_b + 1, self.text_bt.gather(1, at_b1)[:, 0])[:, None]
            self.text_bt.scatter_(1, at_b1, number_b1)
        at = [
            NewTokens(model, kind, self.cache.max_len, self.position_b, self.runs_b, self.text_bt)
            for kind in (False, True)
        ]
        x_bqm = F.embedding(self.token_b.clamp(min=0)[:, None], weights.embed_vm) * self.embed_factor
        for layer, block in enumerate(weights.layers):
            x_bqm = model.block(x_bqm, layer, block, at, self.static, no_trace)
        self.position_b += self.runs_b
        self._next(model.logits(model.norm(x_bqm, weights.final_norm_m))[:, 0])

    def _next(self, L_bv: Tensor) -> None:
        """Choose the next tokens; a row that stopped says -1, and one that says <eos> or <end_of_turn> now stops."""
        if self.model.config.vision is not None:  # the placeholder of an image is no word
            L_bv[:, self.model.config.vision.image_token].fill_(-torch.inf)
        chosen_b = choose(self.sampling, L_bv, self.uniform_tb[self.time].mT)
        self.token_b.copy_(torch.where(self.runs_b, chosen_b, -1))
        self.runs_b.logical_and_((self.token_b[:, None] != self.stop_s).all(-1))
        self.time.add_(1).clamp_(max=len(self.uniform_tb) - 1)


# ---- for `generate` ----


def serves(model: Any, cache: Cache, max_new_tokens: int) -> bool:
    """Is decoding captured? On CUDA, where the kernels read every layer and the cache has room for all tokens."""
    return (
        model.device.type == "cuda"
        and int(np.max(cache.lengths_b)) + max_new_tokens - 1 <= cache.max_len
        and all(kernels.usable(model.device, pair, getattr(torch, model.dtype)) for pair in model.pairs)
    )


def stream(
    model: Any, cache: Cache, L_bv: Tensor, max_new_tokens: int, sampling: Sampling, stop: frozenset[int]
) -> Iterator[list[int | None]]:
    """`generate.steps`. The device is a step ahead of what the host has read."""
    decoder = GraphDecoder(model, cache, sampling, max_new_tokens + 1, stop)
    start_b, fed_b = np.array(cache.lengths_b), np.zeros(cache.batch, np.int64)
    decoder.begin(L_bv)
    try:
        for number in range(1, max_new_tokens + 1):
            arrived = Copy(decoder.token_b)
            if number < max_new_tokens:
                decoder.step()
            tokens = [None if token < 0 else token for token in arrived.wait()]
            yield tokens
            runs_b = np.array([token is not None and token not in stop for token in tokens])
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
