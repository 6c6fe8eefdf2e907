"""Who sees whom, and attention over it.

GLM's mask is one interval of keys per query: query q sees `k_start[q] <= k < k_end[q]`. For a
sample that starts at s with a bidirectional part A of length c, k_start = s and
k_end = max(q + 1, s + c). Causal, bidirectional, packed and padded rows are intervals too.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from glmjax.config import AttentionImplementation, GLMConfig
from glmjax.kernels.blank_attention import blockwise, reference
from glmjax.sharding import constrain

_IMPLEMENTATIONS: dict[AttentionImplementation, ModuleType] = {
    "reference": reference,
    "blockwise": blockwise,
}


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


@struct.dataclass
class KVCache:
    """Keys and values of all layers for S slots, of which the first length_B are filled."""

    k_NBSHK: Any
    v_NBSHK: Any
    length_B: Any

    @classmethod
    def empty(cls, config: GLMConfig, batch: int, size: int) -> "KVCache":
        """A cache of `size` slots with nothing in it."""
        shape = (config.num_layers, batch, size, config.num_heads, config.head_size)
        zeros = jnp.zeros(shape, config.dtype)
        return cls(zeros, zeros, jnp.zeros(batch, jnp.int32))


def attend(
    config: GLMConfig,
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask: BlankMask,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Blank attention by the implementation that the configuration names, [B, T, H, K]."""
    implementation = _IMPLEMENTATIONS[config.attention]
    q_BTHK, k_BSHK, v_BSHK = (
        constrain(x, "batch", "length", "heads", "head") for x in (q_BTHK, k_BSHK, v_BSHK)
    )
    return implementation.attend(
        q_BTHK, k_BSHK, v_BSHK, mask.k_start_BT, mask.k_end_BT,
        dropout_key if config.attention_dropout else None, config.attention_dropout,
    )  # fmt: skip
