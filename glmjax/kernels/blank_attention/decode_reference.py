"""Attention of a few new queries over a cache, in plain XLA.

A loop walks the key blocks between the first and the last key that any query sees and slices them
straight out of the cache of all layers, so that neither a layer nor the unfilled slots are ever
copied or read. The softmax is kept as a running maximum and sum (Milakov and Gimelshein 2018). An
int8 cache holds one scale per token and head; a scale factors out of its key's score and of its
value's weight, so that there is no dequantised copy either.
"""

from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128


def attend_cache(
    q_BTHK: jax.Array,
    k_NBHSK: jax.Array,
    v_NBHSK: jax.Array,
    layer: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    k_scale_NBHS: jax.Array | None = None,
    v_scale_NBHS: jax.Array | None = None,
) -> jax.Array:
    """Attention output [B, T, H, K] in the type of q over one layer of a cache.

    The cache is float32, bfloat16, or int8 with a float32 scale per token and head; products are
    made in the type of q with float32 sums. A query that sees no key gives zeros.
    """
    q_BHTK = jnp.swapaxes(q_BTHK, 1, 2)
    size = k_NBHSK.shape[3]
    block = min(BLOCK, size)
    sees_BT = k_start_BT < jnp.minimum(k_end_BT, size)

    def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out_BHTK, max_BHT, sum_BHT = carry
        # The last block of a ragged cache starts early; its keys below j * block have been seen.
        start = jnp.minimum(j * block, size - block)
        key_k = start + jnp.arange(block)
        visible_BTk = (k_start_BT[..., None] <= key_k) & (key_k < k_end_BT[..., None])
        visible = (visible_BTk & (key_k >= j * block))[:, None]

        s_BHTk = jnp.einsum(
            "bhtc,bhkc->bhtk", q_BHTK, _slice(k_NBHSK, layer, start, block).astype(q_BHTK.dtype),
            preferred_element_type=jnp.float32,
        ) * (q_BHTK.shape[-1] ** -0.5)  # fmt: skip
        if k_scale_NBHS is not None:
            s_BHTk *= _slice(k_scale_NBHS, layer, start, block)[:, :, None]
        new_max_BHT = jnp.maximum(max_BHT, jnp.max(jnp.where(visible, s_BHTk, -1e30), -1))
        p_BHTk = jnp.where(visible, jnp.exp(s_BHTk - new_max_BHT[..., None]), 0)
        rescale_BHT = jnp.exp(max_BHT - new_max_BHT)
        sum_BHT = sum_BHT * rescale_BHT + jnp.sum(p_BHTk, -1)
        if v_scale_NBHS is not None:
            v_scale_BH1k = _slice(v_scale_NBHS, layer, start, block)[:, :, None]
            p_BHTk = jnp.where(visible, p_BHTk * v_scale_BH1k, 0)
        update_BHTK = jnp.einsum(
            "bhtk,bhkc->bhtc", p_BHTk.astype(q_BHTK.dtype),
            _slice(v_NBHSK, layer, start, block).astype(q_BHTK.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return out_BHTK * rescale_BHT[..., None] + update_BHTK, new_max_BHT, sum_BHT

    empty = (
        jnp.zeros(q_BHTK.shape, jnp.float32),
        jnp.full(q_BHTK.shape[:3], -1e30, jnp.float32),
        jnp.zeros(q_BHTK.shape[:3], jnp.float32),
    )
    first = jnp.min(jnp.where(sees_BT, k_start_BT, size)) // block
    last = -(-jnp.max(jnp.where(sees_BT, jnp.minimum(k_end_BT, size), 0)) // block)
    out_BHTK, _, sum_BHT = jax.lax.fori_loop(first, last, key_block, empty)
    out_BHTK /= jnp.where(sum_BHT == 0, 1, sum_BHT)[..., None]
    return jnp.swapaxes(out_BHTK, 1, 2).astype(q_BTHK.dtype)


def _slice(x: jax.Array, layer: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Slots start to start + size of one layer: [N, B, H, S, ...] to [B, H, size, ...]."""
    index: list[Any] = [layer, 0, 0, start, *[0] * (x.ndim - 4)]
    return jax.lax.dynamic_slice(x, index, (1, *x.shape[1:3], size, *x.shape[4:]))[0]
