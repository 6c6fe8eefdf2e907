"""Products with weights that are narrower than the numbers they multiply.

`multiply` takes integers with scales; `reference` is the meaning. `multiply_narrow` takes floats of 16
bits, for the platforms that have no product for them.
"""

import jax

from glmjax.kernels.quantized_matmul import cpu, xla
from glmjax.sharding import target_device


def multiply(
    equation: str,
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
) -> jax.Array:
    """einsum(equation, x, scale (values + zero)) in float32, by the form made for the platform.

    The letters of the weights are those of their outputs and then of their inputs; see
    `reference.dequantise` for the arrays.
    """
    form = cpu if on_one_cpu() else xla
    return form.multiply(equation, x, values, scale, zero)


def multiply_narrow(equation: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    """einsum(equation, x, weights) in float32, where `needs_narrow` says so."""
    return cpu.multiply_narrow(equation, x, weights)


def needs_narrow(x: jax.Array, weights: jax.Array) -> bool:
    """Whether XLA would convert all weights to the type of x and then multiply: on CPUs, for which
    float16 and bfloat16 weights in products of float32 are best read a few at a time."""
    return on_one_cpu() and weights.dtype.itemsize < x.dtype.itemsize == 4


def on_one_cpu() -> bool:
    """Whether the program runs on a CPU and no mesh; over a mesh XLA splits plain products itself."""
    return target_device().platform == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
