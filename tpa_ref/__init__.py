"""Tensor Product Attention (arXiv 2501.06425) for Gemma 3, in NumPy: the reference that everybody can read.

Read in this order:

    tpa.py      the whole lesson in arrays: factors, RoPE on factors, attention from factors, a cache, a ring
    core/       the same in production: first rope, mode, contextual, pair, cache; then the other modes, quantization
    gemma/      Gemma 3 around it: weights, forward pass, images, text
    compress/   which factors and how many bits: calibrate, convert, plan, evaluate
    files/      checkpoints of every format, in and out
    cli/        the two commands

Imports point one way, core <- gemma <- compress <- files <- cli.

One letter per axis in the whole project, the paper's; arrays carry theirs as a suffix (`BK_bksd`), and einsum strings
use the same:

    b  batch                    h  query heads              r  rank of Q
    q  query position           g  KV heads                 s  rank of K
    k  key position             n  queries per KV head      u  rank of V
    d  head dimension           e  value head dimension     l  layer
    m  model width              f  MLP width                w  window
    v  vocabulary               c x y  image channels, rows, columns        i  images
    p  RoPE pair; in the image tower a patch                z  width of a token vector, or of the image tower
    t  token of a text, or soft token of an image           x  several axes as one, mostly heads and features, g d
    j  a second g      c  a second d                        y  the same, where x is taken

A capital R in a docstring stands for any of r, s, u.

    >>> import tpa_ref
    >>> model = tpa_ref.load("assets/tiny-gemma3")                        # doctest: +SKIP
    >>> tpa = tpa_ref.convert(model, tpa_ref.TPAConfig(mode="latent"))    # doctest: +SKIP
    >>> "".join(tpa_ref.generate(tpa, "The return value is"))             # doctest: +SKIP
"""

from .compress.calibrate import calibrate
from .compress.config import FixedRank, Side, Spectral, TPAConfig
from .compress.convert import convert
from .compress.evaluate import evaluate
from .compress.moments import Moments
from .compress.plan import plan
from .errors import TPAError
from .files.checkpoint import load, save
from .files.stream import convert_checkpoint, export
from .gemma.config import GemmaConfig
from .gemma.generate import generate, generate_batch
from .gemma.model import Model

__version__ = "0.1.0"
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
    "load",
    "plan",
    "save",
]
