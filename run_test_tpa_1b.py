#!/usr/bin/env python3
"""`tpa-demo` from a clone: convert a checkpoint, save it, and show what it costs and saves (`tpa_ref/cli/demo.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tpa_ref.cli.demo import run

if __name__ == "__main__":
    run()
