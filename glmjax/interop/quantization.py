"""Weights stored as integers with one scale per output row (GLM-130B section 4, chatglm-6b-int4).

Symmetric absmax: scale = max |w| / (2^(bits - 1) - 1) in float16, integers are w / scale rounded to
even. An int4 matrix keeps two columns in a byte, the even one in the high half, as two's complement.
Sources: THUDM/GLM-130B `quantization/`, Hugging Face THUDM/chatglm-6b `quantization.py`.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from glmjax.interop import layout

_BLOCK = 2**21
"""Weights that are quantised at a time."""


def quantize(
    kernel: np.ndarray, inputs: Sequence[int], bits: int, groups: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and float16 scale [groups, *outputs] of a kernel whose axes `inputs` are summed
    over; the first of them is cut into groups with a scale each.

    float16 weights give the bits of the official code, which divides and rounds in float16.
    """
    outputs = [axis for axis in range(kernel.ndim) if axis not in inputs]
    values = np.empty(kernel.shape, np.int8)
    scale = np.empty((groups, *(kernel.shape[axis] for axis in outputs)), np.float16)
    # A block at a time, because all of it in float32 would be large.
    axis = max(outputs, key=lambda axis: kernel.shape[axis])
    length = kernel.shape[axis]
    step = max(1, length * _BLOCK // max(1, kernel.size))

    def quantize_block(first: int) -> None:
        block = (slice(None),) * axis + (slice(first, first + step),)
        rows = (slice(None),) * (1 + outputs.index(axis)) + (slice(first, first + step),)
        numbers, scale[rows] = _quantize(kernel[block], inputs, bits, groups)
        layout.copy_into(values[block], numbers)

    with ThreadPoolExecutor() as executor:
        list(executor.map(quantize_block, range(0, length, step)))
    return values, scale


def _quantize(
    kernel: np.ndarray, inputs: Sequence[int], bits: int, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    at, limit = inputs[0], 2 ** (bits - 1) - 1
    grouped = kernel.reshape(*kernel.shape[:at], groups, -1, *kernel.shape[at + 1 :])
    blocks = _to_float32(np.moveaxis(grouped, at, 0))
    largest = np.abs(blocks).max(axis=tuple(axis + 1 for axis in inputs), keepdims=True)
    scale = (largest / np.float32(limit)).astype(np.float16)
    blocks /= np.where(scale == 0, np.float16(1), scale).astype(np.float32)
    if kernel.dtype == np.float16:
        _round_to_float16(blocks)
    # Only a scale below the normal numbers of float16 is so coarse that this cuts anything.
    values = np.clip(np.rint(blocks, out=blocks), -limit, limit, out=blocks).astype(np.int8)
    outputs = [n for axis, n in enumerate(kernel.shape) if axis not in inputs]
    return np.moveaxis(values, 0, at).reshape(kernel.shape), scale.reshape(groups, *outputs)


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
    values: np.ndarray, scale: np.ndarray, inputs: Sequence[int], dtype: np.typing.DTypeLike
) -> np.ndarray:
    """The kernel of `quantize`, multiplied and rounded in `dtype`.

    The official GPU code multiplies in float16; float32 is what its scale and integers say.
    """
    at, groups = inputs[0], scale.shape[0]
    grouped = values.reshape(
        *values.shape[:at], groups, values.shape[at] // groups, *values.shape[at + 1 :]
    )
    outputs = [1 if i in inputs else n for i, n in enumerate(values.shape)]
    per_group = np.moveaxis(scale.reshape(groups, *outputs), 0, at)
    return (grouped.astype(dtype) * per_group.astype(dtype)).reshape(values.shape)


def pack_int4(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Pairs along an axis in one byte each, from int8 with values -8..7."""
    pairs = np.moveaxis(values, axis, -1)
    even, odd = pairs[..., ::2], pairs[..., 1::2]
    return np.moveaxis((even << 4) | (odd & 0x0F), -1, axis)


def unpack_int4(packed: np.ndarray, axis: int = -1) -> np.ndarray:
    """The inverse of `pack_int4`."""
    pairs = np.moveaxis(packed, axis, -1)
    high, low = pairs >> 4, (pairs << 4) >> 4  # shifts of int8 keep the sign
    values = np.stack([high, low], axis=-1).reshape(*pairs.shape[:-1], -1)
    return np.moveaxis(values, -1, axis)
