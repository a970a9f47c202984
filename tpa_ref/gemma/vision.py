"""Images: pixels -> soft tokens of the text model, through SigLIP and Gemma's projector.

    pixels -> patches (+ position) -> [norm -> attention; norm -> MLP] x layers -> norm
           -> average of 4 x 4 patches -> RMSNorm -> projection to the width of the text model

Inside the tower every patch sees every patch, there is no cache and no RoPE, LayerNorm multiplies with w (not with
1 + w), and all matrices have a bias. Where soft tokens stand in a text, and what sees them, is at the end of this file.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..core.attention import softmax
from ..core.norm import rms_norm
from ..errors import TPAError
from ..trace import Tracer, no_trace, scoped
from .config import GemmaConfig, VisionConfig
from .mlp import gelu_tanh
from .tokenizer import PAD
from .weights import VisionLayerWeights, VisionWeights

einsum = partial(np.einsum, optimize=True)


def embed_images(
    pixels_icxy: np.ndarray, w: VisionWeights, config: VisionConfig, trace: Tracer = no_trace
) -> np.ndarray:
    """The soft tokens of each image: [i,c,x,y] -> [i,t,m]. They enter the text model as they are, without the factor
    sqrt(m) that text tokens get. One image after another, so that memory does not grow with their number.
    """
    tokens = []
    for number in range(len(pixels_icxy)):
        traced = scoped(trace, f"vision.{number}")
        x_ipz = traced("patches_ipz", embed_patches(pixels_icxy[number : number + 1], w, config))
        for layer, block in enumerate(w.layers):
            x_ipz = traced(f"layers.{layer}_ipz", encode(x_ipz, block, config))
        x_ipz = layer_norm(x_ipz, w.final_norm_z, w.final_norm_bias_z, config.norm_eps)
        x_itz = traced("pooled_itz", pool(x_ipz, config))
        x_itz = rms_norm(x_itz, w.soft_norm_z, config.norm_eps)
        tokens.append(traced("tokens_itm", einsum("itz,zm->itm", x_itz, w.W_project_zm)))
    return np.concatenate(tokens)


def embed_patches(pixels_icxy: np.ndarray, w: VisionWeights, config: VisionConfig) -> np.ndarray:
    """Cut each image into squares, row by row, and multiply each with one matrix: [i,c,x,y] -> [i,p,z].

    This is the convolution whose stride is its size.
    """
    i, c = pixels_icxy.shape[:2]
    side, size = config.patches_per_side, config.patch_size
    patches_ipcxy = pixels_icxy.reshape(i, c, side, size, side, size).transpose(0, 2, 4, 1, 3, 5)
    patches_ipcxy = patches_ipcxy.reshape(i, side * side, c, size, size)
    return einsum("ipcxy,zcxy->ipz", patches_ipcxy, w.W_patch_zcxy) + w.patch_bias_z + w.position_pz


def encode(x_ipz: np.ndarray, w: VisionLayerWeights, config: VisionConfig) -> np.ndarray:
    """One block of the tower: attention and MLP, each after a norm, added to the residual stream."""
    x_ipz = x_ipz + attend(layer_norm(x_ipz, w.attn_norm_z, w.attn_norm_bias_z, config.norm_eps), w)
    return x_ipz + mlp(layer_norm(x_ipz, w.mlp_norm_z, w.mlp_norm_bias_z, config.norm_eps), w)


def attend(a_ipz: np.ndarray, w: VisionLayerWeights) -> np.ndarray:
    """Every patch looks at every patch: softmax(q k / sqrt(d)) v, one head at a time. [i,p,z] -> [i,p,z]."""
    Q_iqhd = einsum("iqz,hdz->iqhd", a_ipz, w.WQ_hdz) + w.Q_bias_hd
    K_ikhd = einsum("ikz,hdz->ikhd", a_ipz, w.WK_hdz) + w.K_bias_hd
    V_ikhe = einsum("ikz,hez->ikhe", a_ipz, w.WV_hez) + w.V_bias_he
    O_iqhe = np.empty_like(V_ikhe)
    scale = Q_iqhd.shape[-1] ** -0.5
    for head in range(Q_iqhd.shape[2]):  # 4096 x 4096 logits a head: one matrix in memory is enough
        P_iqk = softmax(Q_iqhd[:, :, head] @ K_ikhd[:, :, head].swapaxes(1, 2) * scale)
        O_iqhe[:, :, head] = P_iqk @ V_ikhe[:, :, head]
    return einsum("iqhe,zhe->iqz", O_iqhe, w.WO_zhe) + w.O_bias_z


def mlp(a_ipz: np.ndarray, w: VisionLayerWeights) -> np.ndarray:
    """W_down gelu(W_up x), with biases."""
    hidden_ipf = gelu_tanh(einsum("ipz,fz->ipf", a_ipz, w.W_up_fz) + w.up_bias_f)
    return einsum("ipf,zf->ipz", hidden_ipf, w.W_down_zf) + w.down_bias_z


def layer_norm(x: np.ndarray, w: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * w + bias over the last axis.

    >>> layer_norm(np.array([1.0, 3.0]), np.ones(2), np.zeros(2), 0.0).tolist()
    [-1.0, 1.0]
    """
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps) * w + bias


def pool(x_ipz: np.ndarray, config: VisionConfig) -> np.ndarray:
    """The average of each square of pool x pool patches, row by row: [i,p,z] -> [i,t,z].

    >>> config = VisionConfig(image_size=4, patch_size=1, hidden_size=1, num_heads=1, tokens_per_image=4)
    >>> pool(np.arange(16.0).reshape(1, 16, 1), config).ravel().tolist()
    [2.5, 4.5, 10.5, 12.5]
    """
    i, _, z = x_ipz.shape
    side, n = config.tokens_per_side, config.pool
    return x_ipz.reshape(i, side, n, side, n, z).mean((2, 4)).reshape(i, side * side, z)


# ---- soft tokens in a text (shared by both backends) ----


def check_images(images: Any, tokens_bq: np.ndarray, positions_bq: np.ndarray, config: GemmaConfig) -> np.ndarray:
    """Where the soft tokens go, bool [b,q]: every placeholder of a text, as many as the images have tokens, each image
    in one piece. `images` [i,c,x,y] or None; padding has position -1.
    """
    if images is None and config.vision is None:
        return np.zeros(tokens_bq.shape, bool)
    vision = require_vision(config)
    if images is not None:
        check_pixels(images, vision)
    is_image_bq = (tokens_bq == vision.image_token) & (positions_bq >= 0)
    found, t, count = int(is_image_bq.sum()), vision.tokens_per_image, 0 if images is None else len(images)
    if found != count * t:
        wanted = f"{count} images take {count} x {t} placeholder tokens ({vision.image_token})"
        raise TPAError(f"model: {wanted}, got {found} in the text")
    for start, end in (block for row in is_image_bq for block in image_blocks(row)):
        if (end - start) % t:
            wrong = f"got {end - start} at {start}"
            raise TPAError(f"model: the {t} placeholder tokens of an image must stand together, {wrong}")
    return is_image_bq


def require_vision(config: GemmaConfig) -> VisionConfig:
    """The image tower's config, or one line where there is none."""
    if config.vision is None:
        raise TPAError("model: images were given, but this model reads text only: it has no image tower")
    return config.vision


def as_pixels(images: Any) -> np.ndarray | None:
    """Images as a NumPy array, whatever array they are."""
    if str(getattr(images, "dtype", "")) == "torch.bfloat16":  # which NumPy lacks
        images = images.float()
    return None if images is None else np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)


def check_pixels(images: Any, vision: VisionConfig) -> np.ndarray:
    """The same pixels, if they are floats [i,c,x,y] of the size that the model reads, and finite."""
    expected = (vision.channels, vision.image_size, vision.image_size)
    if images.ndim != 4 or images.shape[1:] != expected or images.dtype.kind != "f":
        shape = ", ".join(map(str, expected))
        raise TPAError(f"model: images must be floats of shape [i, {shape}], got {images.dtype} {list(images.shape)}")
    if wrong := int((~np.isfinite(images)).sum()):
        raise TPAError(f"model: images must be finite, got {wrong} NaN or infinite numbers")
    return images


def image_blocks(is_image_q: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each run of placeholders in one row.

    >>> image_blocks(np.array([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    edges = np.flatnonzero(np.diff(is_image_q.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def last_seen(is_image_bq: np.ndarray, positions_bq: np.ndarray) -> np.ndarray | None:
    """The last position that each token sees, [b,q]: its own, and for a token of an image the image's last.

    That is the whole difference that images make to masks: keys before a token are seen anyhow (within the window).
    None where there is no image.

    >>> last_seen(np.array([[False, True, True, False]]), np.array([[5, 6, 7, 8]])).tolist()
    [[5, 7, 7, 8]]
    """
    if not is_image_bq.any():
        return None
    last_bq = positions_bq.copy()
    for row, is_image_q in enumerate(is_image_bq):
        for start, end in image_blocks(is_image_q):
            last_bq[row, start:end] = positions_bq[row, end - 1]
    return last_bq


def images_between(images: np.ndarray | None, is_image_bq: np.ndarray, start: int, end: int) -> np.ndarray | None:
    """Those images whose placeholders lie in the columns start ... end of a text, in their order there.

    >>> is_image_bq = np.array([[True, True, False, True, True], [False, False, False, True, True]])
    >>> images_between(np.array([10, 20, 30]), is_image_bq, 3, 5).tolist()
    [20, 30]
    """
    if images is None or not len(images):
        return images
    t = is_image_bq.sum() // len(images)
    number_bq = (np.cumsum(is_image_bq).reshape(is_image_bq.shape) - 1) // t
    return images[np.unique(number_bq[:, start:end][is_image_bq[:, start:end]])]


def without_placeholders(tokens_bq: np.ndarray, config: GemmaConfig) -> np.ndarray:
    """Tokens that can be looked up: a placeholder may lie outside of the embedding table."""
    return tokens_bq if config.vision is None else np.where(tokens_bq == config.vision.image_token, PAD, tokens_bq)
