"""Rows filled up to whole tiles."""

import jax
import jax.numpy as jnp


def pad(x: jax.Array, size: int, axis: int) -> jax.Array:
    """x with zeros behind it, up to `size` along an axis."""
    widths = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if size > x.shape[axis] else x
