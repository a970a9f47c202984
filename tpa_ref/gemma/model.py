"""The whole Gemma 3 forward pass in NumPy, dense or with a TPA cache. Data flows one way:

tokens -> embedding -> [norm -> Q, K, V -> cache -> attention -> norm; norm -> MLP -> norm] x l -> logits

The last part of `Model` is what differs between backends: everything in `compress`, `files` and `generate` asks a model
for it and is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..core import divergence
from ..core.attention import softmax
from ..core.banded import Banded, BandedLatent
from ..core.cache import Cache, Exact, WholeText
from ..core.mode import MODES
from ..core.norm import rms_norm
from ..core.pair import Joint, Pair
from ..core.rope import rotate
from ..core.spectral import CodedLatent
from ..errors import TPAError
from ..trace import Tracer, Watch, no_trace, scoped
from . import backward, vision
from .config import GemmaConfig
from .mlp import mlp
from .positions import Positions
from .side_files import SideFiles
from .token_vectors import id_dtype, numbered, unit_rows, with_previous
from .tokenizer import Tokenizer
from .weights import LayerWeights, Weights

einsum = partial(np.einsum, optimize=True)
QueryFactors = tuple[Any, Any]  # A [r,h] and W [r,d,m]


class Model:
    """A Gemma 3 model. `tpa` is None for the dense model; `convert` makes one with a TPA cache.

    `pairs[layer]` says how that layer caches K and V, `choices[layer]` is what was asked of it (None: dense).
    """

    # this backend's
    Pair, Joint, CodedLatent, Positions, WholeText = Pair, Joint, CodedLatent, Positions, WholeText
    Banded, BandedLatent = Banded, BandedLatent
    MODES: Any = MODES
    backward: Any = backward
    vision: Any = vision
    rounded_weights = False  # are the weights held coarser than they were stored?

    def __init__(
        self,
        config: GemmaConfig,
        weights: Weights,
        tokenizer: Tokenizer | None = None,
        tpa: Any = None,
        pairs: Sequence[Any] | None = None,
        query_factors: Sequence[QueryFactors | None] | None = None,
        stored_dtype: str = "float32",
        side_files: SideFiles | None = None,
    ):
        self.config, self.weights, self.tokenizer, self.tpa = config, weights, tokenizer, tpa
        self.dtype = str(weights.embed_vm.dtype).removeprefix("torch.")
        self.stored_dtype, self.side_files = stored_dtype, side_files or SideFiles()
        dense = self.Pair.dense(config.num_kv_heads, config.head_dim, self.dtype)
        self.pairs = list(pairs or [dense] * config.num_layers)
        self.query_factors = list(query_factors or [None] * config.num_layers)
        self.choices: list[Any] = [None] * config.num_layers
        self.notes: list[str] = []  # what the conversion had to clamp, one line each

    def __call__(
        self,
        tokens_bq: Any,
        cache: Any = None,
        lengths_b: Any = None,
        images: Any = None,
        trace: Tracer = no_trace,
        last_only: bool = False,
    ) -> Any:
        """Logits [b,q,v] in float32 (float64 in a float64 model) for tokens [b,q].

        With a cache the tokens are appended to what it holds; call again with the next ones. `lengths_b` [b]: only the
        first so many tokens of each row count, the rest is padding on the right. `images` [i,c,x,y]: pixels in -1 ... 1
        (`images.read_images`), in the order of their placeholders in the tokens, row by row; all placeholders of an
        image come in one call. last_only: logits [b,1,v] after each row's last token alone; those of 2,048 positions
        and a vocabulary of 262,144 take 2 GiB.
        """
        x_bqm = self.hidden(tokens_bq, cache, lengths_b, images, trace)
        return self.logits(last_states(x_bqm, lengths_b) if last_only else x_bqm, trace)

    def hidden(
        self, tokens_bq: Any, cache: Any = None, lengths_b: Any = None, images: Any = None, trace: Tracer = no_trace
    ) -> Any:
        """The final hidden states [b,q,m], after the last norm: everything but the output projection."""
        tokens_bq, lengths_b = check_tokens(tokens_bq, lengths_b, self.config)
        positions_bq = self.new_positions(tokens_bq, lengths_b, cache)
        images = vision.as_pixels(images)
        is_image_bq = vision.check_images(images, tokens_bq, positions_bq, self.config)
        x_bqm = trace("embed.x_bqm", self.embed_text(tokens_bq, images, is_image_bq, trace))
        text_bt = self.text_so_far(tokens_bq, is_image_bq, positions_bq, cache)
        at = self.positions(positions_bq, vision.last_seen(is_image_bq, positions_bq), text_bt)
        held = self.whole_text(*tokens_bq.shape) if cache is None else cache
        x_bqm = self.blocks(x_bqm, at, held, trace)
        held.advance(positions_bq)
        return trace("final.x_bqm", self.norm(x_bqm, self.weights.final_norm_m))

    def blocks(self, x_bqm: Any, at: Any, cache: Any, trace: Tracer = no_trace) -> Any:
        """All layers."""
        for layer, block in enumerate(self.weights.layers):
            x_bqm = self.block(x_bqm, layer, block, at, cache, scoped(trace, f"layers.{layer}"))
        return x_bqm

    def block(self, x_bqm: Any, layer: int, w: LayerWeights, at: Any, cache: Any, trace: Tracer = no_trace) -> Any:
        """One layer: attention and MLP, each with a norm before and a norm after, added to the residual stream.

        at: where the new tokens stand, (for window layers, for global layers).
        """
        a_bqm = trace("attn.norm_bqm", self.norm(x_bqm, w.attn_norm_m))
        o_bqm = self.attend(a_bqm, layer, w, at[self.config.is_global[layer]], cache, trace)
        x_bqm = trace("attn.residual_bqm", x_bqm + self.norm(o_bqm, w.post_attn_norm_m))
        a_bqm = self.norm(x_bqm, w.mlp_norm_m)
        return trace("mlp.residual_bqm", x_bqm + self.norm(self.mlp(a_bqm, w), w.post_mlp_norm_m))

    def attend(self, a_bqm: Any, layer: int, w: LayerWeights, at: Any, cache: Any, trace: Tracer) -> Any:
        """Project, norm, write, read, score, mask, average, project back: the heart of the matter."""
        # project; Gemma norms Q and K per head. RoPE turns Q here, and K in the cache, when written or when read
        Q_bqhd = trace("attn.Q_bqhd", self.norm(self.project_queries(a_bqm, layer, w), w.q_norm_d))
        K_bkgd, V_bkge = self.project_keys_and_values(a_bqm, layer, w, trace)
        Q_bqhd = trace("rope.Q_bqhd", rotate(Q_bqhd, *at.new_tokens.tables))

        # write the new tokens, and read what the cache holds: at prefill as at decode
        keys = cache.append(layer, K_bkgd, V_bkge, at, trace)

        # score and mask, average, project back
        L_bhqk = trace("attn.L_bhqk", keys.scores(Q_bqhd, self.config.query_scale))
        P_bhqk = trace("attn.P_bhqk", softmax(L_bhqk))
        O_bqhe = trace("attn.O_bqhe", keys.values(P_bhqk))
        return einsum("bqhe,mhe->bqm", O_bqhe, w.WO_mhe)

    def project_queries(self, a_bqm: Any, layer: int, w: LayerWeights) -> Any:
        """Q = W_Q x, or through a head-mixing rank: B_r = W_r x, Q = sum_r a_r (x) B_r."""
        factors = self.query_factors[layer]
        if factors is None:
            return self.project(a_bqm, w.WQ_hdm)
        A_rh, W_rdm = factors
        return einsum("rh,bqrd->bqhd", A_rh, self.project(a_bqm, W_rdm))

    def project_keys_and_values(self, a_bkm: Any, layer: int, w: LayerWeights, trace: Tracer) -> tuple[Any, Any]:
        """K = norm(W_K x), before RoPE, and V = W_V x."""
        K_bkgd = trace("attn.K_bkgd", self.norm(self.project(a_bkm, w.WK_gdm), w.k_norm_d))
        return K_bkgd, trace("attn.V_bkge", self.project(a_bkm, w.WV_gem))

    def logits(self, x_bqm: Any, trace: Tracer = no_trace) -> Any:
        """Output projection, as a rule the (unscaled) embedding table: [b,q,m] -> [b,q,v]."""
        return trace("logits_bqv", einsum("bqm,vm->bqv", x_bqm, self.weights.head_vm))

    # ---- tokens and positions ----

    def embed(self, tokens_bq: np.ndarray) -> Any:
        """Rows of the embedding table times sqrt(m): [b,q] -> [b,q,m]."""
        embed_vm = self.weights.embed_vm
        return embed_vm[tokens_bq] * embed_vm.dtype.type(self.config.hidden_size**0.5)

    def embed_text(self, tokens_bq: np.ndarray, images: Any, is_image_bq: np.ndarray, trace: Tracer) -> Any:
        """Embedded tokens, with the soft tokens of images in their places."""
        x_bqm = self.embed(vision.without_placeholders(tokens_bq, self.config))
        if images is not None and len(images):
            E_itm = self.embed_images(images, trace)
            x_bqm[is_image_bq] = E_itm.reshape(-1, E_itm.shape[-1])
        return x_bqm

    def embed_images(self, images: np.ndarray, trace: Tracer = no_trace) -> Any:
        """The soft tokens of images: pixels [i,c,x,y] -> [i,t,m]."""
        assert self.weights.vision is not None and self.config.vision is not None
        return self.vision.embed_images(self.array(images), self.weights.vision, self.config.vision, trace)

    def new_positions(self, tokens_bq: np.ndarray, lengths_b: np.ndarray | None, cache: Any) -> np.ndarray:
        """Position [b,q] of every token, after what the cache holds; -1 for padding; refused past the model's last."""
        if cache is None:
            positions_bq = np.tile(np.arange(tokens_bq.shape[1]), (tokens_bq.shape[0], 1))
            if lengths_b is not None:
                positions_bq = np.where(positions_bq < lengths_b[:, None], positions_bq, -1)
        else:
            self.check_cache(cache, tokens_bq.shape[0])
            positions_bq = cache.positions(tokens_bq.shape[1], lengths_b)
        length, most = positions_bq.max(initial=0) + 1, self.config.max_positions
        if length > most:
            raise TPAError(f"model: text of {length} tokens is longer than the model's {most} positions")
        return positions_bq

    def positions(self, positions_bq: np.ndarray, last_bq: Any = None, text_bt: Any = None) -> tuple[Any, Any]:
        """Where new tokens stand, as window layers and as global layers see it."""
        local, everywhere = (self.Positions(self, flag, positions_bq, last_bq, text_bt) for flag in (False, True))
        return local, everywhere

    def text_so_far(self, tokens_bq: np.ndarray, is_image_bq: np.ndarray, positions_bq: np.ndarray, cache: Any) -> Any:
        """The ids by position up to the new tokens, [b,t] (`numbered`), kept by the cache; None if nobody asks."""
        if not self.reads_tokens:
            return None
        numbers_bq = numbered(tokens_bq, (positions_bq >= 0) & ~is_image_bq)
        return numbers_bq if cache is None else cache.remember(numbers_bq, positions_bq)

    @property
    def reads_tokens(self) -> bool:
        """Is K or V of any layer predicted from the tokens?"""
        return any(pair.reads_tokens for pair in self.pairs)

    def token_vectors(self, text_bt: np.ndarray, positions_bk: np.ndarray) -> Any:
        """z of the tokens at some positions of a text of numbered ids: [b,t] by position, [b,k] -> [b,k,2m]."""
        rows = [
            unit_rows(self.embed(np.maximum(numbers_bk, 1) - 1)) * (numbers_bk > 0)[..., None]
            for numbers_bk in with_previous(text_bt.astype(np.int64), positions_bk)
        ]
        return np.concatenate(rows, -1).astype(self.dtype)

    # ---- caches ----

    @property
    def exact(self) -> Exact:
        """How many tokens converted global layers read as they are, beside those that are coded."""
        return Exact(*self.tpa.exact_tokens) if self.tpa else Exact()

    def new_cache(self, batch: int = 1, max_len: int = 4096) -> Any:
        """An empty cache for `batch` texts of at most `max_len` tokens; window layers hold only their window."""
        return Cache(self.pairs, self.config.windows, batch, max_len, self.exact, id_dtype(self.config.vocab_size))

    def whole_text(self, batch: int, length: int) -> Any:
        """Stands in for a cache when a text is read at once."""
        return self.WholeText(self.pairs, self.config.windows, batch, length, self.exact)

    def check_cache(self, cache: Any, batch: int) -> None:
        """A cache belongs to one model (its numbers mean nothing to other constant factors) and one batch size."""
        if not isinstance(cache, Cache):
            raise TPAError(f"model: a cache is made with new_cache(), got {type(cache).__name__}")
        if cache.batch != batch:
            raise TPAError(f"model: the cache was made for batch {cache.batch}, got tokens of batch {batch}")
        if len(self.pairs) != len(cache.pairs) or any(a is not b for a, b in zip(self.pairs, cache.pairs)):
            raise TPAError("model: the cache was made by another model; make one with this model's new_cache()")

    # ---- what differs between backends ----

    def norm(self, x: Any, w: Any) -> Any:
        """RMSNorm with Gemma's epsilon."""
        return rms_norm(x, w, self.config.rms_eps)

    def mlp(self, a_bqm: Any, w: LayerWeights) -> Any:
        """The gated MLP."""
        return mlp(a_bqm, w)

    def project(self, a_bqm: Any, W_hdm: Any) -> Any:
        """[b,q,m] through [h,d,m] -> [b,q,h,d]."""
        return einsum("bqm,hdm->bqhd", a_bqm, W_hdm)

    def array(self, x: np.ndarray) -> Any:
        """Numbers as this backend computes with them, in the model's dtype."""
        return x.astype(self.dtype, copy=False)

    def constant(self, x: np.ndarray) -> Any:
        """A constant array as it is kept: one piece, in full precision."""
        return np.ascontiguousarray(x, "float64" if self.dtype == "float64" else "float32")

    def to_numpy(self, x: Any) -> np.ndarray:
        """Any array of this backend as NumPy's, bfloat16 included."""
        return np.asarray(x)

    def double(self, x: Any) -> np.ndarray:
        """The same in float64."""
        return self.to_numpy(x).astype(np.float64, copy=False)

    def through_layer(self, layer: int, x_bqm: Any) -> tuple[Any, Any, Any]:
        """A text's states through one layer: (states after it, its normed K before RoPE, its V)."""
        held: dict[str, Any] = {}
        watch = Watch({"attn.K_bkgd": held.__setitem__, "attn.V_bkge": held.__setitem__})
        at = self.positions(np.arange(x_bqm.shape[1])[None])
        y_bqm = self.block(x_bqm, layer, self.weights.layers[layer], at, self.whole_text(*x_bqm.shape[:2]), watch)
        return y_bqm, held["attn.K_bkgd"], held["attn.V_bkge"]

    def moments(self, K_bkgd: Any, V_bkge: Any, Z_bkz: Any = None) -> dict[str, np.ndarray]:
        """Sums over tokens in float64, of x = (K, V): x x^T [2g,d,2g,d], x [2g,d] and, with token vectors, x z^T."""
        return {name: self.double(x) for name, x in self.backward.moments(K_bkgd, V_bkge, Z_bkz).items()}

    def token_moments(self, Z_bkz: Any) -> tuple[np.ndarray, np.ndarray]:
        """Sums over tokens in float64, of z [z] and of z z^T [z,z]."""
        return Z_bkz.sum((0, 1), dtype=np.float64), (Z_bkz[0].T @ Z_bkz[0]).astype(np.float64)

    def logits_backward(self, x_bqm: Any, rng: np.random.Generator) -> Any:
        """Gradient of -log p(y) with respect to the states after the last layer, y drawn from the model's own p."""
        return self.backward.logits_backward(self, x_bqm, rng)

    def back_through_layer(self, layer: int, x_bqm: Any, dy_bqm: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """Gradients back through one layer: (that of the states before it, sums of grad grad^T for K and for V over all
        tokens but the first, and the first one's own gradient [2g,d]).
        """
        at = np.arange(x_bqm.shape[1])[None]
        dx_bqm, *gradients = self.backward.block_backward(self, dy_bqm, x_bqm, layer, self.weights.layers[layer], at)
        F_k, F_v = (self.double(self.backward.second_moment(x_bkgd[:, 1:])) for x_bkgd in gradients)
        return dx_bqm, F_k, F_v, np.concatenate([self.double(x_bkgd[0, 0]) for x_bkgd in gradients])

    def compare(self, x_bqm: Any, other: Model, y_bqm: Any, following_q: np.ndarray) -> dict[str, np.ndarray]:
        """Predictions of this model and another from their final states, one number per position: kl (nats), same (is
        the most likely token the same?), and -log p of the tokens that follow: nll, nll_other.
        """
        found = []
        for start in range(0, x_bqm.shape[1], backward.ROWS):
            here = slice(start, start + backward.ROWS)
            found.append(self.compare_rows(x_bqm[:, here], other, y_bqm[:, here], following_q[here]))
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def compare_rows(self, x_bqm: Any, other: Model, y_bqm: Any, following_q: np.ndarray) -> dict[str, np.ndarray]:
        """`compare` of so few positions that the logits of all of them are made at once."""
        P_bqv = divergence.log_softmax(self.logits(x_bqm))
        Q_bqv = divergence.log_softmax(other.logits(y_bqm))
        step_q = np.arange(len(following_q))
        return {
            "kl": divergence.kl_divergence(P_bqv, Q_bqv)[0],
            "same": (P_bqv.argmax(-1) == Q_bqv.argmax(-1))[0],
            "nll": -P_bqv[0, step_q, following_q],
            "nll_other": -Q_bqv[0, step_q, following_q],
        }

    def stream(self, cache: Any, L_bv: np.ndarray, max_new_tokens: int, sampling: Any, stop: frozenset[int]) -> Any:
        """Steps of generation that a device runs by itself, as an iterator; None where it cannot."""
        return None


def last_states(x_bqm: Any, lengths_b: Any = None) -> Any:
    """The state of each row's last token, [b,q,m] -> [b,1,m]; of a row without tokens, of its first padding."""
    if lengths_b is None:
        return x_bqm[:, -1:]
    ends_b = np.maximum(on_host(lengths_b), 1) - 1
    return x_bqm[np.arange(len(ends_b)), ends_b][:, None]


def on_host(numbers: Any) -> np.ndarray:
    """Numbers of any kind as an array of NumPy; rows of different length are refused."""
    try:
        return np.asarray(numbers.detach().cpu() if hasattr(numbers, "detach") else numbers)
    except ValueError:
        raise TPAError("model: all rows of tokens must have one length; pad them, and give lengths_b") from None


def check_tokens(tokens_bq: Any, lengths_b: Any, config: GemmaConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens as an array [b,q] with every id in the vocabulary, lengths as an array [b] or None."""
    tokens_bq = on_host(tokens_bq)
    if tokens_bq.ndim != 2 or tokens_bq.shape[1] == 0 or tokens_bq.dtype.kind not in "iu":
        raise TPAError(
            f"model: tokens must be whole numbers of shape [b, q >= 1], got {tokens_bq.dtype} {tokens_bq.shape}"
        )
    ids_bq = vision.without_placeholders(tokens_bq, config)
    wrong = ids_bq[(ids_bq < 0) | (ids_bq >= config.vocab_size)]
    if wrong.size:
        raise TPAError(f"model: token ids must lie in 0 ... {config.vocab_size - 1}, got {wrong[0]}")
    if lengths_b is None:
        return tokens_bq, None
    lengths_b = on_host(lengths_b)
    b, q = tokens_bq.shape
    wrong_kind = lengths_b.shape != (b,) or lengths_b.dtype.kind not in "iu"
    if wrong_kind or lengths_b.min(initial=0) < 0 or lengths_b.max(initial=0) > q:
        raise TPAError(f"model: lengths must be one number a row in 0 ... {q}, got {lengths_b.tolist()}")
    return tokens_bq, lengths_b
