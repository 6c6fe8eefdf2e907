"""Dropout of attention weights, from bits that the backward pass draws again."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def keep_scale(key: jax.Array, shape: Sequence[int], rate: float) -> jax.Array:
    """float32 factors: 0 with probability `rate` (to 2^-16), else 1 / (1 - rate)."""
    keep = jax.random.bits(key, tuple(shape), jnp.uint16) >= round(rate * 2**16)
    return jnp.where(keep, 1 / (1 - rate), 0.0).astype(jnp.float32)
