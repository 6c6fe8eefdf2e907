"""ALiBi (Press et al. 2022): the score of a key falls with its distance from the query.

score[q, k] = query[q] . key[k] / sqrt(K) - slope[head] |position[q] - position[k]|
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Positions(NamedTuple):
    """Where queries and keys stand in the text, int32; their order in memory says nothing of it."""

    query_BT: jax.Array
    key_BS: jax.Array


def slopes(heads: int) -> np.ndarray:
    """The slope of each head, float32 [H]: 2^(-8 h / H) for h = 1 .. H.

    If H is no power of two, the first P heads have the slopes of the largest power of two P below
    it, and the others every second slope of 2 P heads.
    """
    power = 2 ** (heads.bit_length() - 1)
    of_power = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([of_power, between]).astype(np.float32)


def penalty(positions: Positions, heads: int) -> jax.Array:
    """What is taken from the scores, float32 [B, H, T, S]."""
    distance_BTS = jnp.abs(positions.query_BT[:, :, None] - positions.key_BS[:, None])
    slope_H11 = jnp.asarray(slopes(heads))[:, None, None]
    return slope_H11 * distance_BTS[:, None].astype(jnp.float32)
