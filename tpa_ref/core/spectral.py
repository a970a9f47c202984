"""`spectral`: `latent` whose coefficients have a width of their own each, 1 to 8 bits. Not in the paper.

Rank and precision become one decision: in the coordinates of the damage (`transform`) the strongest coefficients get
most bits and the weakest none at all, as in JPEG. K and V of a token may be one vector (`pair.Joint`), and what the
token itself tells of them, W z, need not be coded (`compress.token_prediction`):

    c = E (x - mean - W z),        x^ = mean + B c + W z.

In the first layer nothing is left to code: K and V follow from the token alone, V = W z and K = norm(W z).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from . import codes, norm
from .latent import Latent
from .mode import Parts, Stored, Tokens


@dataclass(frozen=True)
class CodedLatent(Latent):
    """Coefficient s of unit variance takes widths[s] bits of a string that begins with the token's scale (`codes`).

    predictor: W^T [z,g,d], or None. k_norm: gains [d] of the norm behind it, or None. This mode cannot be asked for by
    name: a rate chooses it, and its widths.

    >>> CodedLatent(g=1, d=4, rank=3, widths=(4, 3, 2)).token_bytes
    3
    """

    widths: tuple[int, ...] = field(default=(), repr=False)
    predictor: Any = field(default=None, repr=False)
    k_norm: Any = field(default=None, repr=False)

    name = "spectral"
    constants: ClassVar[tuple[str, ...]] = ("basis", "encoder", "mean", "predictor", "k_norm")
    codes: ClassVar[Any] = codes  # another backend has its own
    norm: ClassVar[Any] = norm

    def array_shapes(self) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
        z = 0 if self.predictor is None else len(self.predictor)
        basis, mean = (self.rank, self.g, self.d), (self.g, self.d)
        predictor = None, (z, self.g, self.d)
        return {
            "basis": (basis,),
            "encoder": (basis,),
            "mean": (mean,),
            "predictor": predictor,
            "k_norm": (None, (self.d,)),
        }

    @property
    def widths_of_strings(self) -> list[tuple[int, ...]]:
        """The widths of each string of codes; here it is one."""
        return [self.widths]

    @property
    def string_bytes(self) -> list[int]:
        """How many bytes of a token each string has."""
        return [codes.packed_bytes(widths) for widths in self.widths_of_strings]

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"C.codes": ((sum(self.string_bytes),), np.dtype(np.uint8))}

    def store(self, parts: Parts) -> Stored:
        return {"C.codes": self.quantized(parts["C"], self.widths)}

    def quantized(self, C_bks: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
        """The bytes of each token, uint8 [b,k,bytes]."""
        return self.codes.quantize(C_bks, widths)

    def load(self, stored: Stored, dtype: Any) -> Parts:
        return {"C": self.cast(self.codes.dequantize(stored["C.codes"], self.widths), dtype)}

    def encode(self, X_bkgd: np.ndarray, tokens: Tokens) -> Parts:
        predicted = self.predicted(tokens)
        return super().encode(X_bkgd if predicted is None else X_bkgd - self.cast(predicted, X_bkgd.dtype), tokens)

    def decode(self, parts: Parts, tokens: Tokens) -> np.ndarray:
        predicted, X_bkgd = self.predicted(tokens), super().decode(parts, tokens)
        return X_bkgd if predicted is None else X_bkgd + self.cast(predicted, X_bkgd.dtype)

    def values(self, P_bhqk: np.ndarray, parts: Parts, tokens: Tokens) -> np.ndarray:
        """Token vectors are coefficients like others: summed first, mapped once per query."""
        O_bqhe, dtype = super().values(P_bhqk, parts, tokens), P_bhqk.dtype
        if self.predictor is None:
            return O_bqhe
        return O_bqhe + self.weighted(P_bhqk, self.cast(tokens.Z_bkz, dtype), self.cast(self.predictor, dtype))

    def predicted(self, tokens: Tokens) -> Any:
        """What the tokens tell of K or V, W z: [b,k,g,d]; None where nothing is predicted."""
        if self.predictor is None:
            return None
        X_bkgd = self.combined(tokens.Z_bkz, self.cast(self.predictor, tokens.Z_bkz.dtype))
        return X_bkgd if self.k_norm is None else self.norm.rms_norm(X_bkgd, self.cast(self.k_norm, X_bkgd.dtype))
