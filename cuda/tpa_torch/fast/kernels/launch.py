"""What the Triton kernels need beside the cache itself, and what remains to be done behind them.

Everything here is a few small tensor operations on the device: nothing is copied from the cache and nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import e as euler
from math import log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tpa_ref.core.banded import TILE
from tpa_ref.core.cache import LayerCache, Ring
from tpa_ref.core.mode import Stored, of_part

from ...core.banded import BandedLatent
from ...core.codes import constants, numbers, packed_bytes
from ...core.contextual import Contextual
from ...core.dense import Dense
from ...core.fixed_a import FixedA, absorb, mix
from ...core.fixed_b import FixedB
from ...core.latent import Latent
from ...core.mode import Mode
from ...core.pair import Joint
from ...core.spectral import CodedLatent
from ...lasting import lasting
from . import Step
from .absorbed import at_nodes, bands_of
from .triton_kernels import attend_split, merge_splits

IN_A_THREAD = {"float": 128, "float32": 32, "int8": 64, "int4": 32, "spectral": 32}
MANY = 2**30  # a window that never ends
# Basis and mean of a K that is rebuilt; absorbed queries, and weights between their nodes
Constants = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Pointers = tuple[Tensor | None, Tensor | None, Tensor | None]
Strings = tuple[tuple[int, ...], ...]  # the widths of each


@dataclass(frozen=True)
class Tile:
    """Sizes of one program: tokens at a time, at most so many numbers of V, coefficients at a time, warps, stages."""

    tokens: int
    values: int
    coefficients: int = 32
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Side:
    """K or V of a segment as the kernels see it.

    form: "rows", "contextual", "rebuilt", "banded" or "behind"; groups: of KV heads, each with rows of its own; rows:
    how many a token; width: numbers of a row; stride: entries of `stored[0]` from row to row; store: how they are
    stored; a: the a's of `contextual`; fast: coefficients of the fast pairs of `banded`.
    """

    form: str
    groups: int
    rows: int
    width: int
    stride: int
    store: str
    stored: Pointers
    a: Pointers = (None, None, None)
    store_a: str = "float"
    fast: int = 0


def decode(
    Q_bqhd: Tensor,
    held: LayerCache,
    step: Step,
    tables: tuple[Tensor, Tensor],
    scale: float,
    splits: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Attention of one new token a row over all that a layer's cache holds, the token itself included.

    tables: cos and sin [T,d/2] of the layer for all positions. Splits and tile are chosen where None is given.
    Shapes: rotated queries [b,1,h,d] -> [b,1,h,e].
    """
    bounds = held.window or MANY, held.exact.sinks, held.exact.recent
    found = [
        segment(kind, ring, Q_bqhd[:, 0], step, tables, bounds, scale, splits, tile)
        for kind, ring in held.rings.items()
    ]
    return joined(found).to(Q_bqhd.dtype)[:, None]


def joined(found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Outputs [b,h,e] of several segments in one softmax, by their log-sum-exp [b,h] (base 2)."""
    if len(found) == 1:
        return found[0][0]
    O_xbhe, lse_xbh = (torch.stack(each) for each in zip(*found, strict=True))
    most_bh = lse_xbh.amax(0)
    weight_xbh = torch.exp2(lse_xbh - torch.where(most_bh.isinf(), 0, most_bh))
    total_bh = weight_xbh.sum(0)
    return (O_xbhe * weight_xbh[..., None]).sum(0) / torch.where(total_bh == 0, 1, total_bh)[..., None]


def segment(
    kind: str,
    ring: Ring,
    Q_bhd: Tensor,
    step: Step,
    tables: tuple[Tensor, Tensor],
    bounds: tuple[int, int, int],
    scale: float,
    splits: int | None,
    tile: Tile | None,
) -> tuple[Tensor, Tensor]:
    """One segment of keys: output [b,h,e] and log-sum-exp [b,h] (base 2), float32."""
    mode_k, mode_v = (as_rows(mode) for mode in ring.pair.modes)
    k = side(of_part(ring.arrays, "k"), mode_k)
    v = k if isinstance(ring.pair, Joint) else side(of_part(ring.arrays, "v"), mode_v)
    v = behind(v, mode_k, mode_v) if isinstance(mode_v, BandedLatent) else v
    if isinstance(mode_k, BandedLatent):
        k, constant = banded(k, mode_k, ring, Q_bhd, step, tables)
    else:
        k = replace(k, form="rebuilt") if isinstance(mode_k, FixedB | Latent) else k
        constant = rebuild(mode_k, Q_bhd.dtype)
    Q_bhd, scale = absorbed(Q_bhd, mode_k, scale)
    partial, lse = attend(kind, k, v, constant, Q_bhd, step, tables, bounds, ring.slots, mode_k.g, scale, splits, tile)
    O_bhe, lse_bh = merge(partial, lse)
    return finished(O_bhe, mode_v), lse_bh


# ---- every mode as rows ----


def as_rows(mode: Any) -> Any:
    """`fixed-a` at full rank with A = g I holds the heads themselves: read as a dense cache, at g times fewer FLOPs."""
    exact = isinstance(mode, FixedA) and mode.rank == mode.g and mode.basis.ndim == 2 and is_identity(mode.basis)
    return Renamed(mode.g, mode.d, dtype=mode.dtype) if exact else mode


class Renamed(Dense):
    """A dense cache whose part is called B, as `fixed-a` calls it."""

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {"B": (self.g, self.d)}


_known: Any = WeakIdKeyDictionary()  # constant array -> what was asked of it before, so that a device waits only once


def is_identity(A_sg: Tensor) -> bool:
    """Is A = g I? Asked once: the answer has to come from the device."""
    known = _known.setdefault(A_sg, {})
    if "identity" not in known:
        g = len(A_sg)
        known["identity"] = torch.equal(A_sg, g * torch.eye(g, dtype=A_sg.dtype, device=A_sg.device))
    return known["identity"]


def cast(array: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A constant array in the dtype of the computation, made once."""
    if array is None or array.dtype == dtype:
        return array
    known = _known.setdefault(array, {})
    if dtype not in known:
        with lasting():
            known[dtype] = array.to(dtype).contiguous()
    return known[dtype]


def side(stored: Stored, mode: Any) -> Side:
    """The arrays of K or V of a cache as rows of numbers."""
    contextual, absorbs = isinstance(mode, Contextual), isinstance(mode, FixedA)
    name, shape = list(mode.parts().items())[-1]  # the only part, or the b's of `contextual`
    width = shape[-1] * (mode.rank if absorbs else 1)  # the R rows of a token lie side by side
    store, pointers = fields(of_part(stored, name), mode, name)
    x = pointers[0]
    assert x is not None
    banded = isinstance(mode, BandedLatent)  # whose groups lie side by side
    stride = x.shape[-1] * (mode.rank if absorbs else 1) // (mode.groups if banded else 1)
    groups = mode.groups if banded else mode.g if isinstance(mode, Dense | FixedB) else 1
    made = Side("rows", groups, mode.rank if contextual else 1, width, stride, store, pointers)
    if not contextual:
        return made
    store_a, a = fields(of_part(stored, "A"), mode, "A")
    return replace(made, form="contextual", a=a, store_a=store_a)


def fields(stored: dict[str, Tensor], mode: Any, part: str) -> tuple[str, Pointers]:
    """(how numbers are stored, the three pointers) of one part; see `triton_kernels`."""
    if isinstance(mode, CodedLatent | BandedLatent):
        device = stored["codes"].device
        return "spectral", (stored["codes"], unpacking(tuple(mode.widths_of_strings), device), numbers(device))
    if "x" in stored:
        return "float", (stored["x"], None, None)
    return mode.part_dtype(part), (stored["codes"], stored["scale"], stored.get("minimum"))


def banded(
    k: Side, mode: Any, ring: Ring, Q_bhd: Tensor, step: Step, tables: tuple[Tensor, Tensor]
) -> tuple[Side, Constants]:
    """K of `banded`, with basis and mean of the fast pairs, absorbed queries, and weights between their nodes."""
    bands, laps = bands_of(mode, Q_bhd.dtype), 2 if ring.windowed else 1
    U_gtlbns = at_nodes(Q_bhd, bands, step.length_b, ring.slots, laps, tables)
    return replace(k, form="banded", fast=mode.strings[0]), (*bands.rebuild, U_gtlbns, bands.weights_nk)


def behind(v: Side, mode_k: Any, mode_v: Any) -> Side:
    """V of `banded`: its rows are the coefficients of K, from the codes of K, and its own."""
    codes, _, levels = v.stored
    assert codes is not None
    places = unpacking(tuple(mode_v.widths_of_strings), codes.device, tuple(mode_k.widths_of_strings))
    return replace(v, form="behind", width=mode_v.before + mode_v.rank, stored=(codes, places, levels))


@lru_cache(maxsize=512)
@lasting()
def unpacking(strings: Strings, device: torch.device, others: Strings = ()) -> Tensor:
    """Where the windows of each coefficient lie, its levels begin and its scale lies, int32 [5,R]. others: strings that
    come first and lie in an array of their own.
    """
    found = [torch.zeros(5, 0, dtype=torch.int32, device=device)]
    for array in (others, strings):
        start = 0
        for widths in array:
            if widths:
                of = constants(widths, device)
                at, after, scale = of["at"] + start, of["after"] + start, torch.full_like(of["at"], start)
                found.append(torch.stack([at, after, of["shift"], of["table"], scale]).int())
            start += packed_bytes(widths)
    return torch.cat(found, 1).contiguous()


def absorbed(Q_bhd: Tensor, mode: Any, scale: float) -> tuple[Tensor, float]:
    """(queries as long as a row of K, scale with the 1/R): in `fixed-a` the query takes A, [b,h,d] -> [b,h,R d]."""
    if isinstance(mode, Contextual):
        return Q_bhd.contiguous(), scale / mode.rank
    if not isinstance(mode, FixedA):
        return Q_bhd.contiguous(), scale
    A = cast(mode.basis, Q_bhd.dtype)
    assert A is not None
    Q_bgnsd = absorb(Q_bhd.unflatten(1, (mode.g, -1))[:, None], A)[:, 0]
    return Q_bgnsd.flatten(-2).flatten(1, 2).contiguous(), scale / mode.rank


def rebuild(mode: Any, dtype: torch.dtype) -> Constants:
    """Basis and mean of a K that is rebuilt."""
    if not isinstance(mode, FixedB | Latent):
        return None, None, None, None
    basis = cast(mode.basis, dtype)
    assert basis is not None
    return basis.transpose(0, 1) if isinstance(mode, FixedB) else basis, cast(mode.mean, dtype), None, None


def finished(O_bhe: Tensor, mode: Mode) -> Tensor:
    """Constant factors and mean of V, once a query instead of once a key: [b,h,E] -> [b,h,e]."""
    if isinstance(mode, Dense):
        return O_bhe
    if isinstance(mode, Contextual):
        return O_bhe / mode.rank
    assert isinstance(mode, FixedA | FixedB | Latent)
    O_bgnx, basis = O_bhe.unflatten(1, (mode.g, -1)), cast(mode.basis, torch.float32)
    assert basis is not None
    if isinstance(mode, FixedA):
        return mix(O_bgnx.unflatten(-1, (mode.rank, -1))[:, None], basis)[:, 0].flatten(1, 2) / mode.rank
    letters = "bgnu,gue->bgne" if isinstance(mode, FixedB) else "bgnu,uge->bgne"
    O_bgne = torch.einsum(letters, O_bgnx, basis)
    mean_ge = cast(mode.mean, torch.float32)
    return (O_bgne if mean_ge is None else O_bgne + mean_ge[:, None]).flatten(1, 2)


# ---- the launches ----


def attend(
    kind: str,
    k: Side,
    v: Side,
    constant: Constants,
    Q_bhd: Tensor,
    step: Step,
    tables: tuple[Tensor, Tensor],
    bounds: tuple[int, int, int],
    slots: int,
    g: int,
    scale: float,
    splits: int | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Every split by itself: partial outputs [b,h,split,E] and their log-sum-exp [b,h,split], float32."""
    b, h, D = Q_bhd.shape
    heads = h // max(k.groups, v.groups, g if k.form == "rebuilt" else 1)  # of one program: all share what is read
    block_h = max(16, triton.next_power_of_2(heads))
    tile = tile or chosen_tile(k, v, block_h, Q_bhd.dtype)
    tokens = min(tile.tokens, TILE) if k.form == "banded" else tile.tokens
    block_e = min(max(16, triton.next_power_of_2(v.width)), tile.values)
    blocks = h // heads * max(1, triton.cdiv(v.width, block_e))
    splits = splits or chosen_splits(b * blocks, triton.cdiv(slots, tokens), Q_bhd.device)
    partial = torch.empty((b, h, splits, v.width), dtype=torch.float32, device=Q_bhd.device)
    lse = torch.empty((b, h, splits), dtype=torch.float32, device=Q_bhd.device)
    attend_split[(blocks, splits, b)](
        Q_bhd, k.stored, k.a, v.stored, v.a, constant, tables, step.query_b, step.length_b, partial, lse,
        slots, *bounds, splits, h, k.fast, rank=k.width, width=v.width, bytes_k=k.stride, bytes_v=v.stride,
        scale=scale * log2(euler), **shapes(k, constant),
        K=k.form, V=v.form, STORE_K=k.store, STORE_V=v.store, STORE_KA=k.store_a, STORE_VA=v.store_a,
        ROWS_K=k.rows, ROWS_V=v.rows,
        GROUPS_K=k.groups, GROUPS_V=v.groups, SEGMENT=kind,
        G=g, N=h // g, HEADS=heads, D=D, BLOCK_H=block_h, BLOCK_T=tokens,
        BLOCK_D=min(256, max(16, triton.next_power_of_2(D))) if constant[0] is None else constant[0].shape[-1] // 2,
        BLOCK_E=block_e, BLOCK_R=tile.coefficients, DOT=dot_dtype(Q_bhd),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial, lse


def shapes(k: Side, constant: Constants) -> dict[str, Any]:
    """What the kernel is told of the constants of K: strides of a basis [R,g,d]; laps and
    columns of absorbed queries [g,t,lap,b,n,S].
    """
    basis, mean, U, _ = constant
    strides = (0, 0) if basis is None else basis.stride()[:2]
    laps, columns = (1, 0) if U is None else (U.shape[2], U.shape[-1])
    of_basis = {"basis_row": strides[0], "basis_group": strides[1], "MEAN": mean is not None}
    return of_basis | {"laps": laps, "columns": columns}


def merge(partial: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The splits in one softmax: [b,h,split,E], [b,h,split] -> [b,h,E], [b,h]."""
    b, h, splits, width = partial.shape
    out, lse_out = partial.new_empty((b, h, width)), lse.new_empty((b, h))
    block_e = min(64, max(16, triton.next_power_of_2(width)))
    merge_splits[(b * h, max(1, triton.cdiv(width, block_e)))](
        partial, lse, out, lse_out, splits, width, BLOCK_S=triton.next_power_of_2(splits), BLOCK_E=block_e
    )
    return out, lse_out


def dot_dtype(x: Tensor) -> tl.dtype:
    """What goes into `tl.dot`; the interpreter multiplies bfloat16 as whole numbers, so there it is float32."""
    return tl.bfloat16 if x.dtype == torch.bfloat16 and x.device.type == "cuda" else tl.float32


def chosen_tile(k: Side, v: Side, block_h: int, dtype: torch.dtype) -> Tile:
    """As many tokens at a time, up to 64, as shared memory and registers hold.

    The sum over values takes at most 16k float32 numbers, all rows of a tile 64 kB, and each of 256 threads unpacks 32
    numbers of a row at once (64 of int8; floats go to shared memory as they are, and only those of float32 come back).
    """
    values = 16384 // block_h
    row_v = min(values, max(16, triton.next_power_of_2(v.width)))
    is_rebuilt = k.form in ("rebuilt", "banded")
    row_k = 0 if is_rebuilt else min(256, triton.next_power_of_2(k.width))
    bytes_of_token = (k.rows * row_k + v.rows * row_v) * (4 if dtype == torch.float32 else 2)
    in_a_thread = min(IN_A_THREAD["float32" if dtype == torch.float32 else side.store] for side in (k, v))
    row = max(row_k, row_v)
    tokens = max(16, min(64, power_of_two(65536 // bytes_of_token), power_of_two(256 * in_a_thread // row)))
    return Tile(tokens, values, warps=8 if is_rebuilt or tokens * row > 4096 else 4)


def power_of_two(most: int) -> int:
    """The largest power of two that is not larger."""
    return 1 << max(0, most.bit_length() - 1)


def chosen_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Enough splits for four programs a multiprocessor, and no more than there are tiles."""
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(tiles, 128, triton.cdiv(4 * units, programs)))
