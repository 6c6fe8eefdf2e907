"""Parameters, each declared once.

`specs(config)` is a tree of `ParamSpec`; initial values, abstract shapes, shardings, counting and
checkpoint conversion are maps over it. The N blocks are one `Block` whose leaves have a leading
`layer` axis. What a model lacks, such as biases or learned positions, is None.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AbstractMesh, Mesh

from glmjax.config import GLMConfig
from glmjax.sharding import named_sharding

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axes, initialiser and type of one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    dtype: str = "float32"


@struct.dataclass
class LayerNorm:
    """Affine part of a layer norm, [D]; RMSNorm has no bias."""

    scale: Any
    bias: Any


@struct.dataclass
class Linear:
    """A kernel and the bias of its outputs."""

    kernel: Any
    bias: Any


@struct.dataclass
class Quantized:
    """A kernel as integers and a scale per output (GLM-130B section 4, THUDM/GLM-130B
    `quantization/`).

    values: int8 with the axes of the kernel. Of 4 bits two share a byte along the last input axis,
    the even one in the high half, as two's complement.
    scale: float16 [group, *outputs]; group g belongs to inputs g n / G .. (g + 1) n / G of the n of
    the first input axis.
    """

    values: Any
    scale: Any


@struct.dataclass
class Block:
    """One transformer block; stacked over layers in `Params`.

    A model whose queries share keys and values has q and kv in place of qkv.
    """

    attention_norm: LayerNorm
    qkv: Linear | None
    q: Linear | None
    kv: Linear | None
    attention_out: Linear
    ffn_norm: LayerNorm
    ffn_in: Linear
    ffn_out: Linear


@struct.dataclass
class PrefixEncoder:
    """The prefix [P, 2 N G K] itself, or embeddings [P, D] with two layers that make it from them."""

    embedding: Any
    hidden: Linear | None
    out: Linear | None


@struct.dataclass
class Params:
    """All parameters of a model."""

    word_embedding: Any
    position_embedding: Any
    block_position_embedding: Any
    blocks: Block
    final_norm: LayerNorm
    output_embedding: Any
    prefix: PrefixEncoder | None = None


def normal(scale: float | np.ndarray) -> Initializer:
    """Normal with this standard deviation, which may differ along leading output axes."""
    return lambda key, shape: jax.random.normal(key, shape, jnp.float32) * jnp.float32(scale)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def uniform(bound: float) -> Initializer:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def no_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    raise ValueError("quantised kernels have no initial values; quantise those of a trained model")


def specs(config: GLMConfig) -> Params:
    """The parameters of a model as a tree of `ParamSpec`.

    Pre-norm models start as THUDM/GLM does: N(0, 0.02), output projections divided by sqrt(2 N).
    DeepNorm models start as GLM-130B section 2.2 says: Xavier normal, with gain (2 N)^-1/2 on the
    value, attention output and feed-forward matrices.
    """
    D, V, P = config.hidden_size, config.vocab_size, config.max_positions + 1
    embedding = normal(config.initializer_scale)
    position = ParamSpec((P, D), ("position", "embed"), embedding)
    learned = config.positions == "learned_2d"
    word = ParamSpec((V, D), ("vocab", "embed"), embedding)
    return Params(
        word_embedding=word,
        position_embedding=position if learned else None,
        block_position_embedding=position if learned else None,
        blocks=_block_specs(config),
        final_norm=_norm_specs(config),
        output_embedding=None if config.tied_embeddings else word,
        prefix=_prefix_specs(config) if config.prefix_length else None,
    )


def _block_specs(config: GLMConfig) -> Block:
    """The blocks, stacked."""
    N, D, F = config.num_layers, config.hidden_size, config.ffn_size
    H, G, K = config.num_heads, config.kv_heads, config.head_size
    if config.norm == "deepnorm":
        beta = (2 * N) ** -0.5
        xavier, xavier_ffn = (2 / (D + D)) ** 0.5, (2 / (D + F)) ** 0.5
        q, k, v = xavier, xavier, beta * xavier
        attention_out = normal(beta * xavier)
        ffn_in = ffn_out = normal(beta * xavier_ffn)
    else:
        q = k = v = config.initializer_scale
        ffn_in = normal(config.initializer_scale)
        attention_out = ffn_out = normal(config.initializer_scale / math.sqrt(2 * N))

    def each(*scales: float) -> Initializer:
        """One scale for each of a kernel's pair or triple [D, c, H, K]."""
        return normal(np.array(scales, np.float32)[:, None, None])

    # The pair comes first: as inner axes of 2 and F a kernel lies badly in the memory of TPUs.
    gate = {} if config.ffn == "gelu" else {"gate": 2}
    heads = {"heads": H, "head": K}
    shared = G < H
    return Block(
        attention_norm=_norm_specs(config, N),
        qkv=None if shared else _linear_specs(
            config, each(q, k, v), ("embed",), embed=D, qkv=3, **heads
        ),
        q=_linear_specs(config, normal(q), ("embed",), embed=D, **heads) if shared else None,
        kv=_linear_specs(
            config, each(k, v), ("embed",), embed=D, qkv=2, heads=G, head=K
        ) if shared else None,
        attention_out=_linear_specs(config, attention_out, ("heads", "head"), **heads, embed=D),
        ffn_norm=_norm_specs(config, N),
        ffn_in=_linear_specs(config, ffn_in, ("embed",), **gate, embed=D, mlp=F),
        ffn_out=_linear_specs(config, ffn_out, ("mlp",), mlp=F, embed=D),
    )  # fmt: skip


def _norm_specs(config: GLMConfig, *layer: int) -> LayerNorm:
    shape, axes = (*layer, config.hidden_size), ("layer",) * len(layer) + ("stream",)
    bias = None if config.norm == "rmsnorm" else ParamSpec(shape, axes, zeros)
    return LayerNorm(ParamSpec(shape, axes, ones), bias)


def _linear_specs(
    config: GLMConfig, init: Initializer, inputs: tuple[str, ...], **sizes: int
) -> Linear:
    """A kernel with these axes and sizes; those that are not inputs are of the bias too."""
    N = config.num_layers
    outputs = [axis for axis in sizes if axis not in inputs]
    output_axes = tuple("stream" if axis == "embed" else axis for axis in outputs)
    output_sizes = [sizes[axis] for axis in outputs]
    bias = ParamSpec((N, *output_sizes), ("layer", *output_axes), zeros)
    kernel: Any = ParamSpec((N, *sizes.values()), ("layer", *sizes), init)
    if config.quantization is not None:
        # GLM-130B's shards split the inputs of attention_out and ffn_out, the outputs of the rest.
        groups = 1 if inputs == ("embed",) else config.quantization.shards
        packed = dict(sizes)
        packed[inputs[-1]] //= 8 // config.quantization.bits
        kernel = Quantized(
            ParamSpec((N, *packed.values()), kernel.axes, no_init, "int8"),
            ParamSpec(
                (N, groups, *output_sizes), ("layer", "group", *output_axes), no_init, "float16"
            ),
        )
    return Linear(kernel, bias if config.biases == "all" or "heads" in outputs else None)


def _prefix_specs(config: GLMConfig) -> PrefixEncoder:
    """They start as PyTorch's defaults do."""
    P, D = config.prefix_length, config.hidden_size
    W = 2 * config.num_layers * config.kv_heads * config.head_size
    rows = ("position", "embed")
    if not config.prefix_projection:
        return PrefixEncoder(ParamSpec((P, W), rows, normal(1.0)), None, None)
    init = uniform(D**-0.5)
    return PrefixEncoder(
        ParamSpec((P, D), rows, normal(1.0)),
        Linear(ParamSpec((D, D), ("stream", "embed"), init), ParamSpec((D,), ("stream",), init)),
        Linear(ParamSpec((D, W), ("embed", "stream"), init), ParamSpec((W,), ("stream",), init)),
    )


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, such as blocks.qkv.kernel."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def count_params(config: GLMConfig) -> int:
    """The exact number of weights, quantised or not; no array is made."""
    dense = specs(replace(config, quantization=None))
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(dense))


def param_shardings(config: GLMConfig, mesh: Mesh | AbstractMesh) -> Params:
    """The sharding of every parameter on a mesh.

    Raises:
        ValueError: a mesh axis does not divide a parameter's dimension.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: named_sharding(mesh, spec.axes, spec.shape, leaf_name(path)),
        specs(config),
    )


def abstract_params(config: GLMConfig) -> Params:
    """Shapes and types of the parameters, without values."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs(config))


def init(config: GLMConfig, key: jax.Array) -> Params:
    """Initial parameters in float32, born sharded when a mesh is set (`jax.set_mesh`).

    Every parameter draws from its own key, derived from its name, so that a new parameter does not
    change the others.

    Raises:
        ValueError: the model is quantised.
    """

    def make(key: jax.Array) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, spec: spec.init(
                jax.random.fold_in(key, zlib.crc32(leaf_name(path).encode())), spec.shape
            ),
            specs(config),
        )

    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.jit(make)(key)
    return jax.jit(make, out_shardings=param_shardings(config, mesh))(key)
