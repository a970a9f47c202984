"""The mathematics: arrays in, arrays out. Importing it makes the modes known by their names.

After `tpa.py` read the same in production, in five files: `rope`, `mode`, `contextual`, `pair` (where RoPE acts on b)
and `cache`; `gemma.model.Model.attend` puts them together.
"""

from .contextual import Contextual
from .fixed_a import FixedA
from .fixed_b import FixedB
from .latent import Latent
from .mode import register

for mode_class in (Contextual, FixedA, FixedB, Latent):
    register(mode_class)
