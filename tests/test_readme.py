"""The README tells the truth: its numbers are those of the result files, its flags exist, its example runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import update_readme

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_blocks_are_the_result_files():
    """Every marked block is the content of its file; nobody edits numbers by hand."""
    assert update_readme.BLOCK.search(README)
    assert update_readme.updated(README) == README


def test_a_changed_number_would_be_seen():
    """The check above can fail."""
    assert update_readme.updated(README.replace("Quality on", "Quality near")) == README


def test_demo_text_comes_from_its_report():
    """The printed demo and its JSON report are of one run."""
    report = json.loads((ROOT / "results" / "demo.json").read_text())
    shown = (ROOT / "results" / "demo.txt").read_text()
    assert f"mean {report['quality']['kl']:.5f}" in shown
    assert f"{report['kv']['ratio_vs_windowed']:.1f}x" in shown
    assert report["text"]["tpa"].strip() in shown


def test_figures_of_the_tiny_model_are_those_of_its_training():
    """Loss, gap and recall in the text are those of training.json."""
    figures = json.loads((ROOT / "assets" / "tiny-gemma3" / "training.json").read_text())
    unseen, seen = figures["loss_unseen_documents"], figures["loss_training_documents"]
    text = " ".join(README[README.index("## The tiny model") :].split())
    assert f"{unseen:.2f} nats per token, {unseen - seen:.2f} above its training text" in text
    assert f"at least {100 * min(figures['recall'].values()):.1f} % of the recall questions" in text


def test_flags_exist():
    """Every option the README names is one of the scripts'."""
    pytest.importorskip("torch")
    known = "".join(
        subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for script in ("run_test_tpa_1b.py", "scripts/run_tpa.py", "scripts/full_size.py")
    ).replace("--save-tpa", "--save-tpa --save_tpa")
    usage = README[README.index("## Quick start") :].replace("--local-dir", "")  # of another program
    for flag in sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", usage))):
        assert flag in known, flag


def test_files_and_links_exist():
    """Every relative link leads to a file, and every file of the stage table is there; only torch heals."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    table = README[README.index("## How it works") : README.index("## Performance")]
    for name in set(re.findall(r"`(\w+\.py)`", table)):
        assert (ROOT / "tpa_ref" / name).exists() or (ROOT / "cuda" / "tpa_torch" / name).exists(), name


@pytest.mark.parametrize("backend", ["tpa_torch", "tpa_ref"])
def test_python_example_runs(backend, tmp_path):
    """The example works as printed, in both backends."""
    pytest.importorskip("torch" if backend == "tpa_torch" else "numpy")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = code.replace("import tpa_torch as tpa", f"import {backend} as tpa")
    code = code.replace('"tpa_model"', repr(str(tmp_path / "m")))
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'cuda'}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m" / "config.json").exists()
