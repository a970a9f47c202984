"""The script that a machine with a GPU runs: what of it can be seen without one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import helpers

from tpa_ref.compress.config import TPAConfig


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    import gpu_check

    torch.set_num_threads(1)
    return gpu_check


def test_it_says_in_one_line_that_there_is_no_gpu(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--out", str(tmp_path / "gpu.json")]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "CUDA" in printed.err and not printed.out
    assert not any(tmp_path.iterdir())


def test_its_comparison_of_kernels(script, monkeypatch):
    """A ring and a global layer of 4b, under the interpreter; and that it sees a mistake."""
    pytest.importorskip("test_kernels")  # asks for the interpreter before it imports Triton
    monkeypatch.setenv("TPA_TRITON", "1")
    assert script.wrong("4b", "contextual", "int8", "cpu", torch.float32, length=40) < 1e-5
    assert script.wrong("4b", "banded", "spectral", "cpu", torch.float32, length=40) < script.INTERPOLATED
    monkeypatch.setattr(script.kernels, "decode", lambda Q, *_: Q)
    assert script.wrong("4b", "contextual", "int8", "cpu", torch.float32, length=40) > 0.1


@pytest.mark.parametrize("tpa", [None, TPAConfig(rate=3.0), TPAConfig(rate=3.0, prefer="size")])
def test_its_decode_of_a_whole_model(script, tpa):
    found = script.model_speed(tpa, 1e10, helpers.config(max_positions=512), "cpu", prompt=20, steps=8)
    assert found["tokens_per_s"] > 0 and found["kv_bytes"] > 0


def test_what_fails_is_a_row_of_the_report(script, capsys):
    row = script.attempt({"mode": "dense"}, lambda: 1 / 0)
    assert (
        row == {"mode": "dense", "error": "ZeroDivisionError: division by zero"}
        and "ZeroDivision" in capsys.readouterr().out
    )
