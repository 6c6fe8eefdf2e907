"""Integer weights against those of the official kernels, and the spec's worked bytes."""

import numpy as np
import pytest
from golden_cases import read_npz
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.interop.quantization import dequantize, pack_int4, quantize, unpack_int4

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


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pairs_along_any_axis(axis):
    values = np.random.default_rng(0).integers(-8, 8, (4, 6, 2)).astype(np.int8)
    packed = pack_int4(values, axis)
    assert packed.shape[axis] * 2 == values.shape[axis]
    np.testing.assert_array_equal(unpack_int4(packed, axis), values)


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
    kernel = weight.astype(np.float16 if variant == "half" else np.float32).T
    values, scale = quantize(kernel, [0], bits)
    np.testing.assert_array_equal(scale[0], matrix["weight_scale"].astype(np.float16))
    np.testing.assert_array_equal(values.T, matrix["int_values"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_bits(bits, variant):
    matrix = recorded(bits, variant)
    result = dequantize(matrix["int_values"], matrix["weight_scale"][None], [1], np.float32)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, matrix["dequantised"])


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_in_float16_as_on_the_gpu(bits):
    matrix = recorded(bits, "half")
    result = dequantize(matrix["int_values"], matrix["weight_scale"][None], [1], np.float16)
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result, matrix["dequantised_half"])


def test_a_row_of_zeros_has_no_scale():
    kernel = np.array([[0, 1], [0, -2]], np.float16)
    values, scale = quantize(kernel, [0], 8)
    np.testing.assert_array_equal(values, [[0, 64], [0, -127]])
    assert scale[0, 0] == 0 and scale[0, 1] > 0


def test_tiny_scales_do_not_overflow():
    """Below the normal numbers of float16 a scale is so coarse that quotients pass the limit."""
    kernel = np.array([[127.4 * 2**-24], [2**-24]], np.float32)
    values, scale = quantize(kernel, [0], 8)
    assert scale[0, 0] == 2.0**-24 and values.ravel().tolist() == [127, 1]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.sampled_from([4, 8]), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1),
    st.sampled_from([((0,), (8, 3, 5)), ((0, 1), (4, 6, 7)), ((1,), (2, 8, 3)), ((0,), (12, 9))]),
)  # fmt: skip
def test_groups_are_quantised_one_by_one(bits, groups, seed, case):
    """As if each part of the inputs were a matrix of its own. The error is at most half a scale, and
    half the spacing of the float16 quotients below 128."""
    inputs, shape = case
    kernel = np.random.default_rng(seed).standard_normal(shape).astype(np.float16)
    values, scale = quantize(kernel, inputs, bits, groups)
    parts = np.split(kernel, groups, axis=inputs[0])
    for part, numbers, row in zip(
        parts, np.split(values, groups, axis=inputs[0]), scale, strict=True
    ):
        alone, alone_scale = quantize(part, inputs, bits)
        np.testing.assert_array_equal(alone, numbers)
        np.testing.assert_array_equal(alone_scale[0], row)
    error = np.abs(dequantize(values, scale, inputs, np.float32) - kernel.astype(np.float32))
    assert error.max() <= (0.5 + 2**-5) * scale.astype(np.float32).max()
