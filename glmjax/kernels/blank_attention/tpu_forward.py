"""Forward pass of blank attention on TPU.

The grid is (batch, heads, query blocks, parts of the keys). A step holds in VMEM one block of
queries and one part of the keys and values, of `block_h` heads; a loop walks the key blocks of the
part that some query sees. When all keys fit there is one part, which stays while the query blocks
of its heads go by; longer sequences are streamed, and parts that no query sees are never copied.

    key block     0  1  2  3  4  5
    query block   .  #  =  =  #  .     # visited, = visited without a mask, . never read

The first visited block writes the running maximum, sum and output, the others update them. If only
one half of a masked block is seen, only that half is read. Heads share the mask, and their
independent products and exponentials fill each other's waiting times.
Weights are powers of two: 2^(score scale log2(e) - maximum).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glmjax.kernels.blank_attention.dropout import keep
from glmjax.kernels.blank_attention.key_ranges import Ranges, key_ranges

LANES = 128
BLIND_LSE = 1e30
# Where the running maximum starts: below every score, but so far above the -inf of hidden keys that
# their weight is zero even while a query has not met a visible key.
_LOWEST = -1e30


class ForwardTiles(NamedTuple):
    """Queries, keys and heads that are worked on together, and the VMEM that a kernel may use."""

    block_q: int
    block_k: int
    block_h: int
    vmem_bytes: int = 32 * 2**20


class _State(NamedTuple):
    """What a block of queries has gathered; numbers of a query are repeated over the lanes L."""

    max_hqL: jax.Array
    sum_hqL: jax.Array  # each lane has a part, added up at the end
    out_hqK: jax.Array
    k_start_qL: jax.Array  # float32, exact up to 2^24
    k_end_qL: jax.Array


def forward(
    q_BHTK: jax.Array,
    k_BHSK: jax.Array,
    v_BHSK: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    seeds_BH2: jax.Array | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
    tiles: ForwardTiles,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, T, K] and base-2 log-sum-exp float32 [B, H, T], 1e30 if a query sees nothing.

    Tiles must divide the sizes, else ValueError. FlashAttention-2 (Dao 2023) on key intervals.
    """
    B, H, T, K = q_BHTK.shape
    S = k_BHSK.shape[2]
    q, k, h, vmem_bytes = tiles
    if T % q or S % k or H % h or q % LANES or k % LANES:
        raise ValueError(f"{tiles} do not divide {T} queries, {S} keys and {H} heads")
    # Half of VMEM is for keys and values, each twice: one part is copied while another is used.
    block_bytes = 4 * h * k * max(K, LANES) * k_BHSK.dtype.itemsize
    num_k = min(S // k, max(1, vmem_bytes // 2 // block_bytes))

    def query_index(b, n, i, c, *_):
        return b, n, i, 0

    def part_index(b, n, i, c, ranges: Ranges, *_):
        """The nearest visited part: repeating an index costs no copy."""
        first, last = (jax.lax.div(x, num_k) for x in (ranges.first[b, i], ranges.last[b, i] - 1))
        return b, n, jnp.clip(c, first, jnp.maximum(first, last)), 0

    query_spec = pl.BlockSpec((1, h, q, K), query_index)
    part_spec = pl.BlockSpec((1, h, num_k * k, K), part_index)
    interval_spec = pl.BlockSpec((1, 2, q), lambda b, n, i, c, *_: (b, 0, i))
    out_BHTK, lse_BH1T = pl.pallas_call(
        partial(_kernel, tiles=tiles, num_k=num_k, scale=scale, dropout=dropout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H // h, T // q, pl.cdiv(S // k, num_k)),
            in_specs=[query_spec, part_spec, part_spec, interval_spec],
            out_specs=[query_spec, pl.BlockSpec((1, h, 1, q), lambda b, n, i, c, *_: (b, n, 0, i))],
            scratch_shapes=[  # A _State.
                *[pltpu.VMEM((h, q, width), jnp.float32) for width in (LANES, LANES, K)],
                *[pltpu.VMEM((q, LANES), jnp.float32)] * 2,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, T, K), v_BHSK.dtype),
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * H * T * S * K,
            transcendentals=B * H * T * S,
            bytes_accessed=2 * sum(x.nbytes for x in (q_BHTK, k_BHSK)),
        ),
        interpret=interpret,
        name="blank_attention_forward",
    )(
        key_ranges(k_start_BT, k_end_BT, q, k),
        key_ranges(k_start_BT, k_end_BT, q, _narrow(k)),
        jnp.zeros(1, jnp.int32) if seeds_BH2 is None else seeds_BH2.ravel(),
        q_BHTK, k_BHSK, v_BHSK, jnp.stack([k_start_BT, k_end_BT], axis=1),
    )  # fmt: skip
    return out_BHTK, lse_BH1T[:, :, 0]


def _narrow(k: int) -> int:
    """Width of a masked block of which only a part is seen: half, if that is whole lanes."""
    return k // 2 if k % (2 * LANES) == 0 else k


def _kernel(
    ranges: Ranges, narrow: Ranges, seeds,
    q_ref, k_ref, v_ref, interval_ref, out_ref, lse_ref, *scratch,
    tiles: ForwardTiles, num_k: int, scale: float, dropout: float,
):  # fmt: skip
    """All visited key blocks of one part, for one block of queries."""
    state = _State(*scratch)
    b, i, part = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first, last, full_first, full_last = (x[b, i] for x in ranges)
    q, k, h, _ = tiles
    narrow_k = _narrow(k)
    head_0 = (b * pl.num_programs(1) + pl.program_id(1)) * h

    def kept(n, key_1k):
        query_q1 = i * q + jax.lax.broadcasted_iota(jnp.int32, (q, 1), 0)
        seed = 2 * (head_0 + n)
        return keep(seeds[seed], seeds[seed + 1], query_q1, key_1k, dropout)

    tile = partial(
        _tile, q_ref, k_ref, v_ref, state,
        part_start=part * num_k * k, scale=scale, kept=kept if dropout else None,
    )  # fmt: skip

    def masked_block(j, fresh: bool):
        low = jnp.maximum(narrow.first[b, i], j * (k // narrow_k))
        high = jnp.minimum(narrow.last[b, i], (j + 1) * (k // narrow_k))

        @pl.when(high - low == 1)
        def half():
            tile(low * narrow_k, width=narrow_k, masked=True, fresh=fresh)

        @pl.when(high - low > 1)
        def whole():
            tile(j * k, width=k, masked=True, fresh=fresh)

    @pl.when((first < last) & (part == jax.lax.div(first, num_k)))
    def first_block():
        state.k_start_qL[...] = _columns(interval_ref[0, :1])
        state.k_end_qL[...] = _columns(interval_ref[0, 1:])
        masked_block(first, fresh=True)

    @pl.when(first >= last)
    def no_block():  # No query sees anything: empty intervals make all of the output zero.
        state.k_start_qL[...] = state.k_end_qL[...] = jnp.zeros_like(state.k_end_qL)

    # The rest of the part: masked blocks in [low, head) and [tail, high), others in [head, tail).
    low = jnp.maximum(first + 1, part * num_k)
    high = jnp.maximum(low, jnp.minimum(last, (part + 1) * num_k))
    head = jnp.clip(full_first, low, high)
    tail = jnp.clip(full_last, head, high)

    @pl.loop(head, tail)
    def unmasked(j):
        tile(j * k, width=k, masked=False, fresh=False)

    @pl.loop(low, high - (tail - head))
    def masked(j):
        masked_block(jnp.where(j < head, j, j + tail - head), fresh=False)

    @pl.when(part == pl.num_programs(3) - 1)
    def finish():
        _finish(interval_ref, out_ref, lse_ref, state, 1 - dropout)


def _tile(
    q_ref, k_ref, v_ref, state: _State, start,
    *, width: int, masked: bool, fresh: bool, part_start, scale: float, kept: Callable | None,
):  # fmt: skip
    """Keys [start, start + width) for all heads: updates the state, or writes it if `fresh`."""
    h, q = state.max_hqL.shape[:2]
    keys = pl.ds(pl.multiple_of(start - part_start, width), width)
    key_1k = start + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
    scores = [_dot(q_ref[0, 0], k_ref[0, 0, keys], contract=1)]
    if masked:
        position_1k = key_1k.astype(jnp.float32)
        visible_qk = _widen(state.k_start_qL[...], width) <= position_1k
        visible_qk &= position_1k < _widen(state.k_end_qL[...], width)
    for n in range(h):
        # The next head's product is independent of all that follows, so that it can overlap it.
        if n + 1 < h:
            scores.append(_dot(q_ref[0, n + 1], k_ref[0, n + 1, keys], contract=1))
        s_qk = jnp.where(visible_qk, scores[n], -jnp.inf) if masked else scores[n]
        block_max_q1 = jnp.max(s_qk, axis=1, keepdims=True) * (scale * math.log2(math.e))
        old_max_qL = _LOWEST if fresh else state.max_hqL[n]
        max_qL = jnp.maximum(old_max_qL, jnp.broadcast_to(block_max_q1, (q, LANES)))
        p_qk = jnp.exp2(s_qk * (scale * math.log2(math.e)) - _widen(max_qL, width))
        sum_qL = sum(p_qk[:, c : c + LANES] for c in range(0, width, LANES))
        if kept:
            p_qk = jnp.where(kept(n, key_1k), p_qk, 0)
        out_qK = _dot(p_qk.astype(v_ref.dtype), v_ref[0, n, keys], contract=0)
        if not fresh:
            rescale_qL = jnp.exp2(old_max_qL - max_qL)
            sum_qL += state.sum_hqL[n] * rescale_qL
            out_qK += state.out_hqK[n] * _widen(rescale_qL, out_qK.shape[1])
        state.max_hqL[n], state.sum_hqL[n], state.out_hqK[n] = max_qL, sum_qL, out_qK


def _finish(interval_ref, out_ref, lse_ref, state: _State, kept: float):
    """Divides by the sum; queries that see nothing may hold anything until here."""
    width = out_ref.shape[-1]
    blind_1q = interval_ref[0, 1:] <= interval_ref[0, :1]
    blind_qL = state.k_end_qL[...] <= state.k_start_qL[...]
    for n in range(out_ref.shape[1]):
        sum_q1 = jnp.sum(state.sum_hqL[n], axis=1, keepdims=True)
        sum_qL = jnp.broadcast_to(sum_q1, state.sum_hqL[n].shape)
        # Cheaper than a division, and as exact.
        inverse_qL = jax.lax.rsqrt(sum_qL * kept) ** 2
        out_qK = state.out_hqK[n] * _widen(inverse_qL, width)
        out_ref[0, n] = jnp.where(_widen(blind_qL, width), 0, out_qK).astype(out_ref.dtype)
        lse_1q = _row(state.max_hqL[n]) + jnp.log2(_row(sum_qL))
        lse_ref[0, n] = jnp.where(blind_1q, BLIND_LSE, lse_1q)


def _dot(x: jax.Array, y: jax.Array, contract: int) -> jax.Array:
    """Float32 product over the last axis of x and the given axis of y, exact to the type of y."""
    float32 = y.dtype == jnp.float32
    return jax.lax.dot_general(
        x, y, (((1,), (contract,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _widen(x_qL: jax.Array, width: int) -> jax.Array:
    """Numbers of queries spread over `width` lanes."""
    return jnp.tile(x_qL, (1, pl.cdiv(width, LANES)))[:, :width]


def _columns(x_1q: jax.Array) -> jax.Array:
    """Numbers of queries from one row to columns, spread over the lanes [q, L], in float32."""
    x_1q = x_1q.astype(jnp.float32)
    blocks = []
    for i in range(0, x_1q.shape[1], LANES):
        column = jnp.sum(jnp.where(_diagonal(), x_1q[:, i : i + LANES], 0), axis=1, keepdims=True)
        blocks.append(jnp.broadcast_to(column, (LANES, LANES)))
    return jnp.concatenate(blocks)


def _row(x_qL: jax.Array) -> jax.Array:
    """The inverse of `_columns`, [1, q]."""
    blocks = [
        jnp.sum(jnp.where(_diagonal(), x_qL[i : i + LANES], 0), axis=0, keepdims=True)
        for i in range(0, x_qL.shape[0], LANES)
    ]
    return jnp.concatenate(blocks, axis=1)


def _diagonal() -> jax.Array:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return row == column
