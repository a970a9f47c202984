"""Tensor Product Attention for Gemma 3 in PyTorch: the names and the math of `tpa_ref`, at scale, on CPU and GPU.

>>> import tpa_torch
>>> model = tpa_torch.load("assets/tiny-gemma3", device="auto")             # doctest: +SKIP
>>> tpa = tpa_torch.convert(model, tpa_torch.TPAConfig(mode="latent"))      # doctest: +SKIP
>>> "".join(tpa_torch.generate(tpa, "The return value is"))                 # doctest: +SKIP
"""

from tpa_ref import __version__
from tpa_ref.compress.config import LayerConfig, TPAConfig
from tpa_ref.errors import TPAError
from tpa_ref.gemma.config import GemmaConfig

from .compress.calibrate import Moments, calibrate
from .compress.convert import convert
from .compress.evaluate import evaluate
from .compress.plan import plan
from .files.checkpoint import load, save
from .files.stream import convert_checkpoint, export
from .gemma.generate import generate, generate_batch
from .gemma.model import Model
from .heal import heal

__all__ = [
    "GemmaConfig",
    "LayerConfig",
    "Model",
    "Moments",
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
