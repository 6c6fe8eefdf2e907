"""Integer weights against those of the official kernels, and the spec's worked bytes."""

import numpy as np
import pytest
from golden_cases import read_npz

from glmjax.interop.quantization import dequantize, unpack_int4

VARIANTS = ["half", "float", "float_weight_half_scale"]


def test_unpacked_bytes():
    packed = np.array([[30, 121, -43]], np.int8)
    np.testing.assert_array_equal(unpack_int4(packed), [[1, -2, 7, -7, -3, 5]])
    assert unpack_int4(packed).dtype == np.int8


def test_every_byte_is_unpacked():
    packed = np.arange(-128, 128).astype(np.int8)[None]
    high, low = np.divmod(packed.astype(int) % 256, 16)
    expected = np.stack([high, low], -1).reshape(1, -1)
    np.testing.assert_array_equal(
        unpack_int4(packed), np.where(expected > 7, expected - 16, expected)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_int4_values(variant):
    matrix = read_npz("chatglm6b_quantisation", "matrix")
    np.testing.assert_array_equal(
        unpack_int4(matrix[f"int4.{variant}.weight"]), matrix[f"int4.{variant}.int_values"]
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_dequantised_bits(bits, variant):
    matrix = read_npz("chatglm6b_quantisation", "matrix")
    values, scale, *expected = (
        matrix[f"{bits}.{variant}.{name}"] for name in ("int_values", "weight_scale", "dequantised")
    )
    result = dequantize(values, scale, np.float32)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected[0])


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_dequantised_in_float16_as_on_the_gpu(bits):
    matrix = read_npz("chatglm6b_quantisation", "matrix")
    result = dequantize(
        matrix[f"{bits}.half.int_values"], matrix[f"{bits}.half.weight_scale"], np.float16
    )
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result, matrix[f"{bits}.half.dequantised_half"])
