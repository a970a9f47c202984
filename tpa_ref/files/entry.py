"""What every format comes down to: named tensors that have not been read, and what was found beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

QUANTIZED = "quantized"  # the dtype of every tensor of a GGUF, which is read as float32


class Container(NamedTuple):
    """A checkpoint as it was found."""

    entries: dict[str, Entry]  # tensors by the names they have there
    content: dict[str, Any] | None  # of config.json
    files: dict[str, bytes]  # what lies beside


@dataclass(frozen=True)
class Entry:
    """One tensor that has not been read: where it lies, and what is done with it, in this order."""

    shape: tuple[int, ...]
    dtype: str
    file: Any = None  # a `SafetensorsFile`, `PickledFile` or `GgufFile`
    key: str = ""
    scale: Entry | None = None  # multiplies every row
    rows: slice | None = None  # only these
    transposed: bool = False  # whole ones only

    def codes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The numbers of a matrix as int8 codes [n,m] and float16 scales [n,m / 32], where just these are stored."""
        if self.transposed:
            return None
        if self.scale is None:
            return self.file.codes(self.key, self.rows or slice(None)) if hasattr(self.file, "codes") else None
        rows = self.rows or slice(None)
        scale_n = self.scale.read("numpy")[rows].astype(np.float32)
        if (scale_n != scale_n.astype(np.float16)).any():
            return None
        scale_ns = scale_n.astype(np.float16)[:, None].repeat(self.shape[1] // 32, 1)
        return self.file.read(self.key, "numpy", rows), scale_ns

    def read(self, framework: str) -> Any:
        """An array ("numpy") or a torch tensor ("pt")."""
        is_numpy, rows = framework == "numpy", self.rows or slice(None)
        x = self.file.read(self.key, framework, rows)
        if self.scale is not None:
            s = self.scale.read(framework)[rows, None]
            x = x.astype(np.float32) * s.astype(np.float32) if is_numpy else x.float() * s.float()
        if self.transposed:
            x = np.ascontiguousarray(x.T) if is_numpy else x.T.contiguous()
        return x
