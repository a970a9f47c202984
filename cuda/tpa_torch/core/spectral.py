"""`spectral`: `latent` whose coefficients have a width of their own each. Twin of `tpa_ref.core.spectral`."""

from __future__ import annotations

from typing import Any, ClassVar

from tpa_ref.core import spectral as reference

from . import codes, norm
from .latent import Latent


class CodedLatent(Latent, reference.CodedLatent):
    """Coefficient s of unit variance takes widths[s] bits of a string that begins with the token's scale (`codes`)."""

    codes: ClassVar[Any] = codes
    norm: ClassVar[Any] = norm
