#!/usr/bin/env python3
"""Put the committed result files into the README, between their markers; `--check` only compares.

    <!-- begin results/demo.txt -->   ...   <!-- end -->
A .md file is inserted as it is, anything else as a code block.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- begin (results/[\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(readme: str) -> str:
    """The README with every marked block replaced by its file."""

    def block(match: re.Match[str]) -> str:
        path = ROOT / match[2]
        text = path.read_text(encoding="utf-8").strip("\n")
        body = text if path.suffix == ".md" else f"```\n{text}\n```"
        return f"{match[1]}{body}\n{match[3]}"

    return BLOCK.sub(block, readme)


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = updated(before)
    if "--check" in sys.argv:
        sys.exit(0 if before == after else "README.md differs from results/: run python scripts/update_readme.py")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
