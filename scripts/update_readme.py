#!/usr/bin/env python3
"""Put the committed result files into README.md and docs/*.md, between their markers; `--check` only compares.

    <!-- begin results/demo.txt -->                                   ...   <!-- end -->
    <!-- begin results/demo.txt lines converted, KV cache..recall --> ...   <!-- end -->
A .md file is inserted as it is, anything else as a code block. `lines` names ranges in the order of the file, each from
the next line that contains its first text to the next that contains its last; dots show what is left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- begin (results/[\w.]+)(?: lines ([^\n]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(page: str) -> str:
    """The page with every marked block replaced by its file, or by the lines of it that the marker names."""

    def block(match: re.Match[str]) -> str:
        path = ROOT / match[2]
        text = path.read_text(encoding="utf-8").strip("\n")
        text = selected(text, match[3]) if match[3] else text
        body = text if path.suffix == ".md" else f"```\n{text}\n```"
        return f"{match[1]}{body}\n{match[4]}"

    return BLOCK.sub(block, page)


def selected(text: str, ranges: str) -> str:
    r"""The lines that the ranges name. Blank lines left out stay one blank line, others become dots.

    >>> selected("a 1\nb 2\n\nc 3\nd 4\ne 5", "b, c..d")
    '...\nb 2\n\nc 3\nd 4\n...'
    """
    lines = text.splitlines()

    def find(word: str, start: int) -> int:
        for number in range(start, len(lines)):
            if word in lines[number]:
                return number
        raise ValueError(f"no line contains {word!r} from line {start + 1} on: {text[:60]!r} ...")

    def gap(left_out: list[str]) -> list[str]:
        return (["..."] if any(line.strip() for line in left_out) else [""]) if left_out else []

    shown: list[str] = []
    end = 0
    for words in ranges.split(", "):
        first, _, last = words.partition("..")
        start = find(first, end)
        shown += gap(lines[end:start])
        end = find(last or first, start) + 1
        shown += lines[start:end]
    return "\n".join(shown + gap(lines[end:]))


def main() -> None:
    differing = []
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = updated(before)
        if before != after:
            differing.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if "--check" in sys.argv and differing:
        sys.exit(f"{', '.join(differing)} differ from results/: run python scripts/update_readme.py")


if __name__ == "__main__":
    main()
