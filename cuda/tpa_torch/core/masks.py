"""Which key a query sees. Twin of `tpa_ref.core.masks`: tensors are compared as arrays are."""

from typing import Any

from torch import Tensor

from tpa_ref.core import masks as reference
from tpa_ref.core.masks import MASKED

visible: Any = reference.visible
segment_mask: Any = reference.segment_mask


def apply_mask(L_bhqk: Tensor, seen_bqk: Tensor) -> Tensor:
    """Logits with a very negative number wherever the query may not look."""
    return L_bhqk.masked_fill(~seen_bqk[:, None], MASKED)
