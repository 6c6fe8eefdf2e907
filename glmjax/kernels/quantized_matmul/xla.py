"""Products with integer weights that XLA for accelerators fuses: it converts them on their way into
the product, and no array of converted weights exists.

For that nothing but the conversion may happen to them. A scale per output is applied to the result,
and so is a zero-point, as x . (q + z) = x . q + z sum(x). Groups of inputs have a product each: a
scale for some of the inputs, broadcast over the weights, is what XLA does not fuse.
"""

import jax
import jax.numpy as jnp

from glmjax.kernels.quantized_matmul.reference import last_input, unpack


def multiply(
    equation: str, x: jax.Array, values: jax.Array, scale: jax.Array, zero: jax.Array | None
) -> jax.Array:
    """As `reference.multiply`."""
    x_letters, letters, y_letters = equation.replace("->", ",").split(",")
    outputs = scale.ndim - 1
    first = x_letters.index(letters[outputs])
    values = unpack(values, last_input(equation, x))
    size, groups = x.shape[first], len(scale)
    inputs = [i for i, letter in enumerate(x_letters) if letter in letters]

    def per_output(array: jax.Array) -> jax.Array:
        """[*outputs] as the equation has it, with axes of one for all rows."""
        order = sorted(range(outputs), key=lambda i: y_letters.index(letters[i]))
        array = array.astype(jnp.float32).transpose(order)
        return jnp.expand_dims(array, [i for i, c in enumerate(y_letters) if c in x_letters])

    y = jnp.float32(0)
    for g in range(groups):
        start, end = g * size // groups, (g + 1) * size // groups
        x_g = jax.lax.slice_in_dim(x, start, end, axis=first)
        weights = jax.lax.slice_in_dim(values, start, end, axis=outputs).astype(x.dtype)
        y_g = jnp.einsum(equation, x_g, weights, preferred_element_type=jnp.float32)
        if zero is not None:
            sum_x = jnp.sum(x_g, inputs, jnp.float32)
            rows = [i for i, c in enumerate(y_letters) if c not in x_letters]
            y_g += jnp.expand_dims(sum_x, rows) * per_output(zero[g])
        y += y_g * per_output(scale[g])
    return y
