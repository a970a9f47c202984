"""Saving and converting never replace what they did not write: other files, the source, another run's work."""

from __future__ import annotations

import subprocess
import sys

import helpers
import pytest
from helpers import ROOT, refused

import tpa_ref
from tpa_ref.atomic import replacing
from tpa_ref.files.checkpoint import check_output
from tpa_ref.files.stream import alone


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    project = tmp_path / "project"
    (project / "sub").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (project / "sub" / "thesis.txt").write_text("x")
    refused(lambda: check_output(project), "sub", "not saved by this program")
    refused(lambda: tpa_ref.save(helpers.model(tpa_ref), project), "not saved by this program")
    assert (project / "sub" / "thesis.txt").read_text() == "x"


def test_a_saved_model_may_be_replaced(tmp_path):
    first = tpa_ref.save(helpers.model(tpa_ref), tmp_path / "model")
    assert tpa_ref.save(helpers.model(tpa_ref, seed=1), first) == first


@pytest.mark.parametrize("call", ["convert_checkpoint", "export"])
def test_the_source_is_never_replaced(tmp_path, call):
    source = helpers.write_folder(tmp_path / "source")
    before = sorted((file.name, file.read_bytes()) for file in source.iterdir())
    refused(lambda: getattr(tpa_ref, call)(source, source), "is the checkpoint that is read")
    assert sorted((file.name, file.read_bytes()) for file in source.iterdir()) == before


def test_nor_a_file_or_a_folder_of_the_source(tmp_path):
    source = helpers.write_folder(tmp_path / "source")
    before = sorted((file.name, file.read_bytes()) for file in source.iterdir())
    for read, target in (
        (source, source / "model.safetensors"),
        (source / "model.safetensors", source),
        (source / "model.safetensors", tmp_path),
    ):
        refused(lambda read=read, target=target: check_output(target, read), "is the checkpoint that is read")
    assert sorted((file.name, file.read_bytes()) for file in source.iterdir()) == before
    assert check_output(source / "model_tpa.safetensors", source)


def test_a_folder_is_no_place_for_a_file(tmp_path):
    """Nor is it lost when its replacement fails to appear."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")

    def replace_by_file():
        with replacing(folder) as temporary:
            temporary.write_text("y")

    def replace_by_nothing():
        with replacing(folder):
            pass

    refused(replace_by_file, "is a folder")
    refused(replace_by_nothing, "mine")
    assert (folder / "thesis.txt").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


def test_single_files_side_by_side_are_no_saved_folder(tmp_path):
    for name in ("model_a.safetensors", "model_b.safetensors"):
        tpa_ref.save(helpers.model(tpa_ref), tmp_path / name)
    refused(lambda: tpa_ref.save(helpers.model(tpa_ref), tmp_path), "not saved by this program")
    assert len(list(tmp_path.iterdir())) == 2


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    folder = tmp_path / ".target.partial"
    inside = (
        f"from pathlib import Path\nfrom tpa_ref.files.stream import alone\nwith alone(Path({str(folder)!r})): pass"
    )
    run = [sys.executable, "-c", inside]
    with alone(folder):
        other = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        assert other.returncode != 0 and "another run is writing" in other.stderr
    assert subprocess.run(run, cwd=ROOT).returncode == 0  # and a lock goes with its process
    assert not list(tmp_path.iterdir())


def test_a_missing_source_is_one_line(tmp_path):
    """A mistyped checkpoint beside an output that exists is named by whoever opens it, not by the comparison."""
    saved = tpa_ref.save(helpers.model(tpa_ref), tmp_path / "model")
    assert check_output(saved, tmp_path / "mistyped") == saved
    refused(lambda: tpa_ref.export(tmp_path / "mistyped", saved), "no such file or folder")
