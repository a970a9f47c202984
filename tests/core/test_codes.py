"""Spectral codes: both backends, and both ways to pack, make the same bytes and read the same numbers from them."""

from __future__ import annotations

import numpy as np
import pytest

from tpa_ref.core import codes


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_few_tokens_are_packed_as_many(tokens):
    """A single token takes another way to the same bytes; numbers that lie on a threshold, and beyond all, too."""
    torch = pytest.importorskip("torch")
    from tpa_torch.core import codes as twin

    rng = np.random.default_rng(tokens)
    for widths in ((5,), (8, 1, 7, 3, 3, 2, 6, 4, 5, 1), tuple(int(width) for width in rng.integers(1, 9, 61))):
        C = rng.normal(size=(1, tokens, len(widths))).astype(np.float32)
        for column, width in enumerate(widths):
            C[0, 0, column] = rng.choice(codes.thresholds(width))
        C[0, -1, 0] = rng.choice([-1e30, 1e30])
        expected = codes.quantize(C, widths)
        got = twin.quantize(torch.from_numpy(C), widths)
        np.testing.assert_array_equal(got.numpy(), expected)
        assert got.dtype == torch.uint8
        np.testing.assert_array_equal(twin.dequantize(got, widths).numpy(), codes.dequantize(expected, widths))
