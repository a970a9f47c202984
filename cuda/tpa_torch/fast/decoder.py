"""One token of one text through all layers in one compiled call (`cpu/decoder.hpp`).

It computes what `Model.block` does layer by layer, without Python between, which takes a fifth of a step of 270M and
most of one of the tiny model. What has to stand still for that, weights and the arrays of a cache, is looked up once a
cache.
"""

from __future__ import annotations

import ctypes
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tpa_ref.trace import Tracer, no_trace

from ..core.cache import Cache
from .banded import Banded, constants, readable
from .heads import heads, tokens_last
from .kernels import banded as compiled
from .kernels import matrices, native

KINDS = ("float32", "bfloat16", "int8")  # in which heads are kept


class Held(ctypes.Structure):
    """The fields of `struct Held`."""

    _fields_ = (
        ("bands", ctypes.c_void_p),
        ("sides", ctypes.c_void_p),
        ("codes", compiled.Segment),
        *((name, native.Array) for name in ("K", "V", "first_K", "first_V")),
        *((name, ctypes.c_int64) for name in ("slots", "sinks", "window", "is_global")),
    )


class Decoder:
    """The layers of a model and the arrays of a cache, as the compiled function reads them."""

    def __init__(self, layers: list[matrices.Layer], arrays: list[Any], held: list[Held], kept: list[Any]):
        self.layers, self.arrays, self.kept = layers, arrays, kept
        self.pointers = (ctypes.c_void_p * len(layers))(*map(ctypes.addressof, layers))
        self.held = (Held * len(held))(*held)

    def serves(self, layers: list[matrices.Layer], arrays: list[Any]) -> bool:
        """Are weights and arrays still those?"""
        return same(layers, self.layers) and same(arrays, self.arrays)

    def __call__(self, model: Any, x_bqm: Tensor, position: int) -> Tensor:
        """The residual stream of the token at a position behind all layers, [1,1,m]."""
        x_bqm, y_bqm = x_bqm.contiguous(), torch.empty_like(x_bqm)
        turns = [torch.view_as_real(model.rope_turns(kind, position + 1)) for kind in (False, True)]
        native.call(
            "tpa_decode", ctypes.addressof(self.pointers), ctypes.addressof(self.held), len(self.layers), *turns,
            position, ctypes.addressof(compiled.tables()), model.config.query_scale, x_bqm, y_bqm,
        )  # fmt: skip
        return y_bqm


def same(found: list[Any], known: list[Any]) -> bool:
    """Are these the very objects?"""
    return len(found) == len(known) and all(map(is_, found, known))


_known: Any = WeakKeyDictionary()  # cache -> its decoder


def take(model: Any, x_bqm: Tensor, at: Any, cache: Any, trace: Tracer) -> Tensor | None:
    """The residual stream behind all layers, if a token is to be computed so, else None."""
    one = x_bqm.shape[:2] == (1, 1) and x_bqm.dtype in matrices.DTYPES and x_bqm.device.type == "cpu"
    if not one or trace is not no_trace or torch.is_grad_enabled() or not isinstance(cache, Cache):
        return None
    if cache.batch != 1 or cache.text_bt is not None or not isinstance(model.weights.layers, list):
        _known.pop(cache, None)
        return None
    decoder, position, layers = _known.get(cache), int(at[0].positions_bq[0, 0]), []
    arrays = [ring.arrays for layer in cache.layers for ring in layer.rings.values()]
    refused = decoder is not None and not len(decoder.held) and same(arrays, decoder.arrays)
    if refused or position < cache.exact.sinks:
        return None
    for layer, w in enumerate(model.weights.layers):
        if (found := model.compiled.take(model, x_bqm, layer, w, trace)) is None:
            return None
        layers.append(found)
    if decoder is None or not decoder.serves(layers, arrays):
        decoder = _known[cache] = made(model, layers, arrays, cache)
    return decoder(model, x_bqm, position) if len(decoder.held) else None


def made(model: Any, layers: list[Any], arrays: list[Any], cache: Any) -> Decoder:
    """The decoder of a cache; it holds nothing where there is a layer that it does not serve."""
    rounded = model.dtype == "bfloat16" and native.has_bf16_dot()
    held: list[Held] = []
    kept: list[Any] = []
    for layer, is_global in zip(cache.layers, model.config.is_global, strict=True):
        found = held_of(model, layer, is_global, rounded, kept)
        if found is None:
            return Decoder(layers, arrays, [], [])
        held.append(found)
    return Decoder(layers, arrays, held, kept)


def held_of(model: Any, layer: Any, is_global: bool, rounded: bool, kept: list[Any]) -> Held | None:
    """What a layer of a cache keeps; kept: what must stay in memory for it. None: something else."""
    coded, sinks = layer.rings["coded"], layer.rings.get("sinks")
    first = None if sinks is None else heads_of(sinks, model)
    if set(layer.rings) - {"coded", "sinks"} or (sinks is not None and first is None):
        return None
    found = Held(slots=coded.slots, window=layer.window or 0, is_global=is_global)
    if first is not None:
        found.first_K, found.first_V = first
        found.sinks = sinks.slots
    if not isinstance(coded.pair, Banded):
        if sinks is not None or not (rows := heads_of(coded, model)):
            return None
        found.K, found.V = rows
        return found
    bands, coder = constants(coded.pair, rounded, model.scratch).bands, coded.pair.coder
    codes = [tokens_last(coded.arrays[f"{side}.C.codes"]) for side in "kv"]
    if not all(map(readable, codes)):
        return None
    found.codes = compiled.segment(bands, codes)
    found.bands, found.sides = ctypes.addressof(bands), ctypes.addressof(coder[0])
    kept += [bands, coder]
    return found


def heads_of(ring: Any, model: Any) -> tuple[Any, Any] | None:
    """K and V [g,slots,d] of heads that are kept as they are, in floating point or int8; None: something else."""
    rows = heads(ring.pair, ring.arrays, getattr(torch, model.dtype), model.scratch)
    return (rows[0]._array(), rows[1]._array()) if rows is not None and rows[0].kind in KINDS else None
