"""int8 and packed int4: error bounds, packing, groups, sizes, and values that are hard to store."""

from __future__ import annotations

import helpers
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

GROUP = 64
LARGEST = {"int8": 127, "int4": 15}  # the largest code: so many steps span a group
HALF = np.float16


def stored(backend, x, dtype):
    """The stored fields as NumPy arrays."""
    fields = helpers.part(backend, "core.quantize").quantize(helpers.to(backend, x), dtype)
    return {name: helpers.back(array) for name, array in fields.items()}


def round_trip(backend, x, dtype):
    quantize = helpers.part(backend, "core.quantize")
    return helpers.back(quantize.dequantize(quantize.quantize(helpers.to(backend, x), dtype), dtype, x.shape[-1]))


def bound(x, dtype):
    """The largest error of each number, worked out here from the definition: half a step, plus what rounding scale (and
    minimum) to float16 moves the ends of the range.
    """
    x = x.astype(np.float64)
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], GROUP):
        group = x[..., start : start + GROUP]
        if dtype == "int8":
            low, true_step = np.zeros_like(group[..., 0]), np.abs(group).max(-1) / 127
            shift = 0.0
        else:
            low = group.min(-1).astype(np.float32).astype(HALF).astype(np.float64)
            true_step = np.maximum(group.max(-1) - low, 0) / 15
            shift = np.abs(group.min(-1) - low)
        step = true_step.astype(np.float32).astype(HALF).astype(np.float64)
        limit = step / 2 + LARGEST[dtype] * np.abs(step - true_step) + shift
        out[..., start : start + GROUP] = limit[..., None]
    return out * (1 + 1e-5) + 1e-6 * np.abs(x)  # float32 arithmetic


def assert_within_bound(backend, x, dtype):
    error = np.abs(round_trip(backend, x, dtype).astype(np.float64) - x)
    assert (error <= bound(x, dtype)).all(), (error / np.maximum(bound(x, dtype), 1e-30)).max()


# ---- error ----


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3, 3e4])
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 100, 256])
def test_error_is_at_most_half_a_step(backend, dtype, size, n):
    """|x - x'| <= step / 2 plus the rounding of scale and minimum to float16, for every length and size."""
    x = (np.random.default_rng(n).standard_normal((3, 2, n)) * size / 5).astype(np.float32)
    assert round_trip(backend, x, dtype).shape == x.shape
    assert_within_bound(backend, x, dtype)


def test_a_grid_is_stored_without_error(backend):
    """Numbers that lie on the grid come back exactly: -127 ... 127 in int8, 3 ... 18 in int4."""
    x8 = np.arange(-127, 128, dtype=np.float32)[::4] / 8
    x8 = np.append(x8, -127 / 8).astype(np.float32)
    np.testing.assert_array_equal(round_trip(backend, x8, "int8"), x8)
    x4 = np.arange(3, 19, dtype=np.float32) / 2
    np.testing.assert_array_equal(round_trip(backend, x4, "int4"), x4)


def test_bfloat16_and_float_are_plain_casts(backend):
    """bfloat16 rounds to nearest even with 8 bits; float32 and float64 change nothing."""
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.14159265], np.float64)
    np.testing.assert_array_equal(round_trip(backend, x, "bfloat16"), [1.0, 1.0, 1 + 2**-6, -3.140625])
    np.testing.assert_array_equal(round_trip(backend, x, "float64"), x)
    np.testing.assert_array_equal(round_trip(backend, x, "float32"), x.astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip_property(dtype, data):
    """Whatever numbers within float16's range: the bound holds and nothing becomes infinite."""
    import tpa_ref

    n = data.draw(st.integers(1, 130))
    number = st.one_of(
        st.floats(-60_000, 60_000, width=32), st.floats(-1, 1, width=32), st.sampled_from([0.0, 1e-7, -1e-7, 6e4])
    )
    x = np.array(data.draw(st.lists(number, min_size=n, max_size=n)), np.float32)
    assert np.isfinite(round_trip(tpa_ref, x, dtype)).all()
    assert_within_bound(tpa_ref, x, dtype)


# ---- groups and packing ----


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_each_group_of_64_has_its_own_scale(backend, dtype):
    """A huge number spoils only its own group; the last group may be shorter and is not scaled by its filling."""
    x = np.concatenate([np.full(64, 1000.0), np.linspace(-1, 1, 64), np.linspace(0.5, 0.6, 5)]).astype(np.float32)
    fields = stored(backend, x, dtype)
    assert fields["scale"].shape == (3,)
    span = {"int8": [1000, 1, 0.6], "int4": [0, 2, 0.1]}[dtype]
    expected = np.array(span) / LARGEST[dtype]
    np.testing.assert_allclose(fields["scale"], expected, rtol=2**-10 + 0.005 * (dtype == "int4"), atol=1e-7)
    np.testing.assert_allclose(round_trip(backend, x, dtype)[64:], x[64:], atol=1.01 / LARGEST[dtype])
    np.testing.assert_allclose(round_trip(backend, x, dtype)[128:], x[128:], atol=0.005)


def test_int4_packs_two_numbers_to_a_byte_low_half_first(backend):
    """Number 2i is the low half of byte i, number 2i + 1 the high half; an odd last byte has nothing above."""
    fields = stored(backend, np.array([0, 15, 5, 10, 3], np.float32), "int4")
    assert fields["codes"].dtype == np.uint8
    assert fields["codes"].tolist() == [0xF0, 0xA5, 0x03]
    assert fields["minimum"].tolist() == [0.0] and fields["scale"].tolist() == [1.0]


def test_int4_reads_bytes_it_did_not_write(backend):
    """Decoding by hand: byte 0x21 with scale 0.5 and minimum -1 is (-0.5, 0.0)."""
    fields = {
        "codes": helpers.to(backend, np.array([0x21, 0x0F], np.uint8)),
        "scale": helpers.to(backend, np.array([0.5], HALF)),
        "minimum": helpers.to(backend, np.array([-1.0], HALF)),
    }
    np.testing.assert_array_equal(
        helpers.back(helpers.part(backend, "core.quantize").dequantize(fields, "int4", 3)), [-0.5, 0.0, 6.5]
    )


def test_int8_codes_by_hand(backend):
    """scale = 2 / 127 in float16 = 0.015747...; 1.0 is code 64 (63.5 rounds to even), -2.0 is -127."""
    fields = stored(backend, np.array([1.0, -2.0, 0.5], np.float32), "int8")
    assert fields["codes"].dtype == np.int8 and fields["codes"].tolist() == [64, -127, 32]
    assert fields["scale"].dtype == HALF and fields["scale"][0] == HALF(2 / 127)


@pytest.mark.parametrize(
    ("n", "bytes_by_dtype"), [(1, (4, 2, 3, 5)), (65, (260, 130, 69, 41)), (256, (1024, 512, 264, 144))]
)
def test_bytes_of_a_row_by_hand(backend, n, bytes_by_dtype):
    """n numbers: 4n; 2n; n + 2 ceil(n/64); ceil(n/2) + 4 ceil(n/64). The arrays really take as much."""
    x = np.ones((1, n), np.float32)
    for dtype, expected in zip(("float32", "bfloat16", "int8", "int4"), bytes_by_dtype, strict=True):
        quantize = helpers.part(backend, "core.quantize")
        assert sum(size * kind.itemsize for size, kind in quantize.field_shapes(n, dtype).values()) == expected
        fields = quantize.quantize(helpers.to(backend, x), dtype)
        assert sum(array.nbytes for array in fields.values()) == expected


def test_bytes_of_a_dense_token_of_the_4b_model(backend):
    """K and V of 4 heads of 256: 4096 bytes in bfloat16, 2112 in int8, 1152 in int4."""
    pair = helpers.part(backend, "core.pair").Pair
    assert [pair.dense(4, 256, dtype).token_bytes for dtype in ("bfloat16", "int8", "int4")] == [4096, 2112, 1152]


def test_field_shapes_are_those_of_the_arrays(backend):
    """What the cache allocates is what quantize returns, name by name, size by size, dtype by dtype."""
    quantize = helpers.part(backend, "core.quantize")
    for n in (1, 63, 64, 65, 129):
        for dtype in ("float64", "float32", "bfloat16", "int8", "int4"):
            made = quantize.quantize(helpers.to(backend, np.ones((2, 3, n), np.float32)), dtype)
            expected = {name: (size, kind.name) for name, (size, kind) in quantize.field_shapes(n, dtype).items()}
            assert {name: (x.shape[-1], str(x.dtype).removeprefix("torch.")) for name, x in made.items()} == expected
            assert all(tuple(array.shape[:2]) == (2, 3) for array in made.values())


# ---- values that are hard to store ----


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_zeros_come_back_as_zeros(backend, dtype):
    """A scale of zero divides nothing; a row of zeros beside a full one changes neither."""
    x = np.zeros((2, 70), np.float32)
    x[1] = 3.0
    y = round_trip(backend, x, dtype)
    assert (y[0] == 0).all()
    np.testing.assert_allclose(y[1], 3.0, rtol=2**-10)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.1, 1234.567, -6e4, 1e-6])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_constant_comes_back_up_to_float16(backend, dtype, value):
    """All numbers equal: the error is only that of a float16 (2^-11 relative, 2^-25 absolute) times the code."""
    x = np.full(67, value, np.float32)
    atol = LARGEST[dtype] * 2.0**-25
    np.testing.assert_allclose(round_trip(backend, x, dtype), x, rtol=1.01 * 2**-11, atol=atol)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_scale_below_the_normal_float16_range(backend, dtype):
    """Scales are denormal (below 6e-5) or round to zero: the absolute error stays below codes * 2^-25 + half a step."""
    for size in (3e-3, 1e-4, 1e-5, 4e-6, 1e-6, 1e-8, 1e-30, 1e-42):
        x = (np.linspace(-1, 1, 64) * size).astype(np.float32)
        y = round_trip(backend, x, dtype)
        assert np.isfinite(y).all()
        assert_within_bound(backend, x, dtype)
        assert np.abs(y - x).max() <= size / LARGEST[dtype] + (LARGEST[dtype] + 1) * 2.0**-25 + 2.0**-24


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_an_offset_far_from_zero(backend, dtype):
    """1000 ... 1001: int4 keeps the minimum apart and resolves the difference; int8 cannot, but keeps its bound."""
    x = np.linspace(1000, 1001, 64).astype(np.float32)
    assert_within_bound(backend, x, dtype)
    spread = np.unique(round_trip(backend, x, dtype)).size
    assert spread == 16 if dtype == "int4" else spread <= 2


@pytest.mark.parametrize("size", [7e4, 1e7, 3e38])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_numbers_beyond_float16_never_become_nan_or_infinite(backend, dtype, size):
    """Gemma's activations exceed 65,504. A scale or minimum that overflowed would turn a whole group into NaN; it must
    saturate instead, and keep the sign of what it cannot hold.
    """
    x = np.array([size, -size, size / 2, 1.0], np.float32)
    y = round_trip(backend, x, dtype)
    assert np.isfinite(y).all(), y
    assert y[0] > 0 > y[1]


def test_both_backends_store_the_same_bytes():
    """The codes of one backend are those of the other, so a cache means the same in both."""
    pytest.importorskip("torch")
    tpa_ref, tpa_torch = helpers.backends()
    x = np.random.default_rng(3).standard_normal((5, 131)).astype(np.float32)
    for dtype in ("int8", "int4"):
        ours, theirs = stored(tpa_ref, x, dtype), stored(tpa_torch, x, dtype)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype


def test_bfloat16_is_ml_dtypes_bfloat16():
    """The NumPy backend really holds two bytes a number."""
    from tpa_ref.core.quantize import quantize

    assert quantize(np.ones(3, np.float32), "bfloat16")["x"].dtype == ml_dtypes.bfloat16
