"""Images: pixels -> soft tokens of the text model. Twin of `tpa_ref.gemma.vision`, which explains it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.gemma.config import VisionConfig
from tpa_ref.gemma.weights import VisionLayerWeights, VisionWeights
from tpa_ref.trace import Tracer, no_trace, scoped

from ..core.norm import rms_norm
from .mlp import gelu_tanh


def embed_images(pixels_icxy: Tensor, w: VisionWeights, config: VisionConfig, trace: Tracer = no_trace) -> Tensor:
    """The soft tokens of each image, one after another: [i,c,x,y] -> [i,t,m]."""
    tokens = []
    for number in range(len(pixels_icxy)):
        traced = scoped(trace, f"vision.{number}")
        x_ipz = traced("patches_ipz", embed_patches(pixels_icxy[number : number + 1], w, config))
        for layer, block in enumerate(w.layers):
            x_ipz = traced(f"layers.{layer}_ipz", encode(x_ipz, block, config))
        x_ipz = layer_norm(x_ipz, w.final_norm_z, w.final_norm_bias_z, config.norm_eps)
        x_itz = traced("pooled_itz", pool(x_ipz, config))
        x_itz = rms_norm(x_itz, w.soft_norm_z, config.norm_eps)
        tokens.append(traced("tokens_itm", x_itz @ w.W_project_zm))
    return torch.cat(tokens)


def embed_patches(pixels_icxy: Tensor, w: VisionWeights, config: VisionConfig) -> Tensor:
    """Cut each image into squares, row by row, and multiply each with one matrix: [i,c,x,y] -> [i,p,z]."""
    x_izxy = F.conv2d(pixels_icxy, w.W_patch_zcxy, w.patch_bias_z, stride=config.patch_size)
    return x_izxy.flatten(2).mT + w.position_pz


def encode(x_ipz: Tensor, w: VisionLayerWeights, config: VisionConfig) -> Tensor:
    """One block of the tower: attention and MLP, each after a norm, added to the residual stream."""
    x_ipz = x_ipz + attend(layer_norm(x_ipz, w.attn_norm_z, w.attn_norm_bias_z, config.norm_eps), w)
    return x_ipz + mlp(layer_norm(x_ipz, w.mlp_norm_z, w.mlp_norm_bias_z, config.norm_eps), w)


def attend(a_ipz: Tensor, w: VisionLayerWeights) -> Tensor:
    """Every patch looks at every patch: softmax(q k / sqrt(d)) v. [i,p,z] -> [i,p,z]."""
    Q_ihpd, K_ihpd, V_ihpe = (
        F.linear(a_ipz, W_hdz.flatten(0, 1), bias_hd.flatten()).unflatten(-1, bias_hd.shape).transpose(1, 2)
        for W_hdz, bias_hd in ((w.WQ_hdz, w.Q_bias_hd), (w.WK_hdz, w.K_bias_hd), (w.WV_hez, w.V_bias_he))
    )
    O_ihpe = F.scaled_dot_product_attention(Q_ihpd, K_ihpd, V_ihpe)
    return F.linear(O_ihpe.transpose(1, 2).flatten(2), w.WO_zhe.flatten(1), w.O_bias_z)


def mlp(a_ipz: Tensor, w: VisionLayerWeights) -> Tensor:
    """W_down gelu(W_up x), with biases."""
    return F.linear(gelu_tanh(F.linear(a_ipz, w.W_up_fz, w.up_bias_f)), w.W_down_zf, w.down_bias_z)


def layer_norm(x: Tensor, w: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * w + bias over the last axis."""
    return F.layer_norm(x, w.shape, w, bias, eps)


def pool(x_ipz: Tensor, config: VisionConfig) -> Tensor:
    """The average of each square of pool x pool patches, row by row: [i,p,z] -> [i,t,z]."""
    side, n = config.tokens_per_side, config.pool
    return x_ipz.unflatten(1, (side, n, side, n)).mean((2, 4)).flatten(1, 2)
