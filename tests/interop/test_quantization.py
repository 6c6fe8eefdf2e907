"""Integer weights against those of the official kernels, and the spec's worked bytes."""

import numpy as np
import pytest
from golden_cases import read_npz
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.interop.quantization import Integers, dequantize, pack_int4, quantize, unpack_int4

SCHEMES = ["absmax", "zeropoint"]
VARIANTS = ["half", "float", "float_weight_half_scale"]


def recorded(bits: int, variant: str) -> dict[str, np.ndarray]:
    """What the official kernels made of one matrix."""
    matrix, start = read_npz("chatglm6b_quantisation", "matrix"), f"int{bits}.{variant}."
    return {key.removeprefix(start): x for key, x in matrix.items() if key.startswith(start)}


def test_unpacked_bytes():
    packed = np.array([[30, 121, -43]], np.int8)
    np.testing.assert_array_equal(unpack_int4(packed), [[1, -2, 7, -7, -3, 5]])
    np.testing.assert_array_equal(pack_int4(unpack_int4(packed)), packed)
    assert unpack_int4(packed).dtype == pack_int4(packed).dtype == np.int8


def test_every_byte_is_unpacked():
    packed = np.arange(-128, 128).astype(np.int8)[None]
    high, low = np.divmod(packed.astype(int) % 256, 16)
    expected = np.stack([high, low], -1).reshape(1, -1)
    np.testing.assert_array_equal(
        unpack_int4(packed), np.where(expected > 7, expected - 16, expected)
    )
    np.testing.assert_array_equal(pack_int4(unpack_int4(packed)), packed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_int4_values(variant):
    matrix = recorded(4, variant)
    np.testing.assert_array_equal(unpack_int4(matrix["weight"]), matrix["int_values"])


@pytest.mark.parametrize("variant", ["half", "float_weight_half_scale"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bits(bits, variant):
    """float16 weights are divided in float16, others in float32."""
    matrix = recorded(bits, variant)
    weight = read_npz("chatglm6b_quantisation", "matrix")["weight"]
    kernel = weight.astype(np.float16 if variant == "half" else np.float32)
    values, scale, zero = quantize(kernel, 1, bits)
    assert zero is None
    np.testing.assert_array_equal(scale[0], matrix["weight_scale"].astype(np.float16))
    np.testing.assert_array_equal(values, stored(matrix, bits))


def stored(matrix: dict[str, np.ndarray], bits: int) -> np.ndarray:
    return matrix["weight"] if bits == 4 else matrix["int_values"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_bits(bits, variant):
    matrix = recorded(bits, variant)
    integers = Integers(stored(matrix, bits), matrix["weight_scale"][None], None)
    result = dequantize(integers, 1, bits, np.float32)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, matrix["dequantised"])


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_in_float16_as_on_the_gpu(bits):
    matrix = recorded(bits, "half")
    integers = Integers(stored(matrix, bits), matrix["weight_scale"][None], None)
    result = dequantize(integers, 1, bits, np.float16)
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result, matrix["dequantised_half"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_of_zeros_has_no_scale(scheme):
    kernel = np.array([[0, 0], [1, -2]], np.float16)
    integers = quantize(kernel, 1, 8, scheme=scheme)
    np.testing.assert_array_equal(dequantize(integers, 1, 8, np.float32)[0], 0)
    assert integers.scale[0, 0] == 0 and integers.scale[0, 1] > 0


def test_tiny_scales_do_not_overflow():
    """Below the normal numbers of float16 a scale is so coarse that quotients pass the limit."""
    kernel = np.array([[127.4 * 2**-24, 2**-24]], np.float32)
    values, scale, _ = quantize(kernel, 1, 8)
    assert scale[0, 0] == 2.0**-24 and values.ravel().tolist() == [127, 1]


def test_zero_point_by_hand():
    """GLM-130B equations 9 to 11 for weights -1, 0, 2 and 6: with 4 bits s = 7 / 14,
    z = round(-1 / s) + 7 = 5 and q = round(x / s) - z = -7, -5, -1, 7."""
    integers = quantize(np.array([[-1, 0, 2, 6]], np.float16), 1, 4, scheme="zeropoint")
    assert integers.scale == 0.5 and integers.zero == 5
    assert unpack_int4(integers.values).tolist() == [[-7, -5, -1, 7]]
    np.testing.assert_array_equal(dequantize(integers, 1, 4, np.float32), [[-1, 0, 2, 6]])


def test_weights_that_are_all_one_number():
    kernel = np.array([[0.75] * 4, [-3.0] * 4], np.float32)
    integers = quantize(kernel, 1, 4, scheme="zeropoint")
    np.testing.assert_array_equal(dequantize(integers, 1, 4, np.float32), kernel)


@st.composite
def kernels(draw) -> tuple[np.ndarray, int, int]:
    """A kernel [*outputs, *inputs], the number of its inputs, and of groups."""
    shape, inputs = draw(st.sampled_from(
        [((3, 5, 8), 1), ((7, 4, 6), 2), ((2, 3, 8), 1), ((9, 4), 1), ((1, 8, 2), 2)]
    ))  # fmt: skip
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = random.standard_normal(shape) * random.choice(
        [1e-3, 1.0, 30.0], (shape[0], 1, 1)[: len(shape)]
    )
    offset = draw(st.sampled_from([0.0, -0.5, 3.0]))
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    return (weights + offset).astype(dtype), inputs, draw(st.sampled_from([1, 2, 4]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from([4, 8]), st.sampled_from(SCHEMES), kernels())
def test_groups_are_quantised_one_by_one(bits, scheme, case):
    """As if each part of the inputs were a matrix of its own."""
    kernel, inputs, groups = case
    whole = quantize(kernel, inputs, bits, groups, scheme)
    first = kernel.ndim - inputs
    parts = np.split(kernel, groups, axis=first)
    if bits == 4 and parts[0].shape[-1] % 2:
        return  # a pair of one group shares a byte with another
    for number, part in enumerate(parts):
        alone = quantize(np.ascontiguousarray(part), inputs, bits, 1, scheme)
        np.testing.assert_array_equal(alone.values, np.split(whole.values, groups, first)[number])
        np.testing.assert_array_equal(alone.scale[0], whole.scale[number])
        if scheme == "zeropoint":
            np.testing.assert_array_equal(alone.zero[0], whole.zero[number])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([4, 8]), st.sampled_from(SCHEMES), kernels())
def test_errors_are_half_a_step(bits, scheme, case):
    """A weight is off by rounding, half a step; by what float16 takes off the scale, 2^-11 of up to
    2^(bits - 1) - 1 steps, or twice as many from end to end; and, of float16 by absmax, by rounding of
    the quotient to 11 bits. A scale is off by half the smallest number of float16 at least, and
    float32 products by 2^-22 of the weight."""
    kernel, inputs, groups = case
    integers = quantize(kernel, inputs, bits, groups, scheme)
    limit = 2 ** (bits - 1) - 1
    span = 2 * limit if scheme == "zeropoint" else limit
    rounding = limit * 2.0**-11 if kernel.dtype == np.float16 and scheme == "absmax" else 0
    rows = kernel.astype(np.float32).reshape(*kernel.shape[: kernel.ndim - inputs], groups, -1)
    found = dequantize(integers, inputs, bits, np.float32).reshape(rows.shape)
    scale = np.moveaxis(integers.scale, 0, -1)[..., None].astype(np.float32)
    allowed = (0.5 + span * 2.0**-11 + rounding) * scale + span * 2.0**-25
    assert np.all(np.abs(found - rows) <= allowed + 2.0**-22 * np.abs(rows))
    numbers = unpack_int4(integers.values) if bits == 4 else integers.values
    ends = numbers.reshape(rows.shape)
    assert np.all(np.abs(ends.astype(int)) <= limit)
    if scheme == "zeropoint":
        assert np.all(ends.min(-1) == -limit)
    # Unless the scale is below the normal numbers of float16, or all weights are one number, the
    # largest has the largest integer too, or of zero-point the one before.
    fine = (scale[..., 0] >= 2.0**-14) & (np.ptp(rows, -1) >= (limit + 1) * scale[..., 0])
    largest = (ends if scheme == "zeropoint" else np.abs(ends)).max(-1)
    assert np.all(largest[fine] >= limit - (scheme == "zeropoint"))
