"""The two commands, called in this process: what a test needs of `subprocess.run`, without importing torch anew."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass
class Done:
    """What a command did."""

    returncode: int
    stdout: str
    stderr: str


def call(command: Callable[[], None], *arguments: Any, cwd: Path, stdin: str = "") -> Done:
    """Run a command in a folder, with arguments and standard input."""
    out, err, code, before = io.StringIO(), io.StringIO(), 0, os.getcwd()
    argv = [command.__module__, *map(str, arguments)]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "stdin", io.StringIO(stdin)):
                command()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os.chdir(before)
    return Done(code, out.getvalue(), err.getvalue())


def check_refused(done: Done, named: str, folder: Path, before: list[Path]) -> None:
    """Exit code 2, one line on stderr that names the thing, no traceback, nothing left behind."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert named in done.stderr and "Traceback" not in done.stderr
    assert sorted(folder.rglob("*")) == before
