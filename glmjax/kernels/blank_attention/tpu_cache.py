"""Writing new tokens into a cache where it lies, on TPU.

XLA's scatter wants slots in front of heads, and would lay the whole cache out anew for every layer.
A few tokens are written by a kernel that reads and writes back only the one or two blocks of slots
of each row that hold them; longer pieces go row by row through dynamic_update_slice.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

FEW = 8
"""Most tokens that the kernel writes: they lie in two blocks of slots at most."""


def write(
    arrays: Sequence[jax.Array],
    layer: jax.Array,
    new: Sequence[jax.Array],
    slot_B: jax.Array,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> list[jax.Array]:
    """Arrays [N, B, H, S, ...] with new ones [B, T, H, ...] in one layer from slot_B on.

    Up to eight tokens are dropped where they are beyond S; more must have room.
    """
    new = [jnp.swapaxes(x, 1, 2) for x in new]
    if new[0].shape[2] <= FEW:
        return _write_few(arrays, layer, new, slot_B, interpret)
    return [_write_many(x, layer, y, slot_B) for x, y in zip(arrays, new, strict=True)]


def _write_many(
    x_NBHS: jax.Array, layer: jax.Array, new_BHT: jax.Array, slot_B: jax.Array
) -> jax.Array:
    def row(b: jax.Array, x_NBHS: jax.Array) -> jax.Array:
        new_1BHT = jax.lax.dynamic_slice_in_dim(new_BHT, b, 1).astype(x_NBHS.dtype)[None]
        index: list[Any] = [layer, b, 0, slot_B[b], *[0] * (x_NBHS.ndim - 4)]
        return jax.lax.dynamic_update_slice(x_NBHS, new_1BHT, index)

    return jax.lax.fori_loop(0, len(slot_B), row, x_NBHS)


def _write_few(arrays, layer, new, slot_B, interpret):
    B, _, T = new[0].shape[:3]

    def old_spec(x):
        # The smallest block that can be copied: 32 rows of int8, 8 of the rest; 128 lanes of scales.
        block = 128 if x.ndim == 4 else 32 if x.dtype == jnp.int8 else 8
        block = min(block, x.shape[3])

        def index(b, j, layer, slot):
            # A second block behind the cache is the last one again; nothing more changes there.
            start = jax.lax.div(slot[b], block) + j
            return (
                layer[0],
                b,
                0,
                jnp.minimum(start, (x.shape[3] - 1) // block),
                *(0,) * (x.ndim - 4),
            )

        return pl.BlockSpec((None, None, x.shape[2], block, *x.shape[4:]), index)

    def new_spec(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, *(0,) * (x.ndim - 1)))

    old_specs = [old_spec(x) for x in arrays]
    return pl.pallas_call(
        partial(_kernel, sizes=[x.shape[3] for x in arrays]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, min(T, 2)),
            in_specs=[*map(new_spec, new), *old_specs],
            out_specs=old_specs,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        input_output_aliases={2 + len(new) + i: i for i in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="blank_write",
        interpret=interpret,
    )(
        jnp.asarray(layer, jnp.int32)[None], slot_B, *(x.astype(jnp.float32) for x in new), *arrays
    )  # fmt: skip


def _kernel(layer_ref, slot_ref, *refs, sizes: Sequence[int]):
    count = len(sizes)
    slot = slot_ref[pl.program_id(0)]
    for new_ref, old_ref, out_ref, size in zip(
        refs[:count], refs[count : 2 * count], refs[2 * count :], sizes, strict=True
    ):
        block = old_ref.shape[1]
        j = jnp.minimum(jax.lax.div(slot, block) + pl.program_id(1), (size - 1) // block)
        at = j * block + jax.lax.broadcasted_iota(jnp.int32, old_ref.shape, 1) - slot
        kept = old_ref[...].astype(jnp.float32)  # Holds every int8 and bfloat16.
        for t in range(new_ref.shape[1]):
            kept = jnp.where(at == t, new_ref[:, t : t + 1], kept)
        out_ref[...] = kept.astype(out_ref.dtype)
