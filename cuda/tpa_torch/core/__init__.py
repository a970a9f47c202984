"""The mathematics on tensors: the same files, names and results as `tpa_ref.core`. Importing it makes the modes known."""

from . import contextual, fixed_a, fixed_b, latent, spectral  # noqa: F401
