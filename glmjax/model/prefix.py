"""P-tuning v2: a learnt prefix of keys and values in front of every layer.

Official code: Hugging Face THUDM/chatglm-6b `modeling_chatglm.py`. A prefix is nothing but a cache
that is learnt: the model continues from it with `extend`. Its keys are seen by every query, are not
rotated, and do not shift positions.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from glmjax.config import GLMConfig
from glmjax.model.attention import KVCache, write
from glmjax.model.params import Params, PrefixEncoder


def prefix_keys_values(config: GLMConfig, params: PrefixEncoder) -> jax.Array:
    """Keys and values of every layer, [N, 2, P, G, K], in the type of the configuration."""
    x_PW = params.embedding.astype(jnp.float32)
    if params.hidden is not None and params.out is not None:
        hidden_PD = jnp.tanh(x_PW @ params.hidden.kernel + params.hidden.bias)
        x_PW = hidden_PD @ params.out.kernel + params.out.bias
    shape = (len(x_PW), config.num_layers, 2, config.kv_heads, config.head_size)
    return x_PW.reshape(shape).astype(config.dtype).transpose(1, 2, 0, 3, 4)


def start_cache(config: GLMConfig, params: Params, batch: int, size: int) -> KVCache:
    """A cache with room for `size` tokens, and in front of them the model's prefix if it has one."""
    if params.prefix is None:
        return KVCache.empty(config, batch, size)
    return prefix_cache(config, params.prefix, batch, config.prefix_length + size)


def prefix_cache(config: GLMConfig, params: PrefixEncoder, batch: int, size: int) -> KVCache:
    """A cache of `size` slots whose first P hold the prefix, the same in every row.

    Raises:
        ValueError: the prefix is longer than size.
    """
    prefix_N2PGK = prefix_keys_values(config, params)
    length = prefix_N2PGK.shape[2]
    if length > size:
        raise ValueError(f"a prefix of {length} keys does not fit a cache of {size} slots")
    cache = KVCache.empty(config, batch, size)
    for n, prefix_2PGK in enumerate(prefix_N2PGK):
        k_BPGK, v_BPGK = (jnp.stack([x_PGK] * batch) for x_PGK in prefix_2PGK)
        cache = write(config, cache, n, k_BPGK, v_BPGK)
    return replace(cache, length_B=jnp.full(batch, length, jnp.int32))
