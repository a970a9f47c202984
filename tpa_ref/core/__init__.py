"""The mathematics: arrays in, arrays out. Importing it makes the modes known by their names."""

from . import contextual, fixed_a, fixed_b, latent, spectral  # noqa: F401
