"""Blank attention in plain XLA that works through key blocks: memory linear in T.

For each block of queries a loop walks the key blocks between the first and the last key that any
query of the block sees; the others are never read. The softmax is kept as a running maximum and
sum (Milakov and Gimelshein 2018), and the backward pass recomputes the weights from the saved
log-sum-exp (FlashAttention, Dao et al. 2022). Inside, arrays are [B, H, length, K] so that every
product is a batched matrix product without transposes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from glmjax.config import Dtype
from glmjax.kernels.blank_attention.alibi import Positions, penalty
from glmjax.kernels.blank_attention.dropout import keep
from glmjax.kernels.blank_attention.padding import pad
from glmjax.kernels.blank_attention.reference import rounded

BLOCK = 128


class _Blocks(NamedTuple):
    """The tiling of one call, and the type of its softmax."""

    q: int
    k: int
    num_q: int
    num_k: int
    dtype: Dtype


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
    """Attention output [B, T, H, K]; holds at most B x H x BLOCK x BLOCK scores at a time.

    Scores fall as ALiBi has it if positions are given.
    """
    length, size = q_BTHK.shape[1], k_BSHK.shape[1]
    q = _block_size(length)
    k = _block_size(size)
    blocks = _Blocks(q, k, -(-length // q), -(-size // k), softmax_dtype)
    q_BHTK = pad(jnp.swapaxes(q_BTHK, 1, 2), q * blocks.num_q, axis=2)
    k_BHSK, v_BHSK = (
        pad(jnp.swapaxes(x, 1, 2), k * blocks.num_k, axis=2) for x in (k_BSHK, v_BSHK)
    )
    # Padded queries see nothing, padded keys are beyond every k_end.
    k_start_BT = pad(jnp.maximum(k_start_BT, 0), q * blocks.num_q, axis=1)
    k_end_BT = pad(jnp.minimum(k_end_BT, size), q * blocks.num_q, axis=1)
    if positions is not None:
        positions = Positions(
            pad(positions.query_BT, q * blocks.num_q, axis=1),
            pad(positions.key_BS, k * blocks.num_k, axis=1),
        )
    out_BHTK = _attend(
        blocks, dropout, q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2, positions
    )
    return jnp.swapaxes(out_BHTK[:, :, :length], 1, 2)


def _block_size(length: int) -> int:
    """The smallest multiple of 8 that cuts the length into the fewest blocks of at most BLOCK."""
    num_blocks = -(-length // BLOCK)
    return -(-length // (8 * num_blocks)) * 8 if length > 8 else length


def _slice(x: jax.Array, index: jax.Array, size: int, axis: int = 2) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _key_blocks(
    blocks: _Blocks, k_start_Bq: jax.Array, k_end_Bq: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """First and one past the last key block that some query of a query block sees."""
    sees = k_start_Bq < k_end_Bq
    first = jnp.min(jnp.where(sees, k_start_Bq, blocks.k * blocks.num_k)) // blocks.k
    last = -(-jnp.max(jnp.where(sees, k_end_Bq, 0)) // blocks.k)
    return first, last


def _scores(blocks, q_BHqK, k_BHkK, k_start_Bq, k_end_Bq, positions, i, j):
    """Scaled scores of one tile in float32 and which of them are visible."""
    s_BHqk = jnp.einsum("bhqc,bhkc->bhqk", q_BHqK, k_BHkK, preferred_element_type=jnp.float32)
    key_k = j * blocks.k + jnp.arange(blocks.k)
    visible_Bqk = (k_start_Bq[..., None] <= key_k) & (key_k < k_end_Bq[..., None])
    s_BHqk = s_BHqk * (q_BHqK.shape[-1] ** -0.5)
    if positions is not None:
        query_Bq = _slice(positions.query_BT, i, blocks.q, axis=1)
        key_Bk = _slice(positions.key_BS, j, blocks.k, axis=1)
        s_BHqk -= penalty(Positions(query_Bq, key_Bk), s_BHqk.shape[1])
    return rounded(s_BHqk, blocks.dtype), visible_Bqk[:, None]


def _keep_scale(blocks, rate, seeds_BH2, i, j):
    """What dropout multiplies the weights of one tile by, float32 [B, H, q, k]."""
    query_q1 = i * blocks.q + jnp.arange(blocks.q)[:, None]
    key_k = j * blocks.k + jnp.arange(blocks.k)
    query_seed, key_seed = (seeds_BH2[..., s, None, None] for s in (0, 1))
    return keep(query_seed, key_seed, query_q1, key_k, rate) / jnp.float32(1 - rate)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(blocks, rate, *inputs):
    return _forward(blocks, rate, *inputs)[0]


def _forward(blocks, rate, *inputs):
    q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2, positions = inputs
    B, H, _, K = q_BHTK.shape

    def query_block(_, i):
        q_BHqK = _slice(q_BHTK, i, blocks.q)
        k_start_Bq, k_end_Bq = (_slice(x, i, blocks.q, axis=1) for x in (k_start_BT, k_end_BT))

        def key_block(j, carry):
            out_BHqK, max_BHq, sum_BHq = carry
            s_BHqk, visible = _scores(
                blocks, q_BHqK, _slice(k_BHSK, j, blocks.k), k_start_Bq, k_end_Bq, positions, i, j
            )
            new_max_BHq = jnp.maximum(max_BHq, jnp.max(jnp.where(visible, s_BHqk, -1e30), -1))
            p_BHqk = jnp.where(visible, jnp.exp(s_BHqk - new_max_BHq[..., None]), 0)
            p_BHqk = rounded(p_BHqk, blocks.dtype)
            rescale_BHq = jnp.exp(max_BHq - new_max_BHq)
            sum_BHq = sum_BHq * rescale_BHq + jnp.sum(p_BHqk, -1)
            if rate:
                p_BHqk *= _keep_scale(blocks, rate, seeds_BH2, i, j)
            update_BHqK = jnp.einsum(
                "bhqk,bhkc->bhqc", p_BHqk.astype(v_BHSK.dtype), _slice(v_BHSK, j, blocks.k),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            return out_BHqK * rescale_BHq[..., None] + update_BHqK, new_max_BHq, sum_BHq

        empty = (
            jnp.zeros((B, H, blocks.q, K), jnp.float32),
            jnp.full((B, H, blocks.q), -1e30, jnp.float32),
            jnp.zeros((B, H, blocks.q), jnp.float32),
        )
        first, last = _key_blocks(blocks, k_start_Bq, k_end_Bq)
        out_BHqK, max_BHq, sum_BHq = jax.lax.fori_loop(first, last, key_block, empty)
        sum_BHq = rounded(jnp.where(sum_BHq == 0, 1, sum_BHq), blocks.dtype)
        return None, (
            (out_BHqK / sum_BHq[..., None]).astype(v_BHSK.dtype),
            max_BHq + jnp.log(sum_BHq),
        )

    _, (out_nBHqK, lse_nBHq) = jax.lax.scan(query_block, None, jnp.arange(blocks.num_q))
    out_BHTK = jnp.moveaxis(out_nBHqK, 0, 2).reshape(q_BHTK.shape)
    lse_BHT = jnp.moveaxis(lse_nBHq, 0, 2).reshape(q_BHTK.shape[:3])
    # Remat policies may keep these by name, so that the loop does not run again.
    out_BHTK, lse_BHT = (checkpoint_name(x, "attention") for x in (out_BHTK, lse_BHT))
    return out_BHTK, (*inputs, out_BHTK, lse_BHT)


def _backward(blocks, rate, residuals, d_out_BHTK):
    q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2, positions, out_BHTK, lse_BHT = (
        residuals
    )
    scale = q_BHTK.shape[-1] ** -0.5
    # Rowwise sum of weights times their gradient; dropout does not change this identity.
    delta_BHT = jnp.einsum(
        "bhtk,bhtk->bht", d_out_BHTK, out_BHTK, preferred_element_type=jnp.float32
    )

    def query_block(carry, i):
        q_BHqK, d_out_BHqK = _slice(q_BHTK, i, blocks.q), _slice(d_out_BHTK, i, blocks.q)
        lse_BHq, delta_BHq = _slice(lse_BHT, i, blocks.q), _slice(delta_BHT, i, blocks.q)
        k_start_Bq, k_end_Bq = (_slice(x, i, blocks.q, axis=1) for x in (k_start_BT, k_end_BT))

        def key_block(j, carry):
            dq_BHqK, dk_BHSK, dv_BHSK = carry
            k_BHkK, v_BHkK = _slice(k_BHSK, j, blocks.k), _slice(v_BHSK, j, blocks.k)
            s_BHqk, visible = _scores(blocks, q_BHqK, k_BHkK, k_start_Bq, k_end_Bq, positions, i, j)
            p_BHqk = jnp.where(visible, jnp.exp(s_BHqk - lse_BHq[..., None]), 0)
            p_BHqk = rounded(p_BHqk, blocks.dtype)
            dp_BHqk = jnp.einsum(
                "bhqc,bhkc->bhqk", d_out_BHqK, v_BHkK, preferred_element_type=jnp.float32
            )
            dropped_BHqk = p_BHqk
            if rate:
                keep_BHqk = _keep_scale(blocks, rate, seeds_BH2, i, j)
                dropped_BHqk, dp_BHqk = p_BHqk * keep_BHqk, dp_BHqk * keep_BHqk
            ds_BHqk = p_BHqk * (rounded(dp_BHqk, blocks.dtype) - delta_BHq[..., None])
            ds_BHqk = (rounded(ds_BHqk, blocks.dtype) * scale).astype(q_BHTK.dtype)
            product = partial(jnp.einsum, preferred_element_type=jnp.float32)
            dv_BHkK = product("bhqk,bhqc->bhkc", dropped_BHqk.astype(q_BHTK.dtype), d_out_BHqK)
            dk_BHkK = product("bhqk,bhqc->bhkc", ds_BHqk, q_BHqK)
            dq_BHqK += product("bhqk,bhkc->bhqc", ds_BHqk, k_BHkK)
            return (
                dq_BHqK,
                _add(dk_BHSK, dk_BHkK, j * blocks.k),
                _add(dv_BHSK, dv_BHkK, j * blocks.k),
            )

        first, last = _key_blocks(blocks, k_start_Bq, k_end_Bq)
        dq_BHqK, *carry = jax.lax.fori_loop(
            first, last, key_block, (jnp.zeros(q_BHqK.shape, jnp.float32), *carry)
        )
        return tuple(carry), dq_BHqK.astype(q_BHTK.dtype)

    zeros = jnp.zeros(k_BHSK.shape, jnp.float32)
    (dk_BHSK, dv_BHSK), dq_nBHqK = jax.lax.scan(
        query_block, (zeros, zeros), jnp.arange(blocks.num_q)
    )
    dq_BHTK = jnp.moveaxis(dq_nBHqK, 0, 2).reshape(q_BHTK.shape)
    dk_BHSK, dv_BHSK = dk_BHSK.astype(k_BHSK.dtype), dv_BHSK.astype(v_BHSK.dtype)
    return dq_BHTK, dk_BHSK, dv_BHSK, None, None, None, None


def _add(x: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    size = update.shape[2]
    block = jax.lax.dynamic_slice_in_dim(x, start, size, 2) + update
    return jax.lax.dynamic_update_slice_in_dim(x, block, start, 2)


_attend.defvjp(_forward, _backward)
