"""The notebooks run from top to bottom in a fresh copy, and a mistake in the package turns one of them red."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
import run_notebooks

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.name for path in NOTEBOOKS]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """What a notebook needs of a clone, in a folder of its own, on one thread: two wait for each other."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name in ("tpa_ref", "cuda", "notebooks", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "licenses"))
    return tmp_path


NEEDS_TORCH = {"05_at_scale.ipynb", "06_in_transformers.ipynb"}  # the others run without


@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(copy, name):
    """Every assertion of the notebook holds."""
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    done = run_notebooks.execute(copy / "notebooks" / name, timeout=120)
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")


# What is planted: (notebook: the cells needed, the last of which must fail; file of tpa_ref, lines added at its end).
MISTAKES = {
    "the smallest products kept": (
        "01: 01 03 13 17 20",
        "core/contextual",
        """
_right = factor
def factor(X_bkgd, rank):
    A_bksg, B_bksd = _right(X_bkgd, X_bkgd.shape[2])
    return A_bksg[:, :, -rank:] * rank / A_bksg.shape[2], B_bksd[:, :, -rank:]
""",
    ),
    "RoPE turns the other way": (
        "02: 01 03 05 07",
        "core/rope",
        "\n_right = rotate\ndef rotate(x, cos, sin):\n    return _right(x, cos, -sin)\n",
    ),
    "no 1/R in the scores": (
        "03: 01 03 20",
        "core/contextual",
        "\n_right = scores_contextual\ndef scores_contextual(Q, A, B, scale):\n"
        "    return _right(Q, A, B, scale * A.shape[2])\n",
    ),
    "no 1/R in the values": (
        "03: 01 03 20",
        "core/contextual",
        "\n_right = values_contextual\ndef values_contextual(P, A, B):\n    return _right(P, A, B) * A.shape[2]\n",
    ),
    "a window one too long": (
        "03: 01 26 28",
        "core/masks",
        "\n_right = visible\ndef visible(q, k, window, *last):\n"
        "    return _right(q, k, window and window + 1, *last)\n",
    ),
    "the damage metric dropped": (
        "04: 01 03 05 09 17 23",
        "core/transform",
        "\n_right = spectrum\ndef spectrum(M, mean, F):\n    return _right(M, mean, [None] * len(F))\n",
    ),
    "water-filling that ignores how many tokens a layer holds": (
        "04: 01 03 05 09 17 23 29 31 37 39 45 51 53",
        "compress/bits",
        """
_right = allocate_bits
def allocate_bits(variances, entries, bits):
    return _right(variances, [1] * len(entries), bits * len(entries) / sum(entries))
""",
    ),
    "levels evenly spaced": (
        "04: 01 03 05 09 17 23 29 31 33",
        "core/codes",
        "\nLEVELS[1:] = [np.linspace(-2.5, 2.5, 1 << w)[np.arange(256) % (1 << w)] for w in range(1, 9)]\n",
    ),
    "a path that does not look ahead": (
        "04: 01 29",
        "core/codes",
        """
def best_path(X_ks, widths, first_k):
    windows_ks, window_k = np.zeros(X_ks.shape, np.uint8), first_k.astype(int)
    for s, width in enumerate(widths):
        within_ki = (window_k[:, None] << width & 255) + np.arange(1 << width)
        error_ki = np.square(LEVELS[width][within_ki] - X_ks[:, s, None])
        windows_ks[:, s] = window_k = within_ki[np.arange(len(X_ks)), error_ki.argmin(1)]
    return np.concatenate([first_k[:, None].astype(np.uint8), windows_ks], 1)
""",
    ),
    "one scale for all tokens": (
        "04: 01 03 05 09 17 23 29 31 33",
        "core/codes",
        "\ndef choose_scales(C_ks, widths):\n    return np.full(len(C_ks), 64, np.uint8)\n",
    ),
    "token vectors of the wrong token": (
        "04: 01 03 05 09 17 23 29 31 37 39 41 43",
        "gemma/token_vectors",
        """
_right = with_previous
def with_previous(text_bt, positions_bk):
    after_bk, own_bk = _right(text_bt, np.minimum(positions_bk + 1, text_bt.shape[1] - 1))
    return own_bk, after_bk
""",
    ),
    "a fit that flatters itself": (
        "04: 01 03 05 09 17 23 29 31 37 39 41 43",
        "compress/token_prediction",
        """
_right = fit
def fit(N_xz, F_xx, tokens, damage):
    return _right(N_xz, F_xx, TokenMoments(tokens.mean_z, tokens.S_zz, 10**9), damage)
""",
    ),
    "the mean of V forgotten": (
        "02: 01 03 19 29",
        "core/attention",
        "\n_right = mean_values\ndef mean_values(P, mean):\n    return 0 * _right(P, mean)\n",
    ),
    "half of the softmax on the way back": (
        "05: 01 03 11",
        "gemma/backward",
        "\ndef softmax_backward(dP, P):\n    return P * dP\n",
    ),
    "exact tokens that count nothing": (
        "04: 01 03 05 73",
        "compress/plan",
        "\n_right = cache_bytes\ndef cache_bytes(*given, exact, ids):\n    return _right(*given, ids=ids)\n",
    ),
    "points evenly spaced in a tile": (
        "07: 01 03 07 09",
        "core/banded",
        "\ndef nodes():\n    return np.linspace(0, TILE - 1, NODES)\n",
    ),
    "nodes outside of the tile": (
        "07: 01 11 13",
        "core/banded",
        "\n_right = nodes\ndef nodes():\n    return -_right()\n",
    ),
    "a chain whose blocks tell nothing of each other": (
        "07: 01 11 17",
        "core/transform",
        """
_right = successive
def successive(M, mean, F, blocks, distortions):
    return _right(M, mean, F, blocks, [np.ones(len(D_s)) for D_s in distortions])
""",
    ),
}


def run(copy: Path, cells: str, moments: Path | None) -> subprocess.CompletedProcess:
    """Some cells of a notebook as a program, without a kernel and without pictures, and marks between them.

    moments: a folder in which those of notebook 4 are kept from one run to the next.
    """
    number, *wanted = cells.replace(":", "").split()
    (path,) = (copy / "notebooks").glob(f"{number}_*.ipynb")
    source = {cell.id.removeprefix("cell-"): cell.source for cell in nbformat.read(path, as_version=4).cells}
    code = "\n\n".join(f"import sys; print('cell', {cell!r}, file=sys.stderr)\n{source[cell]}" for cell in wanted)
    if moments and number == "04" and "05" in wanted:
        assert "sensitivity_tokens=2048)" in code
        code = code.replace("sensitivity_tokens=2048)", f"sensitivity_tokens=2048, cache_dir={str(moments)!r})")
    command, environment = [sys.executable, "-c", code], {**os.environ, "MPLBACKEND": "agg"}
    return subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def moments(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("moments")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_package_turns_a_notebook_red(copy, mistake, moments):
    """Some cells on a package with one wrong function: an assertion of the last one fails, and nothing else does.

    On the package as it is they pass, as the whole notebook does.
    """
    cells, module, lines = MISTAKES[mistake]
    if any(name.startswith(cells[:2]) for name in NEEDS_TORCH):
        pytest.importorskip("torch")
    with open(copy / "tpa_ref" / f"{module}.py", "a", encoding="utf-8") as file:
        file.write(lines)
    done = run(copy, cells, None if module == "gemma/token_vectors" else moments)  # the wrong ones are not kept
    assert done.returncode == 1, done.stderr
    assert done.stderr.rpartition("cell ")[2].startswith(cells.split()[-1]), done.stderr
    problems = [line for line in done.stderr.splitlines() if re.match(r"\w+(Error|Exception|Interrupt)\b", line)]
    assert [line.split(":")[0] for line in problems] == ["AssertionError"], done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_is_committed(path):
    """Valid, run in order with outputs and no error, small, and for the kernel that everybody has."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert "python" in code[0].outputs[0]["text"] and "numpy" in code[0].outputs[0]["text"]  # versions come first
    assert path.stat().st_size < 600 * 1024
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(/home/|/Users/|/root/|[A-Z]:\\\\)", text), "a path of one machine"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_figure_is_described(path):
    """Below each picture stands its description for those who cannot see it; figures are numbered one by one."""
    notebook = nbformat.read(path, as_version=4)
    numbers = []
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None]):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", ())):
            caption = re.match(r"\*Figure (\d+)\.(\d+)\. .{40,}", below.source if below else "", re.DOTALL)
            assert caption, f"no description below:\n{cell.source}"
            numbers.append((int(caption[1]), int(caption[2])))
    assert numbers == [(int(path.name[:2]), count + 1) for count in range(len(numbers))] and numbers


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_section_checks_what_it_claims(path):
    """A numbered section with code has an assertion; links between notebooks lead somewhere."""
    notebook = nbformat.read(path, as_version=4)
    number = int(path.name[:2])
    sections: dict[str, str] = {}
    title = ""
    for cell in notebook.cells:
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
            if line.startswith("## "):
                title = line
                assert line.startswith(f"## {number}.{len(sections) + 1} "), line
                sections[title] = ""
        if cell.cell_type == "code" and title:
            sections[title] += cell.source
        for target in re.findall(r"\]\(([^)]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert target.startswith("http") or (path.parent / target).is_file(), target
    for title, code in sections.items():
        assert "assert" in code or not code, title
    assert list(sections)[-1].endswith("What if?")
