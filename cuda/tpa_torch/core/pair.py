"""K and V of one layer. Twin of `tpa_ref.core.pair`, which explains it."""

from __future__ import annotations

from tpa_ref.core import pair as reference

from .dense import Dense


class Pair(reference.Pair):
    """K by one mode, V by another (or by the same)."""

    @staticmethod
    def dense(g: int, d: int, dtype: str = "bfloat16") -> Pair:
        """How a layer that is not converted caches K and V."""
        return Pair(Dense(g, d, dtype=dtype), Dense(g, d, dtype=dtype))


class Joint(Pair, reference.Joint):
    """K and V as one vector: what V repeats of K is coded once."""
