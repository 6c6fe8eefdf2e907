"""Who sees whom, and attention over it.

GLM's mask is one interval of keys per query: query q sees `k_start[q] <= k < k_end[q]`. For a
sample that starts at s with a bidirectional part A of length c, k_start = s and
k_end = max(q + 1, s + c). Causal, bidirectional, packed and padded rows are intervals too.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from glmjax.config import GLMConfig
from glmjax.kernels import blank_attention
from glmjax.kernels.blank_attention import cache as cached
from glmjax.kernels.blank_attention.alibi import Positions
from glmjax.kernels.blank_attention.decode_reference import numbers
from glmjax.sharding import constrain


@struct.dataclass
class BlankMask:
    """The interval of keys that each query sees, int32 [B, T] each."""

    k_start_BT: Any
    k_end_BT: Any

    @classmethod
    def from_context(cls, context_B: jax.Array, *, length: int) -> "BlankMask":
        """One GLM sample per row: the first context_B tokens are part A."""
        query_T = jnp.arange(length, dtype=jnp.int32)
        k_end_BT = jnp.maximum(query_T + 1, jnp.asarray(context_B, jnp.int32)[:, None])
        return cls(jnp.zeros_like(k_end_BT), k_end_BT)

    def after(self, length_B: jax.Array) -> "BlankMask":
        """The same queries, which start at key 0, behind length_B cached keys, which all see."""
        return BlankMask(self.k_start_BT, self.k_end_BT + length_B[:, None])

    def behind(self, length: int) -> "BlankMask":
        """The same queries behind `length` keys in front of every row, which those that see key 0
        see too."""
        first_BT = jnp.where(self.k_start_BT > 0, self.k_start_BT + length, 0)
        return BlankMask(first_BT, self.k_end_BT + length)

    def repeat(self, times: int) -> "BlankMask":
        """Every query so many times in a row."""
        return BlankMask(*(jnp.repeat(x, times, 1) for x in (self.k_start_BT, self.k_end_BT)))


CACHE_AXES = ("layer", "batch", "heads", "keys", "head")
"""Logical axes of keys and values in a cache; scales have all but the last."""


def cache_size(size: int) -> int:
    """Slots of a cache with room for `size` tokens: more than 128 are rounded up to a multiple of
    128, of which TPU memory is made."""
    return -(-size // 128) * 128 if size > 128 else size


@struct.dataclass
class KVCache:
    """Keys and values of all layers for S slots, of which the first length_B are filled.

    H counts the heads of keys. An int8 cache has a float32 scale for every token and head, by which
    its numbers are multiplied. For CPUs bfloat16 lies in it as its bits, uint16. For ALiBi it has
    the position of every key, int32, in the axes of the others, so that they all move alike.
    """

    k_NBHSK: Any
    v_NBHSK: Any
    length_B: Any
    k_scale_NBHS: Any = None
    v_scale_NBHS: Any = None
    position_1BHS: Any = None

    @classmethod
    def empty(cls, config: GLMConfig, batch: int, size: int) -> "KVCache":
        """A cache of `cache_size(size)` slots with nothing in it, split by rows and heads."""
        shape = (config.num_layers, batch, config.kv_heads, cache_size(size), config.head_size)
        dtype = cached.stored_dtype(config.cache_dtype or config.dtype)
        # Arrays of their own, so that both can be donated.
        k_NBHSK, v_NBHSK = (constrain(jnp.zeros(shape, dtype), *CACHE_AXES) for _ in range(2))
        k_scale_NBHS, v_scale_NBHS = (
            constrain(jnp.zeros(shape[:-1], jnp.float32), *CACHE_AXES) if dtype == "int8" else None
            for _ in range(2)
        )
        position_1BHS = None
        if config.positions == "alibi":
            position_1BHS = constrain(jnp.zeros((1, *shape[1:-1]), jnp.int32), *CACHE_AXES[:-1])
        return cls(
            k_NBHSK, v_NBHSK, jnp.zeros(batch, jnp.int32), k_scale_NBHS, v_scale_NBHS, position_1BHS
        )


def attend(
    config: GLMConfig,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: BlankMask,
    dropout_key: jax.Array | None = None,
    positions: Positions | None = None,
) -> jax.Array:
    """Blank attention by the implementation that the configuration names, [B, T, H, K].

    The R = H / G heads that share a key head become R queries of that head, one behind the other.
    """
    length, shared = q_BTHK.shape[1], config.num_heads // config.kv_heads
    q_BTGK, k_BSGK, v_BSGK = (
        constrain(x, "batch", "length", "heads", "head")
        for x in (_heads_as_queries(q_BTHK, shared), k_BSGK, v_BSGK)
    )
    mask = mask.repeat(shared)
    out_BTGK = blank_attention.attend(
        q_BTGK, k_BSGK, v_BSGK, mask.k_start_BT, mask.k_end_BT,
        dropout_key, config.attention_dropout, implementation=config.attention,
        positions=positions, softmax_dtype=config.softmax_dtype,
    )  # fmt: skip
    return _queries_as_heads(out_BTGK, length)


def prepend(
    prefix_2PGK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values with those of a prefix in front, the same in every row."""
    k_BTGK, v_BTGK = (
        jnp.concatenate([jnp.broadcast_to(prefix_PGK, (len(x), *prefix_PGK.shape)), x], axis=1)
        for prefix_PGK, x in zip(prefix_2PGK, (k_BTGK, v_BTGK), strict=True)
    )
    return k_BTGK, v_BTGK


def _heads_as_queries(x_BTHK: jax.Array, shared: int) -> jax.Array:
    """[B, T, G R, K] to [B, T R, G, K]."""
    if shared == 1:
        return x_BTHK
    B, T, H, K = x_BTHK.shape
    x_BTGRK = x_BTHK.reshape(B, T, H // shared, shared, K)
    return jnp.swapaxes(x_BTGRK, 2, 3).reshape(B, T * shared, H // shared, K)


def _queries_as_heads(x_BTGK: jax.Array, length: int) -> jax.Array:
    """[B, T R, G, K] back to [B, T, G R, K], where T is the length."""
    B, _, G, K = x_BTGK.shape
    return jnp.swapaxes(x_BTGK.reshape(B, length, -1, G, K), 2, 3).reshape(B, length, -1, K)


def write(
    config: GLMConfig, cache: KVCache, layer: Any, k_BTHK: jax.Array, v_BTHK: jax.Array
) -> KVCache:
    """The cache with T tokens of one layer in the slots from length_B on; length_B stays.

    The cache must have room for length_B + T.
    """
    if cache.k_scale_NBHS is None:
        arrays = {"k_NBHSK": k_BTHK, "v_NBHSK": v_BTHK}
    else:
        (k_BTHK, k_scale_BTH), (v_BTHK, v_scale_BTH) = map(_quantise, (k_BTHK, v_BTHK))
        arrays = {
            "k_NBHSK": k_BTHK, "k_scale_NBHS": k_scale_BTH,
            "v_NBHSK": v_BTHK, "v_scale_NBHS": v_scale_BTH,
        }  # fmt: skip
    old, new = [getattr(cache, name) for name in arrays], list(arrays.values())
    written = cached.write(old, layer, new, cache.length_B, config.attention)
    return replace(cache, **dict(zip(arrays, written, strict=True)))


def write_positions(cache: KVCache, positions_BT: jax.Array) -> KVCache:
    """The cache with the positions of T tokens in the slots from length_B on, as `write` counts."""
    heads = cache.position_1BHS.shape[2]
    position_BTH = jnp.broadcast_to(positions_BT[..., None], (*positions_BT.shape, heads))
    (position_1BHS,) = cached.write(
        [cache.position_1BHS], 0, [position_BTH], cache.length_B, "blockwise"
    )
    return replace(cache, position_1BHS=position_1BHS)


def attend_cache(
    config: GLMConfig, cache: KVCache, mask: BlankMask, positions_BT: jax.Array
) -> Callable[[KVCache, jax.Array, jax.Array], jax.Array]:
    """A function of (cache, layer, q_BTHK): attention of new queries over a layer of a cache.

    The queries' positions matter to ALiBi alone.
    """
    length, shared = mask.k_start_BT.shape[1], config.num_heads // config.kv_heads
    is_plain = config.positions != "alibi" and config.softmax_dtype == "float32"
    if length > cached.TOKENS or not is_plain:
        return partial(_attend_layer, config, mask, positions_BT)
    repeated = mask.repeat(shared)
    bounds = repeated.k_start_BT, repeated.k_end_BT
    size, dtype = cache.k_NBHSK.shape[3], cache.k_NBHSK.dtype
    attend_few = cached.attend_few(*bounds, size, dtype, config.attention)

    def attend(cache: KVCache, layer: Any, q_BTHK: jax.Array) -> jax.Array:
        out_BTGK = attend_few(
            _heads_as_queries(q_BTHK, shared), cache.k_NBHSK, cache.v_NBHSK, layer, *bounds,
            cache.k_scale_NBHS, cache.v_scale_NBHS,
        )  # fmt: skip
        return _queries_as_heads(out_BTGK, length)

    return attend


def _attend_layer(
    config: GLMConfig,
    mask: BlankMask,
    positions_BT: jax.Array,
    cache: KVCache,
    layer: Any,
    q_BTHK: jax.Array,
) -> jax.Array:
    """Attention of many queries over one layer, which is sliced out and in int8 scaled back."""
    k_BHSK, v_BHSK = numbers(cache.k_NBHSK[layer]), numbers(cache.v_NBHSK[layer])
    if cache.k_scale_NBHS is not None:
        k_BHSK = k_BHSK * cache.k_scale_NBHS[layer][..., None]
        v_BHSK = v_BHSK * cache.v_scale_NBHS[layer][..., None]
    k_BSHK, v_BSHK = (jnp.swapaxes(x, 1, 2).astype(q_BTHK.dtype) for x in (k_BHSK, v_BHSK))
    positions = None
    if cache.position_1BHS is not None:
        positions = Positions(positions_BT, cache.position_1BHS[0, :, 0])
    return attend(config, q_BTHK, k_BSHK, v_BSHK, mask, positions=positions)


def _quantise(x_BTHK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 numbers and the float32 scale of each token and head, [B, T, H]."""
    x = x_BTHK.astype(jnp.float32)
    scale_BTH = jnp.max(jnp.abs(x), -1) / 127
    return jnp.round(x / jnp.maximum(scale_BTH, 1e-30)[..., None]).astype(jnp.int8), scale_BTH
