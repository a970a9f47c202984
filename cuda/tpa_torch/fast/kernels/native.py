"""The functions of `cpu/`: products with numbers and packed codes that are read as they lie in memory.

They are compiled once, at the first use, by the machine's C++ compiler for the machine's own processor, and kept in
~/.cache/tpa_torch ($XDG_CACHE_HOME). Where there is no compiler, or with TPA_NATIVE=0, `available` says no and PyTorch
computes the same, only slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core import codes
from ...lasting import lasting

SOURCE = Path(__file__).with_name("cpu")
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
LANES = 16  # head sizes are multiples of it
# Reordered sums let a compiler make vectors; the rest of -ffast-math would change how the whole process rounds.
FLAGS = (
    "-std=c++17 -O3 -fPIC -fno-strict-aliasing -fno-math-errno -fno-trapping-math -fno-signed-zeros"
    " -fassociative-math -ffp-contract=fast"
).split()
FOR_THIS_MACHINE = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())
PATIENCE = 120  # seconds for a compiler


# ---- compiled once ----


def available() -> bool:
    """Are there compiled functions for this machine?"""
    return os.environ.get("TPA_NATIVE") != "0" and library() is not None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled functions, built if nobody has yet; None where that does not work."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None or os.name != "posix":
        return None
    for flags in FOR_THIS_MACHINE:
        try:
            path = built(compiler, [*FLAGS, *flags])
            try:
                return loaded(path)
            except (OSError, AttributeError):  # damaged since
                path.unlink()
                return loaded(built(compiler, [*FLAGS, *flags]))
        except (OSError, AttributeError, subprocess.SubprocessError):
            continue
    return None


def built(compiler: str, flags: list[str]) -> Path:
    """The file of a library compiled with these flags, from the cache if it is there."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE).stdout
    parts = [*sources().values(), version, " ".join(flags).encode(), processor().encode(), torch.__version__.encode()]
    name = f"cpu-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    folder = cache_folder()
    if (folder / name).is_file():
        return folder / name
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects, made = f"{scratch}/cpu.o", f"{scratch}/{name}"
        steps = (
            [compiler, *flags, "-c", str(SOURCE / "cpu.cpp"), "-o", objects],
            [compiler, "-shared", objects, "-o", made],
        )
        # The second step names no OpenMP library: threads are those that PyTorch has already started.
        for step in steps:
            subprocess.run(step, capture_output=True, check=True, timeout=PATIENCE)
        os.replace(made, folder / name)
    return folder / name


def sources() -> dict[str, bytes]:
    """What is compiled: `cpu.cpp` and what it includes."""
    return {file.name: file.read_bytes() for file in sorted(SOURCE.glob("*.?pp"))}


def cache_folder() -> Path:
    """Where compiled files are kept: a folder that only its owner can write to."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "tpa_torch"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except (OSError, RuntimeError):
        pass
    return _own_folder()


@lru_cache(maxsize=1)
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="tpa_torch-"))


def processor() -> str:
    """What tells one kind of processor from another: code for one may not run on the other."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def has_bf16_dot() -> bool:
    """Can the machine multiply bfloat16 numbers?"""
    found = library()
    return found is not None and bool(found.tpa_has_bf16_dot())


def loaded(path: Path) -> ctypes.CDLL:
    """The library with the types of its functions."""
    found = ctypes.CDLL(str(path))
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    arguments = {
        "tpa_linear": [pointer] * 3 + [whole] * 4,
        "tpa_widen": [pointer, pointer, whole, pointer, whole, whole],
        "tpa_before": [pointer] * 3 + [whole] + [pointer] * 3 + [whole] * 3,
        "tpa_after": [pointer] * 4 + [whole] * 2,
        "tpa_turn": [pointer, whole, pointer, whole, pointer] + [whole] * 5,
        "tpa_attend": [pointer] * 6 + [whole] * 6,
        "tpa_dot": [pointer] * 4 + [whole] * 7,
        "tpa_weigh": [pointer] * 4 + [whole] * 6,
        "tpa_exponentials": [pointer] * 3 + [whole] * 3,
        "tpa_quantize": [pointer] * 8 + [whole] * 5,
        "tpa_levels": [pointer, whole, whole, pointer, pointer, pointer, pointer] + [whole] * 4,
        "tpa_weigh_codes": [pointer, whole, whole] + [pointer] * 6 + [whole] * 6,
        "tpa_code_banded": [pointer] * 5 + [whole] * 3,
        "tpa_attend_banded": [pointer] * 9 + [whole] * 4,
        "tpa_decode": [
            pointer,
            pointer,
            whole,
            pointer,
            pointer,
            whole,
            pointer,
            ctypes.c_double,
            pointer,
            pointer,
            whole,
        ],
        "tpa_dot_rotated": [whole, pointer] + [whole] * 3 + [pointer, pointer, whole, pointer, pointer] + [whole] * 6,
    }
    for name, types in arguments.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def call(name: str, *arguments: Any) -> None:
    """Tensors go as the addresses of their numbers, None as a null pointer."""
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(library(), name)(*plain, torch.get_num_threads())


# ---- stored rows of keys or values ----


class Array(ctypes.Structure):
    """The fields of `struct Array`."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("at", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("minimum", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("scale_batch", ctypes.c_int64),
        ("scale_row", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Rows:
    """Stored numbers that nobody has made float32 yet: [..., k, n] in fields of `quantize.field_shapes(n, kind)`."""

    fields: dict[str, Tensor]
    kind: str
    n: int
    rounded: bool = False  # may what is multiplied be rounded to 16 bits, in a model that rounds it anyway?

    @staticmethod
    def takes(fields: dict[str, Tensor], kind: str, n: int) -> bool:
        """Can the compiled functions read these?"""
        array = fields.get("x", fields.get("codes"))
        return (
            array is not None
            and kind in ("float32", "bfloat16", "int8", "int4")
            and array.device.type == "cpu"
            and n % LANES == 0
            and all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in fields.values())
            and available()
        )

    def flatten(self, start: int, end: int) -> Rows:
        """As of a tensor: two leading axes become one."""
        return replace(self, fields={name: x.flatten(start, end) for name, x in self.fields.items()})

    def unbind(self, axis: int) -> Iterator[Rows]:
        """As of a tensor: each rank, or head, by itself."""
        parts = {name: x.unbind(axis) for name, x in self.fields.items()}
        count = len(next(iter(parts.values())))
        return (replace(self, fields={name: x[i] for name, x in parts.items()}) for i in range(count))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*next(iter(self.fields.values())).shape[:-1], self.n)

    def _array(self) -> Array:
        array = self.fields.get("x", self.fields.get("codes"))
        assert array is not None and array.ndim == 3
        scale, minimum = (self.fields.get(name) for name in ("scale", "minimum"))
        size = array.element_size()
        return Array(
            KINDS[self.kind],
            array.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if minimum is None else minimum.data_ptr(),
            array.stride(0) * size,
            array.stride(1) * size,
            0 if scale is None else scale.stride(0),
            0 if scale is None else scale.stride(1),
        )


class _Weights(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("queries", ctypes.c_int64),
    )


def _weights(A_bgk: Tensor | None, x: int) -> _Weights:
    """A factor of every key and KV head; x queries are those of all heads."""
    if A_bgk is None:
        return _Weights(None, 0, 0, 1)
    assert A_bgk.dtype == torch.float32 and (A_bgk.stride(2) == 1 or A_bgk.shape[2] == 1)
    return _Weights(A_bgk.data_ptr(), A_bgk.stride(0), A_bgk.stride(1), x // A_bgk.shape[1])


def dot(Q_bxd: Tensor, K: Rows, L_bxk: Tensor | None = None, A_bgk: Tensor | None = None, add: bool = False) -> Tensor:
    """[b,x,d] . [b,k,d], times weights A of the keys, -> [b,x,k] in float32; into L, if it is given, or added to it."""
    b, k, d = K.shape
    x = Q_bxd.shape[1]
    L_bxk = torch.empty(b, x, k) if L_bxk is None else L_bxk
    assert L_bxk.is_contiguous() and L_bxk.dtype == torch.float32
    Q_bxd, weights = Q_bxd.float().contiguous(), ctypes.byref(_weights(A_bgk, x))
    call("tpa_dot", ctypes.byref(K._array()), Q_bxd, weights, L_bxk, b, x, k, d, int(add), int(K.rounded))
    return L_bxk


def weigh(P_bxk: Tensor, V: Rows, A_bgk: Tensor | None = None) -> Tensor:
    """[b,x,k], times weights of the keys, . [b,k,e] -> [b,x,e] in float32."""
    b, k, e = V.shape
    x = P_bxk.shape[1]
    Y_bxe = torch.empty(b, x, e)
    P_bxk, weights = P_bxk.float().contiguous(), ctypes.byref(_weights(A_bgk, x))
    call("tpa_weigh", ctypes.byref(V._array()), P_bxk, weights, Y_bxe, b, x, k, e, int(V.rounded))
    return Y_bxe


def attend(Q_bxd: Tensor, K: Rows, V: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Few queries over all keys: the largest logit [b,x,1], the sum of exponentials beside it, and values [b,x,d]
    weighed with those.
    """
    b, k, d = K.shape
    x = Q_bxd.shape[1]
    Q_bxd, largest, total = Q_bxd.float().contiguous(), torch.empty(b, x, 1), torch.empty(b, x, 1)
    Y_bxd = torch.empty(b, x, d)
    arrays = (ctypes.byref(rows._array()) for rows in (K, V))
    call("tpa_attend", *arrays, Q_bxd, largest, total, Y_bxd, b, x, k, d, int(K.rounded))
    return largest, total, Y_bxd


def exponentials(L: Tensor) -> tuple[Tensor, Tensor]:
    """exp(L - largest of the row) in place of L [...,k], contiguous; the largest and the sum [...,1]."""
    assert L.is_contiguous() and L.dtype == torch.float32
    shape = *L.shape[:-1], 1
    largest, total = torch.empty(shape), torch.empty(shape)
    call("tpa_exponentials", L, largest, total, largest.numel(), L.shape[-1])
    return largest, total


# ---- codes of a spectral cache ----

_COEFFICIENT = np.dtype([("width", "i4"), ("row", "2i4"), ("shift", "i4")])


@lru_cache(maxsize=512)
@lasting()
def coefficients(widths: tuple[int, ...], start: int = 0) -> Tensor:
    """Where the windows of each coefficient lie in a string that begins at byte `start`, as `codes.hpp` reads it; a
    tensor of bytes.
    """
    found = np.zeros(len(widths), _COEFFICIENT)
    at, after, found["shift"] = codes.places(widths)
    found["width"], found["row"][:, 0], found["row"][:, 1] = widths, start + at, start + after
    return torch.from_numpy(found.view(np.uint8).copy())


@lru_cache(maxsize=1)
@lasting()
def levels_of_codes() -> tuple[Tensor, Tensor]:
    """The levels of every width and window in float32 and in bfloat16 [9,256]."""
    levels = torch.from_numpy(codes.LEVELS.copy())
    return levels, levels.bfloat16()


@lru_cache(maxsize=1)
@lasting()
def scales_of_codes() -> tuple[Tensor, Tensor]:
    """The scale of a token by its first byte, and what divides by it."""
    return torch.from_numpy(codes.SCALES.copy()), torch.from_numpy(1 / codes.SCALES)


@lru_cache(maxsize=512)
@lasting()
def trellis(widths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Width, reach and price of each coefficient (see `codes.choose_scales`)."""
    reach_s, price_s = codes.reach_and_price(widths)
    return torch.tensor(widths, dtype=torch.int32), torch.from_numpy(reach_s), torch.from_numpy(price_s)


def codes_take(codes_bck: Tensor) -> bool:
    """Can the compiled functions read these codes?"""
    return codes_bck.device.type == "cpu" and codes_bck.stride(-1) == 1 and available()


def quantize(C_ks: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Coefficients [k,s] in float32 -> the bytes of each token, uint8 [k,bytes]."""
    assert C_ks.is_contiguous() and C_ks.dtype == torch.float32
    tokens, count = C_ks.shape
    width, reach, price = trellis(widths)
    out = torch.empty(tokens, codes.packed_bytes(widths), dtype=torch.uint8)
    scale, inverse = scales_of_codes()
    arrays = C_ks, width, levels_of_codes()[0], scale, inverse, reach, price, out
    call("tpa_quantize", *arrays, tokens, count, out.shape[1], codes.FREE)
    return out


def levels(codes_bck: Tensor, widths: tuple[int, ...], out_bsk: Tensor) -> Tensor:
    """Codes [b,bytes,k] -> coefficients [b,s,k]."""
    b, s, k = out_bsk.shape
    strides = codes_bck.stride(0), codes_bck.stride(1)
    arrays = coefficients(widths), levels_of_codes()[0], scales_of_codes()[0], out_bsk
    call("tpa_levels", codes_bck, *strides, *arrays, b, s, k)
    return out_bsk


def weigh_codes(P_byk: Tensor, codes_bck: Tensor, widths: tuple[int, ...], rounded: bool) -> Tensor:
    """[b,y,k] . coefficients of [b,bytes,k] -> [b,y,s] in float32; rounded: both in bfloat16, if that is faster."""
    b, y, k = P_byk.shape
    Y_bys = torch.empty(b, y, len(widths))
    rounded = rounded and has_bf16_dot()
    arrays = coefficients(widths), *levels_of_codes(), scales_of_codes()[0], P_byk.contiguous(), Y_bys
    strides = codes_bck.stride(0), codes_bck.stride(1)
    call("tpa_weigh_codes", codes_bck, *strides, *arrays, b, y, k, len(widths), int(rounded))
    return Y_bys


# ---- keys rebuilt from a basis ----


def dot_rotated(Q_bgxd: Tensor, K_bkgd: Tensor, mean_gd: Tensor | None, turns_bkp: Tensor) -> Tensor:
    """Logits [b,g,x,k] of keys before RoPE (any strides but the last): mean added, turned, multiplied, in one pass."""
    b, k, g, d = K_bkgd.shape
    x = Q_bgxd.shape[2]
    L_bgxk = torch.empty(b, g, x, k)
    turns = torch.view_as_real(turns_bkp).contiguous()
    batch = 0 if len(turns) == 1 else turns.stride(0)
    strides = K_bkgd.stride(0), K_bkgd.stride(1), K_bkgd.stride(2)
    kind = KINDS[str(K_bkgd.dtype).removeprefix("torch.")]
    Q_bgxd = Q_bgxd.float().contiguous()
    call("tpa_dot_rotated", kind, K_bkgd, *strides, mean_gd, turns, batch, Q_bgxd, L_bgxk, b, g, x, k, d)
    return L_bgxk
