#!/usr/bin/env python3
"""`tpa` from a clone: convert, save, load again, generate, talk (`tpa_ref/cli/run.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tpa_ref.cli.run import run

if __name__ == "__main__":
    run()
