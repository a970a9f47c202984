"""Apple GPUs know no float64. Here a stand-in for one computes on the CPU and refuses float64, as the real one does."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
from helpers import CALIBRATION, MODES, Bytes, relative

torch = pytest.importorskip("torch")
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import tpa_torch
from tpa_ref.compress.config import TPAConfig
from tpa_ref.files.found import inspect
from tpa_ref.gemma.generate import Sampling, generate_tokens
from tpa_ref.gemma.weights import from_named
from tpa_torch.files.checkpoint import Loader
from tpa_torch.gemma import backward

STAND_IN = torch.device("meta")  # a name that PyTorch lets tensors have here, and that no code of ours knows


class Elsewhere(Tensor):
    """A tensor that says it is on an Apple GPU; its numbers are held by a tensor of the CPU."""

    @staticmethod
    def __new__(cls, held):
        more = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=STAND_IN, **more)

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Computes():
            return func(*args, **(kwargs or {}))


class Computes(TorchDispatchMode):
    """Every operation on such tensors, or that makes one, by the CPU; float64 is refused."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        here = any(isinstance(x, Elsewhere) for x in tree_leaves((args, kwargs)))
        if kwargs.get("device") is not None:
            here, kwargs["device"] = torch.device(kwargs["device"]) == STAND_IN, torch.device("cpu")
        args_held, kwargs_held = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
        out = func(*args_held, **kwargs_held)
        if not here:
            return out
        if func._schema.is_mutable:
            changed = kwargs.get("out", args[0])
            assert isinstance(changed, Elsewhere), func
            return changed
        return tree_map(lambda x: elsewhere(x, func) if isinstance(x, Tensor) else x, out)


def elsewhere(x, func):
    if x.dtype in (torch.float64, torch.complex128):
        raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {func}")
    with torch.inference_mode(False):  # a slice of what is no inference tensor is none either
        return Elsewhere(x)


class Makes(TorchFunctionMode):
    """What PyTorch does not dispatch: `torch.tensor` on the stand-in, and lists of its numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") == STAND_IN:
            return func(*args, **kwargs | {"device": None}).to(STAND_IN)
        if func is Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


@pytest.fixture
def stand_in():
    torch.set_num_threads(1)
    with Makes(), Computes():
        yield


def model_on(device, like):
    named = {name: torch.from_numpy(x).to(device) for name, x in helpers.tensors(like).items()}
    made = tpa_torch.Model(like, from_named(named, like))
    made.tokenizer = Bytes()
    return made


LIKE = helpers.config(num_heads=8, num_kv_heads=4, head_dim=8)


def test_the_stand_in_refuses_float64(stand_in):
    """Asked for, converted to, or brought there; what float32 computes is right, and float64 on the CPU is allowed."""
    x = torch.ones(3, device=STAND_IN)
    assert x.device == STAND_IN and (x + x).cpu().tolist() == [2, 2, 2] and x.cpu().double().dtype == torch.float64
    for wrong in (
        lambda: x.double(),
        lambda: x.to(torch.float64),
        lambda: x.cumsum(0, dtype=torch.float64),
        lambda: torch.zeros(3, dtype=torch.float64, device=STAND_IN),
        lambda: torch.from_numpy(np.ones(3)).to(STAND_IN),
        lambda: torch.from_numpy(np.ones(3)).to(x.device),
        lambda: torch.complex(torch.ones(3).double(), torch.ones(3).double()).to(STAND_IN),
    ):
        with pytest.raises(TypeError, match="float64"):
            wrong()


def everything_on(dense):
    """Calibrate, convert, measure and generate, every mode and the spectral cache, also with predictions."""
    moments = tpa_torch.calibrate(dense, CALIBRATION, max_tokens=100, sensitivity_tokens=100, predict=True)
    choices = [TPAConfig(mode=mode, kv_dtype="int8") for mode in MODES] + [TPAConfig(rate=1.5, context=60)]
    for choice in choices:
        tpa = tpa_torch.convert(dense, choice, moments)
        assert len(list(generate_tokens(tpa, [2, 5, 7], 3, Sampling(1.0)))) > 0
        assert tpa_torch.evaluate(dense, tpa, CALIBRATION[:40], recall_prompts=0)["kl"] > 0


def test_everything_runs_without_float64(stand_in):
    """And the logits are those of the CPU."""
    dense, on_cpu = model_on(STAND_IN, LIKE), model_on("cpu", LIKE)
    ids = helpers.tokens(20)
    assert dense.device == STAND_IN and relative(dense(ids), on_cpu(ids)) < 1e-5
    everything_on(dense)


def drawn_on_the_device(patch):
    patch.setattr(backward, "draw", lambda P_bqv, rng: P_bqv.double().cumsum(-1).argmax(-1))


def widened_before_it_leaves(patch):
    patch.setattr(tpa_torch.Model, "double", lambda self, x: x.double().cpu().numpy())


def tables_in_float64(patch):
    made = tpa_torch.Model._new_turns
    patch.setattr(
        tpa_torch.Model, "_new_turns", lambda self, *sizes: made(self, *sizes).to(torch.complex128).to(self.device)
    )


@pytest.mark.parametrize("mistake", [drawn_on_the_device, widened_before_it_leaves, tables_in_float64])
def test_a_float64_on_the_device_is_seen(stand_in, monkeypatch, mistake):
    mistake(monkeypatch)
    with pytest.raises(TypeError, match="float64"):
        everything_on(model_on(STAND_IN, LIKE))


def test_a_basis_in_float64_is_read_onto_a_device_without_it(tmp_path, stand_in):
    """Saved by a float64 model, where the constant arrays are in float64 as well."""
    wide = helpers.model(tpa_torch, LIKE, "float64")
    folder = tpa_torch.save(tpa_torch.convert(wide, TPAConfig(mode="latent", k_rank=4, v_rank=4)), tmp_path / "saved")
    model = Loader(inspect(folder), "float32", STAND_IN).model()
    ids = helpers.tokens(9)
    assert relative(model(ids), tpa_torch.load(folder)(ids)) < 1e-5
