"""Continues prompts of any lengths, many at a time, with a KV cache.

`begin` feeds a batch into a cache, `advance` runs steps of one token for every row inside one
compiled loop, `new_ids` reads what has been drawn so far. Each row fills its own open blanks, one
after the other and at its own pace; a row that has finished is left as it is. Shapes are rounded up
to powers of two, so that few are ever compiled.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from glmjax.config import GLMConfig
from glmjax.inference.prompts import (
    Row,
    check_positions,
    prompt_row,
    random_streams,
    special_tokens,
)
from glmjax.inference.sampling import Sampling, sample
from glmjax.model.attention import KVCache
from glmjax.model.params import Params
from glmjax.model.prefix import start_cache
from glmjax.model.transformer import decode_step, prefill
from glmjax.sharding import constrain, num_parts

SHORTEST = 16
"""Tokens of the smallest length bucket."""


class _Batch(NamedTuple):
    """Rows as arrays, padded with zeros; rows of padding have no blanks."""

    tokens_BT: Any
    positions_B2T: Any
    context_B: Any
    length_B: Any
    opening_B: Any
    start_BM2: Any
    advance_BM: Any
    num_blanks_B: Any
    stream_Bn: Any


@struct.dataclass
class Decoding:
    """A batch of rows in the middle of filling their M open blanks with at most E tokens each."""

    cache: KVCache
    key_B: Any
    opening_B: Any
    """The token that opens each blank."""
    start_BM2: Any
    """Its position and block position."""
    advance_BM: Any
    """How far the position moves with every token."""
    num_blanks_B: Any
    limit: Any
    """Most tokens of a blank."""
    token_B: Any
    """The token that is fed next, at position_B2."""
    position_B2: Any
    blank_B: Any
    """The blank being filled; num_blanks_B when the row has finished."""
    count_B: Any
    """Tokens in it so far."""
    ids_BME: Any
    """The drawn tokens; -1 where there is none."""

    @property
    def is_active_B(self) -> jax.Array:
        return self.blank_B < self.num_blanks_B


def generate(
    config: GLMConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
) -> list[list[int]]:
    """The new token ids of each prompt: up to, and without, the <eop> or end of document.

    Prompts are lists of token ids in the official layout of the family (see
    `glmjax.inference.prompts`), of any lengths; all but those of ChatGLM2-6B and its successors have
    a mask token and end in <sop>.

    Raises:
        ValueError: a prompt has another layout, or needs positions that the model does not have.
    """
    rows = [prompt_row(config, ids, f"prompt {i}") for i, ids in enumerate(prompts)]
    if not rows:
        return []
    for i, row in enumerate(rows):
        check_positions(config, row, max_new_tokens, f"prompt {i}")
    decoding = begin(config, params, rows, max_new_tokens, sampling, random_streams(prompts))
    decoding = advance(config, params, decoding, sampling)
    return [pieces[0] for pieces in new_ids(decoding, rows)]


def begin(
    config: GLMConfig,
    params: Params,
    rows: Sequence[Row],
    max_new_tokens: int,
    sampling: Sampling,
    streams: Sequence[tuple[int, ...]],
) -> Decoding:
    """Feeds rows into a new cache, at most max_new_tokens to come for each of their blanks.

    `streams` names the random numbers of each row (`random_streams`).

    Raises:
        ValueError: max_new_tokens is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    parts = _batch_parts()
    B = -(-_bucket(len(rows)) // parts) * parts
    T = _bucket(max(len(row.ids) for row in rows), SHORTEST)
    M = _bucket(max(len(row.advance_M) for row in rows))
    batch = _Batch(
        _stack([row.ids for row in rows], B, T),
        _stack([row.positions_2T for row in rows], B, 2, T),
        _stack([row.context for row in rows], B),
        _stack([len(row.ids) for row in rows], B),
        _stack([row.opening for row in rows], B),
        _stack([row.start_M2 for row in rows], B, M, 2),
        _stack([row.advance_M for row in rows], B, M),
        _stack([len(row.advance_M) for row in rows], B),
        _stack(streams, B, len(streams[0])),
    )
    E = _bucket(max_new_tokens)
    return _start(config, params, batch, np.int32(max_new_tokens), sampling.seed, E)


@partial(jax.jit, static_argnames=("config", "E"))
def _start(
    config: GLMConfig, params: Params, batch: _Batch, limit: jax.Array, seed: jax.Array, E: int
) -> Decoding:
    (B, T), M = batch.tokens_BT.shape, batch.advance_BM.shape[1]
    # A blank feeds its opening and up to E tokens; the last token of the last one is not fed.
    cache = start_cache(config, params, B, T + M * (E + 1) - 1)
    _, cache = prefill(
        config, params, cache,
        batch.tokens_BT, batch.positions_B2T, batch.context_B, batch.length_B,
    )  # fmt: skip
    key_B = jnp.broadcast_to(jax.random.key(seed), B)
    for stream_B in batch.stream_Bn.T:
        key_B = jax.vmap(jax.random.fold_in)(key_B, stream_B)
    zeros_B = jnp.zeros(B, jnp.int32)
    return Decoding(
        cache=cache, key_B=key_B, opening_B=batch.opening_B, start_BM2=batch.start_BM2,
        advance_BM=batch.advance_BM, num_blanks_B=batch.num_blanks_B, limit=limit,
        token_B=batch.opening_B, position_B2=batch.start_BM2[:, 0],
        blank_B=zeros_B, count_B=zeros_B, ids_BME=jnp.full((B, M, E), -1, jnp.int32),
    )  # fmt: skip


@partial(jax.jit, static_argnames="config", donate_argnames="decoding")
def advance(
    config: GLMConfig,
    params: Params,
    decoding: Decoding,
    sampling: Sampling,
    steps: int | jax.Array = 2**31 - 1,
) -> Decoding:
    """Draws one token for every active row, `steps` times or until no row is active.

    The cache of the given `Decoding` is reused; that one cannot be read any more.
    """

    def goes_on(state: tuple[jax.Array, Decoding]) -> jax.Array:
        step, decoding = state
        return (step < steps) & jnp.any(decoding.is_active_B)

    def body(state: tuple[jax.Array, Decoding]) -> tuple[jax.Array, Decoding]:
        step, decoding = state
        return step + 1, _step(config, params, decoding, sampling)

    _, decoding = jax.lax.while_loop(goes_on, body, (jnp.int32(0), decoding))
    # Replicated, so that every process can read it.
    return replace(decoding, ids_BME=constrain(decoding.ids_BME))


def _step(config: GLMConfig, params: Params, state: Decoding, sampling: Sampling) -> Decoding:
    """One token of every row: feed, draw, and either keep what was drawn or go to the next blank."""
    tokens, active_B = special_tokens(config), state.is_active_B
    logits_B1V, cache = decode_step(
        config, params, state.cache, state.token_B[:, None], state.position_B2[:, :, None]
    )
    fold_in = jax.vmap(jax.random.fold_in)
    key_B = fold_in(fold_in(state.key_B, state.blank_B), state.count_B)
    new_B = sample(logits_B1V[:, 0], sampling, key_B)

    ended_B = (new_B == tokens.eop) | (new_B == tokens.eos) | (state.count_B == state.limit)
    row_B = jnp.arange(len(new_B))
    ids_BME = state.ids_BME.at[row_B, state.blank_B, state.count_B].set(
        jnp.where(active_B & ~ended_B, new_B, -1)
    )
    count_B = state.count_B + ~ended_B
    # A full blank feeds its last token before the next blank starts; the last blank need not.
    is_last_B = state.blank_B + 1 == state.num_blanks_B
    ended_B |= is_last_B & (count_B == state.limit)
    blank_B = state.blank_B + (active_B & ended_B)
    start_B2 = state.start_BM2[row_B, jnp.minimum(blank_B, state.start_BM2.shape[1] - 1)]
    advance_B = state.advance_BM[row_B, state.blank_B]
    move_B2 = jnp.stack([advance_B, jnp.ones_like(advance_B)], -1)
    return replace(
        state,
        cache=replace(cache, length_B=jnp.where(active_B, cache.length_B, state.cache.length_B)),
        token_B=jnp.where(ended_B, state.opening_B, new_B),
        position_B2=jnp.where(ended_B[:, None], start_B2, state.position_B2 + move_B2),
        blank_B=blank_B,
        count_B=jnp.where(ended_B, 0, count_B),
        ids_BME=ids_BME,
    )


def new_ids(decoding: Decoding, rows: Sequence[Row]) -> list[list[list[int]]]:
    """The tokens drawn so far: for each row, the ids of each of its blanks."""
    ids_BME = np.asarray(decoding.ids_BME)
    return [
        [[int(id) for id in ids_E if id >= 0] for ids_E in ids_ME[: len(row.advance_M)]]
        for row, ids_ME in zip(rows, ids_BME, strict=False)
    ]


def _stack(arrays: Sequence[Any], *shape: int) -> np.ndarray:
    """Arrays of one rank and any sizes as one array of that shape, zero where none reaches."""
    stacked = np.zeros(shape, np.int64)
    for b, array in enumerate(arrays):
        index: Any = (b, *map(slice, np.shape(array)))
        stacked[index] = array
    return stacked.astype(np.int32)


def _bucket(size: int, smallest: int = 1) -> int:
    """The power of two that holds size."""
    return max(smallest, 1 << (size - 1).bit_length())


def _batch_parts() -> int:
    """Into how many parts the ambient mesh splits a batch."""
    return num_parts("batch", jax.sharding.get_mesh())
