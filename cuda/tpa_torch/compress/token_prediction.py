"""What the text itself tells of K and V, so that no bit need be spent on it. Twin of `tpa_ref.words`, which explains
it; the fit of the maps is the same code.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_ref.compress.token_prediction import (
    EPS,
    WordMoments,
    affordable,
    fit,
    number_dtype,
    numbered,
    token_bytes,
    wanted,
    with_previous,
    without_words,
)

from ..core.norm import rms_scale

__all__ = [
    "EPS",
    "WordMoments",
    "affordable",
    "fit",
    "number_dtype",
    "numbered",
    "token_bytes",
    "wanted",
    "with_previous",
    "without_words",
]


def unit_rows(x_bkm: Tensor) -> Tensor:
    """e: rows of rms 1, at least in float32."""
    x_bkm = x_bkm if x_bkm.dtype == torch.float64 else x_bkm.float()
    return x_bkm * rms_scale(x_bkm, EPS)


def window_words(x_bqm: Tensor) -> Tensor:
    """z of a text that begins at position 0, from the embedded tokens: [b,q,m] -> [b,q,2m]."""
    e_bqm = unit_rows(x_bqm)
    return torch.cat([e_bqm, F.pad(e_bqm, (0, 0, 1, 0))[:, :-1]], -1)


def word_moments(texts: list[Tensor]) -> WordMoments:
    """From z of each window, [1,q,2m]."""
    tokens = sum(Z_bqz.shape[1] for Z_bqz in texts)
    sums = [Z_bqz[0].sum(0).cpu().numpy().astype(np.float64) for Z_bqz in texts]
    products = [(Z_bqz[0].mT @ Z_bqz[0]).cpu().numpy().astype(np.float64) for Z_bqz in texts]
    return WordMoments(np.sum(sums, 0) / tokens, np.sum(products, 0) / tokens, tokens)


class WordTable:
    """The embedding table as words: z of tokens by their numbers, without a second copy of the table."""

    def __init__(self, embed_vm: Tensor, factor: Tensor):
        """factor: what the model multiplies its embeddings with."""
        self.embed_vm = embed_vm
        scales = [rms_scale(_wide(rows * factor), EPS)[:, 0] * _wide(factor) for rows in embed_vm.split(8192)]
        self.scale_n = torch.cat([torch.zeros_like(scales[0][:1]), *scales])  # of number 0: no word

    def __call__(self, own_bk: Tensor, previous_bk: Tensor) -> Tensor:
        """Numbers of tokens and of those before them -> [b,k,2m]."""
        b, k = own_bk.shape
        Z_bknm = self.embed_vm.new_empty((b, k, 2, self.embed_vm.shape[1]), dtype=self.scale_n.dtype)
        for place, numbers_bk in enumerate((own_bk, previous_bk)):
            rows_bkm = F.embedding((numbers_bk - 1).clamp(min=0), self.embed_vm)
            torch.mul(rows_bkm, self.scale_n[numbers_bk][..., None], out=Z_bknm[:, :, place])
        return Z_bknm.flatten(2)


class Words:
    """z of the tokens at some positions, for slices of them. A short text is looked up once for all layers."""

    MOST = 1 << 22  # numbers that are kept

    def __init__(self, table: WordTable, own_bk: Tensor, previous_bk: Tensor):
        self.table, self.own_bk, self.previous_bk = table, own_bk, previous_bk
        self._kept: dict[tuple[int | None, int | None], Tensor] = {}

    def __call__(self, keys: slice = slice(None)) -> Tensor:
        """[b,k,2m] of a slice of the positions."""
        at = keys.start, keys.stop
        if at in self._kept:
            return self._kept[at]
        made = self.table(self.own_bk[:, keys], self.previous_bk[:, keys])
        if self.own_bk.numel() * made.shape[-1] <= self.MOST:
            self._kept[at] = made
        return made


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
