"""A running batch whose rows come and go: the base of a server.

The rows of one `Decoding` are slots. `insert` feeds a prompt into an empty one while the others stay
where they are, `step` draws tokens for all of them, `read` says what was drawn, `free` empties a
slot, finished or not. Nothing here depends on who sits where: a program is compiled for a bucket of
prompt lengths, and one for the steps.

    slots = create(config, params, num_slots=8, length=2048)
    slots = insert(config, params, slots, 3, row, 256, sampling, stream)
    while any(slots.row_B):
        following = step(config, params, slots)      # only starts the device
        for slot, news in read(slots).items():       # of the steps before, while these run
            ...                                      # news.pieces; following = free(following, slot)
        slots = following

The device never waits for the host: a loop that reads one block of steps behind keeps it busy.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.config import GLMConfig
from glmjax.inference.generate import (
    SHORTEST,
    Batch,
    Decoding,
    as_batch,
    batch_parts,
    bucket,
    pieces_of,
    replicate,
    run_steps,
    start,
)
from glmjax.inference.prompts import Row, check_ids, check_positions
from glmjax.inference.sampling import MOST_BANNED, Sampling, pad_ids, per_row
from glmjax.model.attention import CACHE_AXES, KVCache
from glmjax.model.params import Params
from glmjax.sharding import constrain, per_device


class _Block(NamedTuple):
    """What the arrays were around a block of steps, for reading while the next one runs."""

    row_B: tuple[Row | None, ...]
    before_BM: Any
    after_BM: Any
    ids_BS: Any
    is_active_B: Any


@dataclass(frozen=True)
class Slots:
    """A running batch. Functions that give a new one take the cache of the old, which then serves
    `read` alone."""

    decoding: Decoding
    row_B: tuple[Row | None, ...]
    """Whose prompt is in each slot; None where it is empty."""
    block: _Block | None = None

    @property
    def length(self) -> int:
        """Tokens of a row, drawn ones included, for which a slot has room."""
        return self.decoding.ids_BS.shape[1] - 1


class News(NamedTuple):
    """What a block of steps drew for one slot."""

    pieces: list[list[int]]
    """The new ids of each blank of the row, mostly none but of one."""
    is_finished: bool


def create(
    config: GLMConfig,
    params: Params,
    num_slots: int,
    length: int,
    max_blanks: int = 1,
    max_banned: int = MOST_BANNED,
) -> Slots:
    """Empty slots for rows of `length` tokens, prompt and drawn ones together.

    The prefix of a model has room besides. Rows have at most max_blanks open blanks and max_banned
    banned ids.

    Raises:
        ValueError: a number is not positive, or the mesh does not divide the slots.
    """
    for name, number in (
        ("num_slots", num_slots), ("length", length), ("max_blanks", max_blanks),
    ):  # fmt: skip
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}")
    parts = batch_parts()
    if num_slots % parts:
        raise ValueError(
            f"num_slots = {num_slots} does not divide over the {parts} parts of the mesh that share "
            "the rows"
        )
    sampling = per_row([Sampling()] * num_slots, len(pad_ids([0] * max_banned)))
    decoding = _empty(config, params, sampling, num_slots, length, max_blanks)
    return Slots(decoding, (None,) * num_slots)


@partial(jax.jit, static_argnames=("config", "B", "length", "M"))
def _empty(
    config: GLMConfig, params: Params, sampling: Sampling, B: int, length: int, M: int
) -> Decoding:
    cache = KVCache.empty(config, B, config.prefix_length + length)
    length = cache.k_NBHSK.shape[3] - config.prefix_length

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    return replicate(Decoding(
        cache=replace(cache, length_B=jnp.full(B, config.prefix_length, jnp.int32)),
        ids_BS=jnp.full((B, length + 1), -1, jnp.int32), position_B2=zeros(B, 2),
        blank_B=zeros(B), size_BM=zeros(B, M), num_blanks_B=zeros(B), limit_B=zeros(B),
        opening_B=zeros(B), start_BM2=zeros(B, M, 2), advance_BM=zeros(B, M),
        sampling=sampling, key_B=jax.vmap(jax.random.key)(sampling.seed),
    ))  # fmt: skip


def insert(
    config: GLMConfig,
    params: Params,
    slots: Slots,
    slot: int,
    row: Row,
    max_new_tokens: int,
    sampling: Sampling,
    stream: tuple[int, ...],
) -> Slots:
    """The slots with a prompt fed into an empty one; it starts with the next step.

    A row draws what `begin` would draw for it with the same `stream`, whoever its neighbours are.

    Raises:
        ValueError: the slot is taken or does not exist, or the row does not fit it or the model.
    """
    max_blanks = slots.decoding.size_BM.shape[1]
    _check_slot(slots, slot)
    if slots.row_B[slot] is not None:
        raise ValueError(f"slot {slot} is taken")
    blanks = len(row.advance_M)
    if blanks > max_blanks:
        raise ValueError(f"a row has {blanks} blanks, but the slots take {max_blanks}")
    # The openings are fed too, but not the very last token.
    needed = len(row.ids) + blanks * (max_new_tokens + 1) - 1
    if needed > slots.length:
        raise ValueError(
            f"a row of {len(row.ids)} tokens with num_blanks = {blanks} and max_new_tokens = "
            f"{max_new_tokens} needs {needed}, but the slots have room for {slots.length}"
        )
    check_positions(config, row, max_new_tokens, "a row")
    check_ids(config, sampling.banned, "banned")
    max_banned = np.shape(slots.decoding.sampling.banned)[-1]
    if len(sampling.banned) > max_banned:
        raise ValueError(f"a row bans {len(sampling.banned)} ids, but the slots take {max_banned}")
    sampling = per_row([sampling], max_banned)
    T = min(bucket(len(row.ids), SHORTEST), slots.length)
    batch = as_batch([row], [max_new_tokens], [stream], 1, T, max_blanks)
    decoding = _insert(config, params, slots.decoding, np.int32(slot), batch, sampling)
    return replace(slots, decoding=decoding, row_B=_with(slots.row_B, slot, row))


@partial(jax.jit, static_argnames="config", donate_argnames="decoding")
def _insert(
    config: GLMConfig,
    params: Params,
    decoding: Decoding,
    slot: jax.Array,
    batch: Batch,
    sampling: Sampling,
) -> Decoding:
    # Devices that share the rows all feed this one; the one that has the slot keeps it.
    batch, sampling = jax.tree.map(
        lambda x: jnp.repeat(jnp.asarray(x), batch_parts(), 0), (batch, sampling)
    )
    T, length = batch.tokens_BT.shape[1], decoding.ids_BS.shape[1]
    one = replicate(start(config, params, batch, sampling, T, length))

    def keys_values(cache: KVCache) -> KVCache:
        return replace(cache, length_B=None)

    def state(decoding: Decoding) -> Decoding:
        return replace(decoding, cache=decoding.cache.length_B)

    merged = jax.tree.map(lambda x, y: x.at[slot].set(y[0]), state(decoding), state(one))
    cache = jax.tree.map(
        partial(_put_row, slot), keys_values(decoding.cache), keys_values(one.cache)
    )
    return replicate(replace(merged, cache=replace(cache, length_B=merged.cache)))


def _put_row(slot: jax.Array, x_NBHS: jax.Array, y_NBHS: jax.Array) -> jax.Array:
    """One array of a cache with the first slots of one row from another."""
    axes = CACHE_AXES[: x_NBHS.ndim]

    def local(row_B: jax.Array, slot: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        at = jnp.clip(slot - row_B[0], 0, len(row_B) - 1)
        index: list[Any] = [0, at, *[0] * (x.ndim - 2)]
        old = jax.lax.dynamic_slice(x, index, y.shape)
        return jax.lax.dynamic_update_slice(x, jnp.where(row_B[at] == slot, y, old), index)

    put = per_device(local, (("batch",), (), axes, axes), axes)
    return constrain(put(jnp.arange(x_NBHS.shape[1]), slot, x_NBHS, y_NBHS), *axes)


def step(config: GLMConfig, params: Params, slots: Slots, steps: int = 8) -> Slots:
    """The slots after so many steps, or fewer if all rows finish; returns before they are done."""
    is_taken_B = np.array([row is not None for row in slots.row_B])
    decoding, block = _run(config, params, slots.decoding, is_taken_B, np.int32(steps))
    return Slots(decoding, slots.row_B, _Block(slots.row_B, *block))


@partial(jax.jit, static_argnames="config", donate_argnames="decoding")
def _run(
    config: GLMConfig, params: Params, decoding: Decoding, is_taken_B: jax.Array, steps: jax.Array
) -> tuple[Decoding, tuple[jax.Array, ...]]:
    num_blanks_B = jnp.where(is_taken_B, decoding.num_blanks_B, 0)
    decoding = replace(decoding, num_blanks_B=num_blanks_B)
    after = run_steps(config, params, decoding, steps)
    read = decoding.size_BM, after.size_BM, after.ids_BS, after.is_active_B
    # Copies, since the next steps take the arrays themselves.
    return after, jax.tree.map(lambda x: constrain(jnp.copy(x)), read)


def read(slots: Slots) -> dict[int, News]:
    """What the last `step` drew for every slot that was taken then and has not been freed since.

    Waits for that step and no longer, even if the next one has been started already.
    """
    if slots.block is None:
        return {}
    before_BM, after_BM, ids_BS, is_active_B = jax.device_get(slots.block[1:])
    news = {}
    for slot, row in enumerate(slots.block.row_B):
        if row is not None:
            pieces = pieces_of(row, ids_BS[slot], after_BM[slot])
            new = [
                piece[old:] for piece, old in zip(pieces, before_BM[slot].tolist(), strict=False)
            ]
            news[slot] = News(new, not is_active_B[slot])
    return news


def free(slots: Slots, slot: int) -> Slots:
    """The slots with one of them empty, whether or not its row has finished.

    Raises:
        ValueError: the slot is empty or does not exist.
    """
    _check_slot(slots, slot)
    if slots.row_B[slot] is None:
        raise ValueError(f"slot {slot} is empty")
    block = slots.block
    if block is not None:
        block = block._replace(row_B=_with(block.row_B, slot, None))
    return replace(slots, row_B=_with(slots.row_B, slot, None), block=block)


def _check_slot(slots: Slots, slot: int) -> None:
    if not 0 <= slot < len(slots.row_B):
        raise ValueError(f"slot {slot} does not exist: there are {len(slots.row_B)}")


def _with(row_B: tuple[Row | None, ...], slot: int, row: Row | None) -> tuple[Row | None, ...]:
    return (*row_B[:slot], row, *row_B[slot + 1 :])
