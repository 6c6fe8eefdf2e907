"""Backward pass of blank attention on TPU: dq, dk and dv in one pass over the visible tiles.

The grid is (batch, heads, spans of keys, spans of queries). A step holds one span of each in VMEM,
for `block_h` heads, and loops walk the tiles that some query sees: large ones without a mask where
every query sees every key, small ones with a mask along the edges, none elsewhere.

    key block     0  1  2  3
    query block   =  #  .  .     = whole tile, no mask
                  =  =  #  .     # its visible small tiles, masked
                  =  =  =  #     . never read

A tile's weights p and gradients of scores ds are transposed, [key, query], so that the numbers of a
query are rows, which spread over sublanes for free. The sums are transposed too, [K, length]: in

    dv^T = d_out^T p        dk^T = q^T ds        dq^T = k^T ds^T

the matrix unit holds p or ds, which fill it whatever K is, and K rows stream through it. Heads share
the mask, and their independent products fill each other's waiting times.

The sums dk and dv stay in VMEM while the spans of queries go by. So does dq if there is one span of
queries or of keys, else it waits in HBM, float32, for the next span of keys. The grid fixes the order
of all sums. The method is FlashAttention-2 (Dao 2023).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glmjax.kernels.blank_attention.dropout import keep
from glmjax.kernels.blank_attention.key_ranges import Ranges, key_ranges, query_ranges

LANES = 128
_LOWEST = -(2**31)


class BackwardTiles(NamedTuple):
    """Queries and keys of a whole tile, of a tile at an edge of the mask (cut to a divisor of the
    former), heads of a step, and the bytes of VMEM that it may take."""

    block_q: int = 512
    block_k: int = 512
    edge: int = 256
    block_h: int = 1
    vmem_bytes: int = 16 * 2**20


class _Sizes(NamedTuple):
    """Queries and keys of a tile at an edge, of a whole tile and of a span, and the spans' number."""

    edge_q: int
    edge_k: int
    block_q: int
    block_k: int
    span_q: int
    span_k: int
    num_spans_q: int
    num_spans_k: int

    @property
    def dq_waits(self) -> bool:
        """Whether sums of dq wait in HBM."""
        return self.num_spans_q > 1 and self.num_spans_k > 1


class _Visits(NamedTuple):
    """Query tiles [first, last) that see a block of keys, of each size; whole ones need no mask."""

    whole_first: jax.Array
    whole_last: jax.Array
    edge_first: jax.Array
    edge_last: jax.Array
    span_first: jax.Array
    span_last: jax.Array


class _Inputs(NamedTuple):
    """What a step reads, in VMEM."""

    q_1hqK: Any
    k_1hkK: Any
    v_1hkK: Any
    out_1hqK: Any
    d_out_1hqK: Any
    lse_1h1q: Any
    k_start_11q: Any
    k_end_11q: Any


class _State(NamedTuple):
    """Float32 in VMEM: sums over tiles, and for each query the sum of out times d_out."""

    dq_hKq: Any
    dk_hKk: Any
    dv_hKk: Any
    delta_h1q: Any


def backward(
    q_BHTK: jax.Array,
    k_BHSK: jax.Array,
    v_BHSK: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    seeds_BH2: jax.Array | None,
    lse_BHT: jax.Array,
    out_BHTK: jax.Array,
    d_out_BHTK: jax.Array,
    *,
    scale: float,
    dropout: float = 0.0,
    tiles: BackwardTiles,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q [B, H, T, K], k and v [B, H, S, K].

    Takes the output of the forward pass and its base-2 log-sum-exp, float32 [B, H, T], 1e30 if a query
    sees nothing. Tiles must divide the sizes, else ValueError.
    """
    B, H, T, K = q_BHTK.shape
    S, h = k_BHSK.shape[2], tiles.block_h
    sizes = _sizes(q_BHTK, k_BHSK, tiles)

    def query_span(b, k, q, visits: _Visits):
        """The nearest visited one: repeating an index costs no copy."""
        first, last = visits.span_first[b, k], visits.span_last[b, k]
        return jnp.clip(q, first, jnp.maximum(last - 1, first))

    query_spec = pl.BlockSpec(
        (1, h, sizes.span_q, K),
        lambda b, n, k, q, visits, _: (b, n, query_span(b, k, q, visits), 0),
    )
    lse_spec = pl.BlockSpec(
        (1, h, 1, sizes.span_q),
        lambda b, n, k, q, visits, _: (b, n, 0, query_span(b, k, q, visits)),
    )
    interval_spec = pl.BlockSpec((1, 1, sizes.span_q), lambda b, n, k, q, *_: (b, 0, q))
    key_spec = pl.BlockSpec((1, h, sizes.span_k, K), lambda b, n, k, q, *_: (b, n, k, 0))
    # Finished while the last span of keys goes by.
    dq_spec = pl.BlockSpec(
        (1, h, sizes.span_q, K),
        lambda b, n, k, q, *_: (b, n, jnp.where(k == sizes.num_spans_k - 1, q, 0), 0),
    )
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BHTK, k_BHSK, v_BHSK)]
    result_specs = [dq_spec, key_spec, key_spec]
    if sizes.dq_waits:
        waiting = (B, H, K, sizes.num_spans_q * sizes.span_q)
        results.append(jax.ShapeDtypeStruct(waiting, jnp.float32))
        result_specs.append(pl.BlockSpec(memory_space=pl.ANY))

    dq_BHTK, dk_BHSK, dv_BHSK, *_ = pl.pallas_call(
        partial(_kernel, sizes=sizes, scale=scale, dropout=dropout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, H // h, sizes.num_spans_k, sizes.num_spans_q),
            in_specs=[
                _Inputs(
                    query_spec, key_spec, key_spec, query_spec, query_spec,
                    lse_spec, interval_spec, interval_spec,
                ),
            ],
            out_specs=result_specs,
            scratch_shapes=[
                _State(
                    *[
                        pltpu.VMEM((h, rows, span), jnp.float32)
                        for rows, span in (
                            (K, sizes.span_q), (K, sizes.span_k), (K, sizes.span_k), (1, sizes.span_q)
                        )
                    ]
                ),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * B * H * T * S * K,
            transcendentals=B * H * T * S,
            bytes_accessed=4 * q_BHTK.nbytes + 4 * k_BHSK.nbytes,
        ),
        interpret=interpret,
        name="blank_attention_backward",
    )(
        _visits(k_start_BT, k_end_BT, S, sizes),
        jnp.zeros(1, jnp.int32) if seeds_BH2 is None else seeds_BH2.ravel(),
        _Inputs(
            q_BHTK, k_BHSK, v_BHSK, out_BHTK, d_out_BHTK,
            lse_BHT[:, :, None], k_start_BT[:, None], k_end_BT[:, None],
        ),
    )  # fmt: skip
    return dq_BHTK, dk_BHSK, dv_BHSK


def _sizes(q_BHTK: jax.Array, k_BHSK: jax.Array, tiles: BackwardTiles) -> _Sizes:
    q, k, edge, h, vmem_bytes = tiles
    (_, H, T, K), S = q_BHTK.shape, k_BHSK.shape[2]
    if T % q or S % k or H % h or q % LANES or k % LANES:
        raise ValueError(f"{tiles} do not divide {T} queries, {S} keys and {H} heads")
    # A row of queries and one of keys: two copies of eight arrays, and three float32 sums.
    row_bytes = h * pl.cdiv(K, LANES) * LANES * (2 * 8 * q_BHTK.dtype.itemsize + 3 * 4)
    # What a tile leaves behind, and numbers of queries.
    other_bytes = h * 6 * q_BHTK.dtype.itemsize * q * k + 2**21
    rows = (vmem_bytes - other_bytes) // row_bytes
    # The last span may reach beyond the end of the arrays, where nothing is visited.
    span_q, span_k = (min(max(rows // block, 1) * block, n) for block, n in ((q, T), (k, S)))
    return _Sizes(
        math.gcd(edge, q), math.gcd(edge, k), q, k, span_q, span_k,
        pl.cdiv(T, span_q), pl.cdiv(S, span_k),
    )  # fmt: skip


def _visits(k_start_BT: jax.Array, k_end_BT: jax.Array, S: int, sizes: _Sizes) -> _Visits:
    # Queries beyond the end see nothing.
    beyond = sizes.num_spans_q * sizes.span_q - k_start_BT.shape[1]
    k_start_BT, k_end_BT = (jnp.pad(x, ((0, 0), (0, beyond))) for x in (k_start_BT, k_end_BT))

    def ranges(q: int, k: int) -> Ranges:
        return query_ranges(key_ranges(k_start_BT, k_end_BT, q, k), pl.cdiv(S, k))

    whole = ranges(sizes.block_q, sizes.block_k)
    edge = ranges(sizes.edge_q, sizes.edge_k)
    span = ranges(sizes.span_q, sizes.span_k)
    return _Visits(whole.full_first, whole.full_last, edge.first, edge.last, span.first, span.last)


def _kernel(
    visits: _Visits, seeds, inputs: _Inputs, dq_ref, dk_ref, dv_ref, *rest,
    sizes: _Sizes, scale: float, dropout: float,
):  # fmt: skip
    """All visible tiles of one span of keys and one span of queries."""
    *waiting_refs, state, copied = rest
    h, b, n = dq_ref.shape[1], pl.program_id(0), pl.program_id(1)
    # Python numbers where there is only one span, so that conditions are decided at compilation.
    span_k: Any = pl.program_id(2) if sizes.num_spans_k > 1 else 0
    span_q: Any = pl.program_id(3) if sizes.num_spans_q > 1 else 0
    first_k, last_k = span_k == 0, span_k == sizes.num_spans_k - 1
    visited: Any = True
    if sizes.num_spans_q * sizes.num_spans_k > 1:
        visited = visits.span_first[b, span_k] <= span_q
        visited &= span_q < visits.span_last[b, span_k]

    @pl.when(first_k)
    def start_dq():
        state.dq_hKq[...] = jnp.zeros_like(state.dq_hKq)

    @pl.when(span_q == 0)
    def start_dk_dv():
        state.dk_hKk[...] = jnp.zeros_like(state.dk_hKk)
        state.dv_hKk[...] = jnp.zeros_like(state.dv_hKk)

    if sizes.dq_waits:
        queries = pl.ds(pl.multiple_of(span_q * sizes.span_q, LANES), sizes.span_q)
        waiting_hKq = waiting_refs[0].at[b, pl.ds(n * h, h), :, queries]
        fetch = pltpu.make_async_copy(waiting_hKq, state.dq_hKq, copied)
        put_back = pltpu.make_async_copy(state.dq_hKq, waiting_hKq, copied)
        pl.when(~first_k & (visited | last_k))(partial(_copy, fetch))

    @pl.when(visited)
    def add_tiles():
        _set_delta(inputs, state, 1 - dropout)
        tile = partial(
            _tile, seeds, inputs, state, (b * pl.num_programs(1) + n) * h,
            span_q * sizes.span_q, span_k * sizes.span_k, scale=scale, dropout=dropout,
        )  # fmt: skip
        _walk(visits, b, span_q, span_k, sizes, tile)

    if sizes.dq_waits:
        pl.when(~last_k & (visited | first_k))(partial(_copy, put_back))

    @pl.when(last_k)
    def finish_dq():
        sees_1q = inputs.k_start_11q[0] < inputs.k_end_11q[0]
        _write(dq_ref, state.dq_hKq, scale / (1 - dropout), sees_1q)

    @pl.when(span_q == sizes.num_spans_q - 1)
    def finish_dk_dv():
        _write(dk_ref, state.dk_hKk, scale / (1 - dropout))
        _write(dv_ref, state.dv_hKk, 1 / (1 - dropout))


def _copy(copy: Any) -> None:
    copy.start()
    copy.wait()


def _set_delta(inputs: _Inputs, state: _State, kept: float) -> None:
    """Sums over K of out times d_out; like all of ds times `kept`, until it is written."""
    for n in range(state.delta_h1q.shape[0]):
        out_Kq, d_out_Kq = (
            x[0, n].T.astype(jnp.float32) for x in (inputs.out_1hqK, inputs.d_out_1hqK)
        )
        state.delta_h1q[n] = jnp.sum(out_Kq * d_out_Kq, axis=0, keepdims=True) * kept


def _write(ref, sums_hKn, factor: float, nonzero_1n: jax.Array | None = None) -> None:
    """Sums times a factor, transposed."""
    for n in range(sums_hKn.shape[0]):
        x_Kn = sums_hKn[n] * factor
        if nonzero_1n is not None:
            x_Kn = jnp.where(nonzero_1n, x_Kn, 0)
        ref[0, n] = x_Kn.astype(ref.dtype).T


def _walk(visits: _Visits, b, span_q, span_k, sizes: _Sizes, tile: Callable[..., None]) -> None:
    """Calls `tile` for the visible tiles of a step, one block of keys after the other."""
    blocks_q, blocks_k = sizes.span_q // sizes.block_q, sizes.span_k // sizes.block_k
    split_q, split_k = sizes.block_q // sizes.edge_q, sizes.block_k // sizes.edge_k
    low, high = span_q * blocks_q, (span_q + 1) * blocks_q
    whole_tile = partial(tile, q=sizes.block_q, k=sizes.block_k, masked=False)
    edge_tile = partial(tile, q=sizes.edge_q, k=sizes.edge_k, masked=True)

    def block(j, _):
        at = span_k * blocks_k + j
        first = jnp.clip(visits.whole_first[b, at], low, high)
        last = jnp.clip(visits.whole_last[b, at], first, high)
        jax.lax.fori_loop(first, last, lambda i, _: whole_tile(i - low, j), None)
        jax.lax.fori_loop(
            j * split_k, (j + 1) * split_k, partial(edges, first=first, last=last), None
        )

    def edges(j, _, first, last):
        """The visible small tiles before and behind the whole ones."""
        at = span_k * blocks_k * split_k + j
        head = jnp.clip(visits.edge_first[b, at], low * split_q, high * split_q)
        end = jnp.clip(visits.edge_last[b, at], head, high * split_q)
        tail = jnp.maximum(head, last * split_q)
        num_before = jnp.maximum(jnp.minimum(end, first * split_q) - head, 0)
        num_behind = jnp.maximum(end - tail, 0)

        def edge(t, _):
            i = jnp.where(t < num_before, head + t, tail + t - num_before)
            edge_tile(i - low * split_q, j)

        jax.lax.fori_loop(0, num_before + num_behind, edge, None)

    num_blocks = jnp.minimum(blocks_k, visits.whole_first.shape[1] - span_k * blocks_k)
    jax.lax.fori_loop(0, num_blocks, block, None)


def _tile(
    seeds, inputs: _Inputs, state: _State, first_head, first_query, first_key, i, j,
    *, q: int, k: int, masked: bool, scale: float, dropout: float,
):  # fmt: skip
    """Adds a tile to the sums, for all heads; i and j count such tiles from the start of the span."""
    queries, keys = pl.ds(pl.multiple_of(i * q, q), q), pl.ds(pl.multiple_of(j * k, k), k)
    visible_kq: Any = None
    if masked:
        # Both ends at once: key - start < end - start as unsigned numbers.
        start_1q = inputs.k_start_11q[0, :, queries]
        size_1q = jnp.maximum(inputs.k_end_11q[0, :, queries] - start_1q, 0)
        key_kq = first_key + j * k + jax.lax.broadcasted_iota(jnp.int32, (k, q), 0)
        visible_kq = key_kq + (_LOWEST - start_1q) < size_1q + _LOWEST
    weights = []
    for n in range(state.dq_hKq.shape[0]):
        s_kq = _dot(inputs.k_1hkK[0, n, keys], inputs.q_1hqK[0, n, queries], 1, 1)
        dp_kq = _dot(inputs.v_1hkK[0, n, keys], inputs.d_out_1hqK[0, n, queries], 1, 1)
        p_kq = jnp.exp2(s_kq * (scale * math.log2(math.e)) - inputs.lse_1h1q[0, n, :, queries])
        dropped_kq = p_kq
        if dropout:
            kept_kq = _kept(
                seeds, first_head + n, first_query + i * q, first_key + j * k, (k, q), dropout
            )
            dropped_kq, dp_kq = (jnp.where(kept_kq, x, 0) for x in (p_kq, dp_kq))
        ds_kq = p_kq * (dp_kq - state.delta_h1q[n, :, queries])
        if masked:
            dropped_kq, ds_kq = (jnp.where(visible_kq, x, 0) for x in (dropped_kq, ds_kq))
        weights.append([x.astype(inputs.q_1hqK.dtype) for x in (dropped_kq, ds_kq)])
    for n, (p_kq, ds_kq) in enumerate(weights):
        state.dv_hKk[n, :, keys] += _dot(inputs.d_out_1hqK[0, n, queries], p_kq, 0, 1)
        state.dk_hKk[n, :, keys] += _dot(inputs.q_1hqK[0, n, queries], ds_kq, 0, 1)
        state.dq_hKq[n, :, queries] += _dot(inputs.k_1hkK[0, n, keys], ds_kq, 0, 0)


def _kept(seeds, head, first_query, first_key, shape: tuple[int, int], dropout: float):
    """Which weights of a tile dropout keeps, for a head counted through the batch."""
    key_k1 = first_key + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
    query_1q = first_query + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    return keep(seeds[2 * head], seeds[2 * head + 1], query_1q, key_k1, dropout)


def _dot(x: jax.Array, y: jax.Array, contract_x: int, contract_y: int) -> jax.Array:
    """Float32 product over the given axes, exact to the type of its factors."""
    float32 = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x, y, (((contract_x,), (contract_y,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
