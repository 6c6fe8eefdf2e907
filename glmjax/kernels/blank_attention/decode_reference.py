"""Writing into a cache and attention of a few new queries over it, in plain XLA.

`attend_cache` walks, row by row, the key blocks between the first and the last key that any query
sees and slices them straight out of the cache of all layers, so that neither a layer nor the
unfilled slots are ever copied or read. The softmax is kept as a running maximum and sum (Milakov and
Gimelshein 2018). An int8 cache holds one scale per token and head; a scale factors out of its key's
score and of its value's weight, so that there is no dequantised copy either. `attend_layer` is for
GPUs, where whatever reads the cache must leave it in memory as it is.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

BLOCK = 128


def numbers(x: jax.Array) -> jax.Array:
    """What lies in a cache: the numbers themselves, or in uint16 the bits of bfloat16, which become
    float32."""
    if x.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x


def write(
    arrays: Sequence[jax.Array], layer: jax.Array, new: Sequence[jax.Array], slot_B: jax.Array
) -> list[jax.Array]:
    """The caches [N, B, H, S, ...] with the tokens [B, T, H, ...] of one layer in the slots from
    slot_B on; what would lie behind the last slot is dropped."""
    B, T = new[0].shape[:2]
    row_B1, slot_BT = jnp.arange(B)[:, None], slot_B[:, None] + jnp.arange(T)

    def put(x_NBHS: jax.Array, y_BTH: jax.Array) -> jax.Array:
        if x_NBHS.dtype == jnp.uint16:
            y_BTH = jax.lax.bitcast_convert_type(y_BTH.astype(jnp.bfloat16), jnp.uint16)
        return x_NBHS.at[layer, row_B1, :, slot_BT].set(y_BTH.astype(x_NBHS.dtype))

    return [put(*each) for each in zip(arrays, new, strict=True)]


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

    The cache is float32, bfloat16 (also as its bits in uint16), or int8 with a float32 scale per
    token and head. A query that sees no key gives zeros.
    """
    size = k_NBHSK.shape[3]
    block = min(BLOCK, size)

    def row(inputs: tuple[jax.Array, ...]) -> jax.Array:
        b, q_THK, k_start_T, k_end_T = inputs
        q_HTK = jnp.swapaxes(q_THK, 0, 1).astype(jnp.float32) * q_THK.shape[-1] ** -0.5
        k_end_T = jnp.minimum(k_end_T, size)
        sees_T = k_start_T < k_end_T

        def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out_HTK, max_HT, sum_HT = carry
            # The last block of a ragged cache starts early; its keys below j * block have been seen.
            start = jnp.minimum(j * block, size - block)
            key_k = start + jnp.arange(block)
            visible_Tk = (k_start_T[:, None] <= key_k) & (key_k < k_end_T[:, None])
            visible_Tk &= key_k >= j * block

            s_HTk = jnp.einsum("htc,hkc->htk", q_HTK, _slots(k_NBHSK, layer, b, start, block))
            if k_scale_NBHS is not None:
                s_HTk *= _slots(k_scale_NBHS, layer, b, start, block)[:, None]
            new_max_HT = jnp.maximum(max_HT, jnp.max(jnp.where(visible_Tk, s_HTk, -1e30), -1))
            p_HTk = jnp.where(visible_Tk, jnp.exp(s_HTk - new_max_HT[..., None]), 0)
            rescale_HT = jnp.exp(max_HT - new_max_HT)
            sum_HT = sum_HT * rescale_HT + jnp.sum(p_HTk, -1)
            if v_scale_NBHS is not None:
                v_scale_H1k = _slots(v_scale_NBHS, layer, b, start, block)[:, None]
                p_HTk = jnp.where(visible_Tk, p_HTk * v_scale_H1k, 0)
            update_HTK = jnp.einsum("htk,hkc->htc", p_HTk, _slots(v_NBHSK, layer, b, start, block))
            return out_HTK * rescale_HT[..., None] + update_HTK, new_max_HT, sum_HT

        empty = (
            jnp.zeros(q_HTK.shape, jnp.float32),
            jnp.full(q_HTK.shape[:2], -1e30, jnp.float32),
            jnp.zeros(q_HTK.shape[:2], jnp.float32),
        )
        first = jnp.min(jnp.where(sees_T, k_start_T, size)) // block
        last = -(-jnp.max(jnp.where(sees_T, k_end_T, 0)) // block)
        out_HTK, _, sum_HT = jax.lax.fori_loop(first, last, key_block, empty)
        out_HTK /= jnp.where(sum_HT == 0, 1, sum_HT)[..., None]
        return jnp.swapaxes(out_HTK, 0, 1).astype(q_BTHK.dtype)

    return jax.lax.map(row, (jnp.arange(len(q_BTHK)), q_BTHK, k_start_BT, k_end_BT))


def _slots(
    x: jax.Array, layer: jax.Array, row: jax.Array, start: jax.Array, size: int
) -> jax.Array:
    """Slots start to start + size of a row of one layer in float32, [H, size, ...]."""
    y = jax.lax.dynamic_slice(
        x, [layer, row, 0, start, *[0] * (x.ndim - 4)], (1, 1, x.shape[2], size, *x.shape[4:])
    )[0, 0]
    return numbers(y).astype(jnp.float32)


def attend_layer(
    q_BTHK: jax.Array,
    k_NBHSK: jax.Array,
    v_NBHSK: jax.Array,
    layer: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    k_scale_NBHS: jax.Array | None = None,
    v_scale_NBHS: jax.Array | None = None,
) -> jax.Array:
    """`attend_cache` without a loop, over all slots of the layer, for GPUs.

    There the rounds of a loop whose number the device computes cost more than the slots that they
    save. Products are made in the type of q with float32 sums. Values are summed over blocks of keys
    first, so that few rows and heads keep a GPU busy.
    """
    size = k_NBHSK.shape[3]
    blocks = size // BLOCK if size % BLOCK == 0 else 1

    def split(x_NBHS: jax.Array) -> jax.Array:
        x_BHS = _as_written(jax.lax.dynamic_index_in_dim(x_NBHS, layer, keepdims=False))
        return x_BHS.reshape(*x_BHS.shape[:2], blocks, size // blocks, *x_BHS.shape[3:])

    key_nk = jnp.arange(size).reshape(blocks, -1)
    k_start_BTnk, k_end_BTnk = k_start_BT[..., None, None], k_end_BT[..., None, None]
    visible = ((k_start_BTnk <= key_nk) & (key_nk < k_end_BTnk))[:, None]

    s_BHTnk = jnp.einsum(
        "bthc,bhnkc->bhtnk", q_BTHK, split(k_NBHSK).astype(q_BTHK.dtype),
        preferred_element_type=jnp.float32,
    ) * (q_BTHK.shape[-1] ** -0.5)  # fmt: skip
    if k_scale_NBHS is not None:
        s_BHTnk *= split(k_scale_NBHS)[:, :, None]
    s_BHTnk = jnp.where(visible, s_BHTnk, -1e30)
    p_BHTnk = jnp.where(visible, jnp.exp(s_BHTnk - jnp.max(s_BHTnk, (-1, -2), keepdims=True)), 0)
    sum_BHT = jnp.sum(p_BHTnk, (-1, -2))
    if v_scale_NBHS is not None:
        p_BHTnk = jnp.where(visible, p_BHTnk * split(v_scale_NBHS)[:, :, None], 0)
    out_BHnTK = jnp.einsum(
        "bhtnk,bhnkc->bhntc", p_BHTnk.astype(q_BTHK.dtype), split(v_NBHSK).astype(q_BTHK.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    # Without the barrier both sums become one again.
    out_BHTK = (
        jnp.sum(jax.lax.optimization_barrier(out_BHnTK), 2)
        / jnp.where(sum_BHT == 0, 1, sum_BHT)[..., None]
    )
    return jnp.swapaxes(out_BHTK, 1, 2).astype(q_BTHK.dtype)


def _as_written(x: jax.Array) -> jax.Array:
    """Laid out in memory with the last axis densest. Left to itself XLA for GPUs gives caches the
    layout that the reader likes best, by a copy of all layers."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
