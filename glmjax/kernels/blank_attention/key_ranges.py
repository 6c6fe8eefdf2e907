"""Which blocks of keys each block of queries has to visit, and which of those need no mask.

Queries that see nothing do not count: kernels set their output to zero at the end, so it does not
matter what they are given on the way.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ranges(NamedTuple):
    """Blocks to visit, [first, last), and among them blocks seen entirely, [full_first, full_last).

    A block is seen entirely if every query that sees anything sees all of its keys. All int32.
    """

    first: jax.Array
    last: jax.Array
    full_first: jax.Array
    full_last: jax.Array


def key_ranges(k_start_BT: jax.Array, k_end_BT: jax.Array, block_q: int, block_k: int) -> Ranges:
    """Key blocks for each query block, [B, T / block_q] each; none if all its queries are blind."""
    batch = k_start_BT.shape[0]
    start_Bnq, end_Bnq = (x.reshape(batch, -1, block_q) for x in (k_start_BT, k_end_BT))
    sees_Bnq = start_Bnq < end_Bnq
    large = jnp.iinfo(jnp.int32).max - block_k

    def over_seeing(reduce, x_Bnq, otherwise):
        return reduce(jnp.where(sees_Bnq, x_Bnq, otherwise), axis=-1)

    any_Bn = sees_Bnq.any(-1)
    first = jnp.where(any_Bn, over_seeing(jnp.min, start_Bnq, large) // block_k, 0)
    last = -(-over_seeing(jnp.max, end_Bnq, 0) // block_k)
    full_first = -(-over_seeing(jnp.max, start_Bnq, 0) // block_k)
    full_last = jnp.where(any_Bn, over_seeing(jnp.min, end_Bnq, large) // block_k, 0)
    return Ranges(first, last, full_first, jnp.maximum(full_first, full_last))


def query_ranges(ranges: Ranges, num_k: int) -> Ranges:
    """The transpose of `key_ranges`: query blocks for each of num_k key blocks, [B, num_k] each.

    The blocks seen entirely are the first run of such blocks.
    """
    key_k1 = jnp.arange(num_k)[:, None]
    first, last, full_first, full_last = (x[:, None] for x in ranges)
    visit_Bkn = (first <= key_k1) & (key_k1 < last)
    full_Bkn = visit_Bkn & (full_first <= key_k1) & (key_k1 < full_last)
    query_n = jnp.arange(first.shape[-1])

    def start(condition_Bkn):
        return jnp.min(jnp.where(condition_Bkn, query_n, query_n.size), axis=-1)

    last_Bk = jnp.max(jnp.where(visit_Bkn, query_n + 1, 0), axis=-1)
    full_first_Bk = start(full_Bkn)
    # A block of blind queries inside the run does no harm and must not end it.
    breaks_Bkn = ~full_Bkn & (last > first) & (query_n >= full_first_Bk[..., None])
    full_last_Bk = jnp.minimum(start(breaks_Bkn), jnp.maximum(last_Bk, full_first_Bk))
    ranges_Bk = jnp.minimum(start(visit_Bkn), last_Bk), last_Bk, full_first_Bk, full_last_Bk
    return Ranges(*(x.astype(jnp.int32) for x in ranges_Bk))
