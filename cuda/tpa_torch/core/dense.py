"""`dense`: K and V as they are. Twin of `tpa_ref.core.dense`."""

from __future__ import annotations

from tpa_ref.core import dense as reference

from .mode import Mode


class Dense(Mode, reference.Dense):
    """The heads themselves: one part X [g,d]."""
