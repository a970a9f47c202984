"""Saved models of formats 2 and 3 against the code that wrote them: they load, and give its logits or better ones.

tests/golden/saved_vN_*.safetensors were written by the NumPy reference at commit c11e76f (format 2) and 9bcaf70
(format 3), in float32: the weights of `helpers.tensors` for a config of three layers, the second one global, with
`helpers.tokenizer_proto()`, calibrated on "the return value is the sum of all the numbers in the list. " forty times
over. The logits of the tokens 3 ... 32 lie beside them as .npy. They are kept and not made anew, since nothing but that
code could.

    saved_v2_fixed      K fixed-b of rank 5, V latent of rank 9, both int8
    saved_v2_spectral   3 bits a number; K and V with codes of their own, as no newer format makes them
    saved_v3_mixed      2 bits a number of V beside an int8 fixed-a K, Q of rank 1, the last layer dense
    saved_v3_spectral   3 bits a number; K and V as one vector, predicted from the tokens
"""

from __future__ import annotations

import json

import helpers
import numpy as np
import pytest
from helpers import ROOT, TOLERANCE, refused, relative, run_cached
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tpa_ref
from tpa_ref.files.formats import VERSION

GOLDEN = ROOT / "tests" / "golden"
NAMES = ("v2_fixed", "v2_spectral", "v3_mixed", "v3_spectral")
IDS = np.arange(3, 33)[None]
FLIPPED = 1e-3  # where a number lies halfway between two int8 codes, either backend may take the other one


def saved(name):
    return GOLDEN / f"saved_{name}.safetensors"


def expected(name):
    return np.load(GOLDEN / f"saved_{name}.npy")


def metadata(path):
    with safe_open(path, "numpy") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_code_that_wrote_it(backend, name, dtype):
    """At once and through a cache. Spectral codes are chosen better since: their logits are nearer to the dense ones.

    The dense weights alone are another model: the factors are what is read.
    """
    model = backend.load(saved(name), dtype=dtype)
    dense = backend.Model(model.config, model.weights)(IDS)
    assert relative(dense, expected(name)) > 0.1
    if dtype == "float64":
        assert relative(run_cached(model, IDS, (7, 12))[1], model(IDS)) < TOLERANCE["float64"]
    if name != "v2_fixed":
        assert relative(model(IDS), dense) < relative(expected(name), dense)
        return
    flips = dtype == "float32" and helpers.is_torch(backend)
    assert relative(model(IDS), expected(name)) < (FLIPPED if flips else TOLERANCE["float32"])


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_it_was(backend, name):
    """The choice, the modes, the widths and what is shared are those of the conversion then."""
    model = backend.load(saved(name))
    joint = [isinstance(pair, backend.Model.Joint) for pair in model.pairs]
    assert joint == [name == "v3_spectral"] * 3 and model.tokenizer.vocab_size == 300
    modes = [tuple(mode.name for mode in pair.modes) for pair in model.pairs]
    if name == "v2_fixed":
        assert modes == [("fixed-b", "latent")] * 3
        assert {(mode.rank, mode.dtype) for pair in model.pairs for mode in pair.modes} == {(5, "int8"), (9, "int8")}
    elif name == "v3_mixed":
        assert modes == [("fixed-a", "spectral")] * 2 + [("dense", "dense")]
        assert [A_rh.shape for A_rh, _ in model.query_factors] == [(1, 2)] * 3
    else:
        assert modes == [("spectral", "spectral")] * 3
        assert [pair.k.widths == pair.v.widths for pair in model.pairs] == joint
        assert [pair.reads_tokens for pair in model.pairs] == joint
    assert model.tpa.spectral == (name != "v2_fixed")


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_of_today_and_the_same(backend, tmp_path, name, suffix):
    """The file that is written says the newest version and gives every logit of the old one."""
    model = backend.load(saved(name))
    path = backend.save(model, tmp_path / f"again{suffix}")
    config = metadata(path)["config"] if suffix else (path / "config.json").read_text()
    assert json.loads(config)["tpa"]["version"] == VERSION == 4
    assert not suffix or metadata(path)["version"] == "4"
    again = backend.load(path)
    assert again.tpa == model.tpa and again.choices == model.choices
    np.testing.assert_array_equal(helpers.logits(again, IDS), helpers.logits(model, IDS))
    held = load_file(path if suffix else path / "model.safetensors")
    before = load_file(saved(name))
    assert held.keys() - {"file.tokenizer.model"} == before.keys()
    assert all(np.array_equal(held[key], before[key]) for key in before)


@pytest.mark.parametrize(("version", "age"), [(5, "a newer"), (1, "another")])
@pytest.mark.parametrize("place", ["metadata", "config"])
def test_other_versions_are_refused(backend, tmp_path, version, age, place):
    """In one line that names the version there is and those that are read, wherever it is said."""
    said = metadata(saved("v3_mixed"))
    if place == "metadata":
        said |= {"version": str(version)}
    else:
        config = json.loads(said["config"])
        config["tpa"]["version"] = version
        said |= {"config": json.dumps(config)}
    path = tmp_path / "other.safetensors"
    save_file(load_file(saved("v3_mixed")), path, said)
    refused(lambda: backend.load(path), path, f"version {version} by {age} release", "reads 2, 3, 4")


def test_bases_exchanged_between_k_and_v_are_another_model(tmp_path):
    """The seeded mistake: constant arrays read into the wrong side."""
    named = load_file(saved("v2_spectral"))
    mean_k, mean_v = named["tpa.layers.1.k.mean"], named["tpa.layers.1.v.mean"]
    save_file(named | {"tpa.layers.1.k.mean": mean_v, "tpa.layers.1.v.mean": mean_k}, tmp_path / "wrong.safetensors",
              metadata(saved("v2_spectral")))  # fmt: skip
    assert relative(tpa_ref.load(tmp_path / "wrong.safetensors")(IDS), expected("v2_spectral")) > 100 * FLIPPED
