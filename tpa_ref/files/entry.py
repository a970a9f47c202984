"""What every format comes down to: named tensors that have not been read, and what was found beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Container = tuple[dict[str, "Entry"], dict[str, Any] | None, bytes | None]  # tensors, config.json, tokenizer.model
QUANTIZED = "quantized"  # the dtype of every tensor of a GGUF: read as float32, made for no dtype of ours


@dataclass(frozen=True)
class Entry:
    """One tensor that has not been read: where it lies, and what is done with it, in this order."""

    shape: tuple[int, ...]
    dtype: str
    file: Any = None  # a `SafetensorsFile`, `PickledFile` or `GgufFile`
    key: str = ""
    scale: Entry | None = None  # multiplies every row
    transposed: bool = False
    rows: slice | None = None  # only these

    def read(self, framework: str) -> Any:
        """An array ("numpy") or a torch tensor ("pt")."""
        is_numpy, x = framework == "numpy", self.file.read(self.key, framework)
        if self.scale is not None:
            s = self.scale.read(framework)[:, None]
            x = x.astype(np.float32) * s.astype(np.float32) if is_numpy else x.float() * s.float()
        if self.transposed:
            x = np.ascontiguousarray(x.T) if is_numpy else x.T.contiguous()
        return x if self.rows is None else x[self.rows]
