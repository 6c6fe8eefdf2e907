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
from glmjax.kernels.blank_attention import (
    decode_reference,
    platform,
    tpu_cache,
    tpu_decode,
    uses_tpu,
)
from glmjax.sharding import per_device

TOKENS = tpu_cache.FEW
"""Most new tokens of a row for which `attend_few` is made."""

_CACHE = ("layer", "batch", "heads")
_TOKENS = ("batch", "length", "heads")
_ROWS = ("batch",)

# (q_BTHK, k_NBHSK, v_NBHSK, layer, k_start_BT, k_end_BT, k_scale_NBHS, v_scale_NBHS) -> out_BTHK
Decode = Callable[..., jax.Array]


def stored_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The type in which a cache lies. XLA for CPUs converts all layers of bfloat16 to float32 to
    slice a few slots or write them; there it is uint16, the bits of the numbers."""
    is_bits = platform() == "cpu" and jnp.dtype(dtype) == jnp.bfloat16
    return jnp.dtype(jnp.uint16 if is_bits else dtype)


def write(
    arrays: Sequence[jax.Array],
    layer: Any,
    new: Sequence[jax.Array],
    slot_B: jax.Array,
    implementation: AttentionImplementation,
) -> list[jax.Array]:
    """The caches with new tokens of one layer in the slots from slot_B on; there must be room."""
    put = tpu_cache.write if uses_tpu(implementation) else decode_reference.write
    return per_device(put, (_CACHE, (), _TOKENS, _ROWS), _CACHE)(arrays, layer, new, slot_B)


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
    in_axes = (_TOKENS, _CACHE, _CACHE, (), _ROWS, _ROWS, _CACHE, _CACHE)
    if not uses_tpu(implementation):
        on_gpu = platform() == "gpu"
        attend = decode_reference.attend_layer if on_gpu else decode_reference.attend_cache
        return per_device(attend, in_axes, _TOKENS)
    tiles = tpu_decode.default_tiles(dtype)
    make_steps = partial(tpu_decode.make_steps, size=size, tiles=tiles)
    steps = per_device(make_steps, (_ROWS, _ROWS), _ROWS)(k_start_BT, k_end_BT)

    def local(steps: tpu_decode.Steps, *arrays: Any) -> jax.Array:
        return tpu_decode.attend_cache(*arrays, tiles=tiles, steps=steps)

    return partial(per_device(local, (_ROWS, *in_axes), _TOKENS), steps)
