"""Writing into a cache and attention over it, by the form made for the platform.

Caches of all layers are arrays [N, B, H, S, ...], new tokens [B, T, H, ...]. TPUs have kernels for
up to eight tokens; other platforms and longer pieces use plain XLA. Under a mesh every device works
on its own rows and heads.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from glmjax.config import AttentionImplementation
from glmjax.kernels.blank_attention import decode_reference, tpu_cache, tpu_decode, uses_tpu
from glmjax.sharding import per_device

TOKENS = tpu_cache.FEW
"""Most new tokens of a row for which `attend_few` is made."""

_CACHE = ("layer", "batch", "heads")
_TOKENS = ("batch", "length", "heads")
_ROWS = ("batch",)

# (q_BTHK, k_NBHSK, v_NBHSK, layer, k_start_BT, k_end_BT, k_scale_NBHS, v_scale_NBHS) -> out_BTHK
Decode = Callable[..., jax.Array]


def write(
    arrays: Sequence[jax.Array],
    layer: Any,
    new: Sequence[jax.Array],
    slot_B: jax.Array,
    implementation: AttentionImplementation,
) -> list[jax.Array]:
    """The caches with new tokens of one layer in the slots from slot_B on; there must be room."""
    if uses_tpu(implementation):
        put = per_device(tpu_cache.write, (_CACHE, (), _TOKENS, _ROWS), _CACHE)
        return put(arrays, layer, new, slot_B)
    row_B1 = jnp.arange(new[0].shape[0])[:, None]
    slot_BT = slot_B[:, None] + jnp.arange(new[0].shape[1])
    return [
        x_NBHS.at[layer, row_B1, :, slot_BT].set(y_BTH.astype(x_NBHS.dtype))
        for x_NBHS, y_BTH in zip(arrays, new, strict=True)
    ]


def attend_few(
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    size: int,
    dtype: DTypeLike,
    implementation: AttentionImplementation,
) -> Decode:
    """Attention of a few queries a row over one layer of caches of `size` slots.

    What depends on the intervals alone is made here, once for all layers.
    """
    if not uses_tpu(implementation):
        return decode_reference.attend_cache
    tiles = tpu_decode.default_tiles(dtype)
    make_steps = partial(tpu_decode.make_steps, size=size, tiles=tiles)
    steps = per_device(make_steps, (_ROWS, _ROWS), _ROWS)(k_start_BT, k_end_BT)

    def local(steps: tpu_decode.Steps, *arrays: Any) -> jax.Array:
        return tpu_decode.attend_cache(*arrays, tiles=tiles, steps=steps)

    in_axes = (_ROWS, _TOKENS, _CACHE, _CACHE, (), _ROWS, _ROWS, _CACHE, _CACHE)
    return partial(per_device(local, in_axes, _TOKENS), steps)
