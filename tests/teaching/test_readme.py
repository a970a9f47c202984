"""README and docs/ tell the truth: numbers are those of the result files, flags and links exist, the examples run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import update_readme
from tpa_ref.compress.config import DEFAULT_RATE

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*update_readme.PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")))
}
each_page = pytest.mark.parametrize("page", PAGES)


def by_hand(page: str) -> str:
    """The text without its generated blocks."""
    return update_readme.BLOCK.sub("", page)


# ---- generated blocks ----


@each_page
def test_blocks_are_the_result_files(page):
    """Every marked block is the content of its file; nobody edits numbers by hand. No marker is misspelt."""
    text = PAGES[page]
    assert update_readme.updated(text) == text, "run python scripts/update_readme.py"
    assert text.count("<!-- begin") == text.count("<!-- end -->") == len(update_readme.BLOCK.findall(text))


def test_every_result_is_shown():
    """A table that nobody shows would go stale unseen; the long ones are linked."""
    shown = {match[1] for text in PAGES.values() for match in update_readme.BLOCK.findall(text)}
    linked = {Path(target).name for text in PAGES.values() for target, _ in links(text)}
    missing = [
        path.name
        for path in (ROOT / "results").iterdir()
        if path.suffix in (".md", ".txt") and f"results/{path.name}" not in shown and path.name not in linked
    ]
    assert missing == ["decode_attention.md"]  # it is part of speed.md


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "<!-- begin" in text])
def test_a_changed_number_would_be_seen(page):
    """The check above can fail, on every page."""
    changed = re.sub(r"(<!-- begin [^\n]*\n(?:```\n)?)[^\n]*", r"\1another line", PAGES[page])
    assert changed != PAGES[page] == update_readme.updated(changed)


def test_lines_are_selected():
    """Ranges, single lines, dots for what is left out; a text that is not there is an error."""
    text = "a 1\nb 2\n\nc 3\nd 4\nc 5"
    assert update_readme.selected(text, "a..b, c") == "a 1\nb 2\n\nc 3\n..."
    assert update_readme.selected(text, "c, c") == "...\nc 3\n...\nc 5"
    assert update_readme.selected(text, "b..d") == "...\nb 2\n\nc 3\nd 4\n..."
    for wrong in ("x", "a..x", "c..d, b"):
        with pytest.raises(ValueError, match="no line contains"):
            update_readme.selected(text, wrong)


# ---- numbers in the text ----


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
    text = " ".join(DOCS["tiny-model.md"].split())
    assert f"{unseen:.2f} nats per token, {unseen - seen:.2f} above its training text" in text
    assert f"at least {100 * min(figures['recall'].values()):.1f} % of the recall questions" in text


def rows(text: str) -> list[list[str]]:
    """The cells of every table row."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_ratios_of_settings_are_those_of_real_weights():
    """What the table of settings says of a size is what was measured on 270M; contextual is the tiny model's."""
    measured = json.loads((ROOT / "results" / "gemma_settings.json").read_text())["settings"]
    said = {cells[1]: cells[2] for cells in rows(README[README.index("## Which setting") :])}
    named = {f"rate {rate:g}, size": f"`--prefer size --rate {rate:g}`" for rate in (2.6, 2, 1)} | {
        "rate 4": "`--rate 4`",
        f"rate {DEFAULT_RATE:g}": f"nothing, or `--rate {DEFAULT_RATE:g}`",
        "dense, int8": "`--mode fixed-a --k-rank 16 --v-rank 16 --kv-dtype int8`",
    }
    for name, options in named.items():
        assert said[options] == f"{measured[name]['prose 2048']['ratio']:.1f}", name
    ours, theirs = (measured[name]["prose 2048"] for name in ("rate 2, size", "like KIVI, 4 bits"))
    assert ours["kl"] < theirs["kl"] and ours["ratio"] > 2 * theirs["ratio"]  # "at half its size"
    default = measured[f"rate {DEFAULT_RATE:g}"]
    assert all(default[f"{text} 8192"]["kl"] <= 0.005 for text in ("prose", "code"))
    tiny = json.loads((ROOT / "results" / "tiny_quality.json").read_text())["rows"]
    contextual = next(row for row in tiny if row["name"] == "contextual" and row["rank"] == 2)
    claim = f"{contextual['ratio_vs_windowed']:.1f} times smaller at a KL of {contextual['kl']:.2f}"
    assert claim in " ".join(README.split())


def test_missed_aims_are_those_measured():
    """What docs/speed.md says was reached stands in the summary, and is below the aim."""
    summary = rows((ROOT / "results" / "speed_summary.md").read_text(encoding="utf-8"))
    sizes = summary[0][2:]
    reached = {(cells[0], size): value for cells in summary[2:] for size, value in zip(sizes, cells[2:], strict=True)}
    section = DOCS["speed.md"].split("## Missed aims")[1].split("## ")[0]
    aims = rows(section)[2:]
    assert aims
    for cache, size, aim, value in aims:
        assert reached[cache, size] == value and float(value[:-1]) < float(aim[:-1]), (cache, size)


def test_the_lesson_prints_what_the_readme_shows():
    """`python -m tpa_ref.tpa`, but for the errors, which differ from machine to machine."""
    done = subprocess.run([sys.executable, "-m", "tpa_ref.tpa"], cwd=ROOT, capture_output=True, text=True, check=True)
    block = README[README.index("## Learn TPA") :].split("```\n")[1]
    shown, printed = ([line.split()[:-1] for line in text.splitlines()] for text in (block, done.stdout))
    assert len(shown) >= 5 and [line for line in shown if line not in printed] == []


# ---- flags, links, folders ----


def test_flags_exist():
    """Every option that README and docs/ name is one of the programs'."""
    pytest.importorskip("torch")
    programs = ["run_test_tpa_1b.py", *(f"scripts/{name}.py" for name in ("run_tpa", "full_size", "gpu_check"))]
    known = "".join(
        subprocess.run([sys.executable, name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in programs
    )
    known = set(re.findall(r"--[a-z][a-z-]+", known)) | {"--local-dir"}  # of hf download
    named = {flag for text in PAGES.values() for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}
    assert len(named) > 30 and named <= known, named - known


def test_docs_name_every_flag():
    """docs/cli.md describes all options of the two programs."""
    pytest.importorskip("torch")
    for program in ("run_test_tpa_1b.py", "scripts/run_tpa.py"):
        done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        missing = {flag for flag in re.findall(r"--[a-z][a-z-]+", done.stdout) if f"{flag}" not in DOCS["cli.md"]}
        assert not missing


def links(text: str) -> list[tuple[str, str]]:
    """(target, heading) of every link and image that stays in the repository; code is no link."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)", text)
    return [(target, heading) for target, heading in found if not target.startswith(("http:", "https:"))]


def test_links_are_found():
    """Over line ends, with headings, not to other places, not in code."""
    text = "[a](b.md#c) ![d\ne](f.png) [g](https://h) `[i](j)` [k](#l)\n```\n[m](n)\n```"
    assert links(text) == [("b.md", "c"), ("f.png", ""), ("", "l")]
    assert headings("# A b\n```\n# c\n```\n## D: `e`, f\n") == {"a-b", "d-e-f"}


def headings(text: str) -> set[str]:
    """The anchors GitHub gives to headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@each_page
def test_links_resolve(page):
    """Every relative link leads to a file, and to a heading of it where it names one."""
    for target, heading in links(PAGES[page]):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if heading:
            assert heading in headings(file.read_text(encoding="utf-8")), f"{target}#{heading}"


def test_every_page_is_reached():
    """The README links all of docs/."""
    assert {f"docs/{name}" for name in DOCS} <= {target for target, _ in links(README)}


@each_page
def test_images_have_a_text(page):
    """An image says what it shows to those who do not see it."""
    for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", PAGES[page]):
        assert len(text) > 30, target


@each_page
def test_paths_exist(page):
    """Folders, scripts and modules named in code spans are there. The changelog may name what was."""
    if page == "CHANGELOG.md":
        return
    tops = ("tpa_ref", "cuda", "scripts", "assets", "results", "benchmarks", "notebooks", "docs", "tests")
    inside = ("core", "gemma", "compress", "files", "cli", "fast")
    text = re.sub(r"```.*?```", "", by_hand(PAGES[page]), flags=re.DOTALL)
    for path in re.findall(r"`([\w.-]+/[\w./-]*|\w+\.py)`", text):
        top = path.split("/")[0]
        if "/" not in path or top in tops:
            places = [ROOT]
        elif top in inside:
            places = [ROOT / "tpa_ref", ROOT / "cuda" / "tpa_torch"]
        else:
            continue
        assert any((place / path).exists() for place in places), path


def test_the_map_shows_every_folder():
    """Every path of the map is there, and every folder of the reference is on the map."""
    lines = README[README.index("## Map") :].split("```\n")[1].splitlines()
    inside = [line.split()[0].rstrip("/") for line in lines if line.startswith("  ")]
    tops = [name for line in lines for name in re.match(r"(?:[\w/-]+/ +)*", line)[0].split()]
    assert {"core", "tpa.py"} <= set(inside) and {"tpa_ref/", "cuda/tpa_torch/", "results/"} <= set(tops)
    assert all((ROOT / path).exists() for path in tops + [f"tpa_ref/{name}" for name in inside])
    assert {path.parent.name for path in (ROOT / "tpa_ref").glob("*/__init__.py")} == set(inside) - {"tpa.py"}
    assert (ROOT / "cuda" / "tpa_torch" / "fast").is_dir() and (ROOT / "cuda" / "tpa_torch" / "heal.py").is_file()


@each_page
def test_lines_fit(page):
    """At most 130 characters, but for generated tables, the mathematics, and rows of tables."""
    if page == "docs/math.md":
        return
    long = [line for line in by_hand(PAGES[page]).splitlines() if len(line) > 130 and line[0] != "|"]
    assert not long


# ---- examples ----


@each_page
def test_python_examples_compile(page):
    """No example has a syntax error; those that stand alone are run below."""
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)):
        compile(code, f"{page}, example {number}", "exec")


@pytest.mark.parametrize("backend", ["tpa_torch", "tpa_ref"])
def test_python_example_runs(backend, tmp_path):
    """The example works as printed, in both backends; but for fewer recall questions, which take most of the time."""
    pytest.importorskip("torch" if backend == "tpa_torch" else "numpy")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = code.replace("import tpa_torch as tpa", f"import {backend} as tpa")
    code = code.replace('"tpa_model"', repr(str(tmp_path / "m")))
    code = re.sub(r'(evaluate\(dense, model, "[^"]*")\)', r"\1, recall_prompts=1)", code)
    assert "recall_prompts=1" in code
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'cuda'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m" / "config.json").exists()
