"""docs/math.md and the code agree: every function it names exists, every public function is named, its numbers hold."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from math import erf, exp, pi, sqrt
from pathlib import Path

import numpy as np
import pytest

import tpa_ref

ROOT = Path(__file__).resolve().parent.parent
MATH = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
MODULES = sorted(found.name for found in pkgutil.iter_modules(tpa_ref.__path__) if found.name != "__main__")


def named(text: str) -> set[str]:
    """Everything the page calls `file.function`, of files in tpa_ref."""
    return {name for name in re.findall(r"`(\w+\.\w+)`", text) if name.split(".")[0] in MODULES}


def public(module: str) -> set[str]:
    """The functions a file defines whose name does not begin with an underscore, as file.function."""
    inside = importlib.import_module(f"tpa_ref.{module}")
    functions = inspect.getmembers(inside, inspect.isfunction)
    return {f"{module}.{name}" for name, f in functions if name[0] != "_" and f.__module__ == inside.__name__}


def test_every_function_named_exists():
    """No name of a function that was renamed or removed; modes and formats are no functions and need no file."""
    everything = set().union(*(public(module) for module in MODULES))
    assert named(MATH) <= everything, f"docs/math.md names what is not there: {sorted(named(MATH) - everything)}"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_is_named(module):
    """Whoever adds a function says which equation it is, or that it has none (the last table)."""
    missing = sorted(public(module) - named(MATH))
    assert not missing, f"name these in docs/math.md, beside their equation or in the last table: {missing}"


def test_a_wrong_name_would_be_seen():
    """The two checks above can fail."""
    assert named("`rope.rotates` and `rope.rotate`, `latent`, `x.y`") == {"rope.rotates", "rope.rotate"}
    assert "rope.rotates" not in public("rope") and "rope.rotate" in public("rope")
    assert "factorize._leading" not in public("factorize")  # private
    assert "attention.decode" not in public("attention")  # imported there, defined elsewhere


def test_links_and_formulas():
    """Links lead somewhere, and GitHub can render the formulas: dollars in pairs, no bare bar inside a table's cell."""
    for target in re.findall(r"\]\(([^)#]+)\)", MATH):
        assert target.startswith("http") or (ROOT / "docs" / target).is_file(), target
    text = re.sub(r"\$\$.*?\$\$", "", MATH, flags=re.DOTALL)
    for paragraph in text.split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph
    for line in text.splitlines():
        if line.startswith("|"):
            assert all("|" not in formula for formula in re.findall(r"\$([^$]*)\$", line)), line
    for page in (MATH, (ROOT / "notebooks" / "exercise.md").read_text(encoding="utf-8")):
        for formula in re.findall(r"\$\$?([^$]+)\$", page):
            assert not re.search(r"\\[^A-Za-z\s]", formula), f"Markdown would eat the backslash: {formula}"
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)


# ---- the numbers of the section "Spectral latent" ----


def lloyd_max(bits: int) -> float:
    """Smallest mean squared error of a scalar quantizer of a unit Gaussian, by Lloyd's two conditions in turn."""
    levels = np.linspace(-2, 2, 2**bits)
    density = np.vectorize(lambda x: exp(-x * x / 2) / sqrt(2 * pi) if np.isfinite(x) else 0.0)
    below = np.vectorize(lambda x: (1 + erf(x / sqrt(2))) / 2)
    for _ in range(3000):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        share = np.diff(below(edges))
        levels = -np.diff(density(edges)) / share  # the mean of each cell
    return 1 - float(share @ np.square(levels))  # var(x) - var(level), since each level is a mean


def test_scalar_quantizers_of_a_gaussian():
    """The table of errors and ratios, and one bit by hand."""
    rows = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", MATH, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4]
    for bits, error, bound, ratio in rows:
        found = lloyd_max(int(bits))
        assert found == pytest.approx(float(error), rel=1e-3)
        assert 4.0 ** -int(bits) == pytest.approx(float(bound), rel=1e-3)
        assert found * 4 ** int(bits) == pytest.approx(float(ratio), abs=5e-3)
    assert lloyd_max(1) == pytest.approx(1 - 2 / pi)
    assert f"{sqrt(3) * pi / 2:.2f}" == "2.72" and "a factor of 2.72" in MATH


def test_reverse_water_filling_is_the_best_split():
    """At its own rate no random split of the bits has a smaller error, and D = 2^(-2 rate) x geometric mean holds."""
    rng = np.random.default_rng(0)
    variance = np.exp(rng.normal(0, 2, 12))
    theta = np.sort(variance)[4]
    best = np.minimum(theta, variance).sum()
    rate = np.maximum(0, np.log2(variance / theta) / 2).sum()
    for _ in range(2000):
        split = rng.dirichlet(np.full(12, 0.5)) * rate
        assert (variance * 4.0**-split).sum() >= best - 1e-12
    low = variance.min() / 3  # everybody gets bits
    mean_rate = (np.log2(variance / low) / 2).mean()
    assert 4.0**-mean_rate * np.exp(np.log(variance).mean()) == pytest.approx(low)


def test_kl_is_a_quadratic_form_of_small_noise():
    """KL = n^T F n / 2 up to third order: halving the noise divides the deviation by about eight."""
    rng = np.random.default_rng(0)
    z_v, J_vn, n_n = rng.normal(size=20), rng.normal(size=(20, 6)), rng.normal(size=6)
    p_v = np.exp(z_v) / np.exp(z_v).sum()
    F_nn = J_vn.T @ (np.diag(p_v) - np.outer(p_v, p_v)) @ J_vn

    def deviation(size):
        noisy_v = z_v + J_vn @ (size * n_n)
        kl = (p_v * (np.log(p_v) - noisy_v + np.log(np.exp(noisy_v).sum()))).sum()
        return kl - size**2 * n_n @ F_nn @ n_n / 2

    assert abs(deviation(1e-2)) < 0.05 * (1e-2) ** 2 * n_n @ F_nn @ n_n
    assert deviation(2e-3) / deviation(1e-3) == pytest.approx(8, rel=0.05)
