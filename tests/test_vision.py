"""Images: both backends compute what `transformers` computes, in every mode at full rank, in every layout of a text."""

from __future__ import annotations

import numpy as np
import pytest
import vision_models as vm
from conftest import KINDS, TOLERANCE, in_kind, relative

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """(the model of `transformers`, its folder)."""
    return vm.saved(tmp_path_factory.mktemp("seeing"))


LAYOUTS = {
    "one image in the middle": "9 i 14",
    "first and longer than the window": "i 40",
    "last": "20 i",
    "three with text between": "3 i 5 i 13 i 30",
    "side by side": "4 i i 8",
    "without start and end": "bare 9 bare bare 5",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_whole_text(backend, seeing, layout, kind):
    """Logits of a whole text with images, dense or in any mode at full rank."""
    hf, folder = seeing
    tokens_bq = np.array([vm.text(layout)])
    images = vm.pixels(layout.count("i") + layout.count("bare"))
    model = in_kind(backend, backend.load(folder), kind)
    assert relative(model(tokens_bq, images=images), vm.hf_logits(hf, tokens_bq, images)) < TOLERANCE["transformers"]
