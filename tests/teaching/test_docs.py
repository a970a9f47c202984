"""docs/math.md and the code agree: every function it names exists, every public function is named, its numbers hold."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from math import erf, exp, pi, sqrt

import numpy as np
import pytest
from helpers import ROOT

import tpa_ref
import tpa_ref.core

MATH = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
EVERY_MODULE = [found.name for found in pkgutil.walk_packages(tpa_ref.__path__, "tpa_ref.") if not found.ispkg]
MATHEMATICS = ["tpa_ref.tpa", *(found.name for found in pkgutil.iter_modules(tpa_ref.core.__path__, "tpa_ref.core."))]


def named(text: str) -> set[str]:
    """Everything the page calls `file.function` or `Class.method`."""
    return {name for name in re.findall(r"`(\w+(?:\.\w+)+)`", text) if not name.endswith((".py", ".md"))}


@functools.cache
def public(module: str) -> dict[str, str]:
    """What a file defines without a leading underscore: {file.function or Class.method: what that is}.

    A method is what its first definition in the package is: `Latent.encode` is `mode.Mode.encode`.
    """
    inside, file = importlib.import_module(module), module.rpartition(".")[2]
    found = {}
    for name, thing in vars(inside).items():
        if name[0] == "_" or getattr(thing, "__module__", None) != inside.__name__:
            continue
        if inspect.isfunction(thing):
            found[f"{file}.{name}"] = f"{file}.{name}"
        elif inspect.isclass(thing):
            found |= {f"{of}.{method}": first for of in (name, f"{file}.{name}") for method, first in methods(thing)}
    return found


def methods(of: type) -> list[tuple[str, str]]:
    """(name, file.Class.name of its first definition) of the methods and properties of a class."""
    kinds = (property, classmethod, staticmethod)
    owners = [owner for owner in of.__mro__ if owner.__module__.startswith("tpa_ref.")]
    first = {
        name: f"{owner.__module__.rpartition('.')[2]}.{owner.__name__}.{name}"
        for owner in owners
        for name, thing in vars(owner).items()
        if name[0] != "_" and (inspect.isfunction(thing) or isinstance(thing, kinds) or hasattr(thing, "attrname"))
    }
    return list(first.items())


def test_every_name_exists():
    """No name of a function that was renamed or removed."""
    missing = sorted(named(MATH) - set().union(*map(public, EVERY_MODULE)))
    assert not missing, f"docs/math.md names what does not exist: {missing}"


@pytest.mark.parametrize("module", MATHEMATICS)
def test_every_public_function_is_named(module):
    """Whoever adds a function or method to the mathematics says which equation it is."""
    said = {found[name] for found in map(public, EVERY_MODULE) for name in named(MATH) & set(found)}
    missing = sorted(set(public(module).values()) - said)
    assert not missing, f"name these in docs/math.md, beside their equation: {missing}"


def test_a_wrong_name_would_be_seen():
    """The two checks above can fail."""
    assert named("`rope.rotates` and `rope.rotate`, `latent`, `tpa.py`, `Mode.fit`") == {
        "rope.rotates",
        "rope.rotate",
        "Mode.fit",
    }
    rope, latent = public("tpa_ref.core.rope"), public("tpa_ref.core.latent")
    assert "rope.rotates" not in rope and "rope.rotate" in rope
    assert "quantize._grouped" not in public("tpa_ref.core.quantize")  # private
    assert "attention.partial" not in public("tpa_ref.core.attention")  # imported there, defined elsewhere
    assert latent["Latent.encode"] == "mode.Mode.encode" and "Latent.rotate" not in latent


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
