"""Files appear under their name only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import TPAError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when all went well, and vanishes when not."""
    try:
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", dir=path.absolute().parent))
    except OSError as problem:
        raise TPAError(f"save: cannot write in {path.absolute().parent}: {problem.strerror or problem}") from None
    temporary = holder / path.name
    try:
        with writing(path):
            yield temporary
            if path.is_dir() and not temporary.is_dir():
                raise TPAError(f"save: {path} is a folder, a file was expected")
            if path.is_dir():
                path.rename(holder / "replaced")
            try:
                os.replace(temporary, path)
            except OSError:
                if (holder / "replaced").is_dir():
                    (holder / "replaced").rename(path)
                raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@contextmanager
def writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Failures of the disk as one line; `partial` is removed then, and kept when the work is only interrupted."""
    # torch.save says RuntimeError when a disk is full; a long conversion may raise that for other reasons.
    failures = (OSError, SafetensorError, TPAError) if partial else (OSError, SafetensorError, TPAError, RuntimeError)
    try:
        yield
    except failures as problem:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(problem, TPAError):
            raise
        reason = getattr(problem, "strerror", None) or str(problem).split("\n", 1)[0][:120]
        if isinstance(problem, RuntimeError) and shutil.disk_usage(path.absolute().parent).free < 1_000_000:
            reason = "No space left on device"  # which torch.save puts otherwise
        raise TPAError(f"save: cannot write {path}: {reason}") from None
