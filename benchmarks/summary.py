"""results/speed.md from what the three benchmarks wrote: python benchmarks/summary.py"""

from __future__ import annotations

import common


def main() -> None:
    parts = ["# Speed\n", "Written by `make benchmarks`; every ratio was measured in one interleaved run.\n"]
    for name in ("decode_attention", "end_to_end", "serving"):
        for suffix in ("", "_gpu"):
            path = common.RESULTS / f"{name}{suffix}.md"
            if path.is_file():
                parts.append(path.read_text(encoding="utf-8"))
    target = common.RESULTS / "speed.md"
    target.write_text("\n".join(parts).replace("\n### ", "\n## "), encoding="utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    common.cli.run(main)
