"""Weights stored as integers with scales for each output row (GLM-130B section 4, chatglm-6b-int4).

Absmax: scale = max |w| / (2^(bits - 1) - 1) in float16, integers are w / scale rounded to even.
Zero-point (GLM-130B equations 9 to 11): scale = (max - min) / (2^bits - 2) in float16,
zero = round(min / scale) + 2^(bits - 1) - 1, integers are round(w / scale) - zero.
An int4 matrix keeps two columns in a byte, the even one in the high half, as two's complement.
Sources: THUDM/GLM-130B `quantization/`, Hugging Face THUDM/chatglm-6b `quantization.py`.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

_BLOCK = 2**17
"""Weights that are quantised at a time: as many as fit a processor's own cache in float32."""


class Integers(NamedTuple):
    """A kernel as integers [*outputs, *inputs], of 4 bits packed; scale and zero [group, *outputs]."""

    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None


def quantize(
    kernel: np.ndarray,
    num_inputs: int,
    bits: int,
    groups: int = 1,
    scheme: Literal["absmax", "zeropoint"] = "absmax",
) -> Integers:
    """A kernel [*outputs, *inputs], of whose axes the last `num_inputs` are summed over, as integers;
    the first of these is cut into groups with a scale each.

    float16 weights give, by absmax, the bits of the official code, which divides and rounds in
    float16.
    """
    outputs = kernel.shape[: kernel.ndim - num_inputs]
    per_byte = 8 // bits
    values = np.empty((*kernel.shape[:-1], kernel.shape[-1] // per_byte), np.int8)
    scale = np.empty((groups, *outputs), np.float16)
    zero = np.empty((groups, *outputs), np.float32) if scheme == "zeropoint" else None
    # A block at a time, because all of it in float32 would be large, and slow.
    axis = outputs.index(max(outputs))
    step = max(1, outputs[axis] * _BLOCK // max(1, kernel.size))

    def quantize_block(first: int) -> None:
        block = (slice(None),) * axis + (slice(first, first + step),)
        weights = kernel[block]
        rows = weights.reshape(-1, groups, math.prod(kernel.shape[-num_inputs:]) // groups)
        numbers, row_scale, row_zero = _quantize(rows, bits, scheme)
        if bits == 4:
            numbers = pack_int4(numbers.reshape(len(numbers), -1))
        values[block] = numbers.reshape(*weights.shape[:-1], -1)
        per_group = (groups, *weights.shape[: len(outputs)])
        scale[:, *block] = row_scale.T.reshape(per_group)
        if zero is not None:
            zero[:, *block] = row_zero.T.reshape(per_group)

    with ThreadPoolExecutor() as executor:
        list(executor.map(quantize_block, range(0, outputs[axis], step)))
    return Integers(values, scale, zero)


def _quantize(
    rows: np.ndarray, bits: int, scheme: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8 values [row, group, input], float16 scales and float32 zeros [row, group]."""
    limit = 2 ** (bits - 1) - 1
    numbers = _to_float32(rows)
    if scheme == "zeropoint":
        smallest, largest = numbers.min(-1, keepdims=True), numbers.max(-1, keepdims=True)
        scale = ((largest - smallest) / np.float32(2 * limit)).astype(np.float16)
        # Where all weights are one number, that is the scale.
        scale = np.where(scale == 0, np.abs(largest).astype(np.float16), scale)
        steps = np.where(scale == 0, np.float16(1), scale).astype(np.float32)
        zero = np.rint(smallest / steps) + np.float32(limit)
    else:
        largest = np.abs(numbers).max(-1, keepdims=True)
        scale = (largest / np.float32(limit)).astype(np.float16)
        steps = np.where(scale == 0, np.float16(1), scale).astype(np.float32)
        zero = np.zeros_like(steps)
    numbers /= steps
    if scheme == "absmax" and rows.dtype == np.float16:
        _round_to_float16(numbers)
    np.rint(numbers, out=numbers)
    if scheme == "zeropoint":
        numbers -= zero
    # A scale that float16 rounded down cuts the last of zero-point; of absmax only one below the
    # normal numbers of float16 is so coarse that anything is cut.
    values = np.clip(numbers, -limit, limit, out=numbers).astype(np.int8)
    return values, scale[..., 0], zero[..., 0]


def _to_float32(numbers: np.ndarray) -> np.ndarray:
    """A copy in float32. numpy converts float16 value by value; here finite ones are moved to where
    float32 has its sign, exponent and fraction, and the bias of the exponent is corrected."""
    if numbers.dtype != np.float16:
        return numbers.astype(np.float32)
    bits = numbers.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= ~0x70001FFF
    result = bits.view(np.float32)
    result *= np.float32(2.0**112)
    return result


def _round_to_float16(numbers: np.ndarray) -> None:
    """Rounds float32 to the fraction of float16 in place, ties to even; exponents stay, and what is
    below the normal numbers of float16 keeps more digits than it has."""
    bits = numbers.view(np.int32)
    bits += ((bits >> 13) & 1) + 0xFFF
    bits &= ~0x1FFF


def dequantize(
    integers: Integers, num_inputs: int, bits: int, dtype: np.typing.DTypeLike
) -> np.ndarray:
    """The kernel of `quantize`, multiplied and rounded in `dtype`.

    The official GPU code multiplies in float16; float32 is what its scale and integers say.
    """
    values, scale, zero = integers
    if bits == 4:
        values = unpack_int4(values)
    groups, outputs = scale.shape[0], values.shape[: values.ndim - num_inputs]
    grouped = values.reshape(*outputs, groups, -1)
    if zero is None:
        numbers = grouped.astype(dtype)
    else:
        numbers = (grouped + np.moveaxis(zero, 0, -1)[..., None]).astype(dtype)
    return (numbers * np.moveaxis(scale, 0, -1)[..., None].astype(dtype)).reshape(values.shape)


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Pairs along the last axis in one byte each, from int8 with values -8..7."""
    return (values[..., ::2] << 4) | (values[..., 1::2] & 0x0F)


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_int4`."""
    high, low = packed >> 4, (packed << 4) >> 4  # shifts of int8 keep the sign
    return np.stack([high, low], axis=-1).reshape(*packed.shape[:-1], -1)
