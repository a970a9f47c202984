"""The mathematics on tensors: files, names and results as in `tpa_ref.core`. Importing it makes the modes known."""

from .contextual import Contextual
from .fixed_a import FixedA
from .fixed_b import FixedB
from .latent import Latent
from .mode import register

for mode_class in (Contextual, FixedA, FixedB, Latent):
    register(mode_class)
