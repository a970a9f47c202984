"""The house keeps its shape: imports point one way and are at the top, files and functions stay short.

Everything is read from the source (`ast`), and every rule is shown to fail on a made-up package.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import ROOT

REF, TORCH = ROOT / "tpa_ref", ROOT / "cuda" / "tpa_torch"
PACKAGES = (REF, TORCH)
# What may import what: everything that stands before it. "": the modules at the top that build on the folders
BASE = ("errors", "trace", "atomic", "lasting")  # which know nothing of the others
ORDER = {
    "tpa_ref": ("core", "gemma", "compress", "files", "", "cli"),
    "tpa_torch": ("core", "fast", "gemma", "files", ""),
}
MOST_LINES, MOST_OF_A_FUNCTION, MOST_OF_ATTEND = 400, 40, 25

# Modules that import one of their own package inside a function -> why
LATE = {
    "tpa_ref.gemma.config": "reading files (`hf_config`) builds on the config",
    "tpa_torch.fast.kernels": "Triton is optional",
}
# Functions that are longer -> why
LONG = {
    "tpa_torch.fast.kernels.triton_kernels.attend_split": "a Triton kernel, which calls no functions of Python",
}


def modules(package: Path) -> dict[str, ast.Module]:
    """{"tpa_ref.core.rope": its syntax tree}; a package is known by its own name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        name = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text("utf-8"))
        found[name].is_package = file.name == "__init__.py"
    return found


def imported(tree: ast.Module, name: str, node: ast.AST, known: set[str]) -> set[str]:
    """The modules that an import statement names; of `from package import x` the module x, if it is one."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = name.split(".") if tree.is_package else name.split(".")[:-1]
    start = base[: len(base) - node.level + 1] if node.level else []
    source = ".".join([*start, *([node.module] if node.module else [])])
    return {inner if (inner := f"{source}.{alias.name}") in known else source for alias in node.names}


def inside_functions(tree: ast.Module) -> set[ast.AST]:
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    return {inner for function in functions for inner in ast.walk(function) if inner is not function}


def imports(package: Path, late: bool = False) -> dict[str, set[str]]:
    """What every module imports when it is imported; late: what it imports inside functions."""
    trees = modules(package)
    found = {}
    for name, tree in trees.items():
        inner = inside_functions(tree)
        nodes = [node for node in ast.walk(tree) if (node in inner) == late]
        found[name] = set().union(*(imported(tree, name, node, set(trees)) for node in nodes))
    return found


def cycles(package: Path) -> list[str]:
    """Modules that can be reached from themselves."""
    graph = imports(package)

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for following in graph.get(todo.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        return seen

    return [name for name in graph if name in reached(name)]


def against_the_order(package: Path, order: tuple[str, ...]) -> list[str]:
    """Imports of a folder that stands later."""

    def place(name: str) -> int:
        parts = name.split(".")[1:]
        if parts and parts[0] in BASE:
            return -1
        return order.index(parts[0] if parts and parts[0] in order else "")

    return [
        f"{name} imports {other}"
        for name, others in imports(package).items()
        for other in sorted(others)
        if other.split(".")[0] == package.name and place(name) < place(other)
    ]


def late_imports(package: Path) -> set[str]:
    """Modules that import one of our packages inside a function."""
    ours = {package.name, "tpa_ref", "tpa_torch"}
    return {name for name, others in imports(package, late=True).items() if ours & {x.split(".")[0] for x in others}}


def long_files(package: Path) -> list[str]:
    counts = {
        str(file.relative_to(package.parent)): file.read_text("utf-8").count("\n") for file in package.rglob("*.py")
    }
    return [f"{name}: {count}" for name, count in counts.items() if count > MOST_LINES]


def long_functions(package: Path) -> dict[str, int]:
    """{"module.function": its lines} of those that are too long."""
    return {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in modules(package).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MOST_OF_A_FUNCTION
    }


def lines_of_code(file: Path, function: str) -> int:
    """Lines of `Class.method` without its docstring, comments and blank lines."""
    cls, method = function.split(".")
    text = file.read_text("utf-8")
    body = next(node.body for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == cls)
    node = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == method)
    first = node.body[1] if ast.get_docstring(node) else node.body[0]
    lines = text.splitlines()[first.lineno - 1 : node.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)


@each_package
def test_no_import_cycles(package):
    assert cycles(package) == []


@each_package
def test_folders_import_one_way(package):
    assert against_the_order(package, ORDER[package.name]) == []


def test_the_reference_knows_no_torch():
    """No module of tpa_ref imports torch, or tpa_torch, when it is imported; tpa_torch not even later."""
    now, later = imports(REF), imports(REF, late=True)
    roots = {name: {other.split(".")[0] for other in others} for name, others in now.items()}
    assert not [name for name, others in roots.items() if others & {"torch", "triton", "tpa_torch"}]
    assert not [name for name, others in later.items() if "tpa_torch" in {other.split(".")[0] for other in others}]


def test_our_own_packages_are_imported_at_the_top():
    """Inside functions stand optional packages of others alone; the table names every exception and no other."""
    assert set().union(*map(late_imports, PACKAGES)) == set(LATE)


@each_package
def test_files_are_short(package):
    assert long_files(package) == []


def test_functions_are_short():
    found = {name: lines for package in PACKAGES for name, lines in long_functions(package).items()}
    assert set(found) == set(LONG), found


@pytest.mark.parametrize(
    "file", [REF / "gemma" / "model.py", TORCH / "gemma" / "model.py"], ids=["tpa_ref", "tpa_torch"]
)
def test_attention_can_be_read_at_a_glance(file):
    assert 5 < lines_of_code(file, "Model.attend") <= MOST_OF_ATTEND


# ---- every rule can fail ----


def test_what_is_wrong_is_seen(tmp_path):
    """A cycle, an import of a later folder, one inside a function, a long file and a long function."""
    package = tmp_path / "made"
    (package / "core").mkdir(parents=True)
    (package / "gemma").mkdir()
    source = {
        "__init__.py": "from .gemma.c import z",
        "core/__init__.py": "",
        "core/a.py": "from .b import x",
        "core/b.py": "from . import a\nimport torch",
        "core/d.py": "from ..gemma import c\n" + "\n" * MOST_LINES,
        "core/e.py": "def f():\n    from .d import x\n" + "    x()\n" * 40,
        "gemma/__init__.py": "",
        "gemma/c.py": "from ..core.e import f\nclass Model:\n    def attend(self):\n        '''Doc.'''\n"
        "        # why\n\n        f()\n        f(\n        )\n",
    }
    for name, text in source.items():
        (package / name).write_text(text)
    assert cycles(package) == ["made.core.a", "made.core.b"]
    assert against_the_order(package, ("core", "gemma", "")) == ["made.core.d imports made.gemma.c"]
    assert late_imports(package) == {"made.core.e"}
    assert [line.split(":")[0] for line in long_files(package)] == ["made/core/d.py"]
    assert long_functions(package) == {"made.core.e.f": 42}
    assert "torch" in imports(package)["made.core.b"]
    assert lines_of_code(package / "gemma" / "c.py", "Model.attend") == 3
