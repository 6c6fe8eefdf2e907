"""The transformer of GLM, GLM-130B, ChatGLM-6B and its successors, as functions of its parameters.

Dimensions in names: B batch, T query length, S key length, P length of a prefix, D model width,
H heads, G heads of keys and values, K head size, F feed-forward width, V vocabulary, N layers.

    pre-norm (GLM, ChatGLM2-6B ...)     DeepNorm (GLM-130B, ChatGLM-6B), alpha = sqrt(2 N)
    u = x + attention(norm(x))          a = norm(x)    u = alpha a + attention(a)
    y = u + ffn(norm(u))                m = norm(u)    y = alpha m + ffn(m)

Both end in a norm. Post-norm is DeepNorm with alpha = 1: each norm stands behind a branch and its
residual, norm(a + f(a)), the last one being the final norm, and the first one is that of the
embeddings. Sandwich norm is pre-norm with a norm of each branch's output, u = x +
norm(attention(norm(x))). GLM-130B and ChatGLM-6B also divide the scores of layer i by i + 1 and
multiply them again in the softmax; that guards float16 and cancels, so it is left out.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from glmjax.config import GLMConfig, Remat, Saved
from glmjax.kernels import quantized_matmul
from glmjax.kernels.blank_attention.alibi import Positions
from glmjax.model import attention
from glmjax.model.attention import BlankMask, KVCache
from glmjax.model.layers import (
    dequantise,
    dropout,
    fill_rows,
    linear,
    norm,
    product,
    rotary,
    rotate,
    scale_gradient,
)
from glmjax.model.params import Block, Params, Quantized, leaf_name
from glmjax.model.prefix import prefix_keys_values
from glmjax.sharding import constrain, row_major

# Queries [B, T, H, K], keys and values [B, T, G, K] to the attention output and whatever it keeps.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def forward(
    config: GLMConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_B2T: jax.Array,
    mask: BlankMask,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Logits [B, T, V] in float32. Row 0 of positions is the position, row 1 the block position.

    The prefix of a model with one is seen by the queries that see key 0, and no other: not by
    samples that start later in a packed row, nor behind padding on the left.

    Dropout is on when a key is given. Training does not call this: its loss takes the output of
    `encode`, so that no B x T x V array exists.
    """
    return logits(
        config, params, encode(config, params, tokens_BT, positions_B2T, mask, dropout_key)
    )


def logits(config: GLMConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Scores of every word [B, T, V] in float32 for outputs of `encode`."""
    table_VD = params.word_embedding if config.tied_embeddings else params.output_embedding
    if isinstance(table_VD, Quantized) or quantized_matmul.needs_narrow(x_BTD, table_VD):
        return product("btd,vd->btv", "float32", x_BTD, table_VD)
    table_VD = output_table(config, params).astype(x_BTD.dtype)
    filled_BTD = fill_rows("btd", x_BTD)
    logits_BTV = jnp.einsum("btd,vd->btv", filled_BTD, table_VD, preferred_element_type=jnp.float32)
    return logits_BTV[:, : x_BTD.shape[1]]


def output_table(config: GLMConfig, params: Params) -> jax.Array:
    """The matrix [V, D] of the output layer, as floats."""
    table_VD = params.word_embedding if config.tied_embeddings else params.output_embedding
    if isinstance(table_VD, Quantized):
        return dequantise(table_VD, config.hidden_size)
    return scale_gradient(table_VD, config.embedding_gradient_scale)


def encode(
    config: GLMConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_B2T: jax.Array,
    mask: BlankMask,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Hidden states [B, T, D] after the final norm, in the type of the configuration.

    A prefix and dropout as in `forward`.
    """
    embedding_key, blocks_key = (
        jax.random.split(dropout_key) if dropout_key is not None else (None, None)
    )
    x_BTD = embed(config, params, tokens_BT, positions_B2T)
    x_BTD = dropout(x_BTD, embedding_key, config.embedding_dropout)
    angles = rotary(config, positions_B2T)
    positions = Positions(*[positions_B2T[:, 0]] * 2) if config.positions == "alibi" else None
    prefix_N2PGK = None
    if params.prefix is not None:
        prefix_N2PGK = prefix_keys_values(config, params.prefix)
        mask = mask.behind(prefix_N2PGK.shape[2])

    def layer(x_BTD: jax.Array, inputs: tuple[Block, Any, jax.Array]) -> tuple[jax.Array, None]:
        params_n, prefix_2PGK, n = inputs
        keys = (None,) * 3
        if blocks_key is not None:
            keys = tuple(jax.random.split(jax.random.fold_in(blocks_key, n), 3))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            if prefix_2PGK is not None:
                k, v = attention.prepend(prefix_2PGK, k, v)
            return attention.attend(config, q, k, v, mask, keys[0], positions), None

        x_BTD, _ = block(config, params_n, x_BTD, angles, attend, keys[1], keys[2])
        return x_BTD, None

    # Rounded here, the gradients of all layers gather in this type too, in which each arrives.
    # Kernels of fewer bits are not made wider: of those one layer at a time is.
    def rounded(path: Any, leaf: jax.Array) -> jax.Array:
        is_wide = leaf.dtype.itemsize > jnp.dtype(config.dtype).itemsize
        return leaf.astype(config.dtype) if leaf_name(path).endswith("kernel") and is_wide else leaf

    blocks = jax.tree_util.tree_map_with_path(rounded, params.blocks)
    layers = blocks, prefix_N2PGK, jnp.arange(config.num_layers)
    x_BTD, _ = _over_layers(_remat(config, layer), x_BTD, layers)
    return norm(config, params.final_norm, x_BTD)


def _over_layers(layer: Callable[..., tuple[Any, None]], carry: Any, inputs: Any) -> Any:
    """A scan over stacked blocks, or a loop over blocks apart, with what else there is per layer."""
    blocks, *others = inputs
    if not isinstance(blocks, tuple):
        return jax.lax.scan(layer, carry, inputs)
    layer = jax.jit(layer)  # Traced once for all blocks that are alike.
    for n, params_n in enumerate(blocks):
        carry, _ = layer(carry, (params_n, *jax.tree.map(lambda leaf: leaf[n], others)))  # noqa: B023
    return carry, None


def embed(
    config: GLMConfig, params: Params, tokens_BT: jax.Array, positions_B2T: jax.Array
) -> jax.Array:
    """Word embeddings [B, T, D], plus the two learned position tables where the model has them."""
    table_VD = params.word_embedding
    if not isinstance(table_VD, Quantized):
        table_VD = scale_gradient(table_VD, config.embedding_gradient_scale)
        table_VD = constrain(table_VD, "vocab", "embed")
    x_BTD = _look_up(config, table_VD, tokens_BT)
    if config.positions == "learned_2d":
        tables = params.position_embedding, params.block_position_embedding
        for row, table_PD in enumerate(tables):
            x_BTD += _look_up(config, table_PD, positions_B2T[:, row])
    return x_BTD


def _look_up(config: GLMConfig, table: jax.Array | Quantized, ids_BT: jax.Array) -> jax.Array:
    """Rows of a table, [B, T, D]. Devices that share a table look up each other's tokens in their
    own columns and then exchange them, so that neither the table nor its gradient travels."""
    ids_BT = constrain(ids_BT, "replica", "length")
    if isinstance(table, Quantized):
        scale_GBT, zero_GBT = (
            None if x is None else x[:, ids_BT] for x in (table.scale, table.zero)
        )
        rows = Quantized(table.values[ids_BT], scale_GBT, zero_GBT)
        x_BTD = dequantise(rows, config.hidden_size)
    else:
        x_BTD = table[ids_BT]
    x_BTD = constrain(x_BTD.astype(config.dtype), "replica", "length", "embed")
    return constrain(x_BTD, "batch", "sequence", "stream")


def block(
    config: GLMConfig,
    params: Block,
    x_BTD: jax.Array,
    angles: tuple[jax.Array, jax.Array] | None,
    attend: Attend,
    attention_key: jax.Array | None = None,
    ffn_key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """One block; `attend` decides over which keys, and what it keeps is handed back."""
    normalised = config.norm in ("post", "deepnorm")  # The residual is the output of the norm.
    a_BTD = norm(config, params.attention_norm, x_BTD)
    q_BTHK, k_BTGK, v_BTGK = queries_keys_values(params, a_BTD)
    if angles is not None:
        q_BTHK, k_BTGK = (rotate(config, x, *angles) for x in (q_BTHK, k_BTGK))
    o_BTHK, kept = attend(q_BTHK, k_BTGK, v_BTGK)
    o_BTD = linear("bthk,hkd->btd", params.attention_out, o_BTHK)
    o_BTD = dropout(checkpoint_name(o_BTD, "attention_out"), attention_key, config.hidden_dropout)
    if params.attention_out_norm is not None:
        o_BTD = norm(config, params.attention_out_norm, o_BTD)
    residual_BTD = config.residual_scale * a_BTD if normalised else x_BTD
    u_BTD = constrain(residual_BTD + o_BTD, "batch", "sequence", "stream")

    m_BTD = norm(config, params.ffn_norm, u_BTD)
    f_BTD = checkpoint_name(feed_forward(config, params, m_BTD), "ffn_out")
    f_BTD = dropout(f_BTD, ffn_key, config.hidden_dropout)
    if params.ffn_out_norm is not None:
        f_BTD = norm(config, params.ffn_out_norm, f_BTD)
    residual_BTD = config.residual_scale * m_BTD if normalised else u_BTD
    return constrain(residual_BTD + f_BTD, "batch", "sequence", "stream"), kept


def queries_keys_values(params: Block, a_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q_BTHK, k_BTGK and v_BTGK, from one matrix or, where heads share keys, from two."""
    if params.qkv is not None:
        q_BTHK, k_BTHK, v_BTHK = checkpoint_name(
            linear("btd,dchk->cbthk", params.qkv, a_BTD), "qkv"
        )
        return q_BTHK, k_BTHK, v_BTHK
    assert params.q is not None and params.kv is not None
    q_BTHK = checkpoint_name(linear("btd,dhk->bthk", params.q, a_BTD), "qkv")
    k_BTGK, v_BTGK = checkpoint_name(linear("btd,dchk->cbthk", params.kv, a_BTD), "qkv")
    return q_BTHK, k_BTGK, v_BTGK


def feed_forward(config: GLMConfig, params: Block, m_BTD: jax.Array) -> jax.Array:
    """ffn_out(f), where f is gelu(x), x_0 gelu(x_1) or silu(x_0) x_1 for x = ffn_in(m)."""
    if config.ffn == "gelu":
        f_BTF = checkpoint_name(linear("btd,df->btf", params.ffn_in, m_BTD), "ffn_in")
        return linear("btf,fd->btd", params.ffn_out, jax.nn.gelu(f_BTF, approximate=True))
    x_GBTF = linear("btd,gdf->gbtf", params.ffn_in, m_BTD)
    # Left to itself XLA for TPUs lays T out last, and copies it twice in the backward pass.
    x_GBTF = row_major(x_GBTF, "gate", "batch", "length", "mlp")
    first_BTF, second_BTF = checkpoint_name(x_GBTF, "ffn_in")
    if config.ffn == "geglu":
        f_BTF = first_BTF * jax.nn.gelu(second_BTF, approximate=False)
    else:
        f_BTF = jax.nn.silu(first_BTF) * second_BTF
    return linear("btf,fd->btd", params.ffn_out, f_BTF)


def extend(
    config: GLMConfig,
    params: Params,
    cache: KVCache,
    tokens_BT: jax.Array,
    positions_B2T: jax.Array,
    mask: BlankMask,
    count_B: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Hidden states [B, T, D] of tokens behind a cache, and the cache with them in it.

    The first count_B tokens of each row are real; the rest is padding, which the next call
    overwrites. The mask counts keys in cache slots. The cache must have room for length_B + T.
    """
    x_BTD = embed(config, params, tokens_BT, positions_B2T)
    angles = rotary(config, positions_B2T)
    if config.positions == "alibi":
        cache = attention.write_positions(cache, positions_B2T[:, 0])
    attend_cache = attention.attend_cache(config, cache, mask, positions_B2T[:, 0])

    def layer(carry: Any, inputs: tuple[Block, Any, jax.Array]) -> tuple[Any, None]:
        x_BTD, cache = carry
        params_n, _, n = inputs

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KVCache]:
            written = attention.write(config, cache, n, k, v)
            return attend_cache(written, n, q), written

        return block(config, params_n, x_BTD, angles, attend), None

    (x_BTD, cache), _ = _over_layers(
        layer, (x_BTD, cache), (params.blocks, None, jnp.arange(config.num_layers))
    )
    x_BTD = norm(config, params.final_norm, x_BTD)
    return x_BTD, replace(cache, length_B=cache.length_B + count_B)


def prefill(
    config: GLMConfig,
    params: Params,
    cache: KVCache,
    tokens_BT: jax.Array,
    positions_B2T: jax.Array,
    context_B: jax.Array,
    length_B: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Feeds prompts, padded on the right, into a cache.

    The first context_B tokens of a prompt see each other, the rest is causal. Returns the logits
    [B, V] of each prompt's last token.
    """
    mask = BlankMask.from_context(context_B, length=tokens_BT.shape[1]).after(cache.length_B)
    x_BTD, cache = extend(config, params, cache, tokens_BT, positions_B2T, mask, length_B)
    last_B1D = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)
    return logits(config, params, last_B1D)[:, 0], cache


def decode_step(
    config: GLMConfig,
    params: Params,
    cache: KVCache,
    tokens_BT: jax.Array,
    positions_B2T: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Logits [B, T, V] of the next T tokens of each row, which see the cache and their past."""
    batch, length = tokens_BT.shape
    causal = BlankMask.from_context(jnp.zeros(batch, jnp.int32), length=length)
    count_B = jnp.full(batch, length, jnp.int32)
    x_BTD, cache = extend(
        config, params, cache, tokens_BT, positions_B2T, causal.after(cache.length_B), count_B
    )
    return logits(config, params, x_BTD), cache


SAVED: dict[Remat, tuple[Saved, ...]] = {
    "matmuls": ("qkv", "attention", "attention_out", "ffn_in"),
    "ffn": ("attention", "attention_out", "ffn_in"),
    "attention": ("attention", "attention_out"),
    "block": (),
}
"""Outputs that each way of recomputing keeps. That of the feed-forward layer is never needed: the
next block keeps its input."""


def _remat(config: GLMConfig, layer: Callable[..., Any]) -> Callable[..., Any]:
    """The layer with what the configuration says recomputed in the backward pass."""
    if config.remat == "none":
        return layer
    saved = {*SAVED[config.remat], *config.saved}
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=sorted(saved - set(config.offloaded)),
        names_which_can_be_offloaded=sorted(config.offloaded),
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
