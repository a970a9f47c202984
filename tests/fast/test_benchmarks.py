"""The benchmarks run, on the smallest sizes, and write what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
OWN = ("contextual, exact", "latent int8")  # the settings that `serving` does not have, too


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("decode_attention", ["--variants", "tiny", "--contexts", "100"]),
        ("end_to_end", ["--contexts", "150", "--prefill", "20", "--long", "300", "--settings", *OWN]),
        ("serving", ["--contexts", "200", "--memory-gb", "0.003"]),
    ],
)
def test_a_benchmark(script, options, tmp_path):
    command = [sys.executable, f"benchmarks/{script}.py", "--threads", "1", "--repeats", "1", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md", ".png"]
    content = json.loads((tmp_path / f"{script}.json").read_text())
    assert content["machine"]["read_bytes_per_s"] > 0
    assert (tmp_path / f"{script}.md").read_text() in done.stdout


def test_a_wrong_option_is_one_line():
    command = [sys.executable, "benchmarks/decode_attention.py", "--clock", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--threads 1" in done.stderr
