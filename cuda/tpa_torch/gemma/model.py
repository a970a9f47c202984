"""The whole Gemma 3 forward pass in PyTorch. Twin of `tpa_ref.gemma.model`, which explains it: what touches no array is
inherited, and methods without a docstring do what theirs say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.gemma import model as reference
from tpa_ref.gemma.token_vectors import id_dtype, with_previous
from tpa_ref.gemma.weights import LayerWeights
from tpa_ref.trace import Tracer, no_trace

from ..core import rope
from ..core.cache import Cache, WholeText
from ..core.mode import MODES
from ..core.norm import rms_norm
from ..core.pair import Joint, Pair
from ..fast import attend, decoder, graph, kernels, step
from ..fast.banded import Banded
from ..fast.int8 import Int8, wide
from ..fast.linear import at_least_float32, linear
from ..fast.scratch import Scratch
from ..fast.spectral import BandedLatent, CodedLatent
from ..lasting import lasting
from . import backward, vision
from .mlp import mlp
from .positions import Positions
from .token_vectors import TokenTable

inference = torch.inference_mode()


class Model(reference.Model):
    """A Gemma 3 model on one device. `tpa` is None for the dense model; `convert` makes one with a TPA cache."""

    Pair, Joint, CodedLatent, Positions, WholeText = Pair, Joint, CodedLatent, Positions, WholeText
    Banded, BandedLatent = Banded, BandedLatent
    MODES, backward, vision = MODES, backward, vision

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.device = self.weights.embed_vm.device
        self.healing: Any = None  # the history of `heal.heal`, where it made this model
        self.scratch, self.compiled = Scratch(), step.Layers()
        self._turns: dict[bool, Tensor] = {}
        self._tables: dict[bool, tuple[Tensor, Tensor]] = {}
        self._token_table: TokenTable | None = None

    @property
    def rounded_weights(self) -> bool:  # type: ignore[override]
        """Are weights held in 8 bits?"""
        held = self.weights.embed_vm, *vars(self.weights.layers[0]).values()
        return any(isinstance(x, Int8) for x in held)

    __call__ = inference(reference.Model.__call__)
    hidden = inference(reference.Model.hidden)

    def blocks(self, x_bqm: Tensor, at: Any, cache: Any, trace: Tracer = no_trace) -> Tensor:
        found = decoder.take(self, x_bqm, at, cache, trace)
        return super().blocks(x_bqm, at, cache, trace) if found is None else found

    def block(
        self, x_bqm: Tensor, layer: int, w: LayerWeights, at: Any, cache: Any, trace: Tracer = no_trace
    ) -> Tensor:
        compiled = self.compiled.take(self, x_bqm, layer, w, trace)
        if compiled is None:
            return super().block(x_bqm, layer, w, at, cache, trace)
        return step.block(self, compiled, x_bqm, layer, at[self.config.is_global[layer]], cache)

    def attend(self, a_bqm: Tensor, layer: int, w: LayerWeights, at: Any, cache: Any, trace: Tracer) -> Tensor:
        """Project, norm, write, read, score, mask, average, project back: the heart of the matter."""
        # project; Gemma norms Q and K per head. RoPE turns Q here, and K in the cache, when written or when read
        Q_bqhd = trace("attn.Q_bqhd", self.norm(self.project_queries(a_bqm, layer, w), w.q_norm_d))
        K_bkgd, V_bkge = self.project_keys_and_values(a_bqm, layer, w, trace)
        Q_bqhd = trace("rope.Q_bqhd", rope.rotate(Q_bqhd, *at.new_tokens.tables))

        # write the new tokens, and read what the cache holds: at prefill as at decode
        keys = cache.append(layer, K_bkgd, V_bkge, at, trace)

        # score, mask and average, in whatever way is fastest (`fast.attend`); project back
        O_bqhe = trace("attn.O_bqhe", self.read(Q_bqhd, keys, trace))
        return linear(O_bqhe.flatten(2), w.WO_mhe.flatten(1))

    def read(self, Q_bqhd: Tensor, keys: Any, trace: Tracer) -> Tensor:
        """Attention of rotated queries over all that they read: [b,q,h,d] -> [b,q,h,e]."""
        return attend.attend(Q_bqhd, keys, self, trace)

    def project_queries(self, a_bqm: Tensor, layer: int, w: LayerWeights) -> Tensor:
        factors = self.query_factors[layer]
        if factors is None:
            return self.project(a_bqm, w.WQ_hdm)
        A_rh, W_rdm = factors
        return torch.einsum("rh,bqrd->bqhd", A_rh, self.project(a_bqm, W_rdm))

    @inference
    def logits(self, x_bqm: Tensor, trace: Tracer = no_trace) -> Tensor:
        """Output projection, as a rule the (unscaled) embedding table: [b,q,m] -> [b,q,v], at least float32."""
        return trace("logits_bqv", at_least_float32(x_bqm, self.weights.head_vm))

    # ---- tokens and positions ----

    def embed(self, tokens_bq: np.ndarray) -> Tensor:
        """Rows of the embedding table times sqrt(m), which is rounded to its dtype: [b,q] -> [b,q,m]."""
        tokens = torch.from_numpy(np.ascontiguousarray(tokens_bq, np.int64)).to(self.device)
        return F.embedding(tokens, self.weights.embed_vm) * self.embed_factor

    @property
    def embed_factor(self) -> Tensor:
        """sqrt(m) in the dtype of the embedding table."""
        embed_vm = self.weights.embed_vm
        return torch.tensor(self.config.hidden_size**0.5, dtype=embed_vm.dtype, device=self.device)

    @property
    def token_table(self) -> TokenTable:
        """The embedding table as token vectors, prepared once."""
        if self._token_table is None:
            with lasting():
                self._token_table = TokenTable(self.weights.embed_vm, self.embed_factor)
        return self._token_table

    def token_vectors(self, text_bt: np.ndarray, positions_bk: np.ndarray) -> Tensor:
        found = with_previous(text_bt.astype(np.int64), positions_bk)
        return self.token_table(*(torch.from_numpy(numbers_bk).to(self.device) for numbers_bk in found))

    def rope_table(self, is_global: bool, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T >= length, d/2] of a kind of layers as the kernels read them, each contiguous."""
        turns_tp, tables = self.rope_turns(is_global, length), self._tables.get(is_global)
        if tables is None or len(tables[0]) < len(turns_tp):
            with lasting():
                tables = turns_tp.real.contiguous(), turns_tp.imag.contiguous()
            self._tables[is_global] = tables
        return tables

    def rope_turns(self, is_global: bool, length: int) -> Tensor:
        """cos + i sin [T >= length, d/2] of a kind of layers, made once and doubled when a text outgrows them.

        What is returned is what was found or made here: another thread may put a shorter table in its place meanwhile.
        """
        turns = self._turns.get(is_global)
        if turns is None or len(turns) < length:
            with lasting():
                turns = self._new_turns(is_global, max(256, 1 << (length - 1).bit_length()))
            self._turns[is_global] = turns
        return turns

    def _new_turns(self, is_global: bool, size: int) -> Tensor:
        work = torch.complex128 if self.dtype == "float64" else torch.complex64
        turns_tp = torch.empty(size, self.config.head_dim // 2, dtype=work)
        for part_tp, positions_t in zip(turns_tp.split(4096), torch.arange(size).split(4096), strict=True):
            cos, sin = rope.rope_tables(positions_t[None], self.config.head_dim, *self.config.rope(is_global))
            part_tp.copy_(torch.complex(cos[0], sin[0]))
        return turns_tp.to(self.device)  # made here: not every device knows float64

    # ---- caches ----

    def new_cache(self, batch: int = 1, max_len: int = 4096) -> Cache:
        ids, whole = id_dtype(self.config.vocab_size), kernels.runs_on(self.device)
        return Cache(self.pairs, self.config.windows, batch, max_len, self.exact, ids, self.device, whole)

    # ---- what differs between backends ----

    def norm(self, x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x, w, self.config.rms_eps)

    def mlp(self, a_bqm: Tensor, w: LayerWeights) -> Tensor:
        return mlp(a_bqm, w)

    def project(self, a_bqm: Tensor, W_hdm: Tensor) -> Tensor:
        return linear(a_bqm, W_hdm.flatten(0, 1)).unflatten(-1, W_hdm.shape[:2])

    def array(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            x = np.ascontiguousarray(x)
            is_bfloat16 = x.dtype.name == "bfloat16"  # which torch does not take from NumPy
            x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(x)
        return x.to(self.device, getattr(torch, self.dtype))

    def constant(self, x: np.ndarray) -> Tensor:
        kind = torch.float64 if self.dtype == "float64" else torch.float32
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device, kind).contiguous()

    def to_numpy(self, x: Any) -> np.ndarray:
        x = wide(x)
        if not isinstance(x, Tensor):
            return np.asarray(x)
        x = x.detach().cpu()
        if x.dtype != torch.bfloat16:
            return x.numpy()
        import ml_dtypes

        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    @torch.no_grad()
    def through_layer(self, layer: int, x_bqm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y_bqm, K_bkgd, V_bkge = super().through_layer(layer, x_bqm)
        return y_bqm.contiguous(), K_bkgd, V_bkge

    def token_moments(self, Z_bkz: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return self.double(Z_bkz[0].sum(0)), self.double(Z_bkz[0].mT @ Z_bkz[0])

    @inference
    def compare_rows(self, x_bqm: Tensor, other: Any, y_bqm: Tensor, following_q: np.ndarray) -> dict[str, np.ndarray]:
        P_bqv, Q_bqv = (torch.log_softmax(L_bqv, -1) for L_bqv in (self.logits(x_bqm), other.logits(y_bqm)))
        following = torch.from_numpy(following_q).to(self.device)[:, None]
        found = {
            "kl": (P_bqv.exp() * (P_bqv - Q_bqv)).sum(-1).clamp(min=0)[0],
            "same": (P_bqv.argmax(-1) == Q_bqv.argmax(-1))[0],
            "nll": -P_bqv[0, : len(following)].gather(1, following)[:, 0],
            "nll_other": -Q_bqv[0, : len(following)].gather(1, following)[:, 0],
        }
        return {name: self.to_numpy(x) for name, x in found.items()}

    def stream(
        self, cache: Any, L_bv: np.ndarray, max_new_tokens: int, sampling: Any, stop: frozenset[int]
    ) -> Iterator | None:
        if not graph.serves(self, cache, max_new_tokens):
            return None
        return graph.stream(StaticModel(self), cache, torch.from_numpy(L_bv), max_new_tokens, sampling, stop)


class StaticModel(Model):
    """The same model, whose layers take the new tokens from the device (`fast.graph`) instead of from the host."""

    def __init__(self, model: Model):
        super().__init__(
            model.config, model.weights, model.tokenizer, model.tpa, model.pairs, model.query_factors,
            model.stored_dtype, model.side_files,
        )  # fmt: skip
        self._turns, self._tables = model._turns, model._tables

    def read(self, Q_bqhd: Tensor, keys: Any, trace: Tracer) -> Tensor:
        return graph.attend(Q_bqhd, keys, self)
