"""The exercises of `notebooks/`: a correct solution passes all six steps; a mistake fails the step it is made in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

EXERCISES = ROOT / "notebooks" / "exercises"

SOLUTION = """
import numpy as np
from tpa_ref.core import attention, contextual, masks, rope
from tpa_ref.core.cache import slot_positions


def from_factors(A_bksg, B_bksd):
    (b, k, s, g), d = A_bksg.shape, B_bksd.shape[3]
    parts = {"A": A_bksg.reshape(b, k, s * g), "B": B_bksd}
    return contextual.Contextual(g, d, rank=s).decode(parts, None)


best_factors = contextual.factor


def rotate(x_bksd, positions_bk, base, scale=1.0):
    return rope.rotate(x_bksd, *rope.rope_tables(positions_bk, x_bksd.shape[-1], base, scale))


scores = contextual.scores_contextual


def attend(Q, AK, BK, AV, BV, scale, positions_bq, positions_bk, window):
    L_bhqk = masks.apply_mask(scores(Q, AK, BK, scale), masks.visible(positions_bq, positions_bk, window))
    return contextual.values_contextual(attention.softmax(L_bhqk), AV, BV)


class FactorCache:
    def __init__(self, slots, rank, g, d):
        self.slots, self.length = slots, 0
        self.parts = [np.zeros((1, slots, rank, last)) for last in (g, d, g, d)]

    def append(self, *new):
        for part, token in zip(self.parts, new):
            part[:, self.length % self.slots] = token[:, 0]
        self.length += 1

    def read(self):
        filled = min(self.length, self.slots)
        positions_bk = slot_positions(filled, np.array([self.length]), self.slots)
        return *(part[:, :filled] for part in self.parts), positions_bk

    @property
    def nbytes(self):
        return sum(part.nbytes for part in self.parts)
"""

# step -> a mistake that its test must see, added at the end of the solution
MISTAKES = {
    1: "right = from_factors\nfrom_factors = lambda A, B: right(A, B) * A.shape[2]",  # no 1/R
    2: "right = best_factors\nbest_factors = lambda X, rank: right(X[..., ::-1, :], rank)",  # heads in the wrong order
    3: "right = rotate\nrotate = lambda x, t, base, scale=1.0: right(x, -t, base, scale)",  # the wrong direction
    4: "right = scores\nscores = lambda Q, A, B, scale: right(Q, A, B, scale * A.shape[2])",  # no 1/R
    5: "right = attend\nattend = lambda *x: right(*x[:-1], x[-1] and x[-1] + 1)",  # window one too long
    6: "right = FactorCache\nFactorCache = lambda slots, *x: right(slots - 1, *x)",  # ring one too short
}


def run(mine: Path | None, *tests: str) -> subprocess.CompletedProcess:
    """pytest on the exercises in a fresh interpreter, as a reader runs it."""
    command = [sys.executable, "-m", "pytest", *map(str, tests or [EXERCISES]), "-p", "no:cacheprovider"]
    command += ["--mine", str(mine)] if mine else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_right_solution_passes_every_step(tmp_path):
    """Built from the functions of tpa_ref; nothing is skipped."""
    (tmp_path / "mytpa.py").write_text(SOLUTION)
    done = run(tmp_path / "mytpa.py")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout and "failed" not in done.stdout


@pytest.mark.parametrize("step", MISTAKES)
def test_a_mistake_fails_its_step(tmp_path, step):
    """The test of the step itself turns red."""
    (tmp_path / "mytpa.py").write_text(f"{SOLUTION}\n\n{MISTAKES[step]}\n")
    done = run(tmp_path / "mytpa.py", EXERCISES / f"test_step_{step}.py")
    verdict = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and " failed" in verdict and "error" not in verdict, done.stdout


def test_the_empty_start_fails_and_no_file_skips():
    """A copy of start.py has everything still to do; without --mine all steps are skipped with a sentence."""
    assert run(EXERCISES / "start.py").returncode == 1
    without = run(None)
    assert without.returncode == 0 and "skipped" in without.stdout and "passed" not in without.stdout


def test_every_step_has_its_test_and_its_text():
    """Six steps in the text, in the starting file and as tests."""
    text, start = ((ROOT / "notebooks" / name).read_text() for name in ("exercise.md", "exercises/start.py"))
    for step in MISTAKES:
        assert f"## Step {step}." in text and f"# Step {step}\n" in start
    assert sorted(path.name for path in EXERCISES.glob("test_*.py")) == [f"test_step_{step}.py" for step in MISTAKES]
