"""Tensor Product Attention for Gemma 3 in PyTorch: the names and the math of `tpa_ref`, at scale, on CPU and GPU.

    core/   the mathematics, twin of `tpa_ref.core`        fast/   how attention is made fast: tiles, blocks, kernels
    gemma/  the model, twin of `tpa_ref.gemma`             files/  loading onto a device
    heal.py distillation

What touches no array (calibrating, converting, planning, evaluating, generating, saving) is `tpa_ref`'s.

>>> import tpa_torch
>>> model = tpa_torch.load("assets/tiny-gemma3", device="auto")             # doctest: +SKIP
>>> tpa = tpa_torch.convert(model, tpa_torch.TPAConfig(mode="latent"))      # doctest: +SKIP
>>> "".join(tpa_torch.generate(tpa, "The return value is"))                 # doctest: +SKIP
"""

from tpa_ref import (
    FixedRank,
    GemmaConfig,
    Moments,
    Side,
    Spectral,
    TPAConfig,
    TPAError,
    __version__,
    calibrate,
    convert,
    evaluate,
    export,
    generate,
    generate_batch,
    plan,
    save,
)

from .files.checkpoint import convert_checkpoint, load
from .gemma.model import Model
from .heal import heal

__all__ = [
    "FixedRank",
    "GemmaConfig",
    "Model",
    "Moments",
    "Side",
    "Spectral",
    "TPAConfig",
    "TPAError",
    "__version__",
    "calibrate",
    "convert",
    "convert_checkpoint",
    "evaluate",
    "export",
    "generate",
    "generate_batch",
    "heal",
    "load",
    "plan",
    "save",
]
