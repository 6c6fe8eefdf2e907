"""P-tuning v2: a learnt prefix of keys and values in front of every layer.

Official code: Hugging Face THUDM/chatglm-6b `modeling_chatglm.py`. A prefix is nothing but a cache
that is learnt: the model continues from it with `extend`. Its keys are seen by every query, are not
rotated, and do not shift positions.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from glmjax.config import GLMConfig
from glmjax.model.attention import KVCache, write
from glmjax.model.params import Initializer, Linear, ParamSpec, normal


@struct.dataclass
class PrefixEncoder:
    """The prefix [P, 2 N D] itself, or embeddings [P, D] with two layers that make it from them."""

    embedding: Any
    hidden: Linear | None
    out: Linear | None


def prefix_specs(config: GLMConfig, length: int, projection: bool) -> PrefixEncoder:
    """The parameters of a prefix of P = length keys; they start as PyTorch's defaults do."""
    D, W = config.hidden_size, 2 * config.num_layers * config.hidden_size
    rows = ("position", "embed")
    if not projection:
        return PrefixEncoder(ParamSpec((length, W), rows, normal(1.0)), None, None)
    init = _uniform(D**-0.5)
    return PrefixEncoder(
        ParamSpec((length, D), rows, normal(1.0)),
        Linear(ParamSpec((D, D), ("stream", "embed"), init), ParamSpec((D,), ("stream",), init)),
        Linear(ParamSpec((D, W), ("embed", "stream"), init), ParamSpec((W,), ("stream",), init)),
    )


def prefix_cache(config: GLMConfig, params: PrefixEncoder, batch: int, size: int) -> KVCache:
    """A cache of `size` slots whose first P hold the prefix, the same in every row.

    Raises:
        ValueError: the prefix is longer than size.
    """
    x_PW = params.embedding
    if params.hidden is not None and params.out is not None:
        hidden_PD = jnp.tanh(x_PW @ params.hidden.kernel + params.hidden.bias)
        x_PW = hidden_PD @ params.out.kernel + params.out.bias
    length = x_PW.shape[0]
    if length > size:
        raise ValueError(f"a prefix of {length} keys does not fit a cache of {size} slots")
    shape = (length, config.num_layers, 2, config.num_heads, config.head_size)
    k_NPHK, v_NPHK = x_PW.reshape(shape).astype(config.dtype).transpose(2, 1, 0, 3, 4)
    cache = KVCache.empty(config, batch, size)
    for n in range(config.num_layers):
        k_BPHK, v_BPHK = (jnp.stack([x_NPHK[n]] * batch) for x_NPHK in (k_NPHK, v_NPHK))
        cache = write(config, cache, n, k_BPHK, v_BPHK)
    return replace(cache, length_B=jnp.full(batch, length, jnp.int32))


def _uniform(bound: float) -> Initializer:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
