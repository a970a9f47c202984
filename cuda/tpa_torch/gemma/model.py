"""The whole Gemma 3 forward pass in PyTorch, dense or with a TPA cache. Twin of `tpa_ref.model`, which explains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.compress.config import TPAConfig
from tpa_ref.gemma.config import GemmaConfig
from tpa_ref.gemma.model import check_cache, check_tokens, dense_layer, text_positions, text_so_far
from tpa_ref.gemma.tokenizer import Tokenizer
from tpa_ref.gemma.weights import LayerWeights, Weights
from tpa_ref.trace import Tracer, no_trace, scoped, wants_whole_arrays

from ..compress import token_prediction as words
from ..core import attention, factorize, masks, rope
from ..core import cache as kv
from ..core.norm import rms_norm
from ..fast import decode, kernels, prefill
from ..fast.linear import linear
from . import vision
from .mlp import mlp

__all__ = ["check_cache", "check_tokens", "dense_layer", "text_positions", "text_so_far"]
QueryFactors = tuple[Tensor, Tensor]  # A [r,h] and W [r,d,m]
QUERY_BLOCK = 128


class Model:
    """A Gemma 3 model on one device. `tpa` is None for the dense model; `convert` makes one with a TPA cache."""

    def __init__(
        self,
        config: GemmaConfig,
        weights: Weights,
        tokenizer: Tokenizer | None = None,
        tpa: TPAConfig | None = None,
        factors: Sequence[kv.LayerFactors] | None = None,
        query_factors: Sequence[QueryFactors | None] | None = None,
        stored_dtype: str = "float32",
    ):
        self.config, self.weights, self.tokenizer, self.tpa = config, weights, tokenizer, tpa
        self.dtype = str(weights.embed_vm.dtype).removeprefix("torch.")
        self.device = weights.embed_vm.device
        self.stored_dtype = stored_dtype
        self.factors = list(factors or [dense_layer(self.dtype)] * config.num_layers)
        self.query_factors = list(query_factors or [None] * config.num_layers)
        self.notes: list[str] = []  # what the conversion had to clamp, one line each
        self.healing: Any = None  # the history of `heal.heal`, where it made this model
        self._tables: dict[tuple[float, float], tuple[Tensor, Tensor]] = {}
        self._turns: dict[tuple[float, float], Tensor] = {}
        self._scratch = decode.Scratch()
        self._words: words.WordTable | None = None

    @torch.inference_mode()
    def __call__(
        self,
        tokens_bq: Any,
        cache: kv.Cache | None = None,
        lengths_b: Any = None,
        images: Any = None,
        trace: Tracer = no_trace,
    ) -> Tensor:
        """Logits [b,q,v] in float32 (float64 in a float64 model) for tokens [b,q], as a tensor on the model's device.

        With a cache the tokens are appended to what it holds; call again with the next ones. `lengths_b` [b]: only the
        first so many tokens of each row count, the rest is padding on the right. `images` [i,c,x,y]: pixels in -1 ... 1
        (`images.read_images`), in the order of their placeholders in the tokens, row by row; all placeholders of an
        image come in one call.
        """
        return self.logits(self.hidden(tokens_bq, cache, lengths_b, images, trace), trace)

    @torch.inference_mode()
    def hidden(
        self,
        tokens_bq: Any,
        cache: kv.Cache | None = None,
        lengths_b: Any = None,
        images: Any = None,
        trace: Tracer = no_trace,
    ) -> Tensor:
        """The final hidden states [b,q,m], after the last norm: everything but the output projection."""
        tokens_bq, lengths_b = check_tokens(_to_numpy(tokens_bq), _to_numpy(lengths_b), self.config)
        positions_bq = text_positions(self, tokens_bq, lengths_b, cache)
        images = vision.as_pixels(images)
        is_image_bq = vision.check_images(images, tokens_bq, positions_bq, self.config)
        last_bq = vision.last_seen(is_image_bq, positions_bq)
        x_bqm = self.embed(vision.without_placeholders(tokens_bq, self.config))
        if images is not None and len(images):
            x_bqm[torch.from_numpy(is_image_bq).to(self.device)] = self.embed_images(images, trace).flatten(0, 1)
        x_bqm = trace("embed.x_bqm", x_bqm)
        views = self.views(positions_bq, last_bq, text_so_far(self, tokens_bq, is_image_bq, positions_bq, cache))
        for layer, block in enumerate(self.weights.layers):
            x_bqm = self.block(x_bqm, layer, block, views, cache, scoped(trace, f"layers.{layer}"))
        if cache is not None:
            cache.advance(positions_bq)
        return trace("final.x_bqm", rms_norm(x_bqm, self.weights.final_norm_m, self.config.rms_eps))

    def views(
        self, positions_bq: np.ndarray, last_bq: np.ndarray | None = None, text_bt: np.ndarray | None = None
    ) -> Views:
        """What `block` needs to know of the positions [b,q] (and of the last ones seen, and of the text so far), shared
        by all layers.
        """
        return Views(self, positions_bq, last_bq, text_bt)

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
    def word_table(self) -> words.WordTable:
        """The embedding table as words (`words`), prepared once."""
        if self._words is None:
            self._words = words.WordTable(self.weights.embed_vm, self.embed_factor)
        return self._words

    def embed_images(self, images: np.ndarray, trace: Tracer = no_trace) -> Tensor:
        """The soft tokens of images: pixels [i,c,x,y] -> [i,t,m]."""
        assert self.weights.vision is not None and self.config.vision is not None
        pixels_icxy = torch.from_numpy(images).to(self.device, self.weights.embed_vm.dtype)
        return vision.embed_images(pixels_icxy, self.weights.vision, self.config.vision, trace)

    @torch.inference_mode()
    def logits(self, x_bqm: Tensor, trace: Tracer = no_trace) -> Tensor:
        """Output projection with the (unscaled) embedding table: [b,q,m] -> [b,q,v], at least float32."""
        L_bqv = linear(x_bqm, self.weights.embed_vm)
        return trace("logits_bqv", L_bqv if self.dtype == "float64" else L_bqv.float())

    def block(
        self, x_bqm: Tensor, layer: int, w: LayerWeights, views: Views, cache: kv.Cache | None, trace: Tracer
    ) -> Tensor:
        """One layer: attention and MLP, each with a norm before and a norm after, added to the residual stream."""
        eps = self.config.rms_eps
        a_bqm = trace("attn.norm_bqm", rms_norm(x_bqm, w.attn_norm_m, eps))
        o_bqm = self.attend(a_bqm, layer, w, views, cache, trace)
        x_bqm = trace("attn.residual_bqm", x_bqm + rms_norm(o_bqm, w.post_attn_norm_m, eps))
        a_bqm = rms_norm(x_bqm, w.mlp_norm_m, eps)
        return trace("mlp.residual_bqm", x_bqm + rms_norm(mlp(a_bqm, w), w.post_mlp_norm_m, eps))

    def attend(
        self, a_bqm: Tensor, layer: int, w: LayerWeights, views: Views, cache: kv.Cache | None, trace: Tracer
    ) -> Tensor:
        """Project, norm, factorize, cache, score, mask, average, project back: the heart of the matter."""
        config = self.config
        how_k, how_v = self.factors[layer]
        tables_q = views.query_tables(layer)

        # 1) project; Gemma norms Q and K per head, before RoPE
        Q_bqhd = trace("attn.Q_bqhd", rms_norm(self.project_queries(a_bqm, layer, w), w.q_norm_d, config.rms_eps))
        K_bkgd, V_bkge = self.project_keys_and_values(a_bqm, layer, w, trace)
        Q_bqhd = trace("rope.Q_bqhd", rope.rotate(Q_bqhd, *tables_q))

        # 2) factorize; RoPE acts on b where b is what is cached
        Z_bqz = views.words(layer, views.positions_bq, "queries")() if kv.reads_words([(how_k, how_v)]) else None
        parts_k, parts_v = factorize.encode_pair(K_bkgd, V_bkge, (how_k, how_v), Z_bqz)
        if how_k.rotated:
            part = "X" if how_k.mode == "dense" else "B"
            parts_k[part] = trace(f"rope.K_{part}", rope.rotate(parts_k[part], *tables_q))
        new = kv.store(parts_k, how_k), kv.store(parts_v, how_v)
        exact, exact_tokens = self.exact(layer), None
        if exact:
            exact_tokens = (
                kv.store({"X": rope.rotate(K_bkgd, *tables_q)}, kv.DENSE[0]),
                kv.store({"X": V_bkge}, kv.DENSE[1]),
            )

        # 3) store, and read what the cache holds: at prefill as at decode
        if cache is None:
            segments = kv.whole_text((how_k, how_v), new, exact_tokens, views.positions_bq, exact)
        else:
            segments = cache.layers[layer].segments(new, exact_tokens, views.positions_bq, cache.lengths_b)
            if kernels.serve(self, layer, views, cache, trace):
                O_bqhe = trace("attn.O_bqhe", kernels.attend(Q_bqhd, self, layer, cache, views.step(cache)))
                return linear(O_bqhe.flatten(2), w.WO_mhe.flatten(1))

        # 4) attention on the factors, one softmax over the keys of all segments
        if wants_whole_arrays(trace) or self.dtype == "float64" or torch.is_grad_enabled():
            O_bqhe = self._attend_plainly(Q_bqhd, layer, segments, views, exact, trace)
        elif Q_bqhd.shape[1] <= decode.FEW_QUERIES and self.device.type == "cpu":
            O_bqhe = self._attend_decoding(Q_bqhd, layer, segments, views, exact)
        else:
            O_bqhe = self._attend_prefilling(Q_bqhd, layer, segments, views, exact)
        return linear(O_bqhe.flatten(2), w.WO_mhe.flatten(1))

    def _attend_plainly(
        self, Q_bqhd: Tensor, layer: int, segments: list[kv.Segment], views: Views, exact: kv.Exact, trace: Tracer
    ) -> Tensor:
        """By the functions of `attention`, which can be traced, differentiated and compared with the reference: a block
        of queries at a time against the keys that it can see at all.
        """
        config = self.config
        g, d = config.num_kv_heads, config.head_dim
        loaded = [
            kv.load_pair(segment.held, segment.how, g, d, Q_bqhd.dtype, views.words_of(layer, segment))
            for segment in segments
        ]
        outputs = []
        for queries, of_segments in views.blocks(layer, segments, wants_whole_arrays(trace)):
            logits, values = [], []
            for keys, segment, parts in zip(of_segments, segments, loaded, strict=True):
                parts_k, parts_v = ({part: x[:, keys] for part, x in side.items()} for side in parts)
                tables = views.key_tables(layer, segment, keys)
                L_bhqk = attention.scores(Q_bqhd[:, queries], parts_k, segment.how[0], g, tables, config.query_scale)
                L_bhqk = L_bhqk if self.dtype == "float64" else L_bhqk.float()
                logits.append(masks.apply_mask(L_bhqk, views.seen(layer, segment, exact, queries, keys)))
                values.append((parts_v, segment.how[1]))
            L_bhqk = trace("attn.L_bhqk", logits[0] if len(logits) == 1 else torch.cat(logits, -1))
            P_bhqk = trace("attn.P_bhqk", attention.softmax(L_bhqk)).to(Q_bqhd.dtype)
            parts_P = P_bhqk.split([L.shape[-1] for L in logits], -1)
            each = [attention.values(P, parts_v, how, g) for P, (parts_v, how) in zip(parts_P, values, strict=True)]
            outputs.append(each[0] if len(each) == 1 else torch.stack(each).sum(0))
        return trace("attn.O_bqhe", outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1))

    def _attend_decoding(
        self, Q_bqhd: Tensor, layer: int, segments: list[kv.Segment], views: Views, exact: kv.Exact
    ) -> Tensor:
        """One or a few queries, from what is cached, tile by tile."""
        keys = [
            decode.Keys(
                segment.held,
                segment.how,
                views.turns(layer, segment.positions_bk, segment.kind),
                views.unless_all(layer, segment, exact),
                views.words(layer, segment.positions_bk, segment.kind) if kv.reads_words([segment.how]) else None,
            )
            for segment in segments
        ]
        return decode.attend(Q_bqhd, keys, self.config.num_kv_heads, self.config.query_scale, self._scratch)

    def _attend_prefilling(
        self, Q_bqhd: Tensor, layer: int, segments: list[kv.Segment], views: Views, exact: kv.Exact
    ) -> Tensor:
        """Many queries: K and V formed as the cache holds them."""
        g, d = self.config.num_kv_heads, self.config.head_dim
        formed = []
        for segment in segments:
            parts = kv.load_pair(segment.held, segment.how, g, d, Q_bqhd.dtype, views.words_of(layer, segment))
            K_bkgd, V_bkge = (factorize.decode(part, how, g) for part, how in zip(parts, segment.how, strict=True))
            if not segment.how[0].rotated:
                K_bkgd = rope.rotate(K_bkgd, *views.key_tables(layer, segment))
            formed.append((K_bkgd, V_bkge))

        def seen(block: prefill.Block) -> Tensor:
            queries, keys = block
            parts = [views.seen(layer, s, exact, queries, here) for s, here in zip(segments, keys, strict=True)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

        blocks = views.blocks(layer, segments)
        return prefill.attend(Q_bqhd, formed, blocks, seen, self.config.query_scale)

    def exact(self, layer: int) -> kv.Exact:
        """How many tokens this layer reads as they are, beside those that are coded."""
        sinks, recent = self.tpa.exact_tokens if self.tpa else (0, 0)
        return kv.exact_slots(
            self.config, self.factors[layer], layer, self.config.max_positions, kv.Exact(sinks, recent)
        )

    def project_queries(self, a_bqm: Tensor, layer: int, w: LayerWeights) -> Tensor:
        """Q = W_Q x, or through a head-mixing rank: B_r = W_r x, Q = sum_r a_r (x) B_r."""
        factors = self.query_factors[layer]
        if factors is None:
            return _project(a_bqm, w.WQ_hdm)
        A_rh, W_rdm = factors
        return torch.einsum("rh,bqrd->bqhd", A_rh, _project(a_bqm, W_rdm))

    def project_keys_and_values(
        self, a_bkm: Tensor, layer: int, w: LayerWeights, trace: Tracer
    ) -> tuple[Tensor, Tensor]:
        """K = norm(W_K x), before RoPE, and V = W_V x."""
        K_bkgd = rms_norm(_project(a_bkm, w.WK_gdm), w.k_norm_d, self.config.rms_eps)
        return trace("attn.K_bkgd", K_bkgd), trace("attn.V_bkge", _project(a_bkm, w.WV_gem))

    def new_cache(self, batch: int = 1, max_len: int = 4096) -> kv.Cache:
        """An empty cache for `batch` texts of at most `max_len` tokens; window layers hold only their window."""
        exact = kv.Exact(*self.tpa.exact_tokens) if self.tpa else None
        return kv.Cache(self.config, self.factors, batch, max_len, exact, self.device)

    def rope_table(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T >= length, d/2] of a layer's kind as the kernels read them, each contiguous."""
        turns_tp, kind = self.rope_turns(layer, length), self.config.rope(layer)
        if kind not in self._tables or len(self._tables[kind][0]) != len(turns_tp):
            self._tables[kind] = turns_tp.real.contiguous(), turns_tp.imag.contiguous()
        return self._tables[kind]

    @torch.inference_mode(False)
    def rope_turns(self, layer: int, length: int) -> Tensor:
        """cos + i sin [T >= length, d/2] of a layer's kind, made once and doubled when a text outgrows them.

        Never inference tensors, whoever asks first: calibration goes backwards through the same tables.
        """
        kind = self.config.rope(layer)
        if kind not in self._turns or len(self._turns[kind]) < length:
            size = max(256, 1 << (length - 1).bit_length())
            cos, sin = rope.rope_tables(torch.arange(size)[None], self.config.head_dim, *kind)
            work = torch.complex128 if self.dtype == "float64" else torch.complex64
            self._turns[kind] = torch.complex(cos[0], sin[0]).to(self.device, work)
        return self._turns[kind]


def query_blocks(
    positions_bq: np.ndarray,
    positions_bk: np.ndarray,
    window: int | None,
    whole: bool,
    last_bq: np.ndarray | None = None,
) -> list[tuple[slice, slice]]:
    """(queries, keys) of each block of queries: the stretch of keys outside of which none of them sees anything.

    Logits of a block are small enough for a processor's cache, and a window layer never makes a q x k matrix of a long
    text. `whole`: one block, for a trace of everything.
    """
    q, k = positions_bq.shape[1], positions_bk.shape[1]
    if whole or q <= QUERY_BLOCK:
        return [(slice(0, q), slice(0, k))]
    blocks = []
    for start in range(0, q, QUERY_BLOCK):
        queries = slice(start, min(q, start + QUERY_BLOCK))
        asked, last = (x[:, queries] for x in (positions_bq, positions_bq if last_bq is None else last_bq))
        oldest = 0 if window is None else max(0, int(asked.min()) - window + 1)
        seen = np.nonzero(((positions_bk >= oldest) & (positions_bk <= last.max())).any(0))[0]
        blocks.append((queries, slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 1)))
    return blocks


class Views:
    """Positions, rotations and masks of one forward pass. What all layers of a kind share is made once, but nothing
    of the size queries x keys is kept for more than a few queries.
    """

    def __init__(
        self,
        model: Model,
        positions_bq: np.ndarray,
        last_bq: np.ndarray | None = None,
        text_bt: np.ndarray | None = None,
    ):
        self.model, self.positions_bq, self.text_bt = model, positions_bq, text_bt
        self.last_bq = positions_bq if last_bq is None else last_bq
        self._step: kernels.Step | None = None
        self._turns: dict[tuple[bool, str], Tensor] = {}
        self._seen: dict[tuple, Tensor | None] = {}
        self._words: dict[tuple[bool, str], words.Words] = {}

    def query_tables(self, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin [1 or b,q,d/2] of the queries, which are new keys too."""
        turns_bqp = self.turns(layer, self.positions_bq, "queries")
        return turns_bqp.real, turns_bqp.imag

    def step(self, cache: kv.Cache) -> kernels.Step:
        """Positions and lengths on the device, for the kernels."""
        if self._step is None:
            self._step = kernels.step_of(self.positions_bq, cache.lengths_b, self.model.device)
        return self._step

    def key_tables(self, layer: int, segment: kv.Segment, keys: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """cos and sin [1 or b,k,d/2] of a segment's keys."""
        turns_bkp = self.turns(layer, segment.positions_bk, segment.kind)[:, keys]
        return turns_bkp.real, turns_bkp.imag

    def turns(self, layer: int, positions: np.ndarray, name: str) -> Tensor:
        """cos + i sin [1 or b,k,d/2] of positions that all layers of a kind have under a name."""
        kind = self.model.config.is_global[layer], name
        if kind not in self._turns:
            turns = self.model.rope_turns(layer, int(positions.max(initial=0)) + 1)
            first = int(positions[0, 0]) if positions.size else 0
            if first >= 0 and (positions == np.arange(first, first + positions.shape[1])).all():
                self._turns[kind] = turns[None, first : first + positions.shape[1]]
            else:
                self._turns[kind] = turns[torch.from_numpy(np.maximum(positions, 0)).to(turns.device)]
        return self._turns[kind]

    def words(self, layer: int, positions_bk: np.ndarray, name: str) -> words.Words:
        """z [b,k,2m] of positions that all layers of a kind have under a name, as a function of a slice of them."""
        kind = self.model.config.is_global[layer], name
        if kind not in self._words:
            assert self.text_bt is not None
            found = words.with_previous(self.text_bt.astype(np.int64), positions_bk)
            own_bk, previous_bk = (torch.from_numpy(numbers_bk).to(self.model.device) for numbers_bk in found)
            self._words[kind] = words.Words(self.model.word_table, own_bk, previous_bk)
        return self._words[kind]

    def words_of(self, layer: int, segment: kv.Segment) -> Tensor | None:
        """z of all keys of a segment, where K or V is predicted from them."""
        read = kv.reads_words([segment.how])
        return self.words(layer, segment.positions_bk, segment.kind)() if read else None

    def seen(
        self,
        layer: int,
        segment: kv.Segment,
        exact: kv.Exact,
        queries: slice = slice(None),
        keys: slice = slice(None),
    ) -> Tensor:
        """Which keys of a segment a block of queries reads there, [b,q,k]."""
        q, k, last = (
            torch.from_numpy(x).to(self.model.device)
            for x in (self.positions_bq[:, queries], segment.positions_bk[:, keys], self.last_bq[:, queries])
        )
        seen_bqk = masks.visible(q, k, self.model.config.window(layer), last)
        return masks.of_segment(segment.kind, seen_bqk, q, k, exact.sinks, exact.recent) if exact else seen_bqk

    def unless_all(self, layer: int, segment: kv.Segment, exact: kv.Exact) -> Tensor | None:
        """The same for all queries and keys, made once for all layers of a kind; None where everything is seen."""
        kind = self.model.config.is_global[layer], segment.kind, exact
        if kind not in self._seen:
            seen_bqk = self.seen(layer, segment, exact)
            self._seen[kind] = None if bool(seen_bqk.all()) else seen_bqk
        return self._seen[kind]

    def blocks(self, layer: int, segments: list[kv.Segment], whole: bool = False) -> list[prefill.Block]:
        """Blocks of queries, with the keys of each segment that they may see."""
        window = self.model.config.window(layer)
        found = [query_blocks(self.positions_bq, s.positions_bk, window, whole, self.last_bq) for s in segments]
        return [(block[0][0], [keys for _, keys in block]) for block in zip(*found, strict=True)]


def _project(a_bqm: Tensor, W_hdm: Tensor) -> Tensor:
    """[b,q,m] through [h,d,m] -> [b,q,h,d]."""
    return linear(a_bqm, W_hdm.flatten(0, 1)).unflatten(-1, W_hdm.shape[:2])


def _to_numpy(x: Any) -> Any:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else x
