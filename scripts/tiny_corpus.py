"""The text of the tiny model: what this project's Python environment carries, split so that nothing leaks.

Language reference topics (`pydoc_data.topics`), docstrings and block comments of the standard library, the docstrings
of built-in and extension modules, and docstrings of the installed packages in `PACKAGES`. One module or topic is one
document. Near-duplicates are dropped by whitespace-normalised 24-grams, and documents go to training, planner-holdout
or evaluation by a hash of their name.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import os
import random
import sys
import tokenize
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from tpa_ref.compress import recall

SHINGLE = 24  # words; two documents that share one such run are near-duplicates there
SPLITS = ("train", "holdout", "evaluation")
# Permissively licensed packages that come with the pinned dependencies and are richly documented.
PACKAGES = ("numpy", "torch", "sympy", "networkx", "matplotlib")
SKIPPED = {"site-packages", "pydoc_data", "idlelib", "lib2to3"}


def topics() -> dict[str, str]:
    """The language reference that `help()` shows, by topic."""
    from pydoc_data.topics import topics as found

    return {f"topic {name}": text for name, text in found.items()}


def source_documents(root: Path) -> dict[str, str]:
    """Docstrings and block comments of every module below `root`, one document a module, in order of appearance."""
    documents = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root.parent if root.name in PACKAGES else root).as_posix()
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
            pieces = docstrings(tree) + block_comments(source)
        except (SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError, RecursionError):
            continue  # the standard library's own tests hold files that are broken on purpose
        text = "\n\n".join(piece for _, piece in sorted(pieces))
        if len(text) >= 200:
            documents[f"module {name}"] = text
    return documents


def docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, 'name\\n\\ndocstring') of every module, class and function that has one."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            name = f"{node.name}\n" if not isinstance(node, ast.Module) else ""
            found.append((getattr(node, "lineno", 0), name + text))
    return found


def block_comments(source: str, least: int = 120) -> list[tuple[int, str]]:
    """(line, text) of runs of comment lines that are long enough to be prose."""
    found: list[tuple[int, str]] = []
    run: list[str] = []
    start = last = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.strip()[0] != "#":
            continue
        if token.start[0] != last + 1 and run:
            found.append((start, "\n".join(run)))
            run = []
        if not run:
            start = token.start[0]
        run.append(token.string.lstrip("#!:").removeprefix(" ").rstrip())
        last = token.start[0]
    found.append((start, "\n".join(run)))
    return [(line, text) for line, text in found if len(text) >= least and not set(text) <= set("#-=*~ \n")]


def builtin_documents() -> dict[str, str]:
    """Docstrings of modules that are written in C, which no source file carries."""
    documents = {}
    for name in sorted(sys.stdlib_module_names):
        if name in ("antigravity", "this") or name.startswith(("_test", "_xx", "idlelib", "lib2to3", "turtledemo")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except ImportError:
            continue
        if (getattr(module, "__file__", None) or "").endswith(".py"):
            continue
        pieces = [inspect.getdoc(module) or ""]
        for member, value in sorted(vars(module).items()):
            pieces.append(_described(member, value))
            if inspect.isclass(value):
                pieces += [_described(f"{member}.{name}", part) for name, part in sorted(vars(value).items())]
        text = "\n\n".join(dict.fromkeys(piece for piece in pieces if piece))
        if len(text) >= 200:
            documents[f"builtin {name}"] = text
    return documents


def _described(name: str, value: object) -> str:
    if not callable(value) or not isinstance(getattr(value, "__doc__", None), str):
        return ""
    return f"{name}\n{inspect.getdoc(value)}"


def drop_near_duplicates(documents: dict[str, str]) -> dict[str, str]:
    """Remove every paragraph that shares a whitespace-normalised run of 24 words with an earlier one."""
    seen: set[int] = set()
    kept = {}
    for name, text in documents.items():
        paragraphs = []
        for paragraph in text.split("\n\n"):
            words = paragraph.split()
            runs = {hash(" ".join(words[i : i + SHINGLE])) for i in range(max(1, len(words) - SHINGLE + 1))}
            if not runs & seen:
                paragraphs.append(paragraph)
            seen |= runs
        if sum(map(len, paragraphs)) >= 200:
            kept[name] = "\n\n".join(paragraphs).strip()
    return kept


def split_of(name: str) -> str:
    """Where a document goes: 90 % training, 4 % planner-holdout, 6 % evaluation, by a hash of its name."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "train" if bucket < 90 else "holdout" if bucket < 94 else "evaluation"


def package_documents(name: str) -> dict[str, str]:
    """The documents of one installed package; none where it is absent."""
    spec = importlib.util.find_spec(name)
    return source_documents(Path(spec.origin).parent) if spec and spec.origin else {}


def sources() -> list[str]:
    """What the text comes from, with versions."""
    present = [name for name in PACKAGES if importlib.util.find_spec(name)]
    return [f"Python {sys.version.split()[0]}", *(f"{name} {metadata.version(name)}" for name in present)]


def licenses() -> dict[str, str]:
    """The licence text of each package that text is taken from, as it is installed."""
    found = {}
    for name in PACKAGES:
        if importlib.util.find_spec(name):
            files = [path for path in metadata.files(name) or [] if path.name.startswith("LICENSE")]
            found[name] = min(files, key=lambda path: len(path.parts)).read_text("utf-8")
    return found


def collect() -> dict[str, dict[str, str]]:
    """{split: {document name: text}} of everything above. Deterministic for one Python and one set of packages."""
    documents = topics() | builtin_documents() | source_documents(Path(os.__file__).parent)
    for package in PACKAGES:
        documents |= package_documents(package)
    documents = drop_near_duplicates(documents)
    splits: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for name, text in documents.items():
        splits[split_of(name)][name] = text
    return splits


def recall_document(rng: random.Random, filler: str, characters: int, facts: int = 12) -> Iterator[tuple[str, bool]]:
    """Pieces (text, is it an answer?) of one document of the recall task (`tpa_ref.compress.recall`): facts, then
    rounds of questions with stretches of text between.

    A round asks many questions, because only answers teach; the stretches are long enough that the facts (and the
    answers of the round before) lie beyond a local layer's window.
    """
    chosen = dict(zip(rng.sample(recall.KEYS, facts), rng.sample(recall.VALUES, facts), strict=True))
    for key, value in chosen.items():
        yield recall.statement(key, value), False
    done = 0
    while done < characters:
        for _ in range(rng.randint(4, 16)):
            key = rng.choice(list(chosen))
            yield recall.question(key), False
            yield f" {chosen[key]}", True
            yield ".\n", False
            done += 24
        length = rng.choice((60, 300, 600, 1200))
        start = rng.randrange(len(filler) - length)
        yield filler[start : start + length] + "\n", False
        done += length
