"""Parameters, each declared once.

`specs(config)` is a tree of `ParamSpec`; initial values, abstract shapes, shardings, counting and
checkpoint conversion are maps over it. The N blocks are one `Block` whose leaves have a leading
`layer` axis.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
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
    """Shape, logical axes and initialiser of one float32 parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer


@struct.dataclass
class LayerNorm:
    """Affine part of a layer norm, [D]."""

    scale: Any
    bias: Any


@struct.dataclass
class Linear:
    """A kernel and the bias of its outputs."""

    kernel: Any
    bias: Any


@struct.dataclass
class Block:
    """One transformer block; stacked over layers in `Params`."""

    attention_norm: LayerNorm
    qkv: Linear
    attention_out: Linear
    ffn_norm: LayerNorm
    ffn_in: Linear
    ffn_out: Linear


@struct.dataclass
class Params:
    """All parameters of a model; tables that its configuration lacks are None."""

    word_embedding: Any
    position_embedding: Any
    block_position_embedding: Any
    blocks: Block
    final_norm: LayerNorm
    output_embedding: Any


def normal(scale: float | np.ndarray) -> Initializer:
    """Normal with this standard deviation, which may differ along leading output axes."""
    return lambda key, shape: jax.random.normal(key, shape, jnp.float32) * jnp.float32(scale)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def specs(config: GLMConfig) -> Params:
    """The parameters of a model as a tree of `ParamSpec`.

    Pre-norm models start as THUDM/GLM does: N(0, 0.02), output projections divided by sqrt(2 N).
    DeepNorm models start as GLM-130B section 2.2 says: Xavier normal, with gain (2 N)^-1/2 on the
    value, attention output and feed-forward matrices.
    """
    N, D, F, V = config.num_layers, config.hidden_size, config.ffn_size, config.vocab_size
    H, K, P = config.num_heads, config.head_size, config.max_positions + 1
    embedding = normal(config.initializer_scale)
    if config.norm == "deepnorm":
        beta = (2 * N) ** -0.5
        xavier, xavier_ffn = (2 / (D + D)) ** 0.5, (2 / (D + F)) ** 0.5
        qkv = normal(xavier * np.array([1, 1, beta], np.float32)[:, None, None])
        attention_out = normal(beta * xavier)
        ffn_in = ffn_out = normal(beta * xavier_ffn)
    else:
        qkv = ffn_in = embedding
        attention_out = ffn_out = normal(config.initializer_scale / math.sqrt(2 * N))

    def norm(*layer: int) -> LayerNorm:
        axes = ("layer",) * len(layer) + ("stream",)
        return LayerNorm(ParamSpec((*layer, D), axes, ones), ParamSpec((*layer, D), axes, zeros))

    def linear(init: Initializer, inputs: tuple[str, ...], **sizes: int) -> Linear:
        """A kernel with these axes and sizes; those that are not inputs are of the bias too."""
        outputs = [axis for axis in sizes if axis not in inputs]
        bias_axes = tuple("stream" if axis == "embed" else axis for axis in outputs)
        return Linear(
            ParamSpec((N, *sizes.values()), ("layer", *sizes), init),
            ParamSpec((N, *(sizes[axis] for axis in outputs)), ("layer", *bias_axes), zeros),
        )

    # The pair comes first: as inner axes of 2 and F a kernel lies badly in the memory of TPUs.
    gate = {"gate": 2} if config.ffn == "geglu" else {}
    position = ParamSpec((P, D), ("position", "embed"), embedding)
    learned = config.positions == "learned_2d"
    word = ParamSpec((V, D), ("vocab", "embed"), embedding)
    return Params(
        word_embedding=word,
        position_embedding=position if learned else None,
        block_position_embedding=position if learned else None,
        blocks=Block(
            attention_norm=norm(N),
            qkv=linear(qkv, ("embed",), embed=D, qkv=3, heads=H, head=K),
            attention_out=linear(attention_out, ("heads", "head"), heads=H, head=K, embed=D),
            ffn_norm=norm(N),
            ffn_in=linear(ffn_in, ("embed",), **gate, embed=D, mlp=F),
            ffn_out=linear(ffn_out, ("mlp",), mlp=F, embed=D),
        ),
        final_norm=norm(),
        output_embedding=None if config.tied_embeddings else word,
    )


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, such as blocks.qkv.kernel."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def count_params(config: GLMConfig) -> int:
    """The exact number of parameters; no array is made."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs(config)))


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
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), specs(config))


def init(config: GLMConfig, key: jax.Array) -> Params:
    """Initial parameters in float32, born sharded when a mesh is set (`jax.set_mesh`).

    Every parameter draws from its own key, derived from its name, so that a new parameter does not
    change the others.
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
