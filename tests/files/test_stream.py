"""Conversion from disk to disk: what comes out is convert and save, in the memory of one layer, also after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import helpers
from safetensors.numpy import load_file
from helpers import back, part, write_folder, write_sharded

import tpa_ref
from tpa_ref import TPAConfig, TPAError
from tpa_ref.gemma.weights import LayersOnDisk

ROOT = Path(__file__).resolve().parent.parent
IDS = helpers.tokens(25, batch=2, seed=3)
TEXT = small.TEXT * 20
CHOICES = {
    "default": None,
    "contextual, q_rank": TPAConfig(k_rank=1, v_rank=2, q_rank=2),
    "some layers": TPAConfig(mode="fixed-b", layers="5,6", kv_dtype="int4"),
    "V alone": TPAConfig(k_mode="fixed-a", k_rank=2, rate=2.0),
}


@pytest.fixture
def folder(tmp_path):
    """A fresh bf16 checkpoint with a tokenizer."""
    return write_folder(
        tmp_path / "model", weights=helpers.bfloat16(helpers.tensors(helpers.config())), tokenizer=helpers.tokenizer_proto()
    )


def files(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def refused(call, *words):
    with pytest.raises(TPAError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value), caught.value


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("calibrated", [True, False])
def test_it_is_load_convert_save(backend, folder, tmp_path, choice, calibrated):
    """The folder that is written layer by layer loads as the model that is converted in memory."""
    text = TEXT if calibrated else None
    written = backend.convert_checkpoint(folder, tmp_path / "tpa", CHOICES[choice], text, max_tokens=700)
    dense = backend.load(folder)
    moments = backend.calibrate(dense, TEXT, max_tokens=700) if calibrated else None
    whole = backend.convert(dense, CHOICES[choice], moments)
    loaded = backend.load(written)
    np.testing.assert_array_equal(helpers.logits(loaded, IDS), helpers.logits(whole, IDS))
    assert loaded.tpa == whole.tpa and loaded.tokenizer.proto == dense.tokenizer.proto
    for ours, theirs in zip(loaded.factors, whole.factors, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.mode, a.rank, a.dtype, a.error) == (b.mode, b.rank, b.dtype, b.error)


def test_moments_serve_as_calibration(backend, folder, tmp_path):
    """Moments of `calibrate` give what their text gives."""
    moments = backend.calibrate(backend.load(folder), TEXT, max_tokens=700)
    a = backend.convert_checkpoint(folder, tmp_path / "a", calibration=moments)
    b = backend.convert_checkpoint(folder, tmp_path / "b", calibration=TEXT, max_tokens=700)
    assert files(a) == files(b)


def test_the_other_backend_reads_it(backend, folder, tmp_path):
    """What one backend writes both read."""
    written = backend.convert_checkpoint(folder, tmp_path / "tpa", calibration=TEXT, max_tokens=300)
    for reader in helpers.backends():
        np.testing.assert_allclose(
            helpers.logits(reader.load(written), IDS), helpers.logits(backend.load(written), IDS), rtol=0, atol=1e-3
        )


def test_a_model_on_disk_computes_the_same(backend, folder):
    """Logits, calibration, conversion: with blocks read when they are needed, everything is as in memory."""
    near, far = backend.load(folder), backend.load(folder, on_disk=True)
    assert isinstance(far.weights.layers, LayersOnDisk) and len(far.weights.layers) == 7
    np.testing.assert_array_equal(helpers.logits(near, IDS), helpers.logits(far, IDS))


def test_each_block_is_read_once_a_pass_and_one_is_kept():
    """Two uses of a layer in a row read it once; another layer lets go of it."""
    reads = []

    def read(name):
        reads.append(name)
        shape = dict(tpa_ref.weights.hf_names(helpers.config()))[name]
        return np.zeros(shape, np.float32)

    layers = LayersOnDisk(read, helpers.config())
    first = layers[2]
    assert layers[2] is first and len(reads) == 13
    assert layers[3] is not first and len(reads) == 26
    assert layers[2] is not first and len(reads) == 39
    assert [len(vars(block)) for block in layers] == [13] * 7
    with pytest.raises(IndexError):
        layers[7]


def test_a_sharded_checkpoint(backend, tmp_path):
    """Tensors of one layer may lie in several shards."""
    source = write_sharded(tmp_path / "sharded")
    written = backend.convert_checkpoint(source, tmp_path / "tpa")
    whole = backend.convert(backend.load(source))
    np.testing.assert_array_equal(helpers.logits(backend.load(written), IDS), helpers.logits(whole, IDS))


MEASURED = """
import sys
sys.path[:0] = {path!r}
import {backend} as backend
from tpa_ref.command_line import PeakMemory, anonymous_memory
before = anonymous_memory()
with PeakMemory(interval=0.001) as peak:
    backend.convert_checkpoint({source!r}, {target!r}, calibration={text!r}, max_tokens=300)
print(peak.bytes - before)
"""


def test_one_layer_is_enough_memory(backend, tmp_path):
    """A model of 24 layers is converted in less than a third of its size (in the dtype that is computed in)."""
    config = helpers.config(num_layers=24, hidden_size=256, intermediate_size=4096)
    named = helpers.bfloat16(helpers.tensors(config))
    size = sum(value.size * 4 for value in named.values())
    source = write_folder(tmp_path / "model", config, named, helpers.tokenizer_proto())
    script = MEASURED.format(
        path=[str(ROOT), str(ROOT / "cuda")],
        backend=backend.__name__,
        source=str(source),
        target=str(tmp_path / "tpa"),
        text=TEXT,
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    assert size > 300e6 and 0 < int(done.stdout) < size / 3


# ---- interruptions ----

KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import {backend} as backend
steps = iter(range(100))
def progress(layers):
    for layer in layers:
        if next(steps) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield layer
backend.convert_checkpoint({source!r}, {target!r}, calibration=open({text!r}).read(), max_tokens=700, progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize(
    ("at", "found"),
    [
        (0, {"states": 1}),
        (3, {"states": 4, "moments": 3}),
        (9, {"states": 8, "moments": 7, "gradients": 3, "fisher": 2}),
        (16, {"fisher": 7, "spectrum": 2}),
        (25, {"fisher": 7, "spectrum": 7, "model": 5}),
    ],
)
def test_kill_and_run_again_gives_the_same_bytes(backend, folder, tmp_path, at, found):
    """kill -9 forwards, backwards, in the spectra and in the factors, and run again: what was finished is there, no
    layer is written twice, and every byte is that of an undisturbed run.
    """
    target = tmp_path / "tpa"
    (tmp_path / "text").write_text(TEXT)
    script = KILLED.format(
        path=[str(ROOT), str(ROOT / "cuda")],
        backend=backend.__name__,
        at=at,
        source=str(folder),
        target=str(target),
        text=str(tmp_path / "text"),
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert done.returncode == -signal.SIGKILL and not target.exists()
    partial = tmp_path / ".tpa.partial"
    counts = {kind: len(list(partial.glob(f"{kind}-*.safetensors"))) for kind in found}
    assert counts == found
    begun = {file: file.stat().st_mtime_ns for file in partial.glob("model-*")}
    (partial / ".tmpAbC123").write_bytes(b"what a killed library leaves")
    arguments = [sys.executable, "-c", script.replace(f"next(steps) == {at}", "False")]
    subprocess.run(arguments, check=True, env=environment)
    assert not partial.exists()
    assert all((target / file.name).stat().st_mtime_ns == time for file, time in begun.items())
    undisturbed = [arguments[0], "-c", arguments[2].replace(repr(str(target)), repr(str(tmp_path / "again")))]
    subprocess.run(undisturbed, check=True, env=environment)
    assert files(target) == files(tmp_path / "again")


def stopped_at(layer):
    def progress(layers):
        for number in layers:
            if number == layer:
                raise KeyboardInterrupt
            yield number

    return progress


def test_another_conversion_does_not_go_on_with_these_files(backend, folder, tmp_path):
    """What was begun with other ranks, another text or another checkpoint is begun anew."""
    target = tmp_path / "tpa"
    with pytest.raises(KeyboardInterrupt):
        backend.convert_checkpoint(folder, target, TPAConfig(k_rank=1), progress=stopped_at(4))
    assert (tmp_path / ".tpa.partial").is_dir()
    backend.convert_checkpoint(folder, target, TPAConfig(k_rank=2))
    assert files(target) == files(backend.convert_checkpoint(folder, tmp_path / "b", TPAConfig(k_rank=2)))


def test_a_finished_folder_is_replaced(backend, folder, tmp_path):
    """Converting again to the same place: the new model, nothing of the old one."""
    target = backend.convert_checkpoint(folder, tmp_path / "tpa", TPAConfig(k_rank=1))
    backend.convert_checkpoint(folder, target, TPAConfig(mode="latent", k_rank=3))
    assert backend.load(target).factors[0][0].rank == 3
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


# ---- bad input ----


def test_nan_is_named_and_nothing_is_left(backend, tmp_path):
    """A NaN in a late layer is found when that layer is read; the layers already written are removed."""
    named = helpers.tensors(helpers.config())
    named["model.layers.5.mlp.up_proj.weight"][3, 4] = np.nan
    source = write_folder(tmp_path / "model", weights=named)
    refused(
        lambda: backend.convert_checkpoint(source, tmp_path / "tpa"), "model.layers.5.mlp.up_proj.weight", "finite", "1"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_line_and_leaves_nothing(backend, folder, tmp_path, monkeypatch):
    """The disk fills up at the fourth file: what was written is removed, so that there is room again."""
    stream = part(backend, "stream")
    written, save_file = [], stream.save_file

    def full(tensors, path, *metadata):
        written.append(path)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, *metadata)

    monkeypatch.setattr(stream, "save_file", full)
    refused(lambda: backend.convert_checkpoint(folder, tmp_path / "tpa"), "No space left on device", "tpa")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_only_a_folder_can_be_written_layer_by_layer(backend, folder, tmp_path, name):
    """A single file would need all of it at once."""
    refused(lambda: backend.convert_checkpoint(folder, tmp_path / name), name, "folder")


def test_a_converted_model_is_not_converted_again(backend, folder, tmp_path):
    """The bases of a conversion of a conversion would be those of the first."""
    written = backend.convert_checkpoint(folder, tmp_path / "a")
    refused(lambda: backend.convert_checkpoint(written, tmp_path / "b"), "already", "TPA")
    assert not (tmp_path / ".b.partial").exists()


# ---- back to a dense model ----


def test_export_gives_the_weights_back(backend, folder, tmp_path):
    """Converted, exported: the tensors of the original, bit by bit, under the names of a Hugging Face folder."""
    written = backend.convert_checkpoint(folder, tmp_path / "tpa", TPAConfig(k_rank=1, q_rank=2))
    dense = backend.export(written, tmp_path / "dense")
    original = load_file(folder / "model.safetensors")
    back_again = {}
    for file in dense.glob("*.safetensors"):
        back_again |= load_file(file)
    assert back_again.keys() == original.keys()
    assert all((back_again[name] == original[name]).all() for name in original)
    model = backend.load(dense)
    assert model.tpa is None and model.tokenizer.proto == backend.load(folder).tokenizer.proto
    np.testing.assert_array_equal(helpers.logits(model, IDS), helpers.logits(backend.load(folder), IDS))


def test_transformers_loads_an_export(backend, random_gemma, tmp_path):
    """The exported folder is one that `transformers` reads, index and all."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    gemma = random_gemma(2, 4, scaled=True)
    backend.convert_checkpoint(gemma.path, tmp_path / "tpa", TPAConfig(k_rank=1))
    backend.export(tmp_path / "tpa", tmp_path / "dense")
    hf = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        logits = hf(torch.tensor(gemma.tokens_bq)).logits
    np.testing.assert_allclose(back(logits), gemma.logits_bqv, rtol=0, atol=1e-4 * np.abs(gemma.logits_bqv).max())
