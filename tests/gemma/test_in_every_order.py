"""One model used for everything, in every order, and by several threads at once: what it keeps disturbs nobody."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import helpers
import numpy as np
import pytest
from helpers import CALIBRATION, MODES, Bytes, is_torch, part

from tpa_ref.compress.config import TPAConfig
from tpa_ref.gemma.generate import Sampling, generate_tokens
from tpa_ref.gemma.weights import LayersOnDisk

LIKE = helpers.config(num_layers=2, is_global=(False, True), head_dim=32)
TOKENS = 127 + 5  # a window of all positions, and one so short that it is attended to as a decoding step is


def dense_of(backend, dtype="float32"):
    model = helpers.model(backend, LIKE, dtype)
    model.tokenizer = Bytes()
    return model


# ---- in every order ----


def calibrated(backend, dense):
    moments = backend.calibrate(dense, CALIBRATION, max_tokens=TOKENS, sensitivity_tokens=TOKENS, predict=True)
    return [float(x.sum()) for x in (moments.layers[0].M_gdgd, *moments.layers[0].F)]


def said(backend, dense, tpa):
    return [list(generate_tokens(model, [2, 5, 7, 9] * 5, 6)) for model in (dense, tpa)]


def measured(backend, dense, tpa):
    return backend.evaluate(dense, tpa, CALIBRATION, TOKENS, recall_prompts=0)["kl"]


def healed(backend, dense, tpa):
    return backend.heal(tpa, dense, CALIBRATION, steps=1, batch=1, max_tokens=TOKENS).healing.kl


@functools.cache
def moments_of(backend):
    """From a model that is not used for anything else."""
    return backend.calibrate(dense_of(backend), CALIBRATION, max_tokens=TOKENS, predict=True)


def converted(backend, dense):
    """A spectral conversion with predictions."""
    return backend.convert(dense, TPAConfig(rate=1.5, context=60), moments_of(backend))


USES = {"calibrate": lambda b, dense, tpa: calibrated(b, dense), "generate": said, "evaluate": measured, "heal": healed}


@pytest.mark.parametrize("order", list(itertools.permutations(USES)), ids=" ".join)
def test_every_use_after_every_other(order):
    """What each finds is what it finds in a model that nobody has used, up to rounding; nothing is refused."""
    torch = pytest.importorskip("torch")
    import tpa_torch

    torch.set_num_threads(1)
    dense = dense_of(tpa_torch)
    tpa = converted(tpa_torch, dense)
    part(tpa_torch, "core.codes").constants.cache_clear()  # whose arrays the conversion has made, in its own way
    for use in order:
        found = USES[use](tpa_torch, dense, tpa)
        np.testing.assert_allclose(np.array(found, float), expected(use), rtol=1e-3, err_msg=use)


EXPECTED: dict[str, np.ndarray] = {}


def expected(use):
    """What a use finds in models of its own."""
    if use not in EXPECTED:
        import tpa_torch

        dense = dense_of(tpa_torch)
        EXPECTED[use] = np.array(USES[use](tpa_torch, dense, converted(tpa_torch, dense)), float)
    return EXPECTED[use]


# ---- by several threads ----


@pytest.fixture
def hurried():
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*works):
    """The results of several functions that begin together, each in a thread of its own."""
    start = threading.Barrier(len(works))

    def begin(work):
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result() for done in [pool.submit(begin, work) for work in works]]


@pytest.mark.parametrize("mode", ["dense", *MODES, "spectral"])
def test_several_threads_generate_with_one_model(backend, mode, hurried):
    """Prompts of different length and seeds of their own: every thread gets what it gets alone, in a fresh model."""
    if is_torch(backend):
        import torch

        torch.set_num_threads(1)

    def fresh():
        dense = dense_of(backend)
        if mode == "dense":
            return dense
        if mode == "spectral":
            return converted(backend, dense)
        return backend.convert(dense, TPAConfig(mode=mode, k_rank=3, v_rank=3, kv_dtype="int8"))

    prompts = [helpers.tokens(n, seed=n)[0].tolist() for n in (20, 70, 33, 90)]

    def said(model, number):
        return list(generate_tokens(model, prompts[number], 16, Sampling(1.0, seed=number)))

    alone, together = fresh(), fresh()
    expected = [said(alone, number) for number in range(4)]
    for _ in range(3):
        assert at_once(*(lambda n=n: said(together, n) for n in range(4))) == expected


def test_memory_of_a_thread_is_its_own():
    """The same name gives every thread another place, and one thread the same again; constants are for all."""
    torch = pytest.importorskip("torch")
    from tpa_torch.fast.scratch import Scratch

    scratch, like = Scratch(), torch.zeros(1)

    def place():
        return scratch("L", like, (5,)).data_ptr(), scratch("L", like, (2, 2)).data_ptr()

    found = at_once(place, place)
    assert all(one == two for one, two in found) and found[0] != found[1]
    made = at_once(*[lambda: scratch.constant("c", like, lambda: torch.ones(3))] * 2)
    assert all(torch.equal(x, torch.ones(3)) for x in made) and scratch.constant("c", like, lambda: None) is not None


class Overtaken(dict):
    """A dict in which another thread puts its own value right after anybody's."""

    def __init__(self, other):
        self.other = other

    def __setitem__(self, name, value):
        super().__setitem__(name, self.other(value))


def test_tables_that_another_thread_replaces():
    """Asked for 1000 positions one gets them, also where another thread has just put a table of 256 in their place."""
    pytest.importorskip("torch")
    import tpa_torch

    model = dense_of(tpa_torch)
    model._turns = Overtaken(lambda turns: turns[:256])
    assert len(model.rope_turns(True, 1000)) >= 1000
    model._tables = Overtaken(lambda tables: tuple(x[:256] for x in tables))
    assert len(model.rope_table(True, 1000)[0]) >= 1000


def test_blocks_on_disk_that_another_thread_replaces():
    """Of a model larger than memory each thread gets the block it asks for, whichever was read last."""

    class Overtaken(LayersOnDisk):
        now = None

        @property
        def _held(self):
            return self.now

        @_held.setter
        def _held(self, value):  # another thread, which is in layer 7, is right behind
            self.now = value and (7, "block 7")

        def _read(self, layer):
            return f"block {layer}"

    layers = Overtaken({}, object, "", 8, {})
    assert [layers[layer] for layer in (0, 3, 3, 7)] == ["block 0", "block 3", "block 3", "block 7"]
