"""Token vectors: what K and V are predicted from, where they are. Twin of `tpa_ref.gemma.token_vectors`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.gemma.token_vectors import EPS

from ..core.norm import rms_scale


class TokenTable:
    """The embedding table as token vectors: z of tokens by their numbers, without a second copy of the table."""

    def __init__(self, embed_vm: Tensor, factor: Tensor):
        """factor: what the model multiplies its embeddings with."""
        self.embed_vm = embed_vm
        scales = [rms_scale(_wide(rows * factor), EPS)[:, 0] * _wide(factor) for rows in embed_vm.split(1024)]
        self.scale_n = torch.cat([torch.zeros_like(scales[0][:1]), *scales])  # of number 0: no token

    def __call__(self, own_bk: Tensor, previous_bk: Tensor) -> Tensor:
        """Numbers of tokens and of those before them -> [b,k,2m]."""
        b, k = own_bk.shape
        Z_bknm = self.scale_n.new_empty((b, k, 2, self.embed_vm.shape[1]))
        for place, numbers_bk in enumerate((own_bk, previous_bk)):
            rows_bkm = F.embedding((numbers_bk - 1).clamp(min=0), self.embed_vm)
            torch.mul(rows_bkm, self.scale_n[numbers_bk][..., None], out=Z_bknm[:, :, place])
        return Z_bknm.flatten(2)


class TokenVectors:
    """z of the tokens at some positions, for slices of them. A short text is looked up once for all layers."""

    MOST = 1 << 22  # numbers that are kept

    def __init__(self, table: TokenTable, own_bk: Tensor, previous_bk: Tensor):
        self.table, self.own_bk, self.previous_bk = table, own_bk, previous_bk
        self._kept: dict[tuple[int | None, int | None], Tensor] = {}

    def __call__(self, keys: slice = slice(None)) -> Tensor:
        """[b,k,2m] of a slice of the positions."""
        at = keys.start, keys.stop
        made = self._kept.get(at)
        if made is None:
            made = self.table(self.own_bk[:, keys], self.previous_bk[:, keys])
            if self.own_bk.numel() * made.shape[-1] <= self.MOST:
                self._kept[at] = made
        return made


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
