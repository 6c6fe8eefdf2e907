"""Attention of a few new queries over a cache: a Pallas kernel for TPU.

Decoding is bound by reading keys and values once, so the kernel reads nothing else. Its steps are a
list, made outside and prefetched as scalars: one step for each block of keys that some query of a
row sees, row after row. The grid is as long as the list, and the copies of one row's last block
overlap with the next row's first. The whole cache stays where it is in HBM; a step copies
[heads, keys, K] of one layer and row. Scores are products with the keys as the stationary operand,
[queries, keys] for each head, so that the softmax costs a few registers.

    grid     (groups of heads, steps)
    scratch  output [h, q, K], running maximum and sum [h, q, 128] of the row in work

An int8 cache is scaled at the scores and at the weights, where a scale per key is a row vector.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES = 8
"""Queries are filled up to a multiple of the rows of a register."""
QUERIES = 128
"""Most queries of a call: eight tokens of sixteen heads that share their keys."""
LANES = 128
LOG2_E = 1.4426950408889634


class DecodeTiles(NamedTuple):
    """How much of the cache one step works on; at best about two megabytes."""

    heads: int
    """Most heads; the kernel takes the largest divisor of the number of heads that it can."""
    keys: int
    """Keys, a multiple of 128."""


class Steps(NamedTuple):
    """The work list for a mask; entries of rows beyond `count_1` are never read."""

    row_I: jax.Array
    copy_row_I: jax.Array
    """The row of the cache to copy from: an earlier one, whose block is there, for an empty row."""
    copy_block_I: jax.Array
    count_1: jax.Array
    bounds_BT2: jax.Array
    """First key and one past the last of each query, padded to whole registers."""


def default_tiles(dtype: jax.typing.DTypeLike) -> DecodeTiles:
    """Tiles for a cache of that type: with 16 heads of 128 they are two megabytes."""
    return DecodeTiles(heads=16, keys=512 // jnp.dtype(dtype).itemsize)


def make_steps(k_start_BT: jax.Array, k_end_BT: jax.Array, size: int, tiles: DecodeTiles) -> Steps:
    """One step per visible block, and one per row without any, which copies nothing new."""
    B, T = k_start_BT.shape
    keys = min(tiles.keys, size)
    num_blocks = -(-size // keys)
    k_end_BT = jnp.minimum(k_end_BT, size)
    sees_BT = k_start_BT < k_end_BT
    first_B = jnp.min(jnp.where(sees_BT, k_start_BT, size), 1) // keys
    last_B = -(-jnp.max(jnp.where(sees_BT, k_end_BT, 0), 1) // keys)
    end_B = jnp.cumsum(jnp.maximum(last_B - first_B, 1))
    step_I = jnp.arange(B * num_blocks + 1)
    row_I = jnp.sum(step_I[:, None] >= end_B, 1, dtype=jnp.int32)
    # What turns the number of a step into that of its block, counted through all rows.
    shift_I = (jnp.arange(B) * num_blocks + last_B - end_B).at[row_I].get(mode="clip")
    is_empty_I = (last_B <= first_B).at[row_I].get(mode="clip")
    copy_I = jax.lax.cummax(jnp.where(is_empty_I, 0, step_I + shift_I))
    bounds_BT2 = jnp.stack([k_start_BT, k_end_BT], -1)
    return Steps(
        row_I, copy_I // num_blocks, copy_I % num_blocks, end_B[-1:],
        jnp.pad(bounds_BT2, ((0, 0), (0, -T % SUBLANES), (0, 0))),
    )  # fmt: skip


def attend_cache(
    q_BTHK: jax.Array,
    k_NBHSK: jax.Array,
    v_NBHSK: jax.Array,
    layer: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    k_scale_NBHS: jax.Array | None = None,
    v_scale_NBHS: jax.Array | None = None,
    *,
    tiles: DecodeTiles | None = None,
    steps: Steps | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Attention output [B, T, H, K] in the type of q over one layer of a cache; T is at most 128.

    The cache is float32, bfloat16, or int8 with a float32 scale per token and head, of any size.
    A query that sees no key gives zeros. `steps` are those of `make_steps` for the same mask and
    tiles, made once for many layers.

    Raises:
        ValueError: there are more than 128 queries, or tiles.keys is no multiple of 128.
    """
    B, T, H, K = q_BTHK.shape
    N, S = k_NBHSK.shape[0], k_NBHSK.shape[3]
    tiles = tiles or default_tiles(k_NBHSK.dtype)
    if T > QUERIES:
        raise ValueError(f"decode attention takes at most {QUERIES} queries per row, got {T}")
    if tiles.keys % LANES:
        raise ValueError(f"tiles.keys must be a multiple of {LANES}, got {tiles.keys}")
    steps = steps or make_steps(k_start_BT, k_end_BT, S, tiles)
    # A block of scales [heads, keys] has whole tiles of 8 rows, or all rows.
    multiple = 1 if k_scale_NBHS is None else 8
    divisors = [n for n in range(multiple, tiles.heads + 1, multiple) if H % n == 0]
    h = H if H <= tiles.heads or not divisors else divisors[-1]
    s = min(tiles.keys, S)
    q_BHTK = jnp.pad(jnp.swapaxes(q_BTHK, 1, 2), ((0, 0), (0, 0), (0, -T % SUBLANES), (0, 0)))
    q = q_BHTK.shape[2]

    def row_index(g, i, layer, row_I, copy_row_I, copy_block_I):
        return row_I[i], g, 0, 0

    def key_index(g, i, layer, row_I, copy_row_I, copy_block_I):
        return layer[0], copy_row_I[i], g, copy_block_I[i], 0

    queries = pl.BlockSpec((None, h, q, K), row_index)
    keys = pl.BlockSpec((None, None, h, s, K), key_index)
    scales = pl.BlockSpec((None, None, h, s), lambda *args: key_index(*args)[:4])
    bounds = pl.BlockSpec((None, q, 2), lambda *args: (row_index(*args)[0], 0, 0))
    operands = [x for x in (k_NBHSK, v_NBHSK, k_scale_NBHS, v_scale_NBHS) if x is not None]
    out_BHTK = pl.pallas_call(
        partial(_kernel, size=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(H // h, steps.count_1[0]),
            in_specs=[bounds, queries, keys, keys, scales, scales][: 2 + len(operands)],
            out_specs=queries,
            scratch_shapes=[
                pltpu.VMEM((h, q, K), jnp.float32),
                pltpu.VMEM((h, q, LANES), jnp.float32),
                pltpu.VMEM((h, q, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BHTK.shape, q_BHTK.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * H * T * S * K,
            transcendentals=B * H * T * S,
            bytes_accessed=sum(x.nbytes for x in operands) // N,
        ),
        name="blank_decode",
        interpret=interpret,
    )(
        jnp.asarray(layer, jnp.int32)[None], steps.row_I, steps.copy_row_I, steps.copy_block_I,
        steps.bounds_BT2, q_BHTK, *operands,
    )  # fmt: skip
    return jnp.swapaxes(out_BHTK[:, :, :T], 1, 2)


def _kernel(
    layer_ref, row_ref, copy_row_ref, copy_block_ref, bounds_ref, q_ref, k_ref, v_ref, *refs, size: int
):  # fmt: skip
    *scale_refs, out_ref, sum_out_ref, max_ref, sum_ref = refs
    s = k_ref.shape[1]
    i = pl.program_id(1)
    block = copy_block_ref[i]

    @pl.when((i == 0) | (row_ref[jnp.maximum(i - 1, 0)] != row_ref[i]))
    def start_row():
        sum_out_ref[...] = jnp.zeros_like(sum_out_ref)
        max_ref[...] = jnp.full_like(max_ref, -1e30)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    if size % s and v_ref.dtype != jnp.int8:

        @pl.when(block == size // s)
        def clear_what_lies_behind_the_cache():
            v_ref[:, size % s :] = jnp.zeros_like(v_ref[:, size % s :])

    key_qk = block * s + jax.lax.broadcasted_iota(jnp.int32, (q_ref.shape[1], s), 1)
    visible_qk = (bounds_ref[:, :1] <= key_qk) & (key_qk < bounds_ref[:, 1:])
    # The matrix unit takes float32 and rounds it to bfloat16, which holds every int8: converting
    # int8 to float32 is half the work of converting it to bfloat16.
    dtype = jnp.float32 if scale_refs else q_ref.dtype
    exact = q_ref.dtype == jnp.float32
    dot = partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    scale = LOG2_E * q_ref.shape[-1] ** -0.5
    q_hqK, k_hkK, v_hkK = (ref[...].astype(dtype) for ref in (q_ref, k_ref, v_ref))
    s_hqk = dot(q_hqK, k_hkK, (((2,), (2,)), ((0,), (0,))))
    s_hqk *= scale_refs[0][...][:, None] * scale if scale_refs else scale
    s_hqk = jnp.where(visible_qk, s_hqk, -1e30)
    max_hq1 = max_ref[...][..., :1]
    new_max_hq1 = jnp.maximum(max_hq1, jnp.max(s_hqk, 2, keepdims=True))
    p_hqk = jnp.where(visible_qk, jnp.exp2(s_hqk - new_max_hq1), 0)
    rescale_hq1 = jnp.exp2(max_hq1 - new_max_hq1)
    sum_ref[...] = sum_ref[...] * rescale_hq1 + jnp.sum(p_hqk, 2, keepdims=True)
    max_ref[...] = jnp.broadcast_to(new_max_hq1, max_ref.shape)
    if scale_refs:
        p_hqk = jnp.where(visible_qk, p_hqk * scale_refs[1][...][:, None], 0)
    update_hqK = dot(p_hqk.astype(dtype), v_hkK, (((2,), (1,)), ((0,), (0,))))
    sum_out_ref[...] = sum_out_ref[...] * rescale_hq1 + update_hqK

    @pl.when(row_ref[i + 1] != row_ref[i])
    def end_row():
        total = sum_ref[...][..., :1]
        out = sum_out_ref[...] / jnp.where(total == 0, 1, total)
        out_ref[...] = out.astype(out_ref.dtype)
