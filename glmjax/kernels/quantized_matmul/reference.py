"""The meaning of a product with integer weights: they become floats, and then it is a plain product.

Weights are [*outputs, *inputs], int8 or int4; of 4 bits stored as int8 two share a byte along the
last axis, the even one in the high half, as two's complement (THUDM/GLM-130B `quantization/`).
"""

import jax
import jax.numpy as jnp


def multiply(
    equation: str, x: jax.Array, values: jax.Array, scale: jax.Array, zero: jax.Array | None
) -> jax.Array:
    """einsum(equation, x, weights) in float32."""
    weights = dequantise(values, scale, zero, last_input(equation, x))
    return jnp.einsum(equation, x, weights.astype(x.dtype), preferred_element_type=jnp.float32)


def dequantise(values: jax.Array, scale: jax.Array, zero: jax.Array | None, size: int) -> jax.Array:
    """The weights scale (values + zero) in float32.

    scale and zero are [group, *outputs]; group g of G belongs to inputs g n / G .. (g + 1) n / G of
    the n of the first input axis. `size` is that of the last axis of the weights.
    """
    values = unpack(values, size)
    G, *outputs = scale.shape
    grouped = values.reshape(*outputs, G, -1).astype(jnp.float32)
    if zero is not None:
        grouped += jnp.moveaxis(zero, 0, -1)[..., None]
    grouped *= jnp.moveaxis(scale, 0, -1)[..., None].astype(jnp.float32)
    return grouped.reshape(values.shape)


def unpack(values: jax.Array, size: int) -> jax.Array:
    """One integer in each element, `size` of them along the last axis."""
    if values.shape[-1] == size:
        return values
    return jnp.stack(halves(values), -1).reshape(*values.shape[:-1], size)


def halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The even and the odd integers of bytes; shifts of int8 keep the sign."""
    return packed >> 4, (packed << 4) >> 4


def last_input(equation: str, x: jax.Array) -> int:
    """The size of the last axis of the weights."""
    x_letters, letters = equation.split("->")[0].split(",")
    return x.shape[x_letters.index(letters[-1])]
