"""The whole Gemma 3 forward pass in NumPy, dense or with a TPA cache. Data flows one way:

tokens -> embedding -> [norm -> Q, K, V -> factorize -> cache -> attention -> norm; norm -> MLP -> norm] x l -> logits
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..compress import token_prediction as words
from ..compress.config import TPAConfig
from ..core import attention, factorize, masks, rope
from ..core import cache as kv
from ..core.factorize import Factorization
from ..core.norm import rms_norm
from ..errors import TPAError
from ..trace import Tracer, no_trace, scoped
from . import vision
from .config import GemmaConfig
from .mlp import mlp
from .tokenizer import Tokenizer
from .weights import LayerWeights, Weights

einsum = partial(np.einsum, optimize=True)
QueryFactors = tuple[np.ndarray, np.ndarray]  # A [r,h] and W [r,d,m]


class Model:
    """A Gemma 3 model. `tpa` is None for the dense model; `convert` makes one with a TPA cache.

    `factors[layer]` says how that layer caches K and V; a dense model's layers all say "dense".
    """

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
        self.dtype = str(weights.embed_vm.dtype)
        self.stored_dtype = stored_dtype
        self.factors = list(factors or [dense_layer(self.dtype)] * config.num_layers)
        self.query_factors = list(query_factors or [None] * config.num_layers)
        self.notes: list[str] = []  # what the conversion had to clamp, one line each

    def __call__(
        self,
        tokens_bq: np.ndarray,
        cache: kv.Cache | None = None,
        lengths_b: np.ndarray | None = None,
        images: np.ndarray | None = None,
        trace: Tracer = no_trace,
    ) -> np.ndarray:
        """Logits [b,q,v] in float32 (float64 in a float64 model) for tokens [b,q].

        With a cache the tokens are appended to what it holds; call again with the next ones. `lengths_b` [b]: only the
        first so many tokens of each row count, the rest is padding on the right. `images` [i,c,x,y]: pixels in -1 ... 1
        (`images.read_images`), in the order of their placeholders in the tokens, row by row; all placeholders of an
        image come in one call.
        """
        return self.logits(self.hidden(tokens_bq, cache, lengths_b, images, trace), trace)

    def hidden(
        self,
        tokens_bq: np.ndarray,
        cache: kv.Cache | None = None,
        lengths_b: np.ndarray | None = None,
        images: np.ndarray | None = None,
        trace: Tracer = no_trace,
    ) -> np.ndarray:
        """The final hidden states [b,q,m], after the last norm: everything but the output projection."""
        tokens_bq, lengths_b = check_tokens(tokens_bq, lengths_b, self.config)
        positions_bq = text_positions(self, tokens_bq, lengths_b, cache)
        images = vision.as_pixels(images)
        is_image_bq = vision.check_images(images, tokens_bq, positions_bq, self.config)
        last_bq = vision.last_seen(is_image_bq, positions_bq)
        x_bqm = self.embed(vision.without_placeholders(tokens_bq, self.config))
        if images is not None and len(images):
            E_itm = self.embed_images(images, trace)
            x_bqm[is_image_bq] = E_itm.reshape(-1, E_itm.shape[-1])
        x_bqm = trace("embed.x_bqm", x_bqm)
        text_bt = text_so_far(self, tokens_bq, is_image_bq, positions_bq, cache)
        for layer, block in enumerate(self.weights.layers):
            x_bqm = self.block(
                x_bqm, layer, block, positions_bq, cache, scoped(trace, f"layers.{layer}"), last_bq, text_bt
            )
        if cache is not None:
            cache.advance(positions_bq)
        return trace("final.x_bqm", rms_norm(x_bqm, self.weights.final_norm_m, self.config.rms_eps))

    def embed(self, tokens_bq: np.ndarray) -> np.ndarray:
        """Rows of the embedding table times sqrt(m): [b,q] -> [b,q,m]."""
        embed_vm = self.weights.embed_vm
        return embed_vm[tokens_bq] * embed_vm.dtype.type(self.config.hidden_size**0.5)

    def words(self, text_bt: np.ndarray | None, positions_bk: np.ndarray) -> np.ndarray:
        """z of the tokens at some positions of the text (`words`): [b,t] by position, [b,k] -> [b,k,2m]."""
        assert text_bt is not None
        rows = [
            words.unit_rows(self.embed(np.maximum(numbers_bk, 1) - 1)) * (numbers_bk > 0)[..., None]
            for numbers_bk in words.with_previous(text_bt.astype(np.int64), positions_bk)
        ]
        return np.concatenate(rows, -1).astype(self.dtype)

    def embed_images(self, images: np.ndarray, trace: Tracer = no_trace) -> np.ndarray:
        """The soft tokens of images: pixels [i,c,x,y] -> [i,t,m]."""
        assert self.weights.vision is not None and self.config.vision is not None
        return vision.embed_images(
            images.astype(self.dtype, copy=False), self.weights.vision, self.config.vision, trace
        )

    def logits(self, x_bqm: np.ndarray, trace: Tracer = no_trace) -> np.ndarray:
        """Output projection with the (unscaled) embedding table: [b,q,m] -> [b,q,v]."""
        return trace("logits_bqv", einsum("bqm,vm->bqv", x_bqm, self.weights.embed_vm))

    def block(
        self,
        x_bqm: np.ndarray,
        layer: int,
        w: LayerWeights,
        positions_bq: np.ndarray,
        cache: kv.Cache | None,
        trace: Tracer,
        last_bq: np.ndarray | None = None,
        text_bt: np.ndarray | None = None,
    ) -> np.ndarray:
        """One layer: attention and MLP, each with a norm before and a norm after, added to the residual stream."""
        eps = self.config.rms_eps
        a_bqm = trace("attn.norm_bqm", rms_norm(x_bqm, w.attn_norm_m, eps))
        o_bqm = self.attend(a_bqm, layer, w, positions_bq, cache, trace, last_bq, text_bt)
        x_bqm = trace("attn.residual_bqm", x_bqm + rms_norm(o_bqm, w.post_attn_norm_m, eps))
        a_bqm = rms_norm(x_bqm, w.mlp_norm_m, eps)
        return trace("mlp.residual_bqm", x_bqm + rms_norm(mlp(a_bqm, w), w.post_mlp_norm_m, eps))

    def attend(
        self,
        a_bqm: np.ndarray,
        layer: int,
        w: LayerWeights,
        positions_bq: np.ndarray,
        cache: kv.Cache | None,
        trace: Tracer,
        last_bq: np.ndarray | None = None,
        text_bt: np.ndarray | None = None,
    ) -> np.ndarray:
        """Project, norm, factorize, cache, score, mask, average, project back: the heart of the matter."""
        config = self.config
        g, d = config.num_kv_heads, config.head_dim
        how_k, how_v = self.factors[layer]
        base, scale = config.rope(layer)
        tables_q = rope.rope_tables(positions_bq, d, base, scale)

        # 1) project; Gemma norms Q and K per head, before RoPE
        Q_bqhd = trace("attn.Q_bqhd", rms_norm(self.project_queries(a_bqm, layer, w), w.q_norm_d, config.rms_eps))
        K_bkgd, V_bkge = self.project_keys_and_values(a_bqm, layer, w, trace)
        Q_bqhd = trace("rope.Q_bqhd", rope.rotate(Q_bqhd, *tables_q))

        # 2) factorize; RoPE acts on b where b is what is cached
        Z_bqz = self.words(text_bt, positions_bq) if kv.reads_words([(how_k, how_v)]) else None
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
            segments = kv.whole_text((how_k, how_v), new, exact_tokens, positions_bq, exact)
        else:
            segments = cache.layers[layer].segments(new, exact_tokens, positions_bq, cache.lengths_b)

        # 4) attention on the factors: one softmax over the keys of all segments
        logits, parts = [], []
        for segment in segments:
            Z_bkz = self.words(text_bt, segment.positions_bk) if kv.reads_words([segment.how]) else None
            parts_k, parts_v = kv.load_pair(segment.held, segment.how, g, d, a_bqm.dtype, Z_bkz)
            tables_k = rope.rope_tables(segment.positions_bk, d, base, scale)
            L_bhqk = attention.scores(Q_bqhd, parts_k, segment.how[0], g, tables_k, config.query_scale)
            seen_bqk = masks.visible(positions_bq, segment.positions_bk, config.window(layer), last_bq)
            seen_bqk = masks.of_segment(
                segment.kind, seen_bqk, positions_bq, segment.positions_bk, exact.sinks, exact.recent
            )
            logits.append(masks.apply_mask(L_bhqk, seen_bqk))
            parts.append((parts_v, segment.how[1]))
        L_bhqk = trace("attn.L_bhqk", np.concatenate(logits, -1))
        P_bhqk = trace("attn.P_bhqk", attention.softmax(L_bhqk))
        ends = np.cumsum([L.shape[-1] for L in logits])[:-1]
        O_bqhe = sum(
            attention.values(P, parts_v, how, g)
            for P, (parts_v, how) in zip(np.split(P_bhqk, ends, -1), parts, strict=True)
        )
        return einsum("bqhe,mhe->bqm", trace("attn.O_bqhe", O_bqhe), w.WO_mhe)

    def exact(self, layer: int) -> kv.Exact:
        """How many tokens this layer reads as they are, beside those that are coded."""
        sinks, recent = self.tpa.exact_tokens if self.tpa else (0, 0)
        return kv.exact_slots(
            self.config, self.factors[layer], layer, self.config.max_positions, kv.Exact(sinks, recent)
        )

    def project_queries(self, a_bqm: np.ndarray, layer: int, w: LayerWeights) -> np.ndarray:
        """Q = W_Q x, or through a head-mixing rank: B_r = W_r x, Q = sum_r a_r (x) B_r."""
        factors = self.query_factors[layer]
        if factors is None:
            return einsum("bqm,hdm->bqhd", a_bqm, w.WQ_hdm)
        A_rh, W_rdm = factors
        return einsum("rh,bqrd->bqhd", A_rh, einsum("bqm,rdm->bqrd", a_bqm, W_rdm))

    def project_keys_and_values(
        self, a_bkm: np.ndarray, layer: int, w: LayerWeights, trace: Tracer
    ) -> tuple[np.ndarray, np.ndarray]:
        """K = norm(W_K x), before RoPE, and V = W_V x."""
        K_bkgd = rms_norm(einsum("bkm,gdm->bkgd", a_bkm, w.WK_gdm), w.k_norm_d, self.config.rms_eps)
        return trace("attn.K_bkgd", K_bkgd), trace("attn.V_bkge", einsum("bkm,gem->bkge", a_bkm, w.WV_gem))

    def new_cache(self, batch: int = 1, max_len: int = 4096) -> kv.Cache:
        """An empty cache for `batch` texts of at most `max_len` tokens; window layers hold only their window."""
        return kv.Cache(
            self.config, self.factors, batch, max_len, kv.Exact(*self.tpa.exact_tokens) if self.tpa else None
        )


def dense_layer(dtype: str) -> kv.LayerFactors:
    """How a layer that is not converted caches K and V."""
    return Factorization("dense", dtype=dtype), Factorization("dense", dtype=dtype)


def check_tokens(tokens_bq: Any, lengths_b: Any, config: GemmaConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens as an array [b,q] with every id in the vocabulary, lengths as an array [b] or None."""
    tokens_bq = np.asarray(tokens_bq)
    if tokens_bq.ndim != 2 or tokens_bq.shape[1] == 0 or tokens_bq.dtype.kind not in "iu":
        raise TPAError(
            f"model: tokens must be whole numbers of shape [b, q >= 1], got {tokens_bq.dtype} {tokens_bq.shape}"
        )
    words_bq = vision.without_placeholders(tokens_bq, config)
    if words_bq.min(initial=0) < 0 or words_bq.max(initial=0) >= config.vocab_size:
        wrong = words_bq[(words_bq < 0) | (words_bq >= config.vocab_size)][0]
        raise TPAError(f"model: token ids must lie in 0 ... {config.vocab_size - 1}, got {wrong}")
    if lengths_b is None:
        return tokens_bq, None
    lengths_b = np.asarray(lengths_b)
    if lengths_b.shape != tokens_bq.shape[:1] or lengths_b.min() < 0 or lengths_b.max() > tokens_bq.shape[1]:
        raise TPAError(
            f"model: lengths must be one number a row in 0 ... {tokens_bq.shape[1]}, got {lengths_b.tolist()}"
        )
    return tokens_bq, lengths_b


def text_positions(model: Any, tokens_bq: np.ndarray, lengths_b: np.ndarray | None, cache: Any) -> np.ndarray:
    """Position [b,q] of every token, after what the cache holds; -1 for padding; refused past the model's last."""
    if cache is None:
        positions_bq = np.tile(np.arange(tokens_bq.shape[1]), (tokens_bq.shape[0], 1))
        if lengths_b is not None:
            positions_bq = np.where(positions_bq < lengths_b[:, None], positions_bq, -1)
    else:
        check_cache(cache, model, tokens_bq.shape[0])
        positions_bq = cache.positions(tokens_bq.shape[1], lengths_b)
    if positions_bq.max(initial=0) >= model.config.max_positions:
        raise TPAError(
            f"model: text of {positions_bq.max() + 1} tokens is longer than the model's "
            f"{model.config.max_positions} positions"
        )
    return positions_bq


def text_so_far(
    model: Any, tokens_bq: np.ndarray, is_image_bq: np.ndarray, positions_bq: np.ndarray, cache: Any
) -> np.ndarray | None:
    """The text by position up to the new tokens, [b,t] (`words.numbered`), kept by the cache; None if nobody asks."""
    if not kv.reads_words(model.factors):
        return None
    numbers_bq = words.numbered(tokens_bq, (positions_bq >= 0) & ~is_image_bq)
    return numbers_bq if cache is None else cache.remember(numbers_bq, positions_bq)


def check_cache(cache: Any, model: Any, batch: int) -> None:
    """A cache belongs to one conversion (its numbers mean nothing to other constant factors) and one batch size."""
    if cache.batch != batch:
        raise TPAError(f"model: the cache was made for batch {cache.batch}, got tokens of batch {batch}")
    same = all(ours is theirs for pair in zip(model.factors, cache.factors) for ours, theirs in zip(*pair))
    if cache.config != model.config or not same:
        raise TPAError("model: the cache was made by another model; make one with this model's new_cache()")
