"""`run_test_tpa_1b.py` as a user runs it: the whole way on the shipped model, and one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import call, check_refused

from tpa_ref.cli import demo
from tpa_ref.compress.config import DEFAULT_RATE

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "assets" / "tiny-gemma3"
QUICK = "--calibration-tokens 700 --recall-prompts 0 --timing-rounds 1 --max-new-tokens 8".split()


def script(*arguments, cwd):
    command = [sys.executable, str(ROOT / "run_test_tpa_1b.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_whole_way(backend, tmp_path):
    """Convert, save, measure, generate, report and picture; the saved model loads and is the converted one."""
    pytest.importorskip("torch" if backend == "torch" else "numpy")
    saved = "model.pt" if backend == "torch" else "model.safetensors"
    options = ["--output", saved, "--report", "r.json", "--plot", "p.png", "--k_rank", "48", "--mode", "latent"]
    done = script("--backend", backend, *QUICK, "--eval-tokens", "300", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "defaults for tiny on cpu: float32, context 2,048\n" in done.stdout  # the others are given
    report = json.loads((tmp_path / "r.json").read_text())
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert report["variant"] == "tiny" and report["tpa"]["ranks_requested"] == {"q": None, "k": 48, "v": None}
    assert report["tpa"]["ranks_used"][0]["k"] == {"mode": "latent", "rank": 48, "dtype": "bfloat16", "bits": None}
    g, d, w, global_layers, local_layers = 4, 32, 128, 2, 10  # arithmetic of the tiny model, by hand
    context, bf16 = report["kv"]["context"], 2
    assert report["kv"]["full_bytes"] == 2 * bf16 * g * d * 12 * context
    assert report["kv"]["windowed_bytes"] == 2 * bf16 * g * d * (global_layers * context + local_layers * w)
    assert report["kv"]["tpa_bytes"] == bf16 * (48 + 64) * (global_layers * context + local_layers * w)
    n = report["kv"]["measured_tokens"]
    assert report["kv"]["measured_bytes"] == bf16 * (48 + 64) * (global_layers * n + local_layers * w)
    constants = 2 * (48 + 64) + 2  # encoder and basis of K and V, and their means
    assert report["weights_bytes"]["tpa"] - report["weights_bytes"]["dense"] == 12 * constants * g * d * 4
    assert 0 <= report["quality"]["kl"] < 2 and report["quality"]["tokens"] == 300 + 1  # BOS
    assert report["peak_memory_bytes"] > report["weights_bytes"]["dense"]

    import tpa_ref
    from tpa_ref.gemma.generate import generate_tokens

    model = tpa_ref.load(tmp_path / saved)
    ids = model.tokenizer.encode(report["text"]["prompt"])
    again = model.tokenizer.decode(list(generate_tokens(model, ids, 8)))
    assert again.strip() == report["text"]["tpa"].strip()


def test_defaults_of_a_spectral_run(tmp_path):
    """Nothing chosen: a spectral cache at the default rate, with recall, and the bits that each layer got."""
    pytest.importorskip("torch")
    more = ["--eval-tokens", "100", "--recall-prompts", "1", "--report", "r.json", "--output", "folder"]
    done = call(demo.run, *QUICK, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "coefficients of K (fast pairs, slow ones)" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["tpa"]["rate"] == DEFAULT_RATE and (tmp_path / "folder" / "config.json").is_file()
    for layer in report["tpa"]["ranks_used"]:
        assert {(layer[side]["mode"], layer[side]["dtype"]) for side in "kv"} == {("banded", "spectral")}
        assert all(layer[side]["bits"] >= layer[side]["rank"] for side in "kv")
    assert report["quality"]["recall_dense"] == 1.0 and set(report["speed"]) == {"dense", "tpa"}


WRONG = {
    "missing checkpoint": (["--ckpt", "nowhere"], "nowhere"),
    "not a checkpoint": (["--ckpt", "empty"], "empty"),
    "unknown mode": (["--mode", "magic"], "magic"),
    "unknown dtype": (["--kv-dtype", "int3"], "int3"),
    "rank zero": (["--k-rank", "0"], "k_rank"),
    "rank no number": (["--k-rank", "two"], "two"),
    "unknown option": (["--colour", "red"], "--colour"),
    "empty prompt": (["--prompt", " "], "prompt"),
    "too long": (["--max-new-tokens", "5000"], "2048"),
    "layers outside": (["--layers", "3,40"], "40"),
    "unknown device": (["--device", "toaster"], "toaster"),
    "missing tokenizer": (["--tokenizer", "none.model"], "none.model"),
    "missing text": (["--eval-text", "none.txt"], "none.txt"),
    "text is no UTF-8": (["--eval-text", "binary.txt"], "UTF-8"),
    "output folder missing": (["--output", "a/b/c.pt"], "c.pt"),
    "output suffix": (["--output", "model.bin"], ".bin"),
    "report folder missing": (["--report", "a/b.json"], "b.json"),
    "wrong variant": (["--variant", "4b"], "4b"),
    "context zero": (["--context", "0"], "--context"),
    "no text to measure on": (["--eval-tokens", "0"], "--eval-tokens"),
    "no round": (["--timing-rounds", "0"], "--timing-rounds"),
    "rate": (["--rate", "9"], "rate"),
    "rate and mode": (["--rate", "2", "--mode", "fixed-a"], "fixed-a"),
    "plan and rate": (["--rate", "2", "--max-kl", "0.1"], "--rate"),
    "plan without text": (["--kv-budget", "8", "--calibration", "none"], "--kv-budget"),
    "budget below zero": (["--kv-budget", "-8"], "kv_budget"),
    "holdout without bound": (["--holdout", "x.txt"], "--max-kl"),
    "too many newest": (["--recent", "65"], "recent"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(case, tmp_path):
    """Exit code 2, one line on stderr that names the thing, no traceback, nothing left behind."""
    pytest.importorskip("torch")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"caf\xe9\xff")
    before = sorted(tmp_path.rglob("*"))
    arguments, named = WRONG[case]
    check_refused(call(demo.run, *QUICK, *arguments, cwd=tmp_path), named, tmp_path, before)


def test_the_script_exits_with_2(tmp_path):
    """The same in a process of its own."""
    check_refused(script("--backend", "numpy", "--ckpt", "nowhere", cwd=tmp_path), "nowhere", tmp_path, [])


def test_clamped_ranks_are_one_line(tmp_path):
    """Ranks above the exact bound are not an error: one line of output says what was used."""
    pytest.importorskip("torch")
    ranks = ["--q-rank", "60", "--k-rank", "9", "--v-rank", "2", "--calibration", "none", "--eval-tokens", "50"]
    done = call(demo.run, *QUICK, *ranks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "k_rank 9 is above the exact bound 4 of contextual: clamped to 4" in done.stdout
    assert "q_rank 60 is above the exact bound 8" in done.stdout
    assert "layers 0-11: K contextual R=4 bfloat16, V contextual R=2 bfloat16" in done.stdout


def test_tiny_model_is_what_its_card_says():
    """The shipped weights have the config's shape, and their loss on unseen documents is the one in the card."""
    import tpa_ref

    model = tpa_ref.load(TINY)
    figures = json.loads((TINY / "training.json").read_text())
    from tpa_ref.core.divergence import log_softmax
    from tpa_ref.gemma.texts import text_windows

    losses = []
    for window in list(text_windows(model, TINY / "evaluation.txt", 60_000))[::12]:
        P_qv = log_softmax(model(np.array([window])))[0]
        losses.append(-P_qv[np.arange(len(window) - 1), window[1:]].mean())
    assert abs(np.mean(losses) - figures["loss_unseen_documents"]) < 0.25


def test_a_model_saved_in_bfloat16_runs_in_float32(tmp_path):
    """A q rank makes weights of its own; saved in one dtype they are computed with in another, in both backends."""
    pytest.importorskip("torch")
    import tpa_ref
    import tpa_torch

    dense = tpa_torch.load(TINY, dtype="bfloat16")
    tpa = tpa_torch.convert(dense, tpa_torch.TPAConfig(mode="latent", q_rank=6))
    tpa_torch.save(tpa, tmp_path / "saved")
    ids = [[2, 500, 501, 502]]
    expected = tpa_ref.load(tmp_path / "saved")(np.array(ids))
    found = tpa_torch.load(tmp_path / "saved", dtype="float32")(ids).numpy()
    assert expected.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()  # bf16 cache: a rounding may flip
    coarse = tpa(ids).numpy()
    assert np.abs(coarse - expected).max() < 0.1 * np.abs(expected).max()
