"""What tests of the compiled functions share: builds of their source, as it is, plain, or with a mistake in it."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")

from tpa_torch.fast.kernels import native

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the source, perhaps with a change in it, and loads it."""

    def make(name, *flags, change=("", "")):
        folder = tmp_path_factory.mktemp(name)
        texts = {name: text.decode() for name, text in native.sources().items()}
        assert any(change[0] in text for text in texts.values())
        for name, text in texts.items():
            (folder / name).write_text(text.replace(*change) if change[0] else text)
        patch = pytest.MonkeyPatch()
        patch.setattr(native, "SOURCE", folder)
        patch.setattr(native, "cache_folder", lambda: folder)
        try:
            found = native.loaded(native.built(COMPILER, [*native.FLAGS, "-march=native", "-fopenmp", *flags]))
        finally:
            patch.undo()
        return found

    return make


@pytest.fixture
def check_mistake(build, monkeypatch):
    """Builds the source with a mistake in it, which the check that is meant for it must see; without one all pass."""

    def run(name, mistakes, checks, *flags):
        built = build("changed", *flags, change=mistakes.get(name, ("", "")))
        monkeypatch.setattr(native, "library", lambda: built)
        if name is None:
            for check in checks.values():
                check(built)
            return
        with pytest.raises(AssertionError):
            checks[name](built)

    return run


@pytest.fixture(scope="module")
def builds(build):
    return {"of this machine": native.library(), "plain": build("plain", "-DTPA_PLAIN", "-O1")}


@pytest.fixture(params=["of this machine", "plain"])
def library(request, builds, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: builds[request.param])
    return builds[request.param]
