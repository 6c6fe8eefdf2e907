"""The meaning of blank attention: dense scores, float32 softmax unless another is asked for.

    out[q] = sum_k softmax_k(query[q] . key[k] / sqrt(K)) value[k]   over k_start[q] <= k < k_end[q]

A query that sees no key gives zeros and a zero gradient.
"""

import jax
import jax.numpy as jnp

from glmjax.config import Dtype
from glmjax.kernels.blank_attention.alibi import Positions, penalty
from glmjax.kernels.blank_attention.dropout import keep


def attend(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    seeds_BH2: jax.Array | None = None,
    dropout: float = 0.0,
    positions: Positions | None = None,
    softmax_dtype: Dtype = "float32",
) -> jax.Array:
    """Attention output [B, T, H, K] in the type of v; holds a B x H x T x S array.

    Scores fall as ALiBi has it if positions are given.
    """
    scores_BHTS = jnp.einsum(
        "bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32
    ) * (q_BTHK.shape[-1] ** -0.5)
    if positions is not None:
        scores_BHTS -= penalty(positions, q_BTHK.shape[2])
    key_S = jnp.arange(k_BSHK.shape[1])
    visible_BTS = (k_start_BT[..., None] <= key_S) & (key_S < k_end_BT[..., None])
    visible_BHTS = visible_BTS[:, None]
    weights_BHTS = _softmax(jnp.where(visible_BHTS, scores_BHTS, -1e30), softmax_dtype)
    weights_BHTS = jnp.where(visible_BHTS, weights_BHTS, 0)
    if seeds_BH2 is not None:
        query_seed, key_seed = (seeds_BH2[..., s, None, None] for s in (0, 1))
        query_T1 = jnp.arange(q_BTHK.shape[1])[:, None]
        weights_BHTS *= keep(query_seed, key_seed, query_T1, key_S, dropout)
        weights_BHTS /= jnp.float32(1 - dropout)
    return jnp.einsum(
        "bhts,bshk->bthk", weights_BHTS.astype(v_BSHK.dtype), v_BSHK,
        preferred_element_type=jnp.float32,
    ).astype(v_BSHK.dtype)  # fmt: skip


def rounded(x: jax.Array, dtype: Dtype) -> jax.Array:
    """float32 numbers, and their gradients, rounded to a type. XLA may leave out a pair of casts."""
    return x if dtype == "float32" else jax.lax.reduce_precision(x, 8, 7)


def _softmax(scores_BHTS: jax.Array, dtype: Dtype) -> jax.Array:
    if dtype == "float32":
        return jax.nn.softmax(scores_BHTS, axis=-1)
    scores_BHTS = rounded(scores_BHTS, dtype)
    max_BHT1 = jax.lax.stop_gradient(jnp.max(scores_BHTS, -1, keepdims=True))
    exp_BHTS = rounded(jnp.exp(scores_BHTS - max_BHT1), dtype)
    return rounded(exp_BHTS / rounded(jnp.sum(exp_BHTS, -1, keepdims=True), dtype), dtype)
