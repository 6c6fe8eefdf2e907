"""Continues prompts of any lengths, many at a time, with a KV cache.

`begin` feeds a batch into a cache, `advance` runs steps of one token for every row inside one
compiled loop, `new_ids` reads what has been drawn so far, `stream` does so while the next steps run.
Each row has settings of its own and fills its own open blanks, one after the other and at its own
pace; a row that has finished is left as it is, and its keys are not read any more. Shapes are rounded
up to powers of two, so that few are ever compiled.
"""

from collections.abc import Iterator, Sequence
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
    check_ids,
    check_positions,
    prompt_row,
    random_streams,
    special_tokens,
)
from glmjax.inference.sampling import History, Sampling, sample
from glmjax.model.attention import BlankMask, KVCache, cache_size
from glmjax.model.params import Params
from glmjax.model.prefix import start_cache
from glmjax.model.transformer import extend, logits, prefill
from glmjax.sharding import constrain, num_parts

SHORTEST = 16
"""Tokens of the smallest length bucket."""


class Batch(NamedTuple):
    """Rows as arrays, padded with zeros; rows of padding have no blanks."""

    tokens_BT: Any
    positions_B2T: Any
    context_B: Any
    length_B: Any
    opening_B: Any
    start_BM2: Any
    advance_BM: Any
    num_blanks_B: Any
    limit_B: Any
    stream_Bn: Any


@struct.dataclass
class Decoding:
    """A batch of rows in the middle of filling their M open blanks."""

    cache: KVCache
    ids_BS: Any
    """The tokens of each row: its prompt, and behind it, for each blank, the opening token and what
    was drawn. The last one is fed next, at position_B2. -1 behind it."""
    position_B2: Any
    blank_B: Any
    """The blank being filled; num_blanks_B when the row has finished."""
    size_BM: Any
    """Tokens drawn for each blank."""
    num_blanks_B: Any
    limit_B: Any
    """Most tokens of a blank."""
    opening_B: Any
    """The token that opens each blank."""
    start_BM2: Any
    """Its position and block position."""
    advance_BM: Any
    """How far the position moves with every token."""
    sampling: Sampling
    """The settings of every row."""
    key_B: Any

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
    return [pieces[0] for pieces in new_ids(advance(config, params, decoding), rows)]


def stream(
    config: GLMConfig,
    params: Params,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    steps: int = 8,
) -> Iterator[list[int]]:
    """The new token ids of one prompt as `generate` gives them, handed out as they are drawn.

    The first one comes alone, the rest in lists of at most `steps`. While one list is read the device
    draws the next; closing the iterator stops it.

    Raises:
        ValueError: as `generate`, at once.
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    row = prompt_row(config, ids, "the prompt")
    check_positions(config, row, max_new_tokens, "the prompt")
    decoding = begin(config, params, [row], max_new_tokens, sampling, random_streams([ids]))
    return _stream(config, params, row, decoding, steps)


def _stream(
    config: GLMConfig, params: Params, row: Row, decoding: Decoding, steps: int
) -> Iterator[list[int]]:
    read, is_active = 0, True
    following = advance(config, params, decoding, 1)
    while is_active:
        # Copies, since the next steps take the arrays themselves.
        drawn = jax.tree.map(jnp.copy, (following.ids_BS, following.size_BM, following.is_active_B))
        following = advance(config, params, following, steps)
        ids_BS, size_BM, is_active_B = jax.device_get(drawn)
        (piece,) = pieces_of(row, ids_BS[0], size_BM[0])
        is_active = bool(is_active_B[0])
        if len(piece) > read:
            yield piece[read:]
        read = len(piece)


def cache_tokens(
    config: GLMConfig, prompt_tokens: int, max_new_tokens: int, num_blanks: int = 1
) -> int:
    """Slots of the cache that a row takes in `begin`, its buckets and the prefix of the model
    included. `prompt_tokens` counts the prompt without the token that opens its blank."""
    prompt, new = bucket(prompt_tokens, SHORTEST), bucket(max_new_tokens)
    # A blank feeds its opening and its tokens; the last token of the last one is not fed.
    return cache_size(config.prefix_length + prompt + bucket(num_blanks) * (new + 1) - 1)


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
        ValueError: max_new_tokens is not positive, or a banned id is not in the vocabulary.
    """
    check_ids(config, sampling.banned, "banned")
    parts = batch_parts()
    B = -(-bucket(len(rows)) // parts) * parts
    prompt = max(len(row.ids) for row in rows)
    M = bucket(max(len(row.advance_M) for row in rows))
    limits = [max_new_tokens] * len(rows)
    batch = as_batch(rows, limits, streams, B, bucket(prompt, SHORTEST), M)
    size = cache_tokens(config, prompt, max_new_tokens, M) - config.prefix_length
    return _begin(config, params, batch, sampling, size)


def as_batch(
    rows: Sequence[Row],
    limits: Sequence[int],
    streams: Sequence[tuple[int, ...]],
    B: int,
    T: int,
    M: int,
) -> Batch:
    """B rows of T tokens with M blanks of at most so many new tokens each.

    Raises:
        ValueError: a limit is not positive.
    """
    for limit in limits:
        if limit < 1:
            raise ValueError(f"max_new_tokens must be positive, got {limit}")
    return Batch(
        _stack([row.ids for row in rows], B, T),
        _stack([row.positions_2T for row in rows], B, 2, T),
        _stack([row.context for row in rows], B),
        _stack([len(row.ids) for row in rows], B),
        _stack([row.opening for row in rows], B),
        _stack([row.start_M2 for row in rows], B, M, 2),
        _stack([row.advance_M for row in rows], B, M),
        _stack([len(row.advance_M) for row in rows], B),
        _stack(limits, B),
        _stack(streams, B, len(streams[0])),
    )


def start(
    config: GLMConfig, params: Params, batch: Batch, sampling: Sampling, size: int, length: int
) -> Decoding:
    """Feeds a batch, which has a setting for every row, into a cache with room for `size` tokens; rows
    may grow to `length` tokens."""
    B, T = batch.tokens_BT.shape
    _, cache = prefill(
        config, params, start_cache(config, params, B, size),
        batch.tokens_BT, batch.positions_B2T, batch.context_B, batch.length_B,
    )  # fmt: skip
    key_B = jax.vmap(jax.random.key)(sampling.seed)
    for stream_B in batch.stream_Bn.T:
        key_B = jax.vmap(jax.random.fold_in)(key_B, stream_B)
    prompt_BT = jnp.where(jnp.arange(T) < batch.length_B[:, None], batch.tokens_BT, -1)
    ids_BS = jnp.full((B, length), -1, jnp.int32).at[:, :T].set(prompt_BT[:, :length])
    return Decoding(
        cache=cache,
        ids_BS=ids_BS.at[jnp.arange(B), batch.length_B].set(batch.opening_B),
        position_B2=batch.start_BM2[:, 0],
        blank_B=jnp.zeros(B, jnp.int32),
        size_BM=jnp.zeros_like(batch.advance_BM),
        num_blanks_B=batch.num_blanks_B,
        limit_B=batch.limit_B,
        opening_B=batch.opening_B,
        start_BM2=batch.start_BM2,
        advance_BM=batch.advance_BM,
        sampling=sampling,
        key_B=key_B,
    )


@partial(jax.jit, static_argnames=("config", "size"))
def _begin(
    config: GLMConfig, params: Params, batch: Batch, sampling: Sampling, size: int
) -> Decoding:
    B = len(batch.length_B)
    sampling = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, *jnp.shape(leaf))), sampling)
    return replicate(start(config, params, batch, sampling, size, size + 1))


@partial(jax.jit, static_argnames="config", donate_argnames="decoding")
def advance(
    config: GLMConfig, params: Params, decoding: Decoding, steps: int | jax.Array = 2**31 - 1
) -> Decoding:
    """Draws one token for every active row, `steps` times or until no row is active.

    The cache of the given `Decoding` is reused; that one cannot be read any more.
    """
    return run_steps(config, params, decoding, steps)


def run_steps(
    config: GLMConfig, params: Params, decoding: Decoding, steps: int | jax.Array
) -> Decoding:
    """`advance`, to be called inside a compiled program."""

    def goes_on(state: tuple[jax.Array, Decoding]) -> jax.Array:
        step, decoding = state
        return (step < steps) & jnp.any(decoding.is_active_B)

    def body(state: tuple[jax.Array, Decoding]) -> tuple[jax.Array, Decoding]:
        step, decoding = state
        return step + 1, _step(config, params, decoding)

    _, decoding = jax.lax.while_loop(goes_on, body, (jnp.int32(0), decoding))
    return replicate(decoding)


def _step(config: GLMConfig, params: Params, state: Decoding) -> Decoding:
    """One token of every row: feed, draw, and either keep what was drawn or go to the next blank."""
    tokens, active_B = special_tokens(config), state.is_active_B
    row_B, length_B = jnp.arange(len(active_B)), state.cache.length_B
    token_B = state.ids_BS[row_B, length_B - config.prefix_length]
    # A row that has finished sees nothing, so that its keys are not read.
    k_end_B1 = jnp.where(active_B, length_B + 1, 0)[:, None]
    x_B1D, cache = extend(
        config, params, state.cache, jnp.maximum(token_B, 0)[:, None],
        state.position_B2[:, :, None], BlankMask(jnp.zeros_like(k_end_B1), k_end_B1),
        active_B.astype(jnp.int32),
    )  # fmt: skip
    size_B = state.size_BM[row_B, state.blank_B]
    # What is drawn comes behind the tokens fed so far.
    next_B = cache.length_B - config.prefix_length
    history = History(state.ids_BS, next_B, next_B - size_B, (tokens.eop, tokens.eos))
    fold_in = jax.vmap(jax.random.fold_in)
    key_B = fold_in(fold_in(state.key_B, state.blank_B), size_B)
    new_B = sample(logits(config, params, x_B1D)[:, 0], state.sampling, key_B, history)

    # A full blank feeds its last token before the next blank starts; the last blank need not.
    is_end_B = (new_B == tokens.eop) | (new_B == tokens.eos) | (size_B == state.limit_B)
    is_last_B = state.blank_B + 1 == state.num_blanks_B
    leaves_B = is_end_B | (is_last_B & (size_B + 1 == state.limit_B))
    blank_B = state.blank_B + (active_B & leaves_B)
    start_B2 = state.start_BM2[row_B, jnp.minimum(blank_B, state.start_BM2.shape[1] - 1)]
    advance_B = state.advance_BM[row_B, state.blank_B]
    move_B2 = jnp.stack([advance_B, jnp.ones_like(advance_B)], -1)
    at_B = jnp.where(active_B, next_B, state.ids_BS.shape[1])
    return replace(
        state,
        cache=cache,
        ids_BS=state.ids_BS.at[row_B, at_B].set(
            jnp.where(is_end_B, state.opening_B, new_B), mode="drop"
        ),
        position_B2=jnp.where(leaves_B[:, None], start_B2, state.position_B2 + move_B2),
        blank_B=blank_B,
        size_BM=state.size_BM.at[row_B, state.blank_B].add(active_B & ~is_end_B),
    )


def new_ids(decoding: Decoding, rows: Sequence[Row]) -> list[list[list[int]]]:
    """The tokens drawn so far: for each row, the ids of each of its blanks."""
    ids_BS, size_BM = jax.device_get((decoding.ids_BS, decoding.size_BM))
    return [pieces_of(*row) for row in zip(rows, ids_BS, size_BM, strict=False)]


def pieces_of(row: Row, ids_S: np.ndarray, size_M: np.ndarray) -> list[list[int]]:
    """What was drawn for each blank of a row."""
    end = len(row.ids)
    pieces = []
    for size in size_M[: len(row.advance_M)].tolist():
        start = end + 1  # Behind the token that opens the blank.
        end = start + size
        pieces.append(ids_S[start:end].tolist())
    return pieces


def replicate(decoding: Decoding) -> Decoding:
    """All but the keys and values whole on every device, so that every process can read it and one
    compiled program takes what another gives."""
    whole = jax.tree.map(constrain, replace(decoding, cache=decoding.cache.length_B))
    return replace(whole, cache=replace(decoding.cache, length_B=whole.cache))


def _stack(arrays: Sequence[Any], *shape: int) -> np.ndarray:
    """Arrays of one rank and any sizes as one array of that shape, zero where none reaches."""
    stacked = np.zeros(shape, np.int64)
    for b, array in enumerate(arrays):
        index: Any = (b, *map(slice, np.shape(array)))
        stacked[index] = array
    return stacked.astype(np.int32)


def bucket(size: int, smallest: int = 1) -> int:
    """The power of two that holds size."""
    return max(smallest, 1 << (size - 1).bit_length())


def batch_parts() -> int:
    """Into how many parts the ambient mesh splits a batch."""
    return num_parts("batch")
