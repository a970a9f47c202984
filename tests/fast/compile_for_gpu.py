"""Compiles the kernels for a GPU (compute capability 9.0) without having one: run by `test_kernels`, not a test itself.

The interpreter takes Python that the compiler refuses, and knows no limits of shared memory. Prints a line for every
compiled kernel: its name, the bytes of shared memory of a program, and whether tensor cores are used.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tpa_torch.core.banded import Banded, BandedLatent
from tpa_torch.core.cache import Cache
from tpa_torch.core.contextual import Contextual
from tpa_torch.core.dense import Dense
from tpa_torch.core.fixed_a import FixedA
from tpa_torch.core.fixed_b import FixedB
from tpa_torch.core.pair import Pair
from tpa_torch.core.spectral import CodedLatent
from tpa_torch.fast import kernels
from tpa_torch.fast.kernels import factors, launch, trellis


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


class Compiled:
    """Stands for a kernel: a launch compiles it."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid):
        def compile(*args, **more):
            made = self.kernel.warmup(*args, grid=grid, **more)
            if any(made is other for other in self.seen):
                return
            self.seen.append(made)
            cores = "mma" in made.asm["ptx"]
            print(self.kernel.fn.__name__, made.metadata.shared, cores, flush=True)

        return compile


def mode_of(name, dtype, rank, g, d):
    match name:
        case "dense":
            return Dense(g, d, dtype=dtype)
        case "contextual":
            return Contextual(g, d, rank, dtype)
        case "fixed-a":
            return FixedA(g, d, rank, dtype, basis=torch.zeros(rank, g, d))
        case "fixed-b":
            return FixedB(g, d, rank, dtype, basis=torch.zeros(g, rank, d))
    return CodedLatent(**coded(rank, rank, g, d), widths=widths(rank))


def widths(rank):
    return tuple(8 - 7 * i // rank for i in range(rank))


def coded(rank, read, g, d):
    constant = {"basis": torch.zeros(read, g, d), "mean": torch.zeros(g, d)}
    return {"g": g, "d": d, "rank": rank, "dtype": "spectral"} | constant


def banded(fast, slow, rank, g, d):
    """K in two bands, and V behind them."""
    before, theta = fast + slow, torch.logspace(0, -4, d // 2)
    k = {"widths": widths(fast) + widths(slow), "strings": (fast, slow), "theta": theta}
    v = {"widths": widths(rank), "strings": (rank,), "before": before}
    sizes = (before, before), (rank, before + rank)
    sizes = (before, before), (rank, before + rank)
    return Banded(*(BandedLatent(**coded(*size, g, d), **side) for size, side in zip(sizes, (k, v), strict=True)))


def compile_decode(k, v, g, h, d, dtype, slots=2048):
    """One layer of a global kind of two modes."""
    compile_pair(Pair(mode_of(*k, g, d), mode_of(*v, g, d)), h, dtype, slots)


def compile_pair(pair, h, dtype, slots=2048):
    """One layer of a global kind, with everything that `launch.decode` would start."""
    held, d = Cache([pair], [None], 1, slots, whole_tokens=True).layers[0], pair.k.d
    one, table = torch.zeros(1, dtype=torch.int32), torch.zeros(2048, d // 2)
    Q_bqhd = torch.zeros(1, 1, h, d, dtype=dtype)
    launch.decode(Q_bqhd, held, kernels.Step(one, one), (table, table), 0.1, splits=32)


def main():
    driver.set_active(NoDevice())
    launch.attend_split, launch.merge_splits = Compiled(launch.attend_split), Compiled(launch.merge_splits)
    factors.factor_token, trellis.path_of_token = Compiled(factors.factor_token), Compiled(trellis.path_of_token)
    launch.dot_dtype = lambda x: tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32
    bf16, big, wide = torch.bfloat16, (16, 32, 128), (4, 8, 256)
    compile_decode(("contextual", "bfloat16", 2), ("contextual", "bfloat16", 2), *big, bf16)
    compile_decode(("contextual", "bfloat16", 2), ("contextual", "bfloat16", 2), *big, bf16, slots=1931)  # nothing new
    compile_decode(("fixed-a", "int8", 2), ("spectral", "spectral", 300), *big, bf16)
    compile_decode(("spectral", "spectral", 300), ("spectral", "spectral", 300), *wide, bf16)
    compile_pair(banded(60, 250, 300, 16, 128), 32, bf16)
    compile_pair(banded(40, 110, 150, 4, 256), 8, bf16)
    compile_decode(("fixed-b", "int4", 64), ("fixed-b", "int4", 64), *wide, bf16)
    compile_decode(("contextual", "float32", 2), ("dense", "float32", 0), *wide, torch.float32)
    factors.contextual_factors(torch.zeros(1, 1, 16, 128, dtype=bf16), 2, 12)
    trellis.best_paths(torch.zeros(1, 300), (5,) * 40 + (3,) * 130 + (1,) * 130)


if __name__ == "__main__":
    main()
