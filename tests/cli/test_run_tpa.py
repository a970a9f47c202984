"""`scripts/run_tpa.py` as a user runs it: convert, save, load, batches, conversations; one line for what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import call, check_refused

torch = pytest.importorskip("torch")
from tpa_ref.cli.run import run

ROOT = Path(__file__).resolve().parent.parent.parent
NEW = ["--max-new-tokens", "8"]


def said(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny model, converted from disk to disk."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, ROOT / "scripts" / "run_tpa.py", "--convert", "--save_tpa", "tpa"]
    options = ["--calibration-tokens", "1000", "--report", "r.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = said(subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, env=environment))
    assert "saved to tpa" in out and "peak memory" in out
    assert "defaults for tiny on cpu: float32, context 2,048\n" in out
    report = json.loads((folder / "r.json").read_text())
    assert report["calibration_tokens"] == 1000 and report["dtype"] == "float32"
    assert report["saved_bytes"] == sum(file.stat().st_size for file in (folder / "tpa").iterdir())
    return folder / "tpa"


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_several_prompts_each_get_what_they_get_alone(saved, tmp_path, backend):
    """--prompt twice and a file: one batch, and the text of each is that of a run of its own."""
    prompts = ["Return a new list", "The module", "Raise an error when the given value is not"]
    (tmp_path / "prompts.txt").write_text(f"\n{prompts[1]}\n\n{prompts[2]}\n", encoding="utf-8")
    options = ["--load_tpa", saved, "--backend", backend, *NEW]
    together = said(call(run, *options, "--prompt", prompts[0], "--prompts-file", "prompts.txt", cwd=tmp_path))
    assert "3 prompts in" in together
    for prompt in prompts:
        alone = (
            said(call(run, *options, "--prompt", prompt, cwd=tmp_path))
            .split("\n\n", 1)[1]
            .rpartition("\n\n1 prompt")[0]
        )
        assert alone.startswith(prompt) and len(alone) > len(prompt) and alone in together


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_a_conversation(saved, tmp_path, chat):
    """Turns come from standard input; /undo and /reset do what they say; the end of the input ends it."""
    lines = "Return a list\n/undo\n/undo\n/reset\nReturn a list\nand then\n"
    out = said(call(run, "--load-tpa", saved, *NEW, *chat, cwd=tmp_path, stdin=lines))
    assert "last turn removed" in out and "no turn to remove" in out and "conversation cleared" in out
    talk = out.partition("/quit ends\n")[2]
    first, _, rest = talk.partition("last turn removed")
    assert first.strip() and first.strip() in rest  # the same answer after it was cleared


def test_a_conversation_that_outgrows_the_cache_goes_on(saved, tmp_path):
    """One line on stderr, no end of the program."""
    lines = "Return a list of all numbers\n" * 4 + "/reset\nReturn\n"
    done = call(run, "--load-tpa", saved, *NEW, "--context", 40, cwd=tmp_path, stdin=lines)
    assert done.returncode == 0 and "error: chat:" in done.stderr and "/reset" in done.stderr
    assert done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_single_file(tmp_path, name):
    """--save_tpa with a suffix: converted in memory, saved, loaded again."""
    options = ["--mode", "fixed-b", "--k-rank", "16", "--calibration", "none"]
    first = said(call(run, "--convert", "--save_tpa", name, *options, "--prompt", "Return", *NEW, cwd=tmp_path))
    assert "fixed-b R=16" in first and f"saved to {name}" in first
    again = said(call(run, "--load_tpa", name, "--prompt", "Return", *NEW, cwd=tmp_path))
    assert again.splitlines()[-3:-2] == first.splitlines()[-3:-2]


@pytest.mark.parametrize("place", ["folder", "model.safetensors"])
def test_a_plan(tmp_path, place):
    """--kv-budget plans alike from disk to disk and in memory; the budget is met."""
    options = ["--calibration-tokens", "300", "--kv-budget", "12", "--context", "1024"]
    out = said(call(run, "--convert", "--save-tpa", place, *options, "--prompt", "Return", *NEW, cwd=tmp_path))
    assert re.search(r"plan: rate \d\.\d+, 12\.\dx smaller than windowed at 1,024 tokens", out)
    assert float(re.search(r"at --context .* (\S+)x\n", out)[1]) >= 12


def test_export(saved, tmp_path):
    """Back to a dense folder, which generates dense text."""
    assert "dense model written to dense" in said(call(run, "--load_tpa", saved, "--export", "dense", cwd=tmp_path))
    out = said(call(run, "--ckpt", "dense", "--prompt", "Return", *NEW, cwd=tmp_path))
    assert "K dense float32" in out and "TPA" not in out


WRONG = {
    "two models": (["--load-tpa", "a", "--ckpt", "b"], "--load-tpa"),
    "options of a conversion that is not asked for": (["--mode", "latent", "--prompt", "a"], "--mode"),
    "no such model": (["--load-tpa", "nowhere", "--prompt", "a"], "nowhere"),
    "no such prompts": (["--prompts-file", "nowhere"], "nowhere"),
    "prompts that are not UTF-8": (["--prompts-file", "latin1"], "UTF-8"),
    "a file without prompts": (["--prompts-file", "blank"], "at least one prompt"),
    "an empty prompt": (["--prompt", ""], "empty"),
    "more tokens than positions": (["--prompt", "a", "--max-new-tokens", "5000"], "2048 positions"),
    "no context": (["--context", "0"], "--context"),
    "a bad temperature": (["--temperature", "-1"], "temperature"),
    "nowhere to save": (["--convert", "--save-tpa", "no/such/folder"], "does not exist"),
    "another variant": (["--variant", "1b", "--prompt", "a"], "26 layers of width 1152"),
    "a malicious pickle": (["--ckpt", "evil.ckpt", "--prompt", "a"], "evil.ckpt"),
    "a truncated shard": (["--ckpt", "short.safetensors", "--prompt", "a"], "truncated"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(tmp_path, case):
    """Exit code 2, one line that names it, no traceback, nothing left behind."""

    class Evil:
        def __reduce__(self):
            return os.system, ("touch executed",)

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"model_state_dict": Evil()}))
    tiny = ROOT / "assets" / "tiny-gemma3" / "model.safetensors"
    (tmp_path / "short.safetensors").write_bytes(tiny.read_bytes()[:100_000])
    (tmp_path / "latin1").write_bytes("Grüße\n".encode("latin-1"))
    (tmp_path / "blank").write_text("\n \n")
    before = sorted(tmp_path.rglob("*"))
    arguments, named = WRONG[case]
    check_refused(call(run, *arguments, cwd=tmp_path), named, tmp_path, before)
