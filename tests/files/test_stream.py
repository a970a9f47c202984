"""Conversion from disk to disk: what comes out is convert and save, in the memory of one layer, also after a kill."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import helpers
import numpy as np
import pytest
from helpers import ROOT, TOLERANCE, back, refused, relative, write_folder, write_sharded
from safetensors.numpy import load_file

from tpa_ref import TPAConfig
from tpa_ref.files import stream
from tpa_ref.files.pairs import describe
from tpa_ref.gemma.config import VisionConfig
from tpa_ref.gemma.weights import LayersOnDisk, from_named, hf_names

IDS = helpers.tokens(25, batch=2, seed=3)
TEXT = helpers.TEXT * 20
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
        tmp_path / "model",
        weights=helpers.bfloat16(helpers.tensors(helpers.config())),
        tokenizer=helpers.tokenizer_proto(),
    )


def files(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


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
    assert loaded.tpa == whole.tpa and loaded.tokenizer.files == dense.tokenizer.files
    for ours, theirs in zip(loaded.pairs, whole.pairs, strict=True):
        assert describe(ours) == describe(theirs)


def test_moments_serve_as_calibration(backend, folder, tmp_path):
    """Moments of `calibrate` give what their text gives."""
    moments = backend.calibrate(backend.load(folder), TEXT, max_tokens=700)
    a = backend.convert_checkpoint(folder, tmp_path / "a", calibration=moments)
    b = backend.convert_checkpoint(folder, tmp_path / "b", calibration=TEXT, max_tokens=700)
    assert files(a) == files(b)


def test_the_other_backend_reads_it(backend, folder, tmp_path):
    """What one backend writes both read: in float64, where no number lies so close to the middle of two codes."""
    written = backend.convert_checkpoint(folder, tmp_path / "tpa", calibration=TEXT, max_tokens=300)
    expected = helpers.logits(backend.load(written, dtype="float64"), IDS)
    for reader in helpers.backends():
        assert relative(helpers.logits(reader.load(written, dtype="float64"), IDS), expected) < TOLERANCE["float64"]


def test_a_model_on_disk_computes_the_same(backend, folder):
    """Logits, calibration, conversion: with blocks read when they are needed, everything is as in memory."""
    near, far = backend.load(folder), backend.load(folder, on_disk=True)
    assert isinstance(far.weights.layers, LayersOnDisk) and len(far.weights.layers) == 7
    np.testing.assert_array_equal(helpers.logits(near, IDS), helpers.logits(far, IDS))


def test_each_block_is_read_once_a_pass_and_one_is_kept():
    """Two uses of a layer in a row read it once; another layer lets go of it."""
    shapes, reads = hf_names(helpers.config()), []

    class Tensors(dict):
        def __missing__(self, name):
            reads.append(name)
            return np.zeros(shapes[name], np.float32)

    layers = from_named(Tensors(), helpers.config(), on_disk=True).layers
    reads.clear()
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


# ---- memory ----

MEASURED = """
import sys
sys.path[:0] = {path!r}
import {backend} as backend
from tpa_ref.cli.machine import PeakMemory, anonymous_memory
def convert(source, target):
    backend.convert_checkpoint(source, target, calibration={text!r}, max_tokens=48)
convert({small!r}, {small!r} + "-tpa")  # what libraries take once
before = anonymous_memory()
with PeakMemory(interval=0.001) as peak:
    convert({source!r}, {source!r} + "-tpa")
print(peak.bytes - before)
"""


def test_one_layer_is_enough_memory(backend, folder, tmp_path):
    """A model of 24 layers is converted in less than a fifth of its size (in the dtype that is computed in)."""
    config = helpers.config(num_layers=24, hidden_size=128, intermediate_size=4096)
    named = helpers.bfloat16(helpers.tensors(config))
    size = sum(value.size * 4 for value in named.values())
    source = write_folder(tmp_path / "large", config, named, helpers.tokenizer_proto())
    script = MEASURED.format(
        path=[str(ROOT), str(ROOT / "cuda")],
        backend=backend.__name__,
        small=str(folder),
        source=str(source),
        text=TEXT,
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    assert size > 150e6 and 0 < int(done.stdout) < size / 5


def test_one_layer_is_held(backend, folder, tmp_path, monkeypatch):
    """Whenever a layer is read the one before is gone: forwards, backwards, and in the factors."""
    read, blocks, most = LayersOnDisk._read, [], []

    def watched(layers, layer):
        most.append(sum(block() is not None for block in blocks))
        block = read(layers, layer)
        blocks.append(weakref.ref(block))
        return block

    monkeypatch.setattr(LayersOnDisk, "_read", watched)
    backend.convert_checkpoint(folder, tmp_path / "tpa", TPAConfig(mode="latent", q_rank=2), TEXT, max_tokens=100)
    assert len(most) > 14 and max(most) == 0


# ---- interruptions ----


def stopped_at(step):
    """A `progress` that ends the work like Ctrl-C before one of its steps, which are counted over all loops."""
    steps = itertools.count()

    def progress(layers):
        for layer in layers:
            if next(steps) == step:
                raise KeyboardInterrupt
            yield layer

    return progress


ALL = list(range(7))


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (0, {"states": [0], "model": 1}),
        (3, {"states": [0, 1, 2, 3], "moments": [0, 1, 2]}),
        (9, {"states": [0, 1, 2, 3, 4, 5], "moments": ALL, "gradients": [5], "fisher": [5, 6]}),
        (16, {"states": [0], "moments": ALL, "gradients": [0], "fisher": ALL, "spectrum": [0, 1]}),
        (
            25,
            {
                "states": [0],
                "moments": ALL,
                "gradients": [0],
                "fisher": ALL,
                "spectrum": ALL,
                "model": 5,
            },
        ),
    ],
)
def test_what_is_finished_is_not_done_again(backend, folder, tmp_path, monkeypatch, step, found):
    """Interrupted forwards, backwards, in the spectra and in the factors: what was finished is there, what is not asked
    for again is gone, the same call does the rest alone, and every byte is that of an undisturbed run.
    """
    target, partial = tmp_path / "tpa", tmp_path / ".tpa.partial"
    arguments = {"calibration": TEXT, "max_tokens": 700}
    with pytest.raises(KeyboardInterrupt):
        backend.convert_checkpoint(folder, target, progress=stopped_at(step), **arguments)
    begun = {file.name for file in partial.glob("*.safetensors")}
    shards = {name for name in begun if name.startswith("model-")}
    kept = found.copy()
    assert len(shards) == kept.pop("model", len(shards))
    assert begun - shards == {f"{kind}-{layer:05d}.safetensors" for kind in kept for layer in kept[kind]}
    written = []
    save_file = stream.save_file

    def recorded(tensors, file, *metadata):
        written.append(Path(file).with_suffix(".safetensors").name)
        save_file(tensors, file, *metadata)

    monkeypatch.setattr(stream, "save_file", recorded)
    backend.convert_checkpoint(folder, target, **arguments)
    assert not partial.exists() and written and not begun & set(written) and len(set(written)) == len(written)
    assert files(target) == files(backend.convert_checkpoint(folder, tmp_path / "again", **arguments))


def killed(work, at, place):
    """Run `work` in a child process that kills itself just before its change number `at` to the files of a place: a
    file being written is left half-written, one being renamed or removed as it was. False: the work came to its end.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
        return status != 0
    changes = itertools.count()

    def watch(event, arguments):
        if event not in ("open", "os.rename", "os.remove", "os.mkdir") or not str(arguments[0]).startswith(str(place)):
            return
        if event == "open" and not arguments[2] & os.O_WRONLY:
            return
        if next(changes) == at:
            if event == "open":
                Path(arguments[0]).write_bytes(b"{")
            os.kill(os.getpid(), signal.SIGKILL)

    save_file = stream.save_file

    def watched(tensors, file, *metadata):  # which Python's audit events do not show
        watch("open", (str(file), "w", os.O_WRONLY))
        save_file(tensors, file, *metadata)

    try:
        signal.alarm(60)  # another signal than the one expected
        sys.addaudithook(watch)
        stream.save_file = watched
        work()
        os._exit(0)
    finally:
        os._exit(1)


def small_seeing_model(folder):
    """Two layers, the second one global, and an image tower of one block."""
    vision = VisionConfig(8, 4, 3, 8, 1, 2, 8, 1e-6, tokens_per_image=1, image_token=300, start_token=7, end_token=8)
    config = helpers.config(num_layers=2, hidden_size=16, is_global=(False, True), vision=vision)
    return write_folder(folder, config, tokenizer=helpers.tokenizer_proto())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
@pytest.mark.parametrize(("over", "first"), [("nothing", 0), ("a saved model", 50)])  # where both begin to differ
def test_a_kill_at_any_point_gives_the_same_bytes(backend, tmp_path, over, first):
    """kill -9 before every single change to the files, between `put` and `trim` and while the finished folder takes its
    name as anywhere else: run again, no shard is written twice and every byte is that of an undisturbed run.
    """
    source = small_seeing_model(tmp_path / "model")
    arguments = {"calibration": TEXT, "max_tokens": 60}
    undisturbed = files(backend.convert_checkpoint(source, tmp_path / "undisturbed", **arguments))
    assert len(undisturbed) == 4 + 4  # outer, two layers, tower; index, config, tokenizer and its config
    for at in itertools.count(first):
        place = tmp_path / f"{at}"
        target, partial = place / "tpa", place / ".tpa.partial"
        place.mkdir()
        if over == "a saved model":
            target.mkdir()
            (target / "config.json").write_text('{"saved_by": "tpa-gemma3"}')
        if not killed(lambda target=target: backend.convert_checkpoint(source, target, **arguments), at, place):
            break
        begun = {}
        if readable(partial / "conversion.json"):
            begun = {file.name: file.stat().st_mtime_ns for file in partial.glob("model-*.safetensors")}
            (partial / ".tmpAbC123").write_bytes(b"what a killed library leaves")
        backend.convert_checkpoint(source, target, **arguments)
        assert files(target) == undisturbed, at
        assert all((target / name).stat().st_mtime_ns == time for name, time in begun.items()), at
        assert over != "nothing" or [file.name for file in place.iterdir()] == ["tpa"], at
    assert files(target) == undisturbed and at > 50


def readable(file):
    try:
        return bool(json.loads(file.read_text()))
    except (OSError, ValueError):
        return False


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
    assert backend.load(target).pairs[0].k.rank == 3
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
    assert model.tpa is None and model.tokenizer.files == backend.load(folder).tokenizer.files
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
