"""A new way to cache K and V is one class and its torch twin: this file adds one, `paired`, and everything else works.

Config, conversion, cache, attention of both backends, decoding on a CPU, memory, files and the command line ask a mode
what it does; none of them knows its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import helpers
import numpy as np
import pytest
from helpers import TOLERANCE, back, is_torch, part, relative, run_cached

import tpa_ref
from tpa_ref.cli import options
from tpa_ref.compress.moments import LayerMoments, Moments
from tpa_ref.core.mode import MODES, Mode

# ---- the mode ----


@dataclass(frozen=True)
class Paired(Mode):
    """Neighbouring heads as their mean and half their difference, which is in int8: [g/2,d] each. What all tokens have
    in common, `middle`, is not cached.
    """

    middle: Any = field(default=None, repr=False)

    name = "paired"
    constants = ("middle",)

    @classmethod
    def exact_rank(cls, g, d):
        return 1  # there is nothing to choose

    @classmethod
    def fit(cls, g, d, rank, dtype, M_gdgd, mean_gd=None, F_gdgd=None):
        return cls(g, d, rank, dtype, middle=mean_gd)

    def parts(self):
        return {"mean": (self.g // 2, self.d), "half": (self.g // 2, self.d)}

    def part_dtype(self, part):
        return "int8" if part == "half" else self.dtype

    def array_shapes(self):
        return {"middle": ((self.g, self.d),)}

    def encode(self, X_bkgd, tokens):
        X_bkgd = X_bkgd - self.cast(self.middle, X_bkgd.dtype)
        first, second = X_bkgd[:, :, 0::2], X_bkgd[:, :, 1::2]
        return {"mean": (first + second) / 2, "half": (first - second) / 2}

    def decode(self, parts, tokens):
        X_bkgd = self.interleaved(parts["mean"] + parts["half"], parts["mean"] - parts["half"])
        return X_bkgd + self.cast(self.middle, X_bkgd.dtype)

    def interleaved(self, first, second):
        return np.stack([first, second], 3).reshape(*first.shape[:2], self.g, self.d)


def twin():
    """`Paired` on tensors: what differs is how arrays are stacked."""
    import torch

    from tpa_torch.core.mode import Mode as TorchMode

    class TorchPaired(TorchMode, Paired):
        def interleaved(self, first, second):
            return torch.stack([first, second], 3).flatten(2, 3)

    return TorchPaired


# ---- everything else ----


@pytest.fixture(autouse=True)
def registered():
    """Known in both backends, for as long as a test runs."""
    known = [(part(backend, "core.mode"), twin() if is_torch(backend) else Paired) for backend in helpers.backends()]
    for module, mode in known:
        module.register(mode)
    yield
    for module, _ in known:
        module.MODES.pop("paired", None)


def converted(backend, kv_dtype="float32", dtype="float64", **more):
    """(dense model, the same in the fifth mode, the middles taken from made-up moments)."""
    dense = helpers.model(backend, dtype=dtype)
    g, d, rng = dense.config.num_kv_heads, dense.config.head_dim, np.random.default_rng(3)
    layers = {
        layer: LayerMoments(np.zeros((2 * g, d, 2 * g, d)), rng.standard_normal((2 * g, d)) / 4)
        for layer in range(dense.config.num_layers)
    }
    tpa = backend.TPAConfig(mode="paired", kv_dtype=kv_dtype, **more)
    return dense, backend.convert(dense, tpa, Moments(layers, 1))


IDS = helpers.tokens(30, batch=2)


def test_logits_are_close_to_the_dense_ones(backend):
    """As close as int8 allows; other layers stay dense where they should."""
    dense, model = converted(backend)
    assert 1e-6 < relative(helpers.logits(model, IDS), helpers.logits(dense, IDS)) < 0.05
    _, only_global = converted(backend, layers="global")
    assert [pair.k.name for pair in only_global.pairs] == ["dense"] * 5 + ["paired"] + ["dense"]


def test_it_stands_beside_another_mode(backend):
    """K in this mode, V in another, and the other way round."""
    dense = helpers.model(backend, dtype="float64")
    for k_mode, v_mode in (("paired", "latent"), ("contextual", "paired")):
        tpa = backend.TPAConfig(k_mode=k_mode, v_mode=v_mode, k_rank=10**6, v_rank=10**6, kv_dtype="float32")
        model = backend.convert(dense, tpa)
        assert (model.pairs[0].k.name, model.pairs[0].v.name) == (k_mode, v_mode)
        assert relative(helpers.logits(model, IDS), helpers.logits(dense, IDS)) < 0.05


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int4"])
def test_cached_equals_whole(backend, kv_dtype):
    """Prefill in chunks and token by token past the window, and the memory is what arithmetic says."""
    _, model = converted(backend, kv_dtype, sinks=2, recent=3)
    cache, logits = run_cached(model, IDS, (13, 5), max_len=40)
    assert relative(logits, helpers.logits(model, IDS)) < TOLERANCE["float64"]
    d = 16
    row = {"float32": 8 * d, "bfloat16": 2 * d, "int4": d // 2 + 4}[kv_dtype] + d + 2  # mean, and half in int8
    by_hand = 2 * (
        2 * row * (40 + 6 * 11) + 2 * 2 * d * 2 * (7 * 2 + 3)
    )  # one pair of heads; two exact heads in bfloat16
    assert cache.nbytes == cache.nbytes_at(40, batch=2) == by_hand


def test_both_backends_cache_the_same():
    pytest.importorskip("torch")
    models = [converted(backend, "int8")[1] for backend in helpers.backends()]
    (cache_n, logits_n), (cache_t, logits_t) = (run_cached(model, IDS, (20,), max_len=40) for model in models)
    assert relative(logits_t, logits_n) < TOLERANCE["float64"]
    for layer_n, layer_t in zip(cache_n.layers, cache_t.layers, strict=True):
        for name, array in layer_n.rings["coded"].arrays.items():
            np.testing.assert_array_equal(back(layer_t.rings["coded"].arrays[name]), array)


def test_a_cpu_decodes_it(monkeypatch):
    """`fast.decode` reads it by the reader that serves any mode, and finds what the plain functions find."""
    tpa_torch = pytest.importorskip("tpa_torch")
    from tpa_ref.trace import Trace
    from tpa_torch.fast import kernels, readers

    _, model = converted(tpa_torch, "bfloat16", "float32")
    asked, right = [], readers.Formed.scores
    monkeypatch.setattr(
        readers.Formed, "scores", lambda self, *rest: asked.append(self.mode.name) or right(self, *rest)
    )
    found = []
    for more in ({"trace": Trace()}, {}):
        cache = model.new_cache(2, 40)
        model(IDS[:, :-1], cache=cache)
        found.append(helpers.logits(model, IDS[:, -1:], cache=cache, **more))
    assert asked == ["paired"] * model.config.num_layers
    assert not kernels.readable(model.pairs[0].k)  # on a GPU neither
    assert relative(found[1], found[0]) < 10 * TOLERANCE["float32"]


def test_saved_and_loaded(backend, tmp_path, monkeypatch):
    """In every format that holds a saved model, and by the other backend too; refused where nobody knows the mode."""
    _, model = converted(backend, "int8", "float32")
    for name in ("model.safetensors", "folder", "model.pt")[: 2 + helpers.has_torch()]:
        backend.save(model, tmp_path / name)
        for reader in helpers.backends():
            loaded = reader.load(tmp_path / name)
            assert [pair.k.name for pair in loaded.pairs] == ["paired"] * 7
            np.testing.assert_array_equal(back(loaded.pairs[3].v.middle), back(model.pairs[3].v.middle))
            assert relative(helpers.logits(loaded, IDS), helpers.logits(model, IDS)) < 100 * TOLERANCE["float32"]
    monkeypatch.delitem(MODES, "paired")
    helpers.refused(lambda: backend.load(tmp_path / "folder"), "tpa.layers.0.k.middle")


def test_a_wrong_constant_is_refused(backend, tmp_path):
    """Its arrays are checked when they are loaded, as those of any mode."""
    _, model = converted(backend, "int8", "float32")
    pair = model.pairs[2]
    model.pairs[2] = replace(pair, k=pair.k.with_arrays({"middle": pair.k.middle[:, :-1]}))
    backend.save(model, tmp_path / "model.safetensors")
    helpers.refused(lambda: backend.load(tmp_path / "model.safetensors"), "layers.2.k.middle", "paired", "(2, 16)")


def test_the_command_line_knows_it():
    """`--mode paired`, alone and for K or V; forgotten, it is refused as any unknown mode."""
    parser = options.shared_parser("test")
    args = parser.parse_args(["--mode", "paired", "--v-mode", "latent"])
    assert (args.mode, args.v_mode) == ("paired", "latent")
    assert tpa_ref.TPAConfig(mode=args.mode).choice.k.mode == "paired"
    del MODES["paired"]
    helpers.refused(lambda: tpa_ref.TPAConfig(mode="paired"), "mode", "paired")
