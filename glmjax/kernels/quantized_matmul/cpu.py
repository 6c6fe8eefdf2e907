"""Products of float32 numbers with narrow weights on CPUs, where reading the weights is all the work.

XLA for CPUs is as fast as memory at products of int8 with int8 whose weights lie as [outputs, inputs],
and converts integers slower than it would read floats. So it is the numbers that become integers: a
row of x is its largest magnitude / 127 times

    d_1 + d_2 / 254 + d_3 / 254^2,      digits d in -127 .. 127

where each digit is what the one before left, at most a half, times 254. What is left in the end is
at most a half of the last place, 2^-24 of the row's largest magnitude, and the float32 arithmetic that
finds the digits loses as much again: 23 bits. The products of integers and their int32 sums are exact
for fewer than 2^31 / (127 128) = 132,104 inputs.

Weights of 4 bits are unpacked, and others that no fast product takes are converted, a few rows at a
time, so that they stay in the processor's cache.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from glmjax.kernels.quantized_matmul.reference import dequantise, halves

AT_A_TIME = 2**19
"""Weights that are converted at a time: two megabytes as float32."""


def multiply(
    equation: str, x: jax.Array, values: jax.Array, scale: jax.Array, zero: jax.Array | None
) -> jax.Array:
    """As `reference.multiply`, in float32.

    Only weights with one scale for all inputs are multiplied as integers: groups need sums of their
    own, and more products than conversions would cost.
    """
    x_MI = _rows_and_inputs(equation, x)
    outputs = values.shape[: scale.ndim - 1]
    values_OI = values.reshape(math.prod(outputs), -1)
    scale_OG = scale.reshape(len(scale), -1).T.astype(jnp.float32)
    zero_OG = None if zero is None else zero.reshape(scale_OG.shape[::-1]).T
    product = _by_digits if len(scale) == 1 else _by_floats
    return _restore(equation, x, product(x_MI, values_OI, scale_OG, zero_OG), outputs)


def multiply_narrow(equation: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    """einsum(equation, x, weights) in float32 for weights of 16 bits with axes in any order."""
    _, letters, _ = equation.replace("->", ",").split(",")
    _, outputs, inputs = _letters(equation)
    if letters != outputs + inputs:
        return _a_few_inputs_at_a_time(equation, x, weights)
    x_MI = _rows_and_inputs(equation, x)
    weights_OI = weights.reshape(-1, x_MI.shape[1])
    if weights.dtype == jnp.bfloat16:
        y_OM = _by_terms(x_MI, weights_OI)
    else:
        y_OM = _a_few_at_a_time(
            lambda w_oI: jnp.einsum("oi,mi->om", w_oI.astype(jnp.float32), x_MI), weights_OI
        )
    return _restore(equation, x, y_OM, weights.shape[: len(outputs)])


def _by_digits(
    x_MI: jax.Array, values_OJ: jax.Array, scale_O1: jax.Array, zero_O1: jax.Array | None
) -> jax.Array:
    """[O, M] by products of integers."""
    unit_M = jnp.max(jnp.abs(x_MI), 1) / 127
    rest_MI = x_MI / jnp.where(unit_M == 0, 1, unit_M)[:, None]
    digits = []
    for _ in range(3):
        digits.append(jnp.round(rest_MI))
        rest_MI = (rest_MI - digits[-1]) * 254
    digits_DI = jnp.concatenate(digits).astype(jnp.int8)

    def dot(values_oJ: jax.Array, digits_DJ: jax.Array) -> jax.Array:
        return jnp.einsum("oj,dj->od", values_oJ, digits_DJ, preferred_element_type=jnp.int32)

    if values_OJ.shape[1] == x_MI.shape[1]:
        sums_OD = dot(values_OJ, digits_DI)
    else:
        even, odd = digits_DI[:, ::2], digits_DI[:, 1::2]

        def packed(bytes_oJ: jax.Array) -> jax.Array:
            high, low = halves(bytes_oJ)
            return dot(high, even) + dot(low, odd)

        sums_OD = _a_few_at_a_time(packed, values_OJ)
    first_OM, second_OM, third_OM = jnp.split(sums_OD.astype(jnp.float32), 3, 1)
    y_OM = (first_OM + second_OM / 254 + third_OM / 254**2) * unit_M
    if zero_O1 is not None:
        y_OM += zero_O1 * x_MI.sum(1)
    return y_OM * scale_O1


def _by_terms(x_MI: jax.Array, weights_OI: jax.Array) -> jax.Array:
    """[O, M] by products of bfloat16: a float32 of 24 bits is three terms of eight."""
    terms, rest_MI = [], x_MI
    for _ in range(3):
        # Of a conversion there and back XLA may leave out both.
        terms.append(jax.lax.reduce_precision(rest_MI, exponent_bits=8, mantissa_bits=7))
        rest_MI = rest_MI - terms[-1]
    y_OD = jnp.einsum(
        "oi,di->od", weights_OI, jnp.concatenate(terms).astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    first_OM, second_OM, third_OM = jnp.split(y_OD, 3, 1)
    return third_OM + second_OM + first_OM


def _by_floats(
    x_MI: jax.Array, values_OJ: jax.Array, scale_OG: jax.Array, zero_OG: jax.Array | None
) -> jax.Array:
    """[O, M] by products of floats, the weights of a few outputs at a time."""
    J = values_OJ.shape[1]

    def product(values_oJ: jax.Array, scale_oG: jax.Array, *zero_oG: jax.Array) -> jax.Array:
        zero_Go = zero_oG[0].T if zero_oG else None

        def dot(values_oJ: jax.Array, x_MJ: jax.Array) -> jax.Array:
            weights_oJ = dequantise(values_oJ, scale_oG.T, zero_Go, J)
            return jnp.einsum("oj,mj->om", weights_oJ, x_MJ)

        if J == x_MI.shape[1]:
            return dot(values_oJ, x_MI)
        even_oJ, odd_oJ = halves(values_oJ)
        return dot(even_oJ, x_MI[:, ::2]) + dot(odd_oJ, x_MI[:, 1::2])

    zeros = [] if zero_OG is None else [zero_OG]
    return _a_few_at_a_time(product, values_OJ, scale_OG, *zeros)


def _a_few_at_a_time(
    function: Callable[..., jax.Array], weights_OJ: jax.Array, *others: jax.Array
) -> jax.Array:
    """function(weights, *others), where a row of the result needs the same row of each array."""
    arrays = weights_OJ, *others
    count, width = weights_OJ.shape
    rows = min(max(1, AT_A_TIME // width), count)

    def some(j: jax.Array, y: jax.Array) -> jax.Array:
        # The last rows start early, where their number is no multiple.
        start = jnp.minimum(j * rows, count - rows)
        found = function(*(jax.lax.dynamic_slice_in_dim(x, start, rows) for x in arrays))
        return jax.lax.dynamic_update_slice_in_dim(y, found, start, 0)

    shapes = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in arrays]
    one = jax.eval_shape(function, *shapes)
    empty = jnp.zeros((count, *one.shape[1:]), one.dtype)
    return jax.lax.fori_loop(0, -(-count // rows), some, empty)


def _a_few_inputs_at_a_time(equation: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    """einsum(equation, x, weights), of which some of the first inputs are converted at a time: more
    for many rows, whose sums are then written less often."""
    x_letters, letters, _ = equation.replace("->", ",").split(",")
    first = _letters(equation)[2][0]
    x_axis, axis = x_letters.index(first), letters.index(first)
    count = weights.shape[axis]
    x = x.astype(jnp.float32)
    num_rows = math.prod(x.shape[x_letters.index(c)] for c in _letters(equation)[0])
    most = AT_A_TIME * -(-num_rows // 64) * count // weights.size
    size = next(n for n in range(min(max(most, 1), count), 0, -1) if count % n == 0)

    def product(j: int | jax.Array) -> jax.Array:
        some_x = jax.lax.dynamic_slice_in_dim(x, j * size, size, x_axis)
        some = jax.lax.dynamic_slice_in_dim(weights, j * size, size, axis)
        return jnp.einsum(equation, some_x, some.astype(jnp.float32))

    return jax.lax.fori_loop(1, count // size, lambda j, y: y + product(j), product(0))


def _letters(equation: str) -> tuple[str, str, str]:
    """Those of the rows, the outputs and the inputs."""
    x_letters, w_letters, _ = equation.replace("->", ",").split(",")
    rows = "".join(c for c in x_letters if c not in w_letters)
    outputs = "".join(c for c in w_letters if c not in x_letters)
    return rows, outputs, "".join(c for c in w_letters if c in x_letters)


def _rows_and_inputs(equation: str, x: jax.Array) -> jax.Array:
    """x as [M, I] in float32."""
    rows, _, inputs = _letters(equation)
    x_letters = equation.split(",")[0]
    size = math.prod(x.shape[x_letters.index(c)] for c in inputs)
    ordered = jnp.einsum(f"{x_letters}->{rows}{inputs}", x.astype(jnp.float32))
    return ordered.reshape(-1, size)


def _restore(equation: str, x: jax.Array, y_OM: jax.Array, outputs: tuple[int, ...]) -> jax.Array:
    """[O, M] as the equation has it."""
    row_letters, output_letters, _ = _letters(equation)
    x_letters, _, y_letters = equation.replace("->", ",").split(",")
    rows = [x.shape[x_letters.index(c)] for c in row_letters]
    y = y_OM.reshape(*outputs, *rows)
    return jnp.einsum(f"{output_letters}{row_letters}->{y_letters}", y)
