"""Dropout of attention weights: a pure function of (seed, query, key), so of no tiling or pass.

The bits are a hash of two words, one of the query and one of the key, by the multiply-and-shift
steps of Chris Wellons' lowbias32. All arithmetic is int32, which wraps, so that the same few lines
run in XLA and inside kernels, and every implementation drops the same weights.
"""

import jax
import jax.numpy as jnp

_MULTIPLIERS = 0x7FEB352D, 0x846CA68B - 2**32


def head_seeds(key: jax.Array, batch: int, heads: int) -> jax.Array:
    """Two seeds for each row and head, int32 [B, H, 2]."""
    bits_BH2 = jax.random.bits(key, (batch, heads, 2), jnp.uint32)
    return jax.lax.bitcast_convert_type(bits_BH2, jnp.int32)


def keep(
    query_seed: jax.Array, key_seed: jax.Array, query: jax.Array, key: jax.Array, rate: float
) -> jax.Array:
    """Whether the weight of `key` for `query` is kept: True with probability 1 - rate.

    Takes the two seeds of a head and int32 positions, which broadcast against each other.
    """
    x = _mix(query + query_seed) ^ _mix(key + key_seed)
    x = x * _MULTIPLIERS[0]
    x = (x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, 15))) * _MULTIPLIERS[1]
    return x >= round(rate * 2**32) - 2**31


def _mix(x: jax.Array) -> jax.Array:
    for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
        x = (x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, shift))) * multiplier
    return x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, 16))
