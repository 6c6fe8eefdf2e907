"""Parameters, each declared once.

`specs(config)` is a tree of `ParamSpec`; initial values, abstract shapes, shardings, counting and
checkpoint conversion are maps over it. The N blocks are one `Block` whose leaves have a leading
`layer` axis, or N Blocks apart. What a model lacks, such as biases or learned positions, is None.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AbstractMesh, Mesh

from glmjax.config import GLMConfig, Kernel, Quantization
from glmjax.sharding import named_sharding, target_device

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
    """A kernel as integers with scales for every output (GLM-130B section 4, THUDM/GLM-130B
    `quantization/`): weights are scale * values, or scale * (values + zero).

    values: int8 [*outputs, *inputs], as official matrices are. Of 4 bits two share a byte along the
    last axis, the even one in the high half, as two's complement; unpacked they are int4.
    scale: float16 [group, *outputs]; group g belongs to inputs g n / G .. (g + 1) n / G of the n of
    the first input axis.
    zero: float32 [group, *outputs]; None where values are centred on 0.
    """

    values: Any
    scale: Any
    zero: Any = None


@struct.dataclass
class Block:
    """One transformer block.

    A model whose queries share keys and values has q and kv in place of qkv. Sandwich norm has
    norms of both branches' outputs too.
    """

    attention_norm: LayerNorm
    qkv: Linear | None
    q: Linear | None
    kv: Linear | None
    attention_out: Linear
    ffn_norm: LayerNorm
    ffn_in: Linear
    ffn_out: Linear
    attention_out_norm: LayerNorm | None = None
    ffn_out_norm: LayerNorm | None = None


@struct.dataclass
class PrefixEncoder:
    """The prefix [P, 2 N G K] itself, or embeddings [P, D] with two layers that make it from them."""

    embedding: Any
    hidden: Linear | None
    out: Linear | None


@struct.dataclass
class Params:
    """All parameters of a model.

    blocks: a Block with a leading layer axis, or a tuple of Blocks without, see `Arrangement`.
    """

    word_embedding: Any
    position_embedding: Any
    block_position_embedding: Any
    blocks: Any
    final_norm: LayerNorm
    output_embedding: Any
    prefix: PrefixEncoder | None = None


@dataclass(frozen=True)
class Arrangement:
    """How the same parameters lie in memory."""

    apart: bool = False
    """Blocks are a tuple and not stacked: XLA for CPUs copies a layer out of a stack before it
    multiplies with it. A model of which some layers stay floats is always so."""
    packed: bool = True
    """Integers of 4 bits share bytes; False: they are int4, which XLA for accelerators packs."""
    merged: bool = False
    """Kernels that end in heads and head have them as one axis, and their qkv axis first. TPUs keep
    the last two axes in tiles, which a product reads in place only if one is of its inputs and the
    other of its outputs."""


STORED = Arrangement()
"""As on disk and in training."""


def decoding_arrangement() -> Arrangement:
    """The fastest one for decoding on the platform of the ambient mesh, else of the default device."""
    platform = target_device().platform
    on_cpu = platform == "cpu"
    return Arrangement(apart=on_cpu, packed=on_cpu, merged=platform == "tpu")


def blocks_apart(config: GLMConfig, arrangement: Arrangement = STORED) -> bool:
    """Whether the blocks of a model are a tuple."""
    some_floats = config.quantization is not None and bool(config.quantization.float_layers)
    return arrangement.apart or some_floats


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


def specs(config: GLMConfig, arrangement: Arrangement = STORED) -> Params:
    """The parameters of a model as a tree of `ParamSpec`.

    Models start as THUDM/GLM does: N(0, 0.02), output projections divided by sqrt(2 N). DeepNorm
    models start as GLM-130B section 2.2 says: Xavier normal, with gain (2 N)^-1/2 on the value,
    attention output and feed-forward matrices.
    """
    D, V, P = config.hidden_size, config.vocab_size, config.max_positions + 1
    embedding = normal(config.initializer_scale)
    position = ParamSpec((P, D), ("position", "embed"), embedding)
    learned = config.positions == "learned_2d"
    word: Any = ParamSpec((V, D), ("vocab", "embed"), embedding)
    if config.quantization is not None and config.quantization.embeddings:
        packed = arrangement.packed
        word = _quantized(config.quantization, "embeddings", packed, {"vocab": V}, {"embed": D})
    return Params(
        word_embedding=word,
        position_embedding=position if learned else None,
        block_position_embedding=position if learned else None,
        blocks=_blocks_specs(config, arrangement),
        final_norm=_norm_specs(config),
        output_embedding=None if config.tied_embeddings else word,
        prefix=_prefix_specs(config) if config.prefix_length else None,
    )


def _blocks_specs(config: GLMConfig, arrangement: Arrangement) -> Block | tuple[Block, ...]:
    quantization = config.quantization
    block = _block_specs(config, quantization, arrangement)
    if blocks_apart(config, arrangement):
        floats = _block_specs(config, None, arrangement)
        float_layers = quantization.float_layers if quantization is not None else ()
        return tuple(floats if n in float_layers else block for n in range(config.num_layers))
    return jax.tree.map(
        lambda spec: replace(
            spec, shape=(config.num_layers, *spec.shape), axes=("layer", *spec.axes)
        ),
        block,
    )


def _block_specs(
    config: GLMConfig, quantization: Quantization | None, arrangement: Arrangement
) -> Block:
    """One block, without a layer axis."""
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

    def linear(kernel: Kernel, init: Initializer, inputs: tuple[str, ...], **sizes: int) -> Linear:
        """A kernel with these axes and sizes; those that are not inputs are of the bias too."""
        outputs = {axis: size for axis, size in sizes.items() if axis not in inputs}
        bias = None
        if config.biases == "all" or "heads" in outputs:
            bias = ParamSpec(tuple(outputs.values()), _whole_axes(outputs), zeros)
        if quantization is None or kernel not in quantization.kernels:
            return Linear(ParamSpec(tuple(sizes.values()), tuple(sizes), init), bias)
        input_sizes = {axis: sizes[axis] for axis in inputs}
        packed = arrangement.packed
        return Linear(_quantized(quantization, kernel, packed, outputs, input_sizes), bias)

    # The pair comes first: as inner axes of 2 and F a kernel lies badly in the memory of TPUs.
    gate = {} if config.ffn == "gelu" else {"gate": 2}
    heads = {"heads": H, "head": K}
    shared, sandwich = G < H, config.norm == "sandwich"
    block = Block(
        attention_norm=_norm_specs(config),
        qkv=None if shared else linear("qkv", each(q, k, v), ("embed",), embed=D, qkv=3, **heads),
        q=linear("qkv", normal(q), ("embed",), embed=D, **heads) if shared else None,
        kv=linear(
            "qkv", each(k, v), ("embed",), embed=D, qkv=2, heads=G, head=K
        ) if shared else None,
        attention_out=linear(
            "attention_out", attention_out, ("heads", "head"), **heads, embed=D
        ),
        ffn_norm=_norm_specs(config),
        ffn_in=linear("ffn_in", ffn_in, ("embed",), **gate, embed=D, mlp=F),
        ffn_out=linear("ffn_out", ffn_out, ("mlp",), mlp=F, embed=D),
        attention_out_norm=_norm_specs(config) if sandwich else None,
        ffn_out_norm=_norm_specs(config) if sandwich else None,
    )  # fmt: skip
    return jax.tree.map(_merged, block) if arrangement.merged else block


def _merged(spec: ParamSpec) -> ParamSpec:
    """As `Arrangement.merged` has it."""
    if "embed" not in spec.axes or spec.axes[-1] != "head":
        return spec
    order = merged_order(spec.axes)
    *axes, _ = (spec.axes[i] for i in order)
    *shape, H, K = (spec.shape[i] for i in order)
    return replace(spec, shape=(*shape, H * K), axes=tuple(axes))


def merged_order(axes: tuple[str, ...]) -> list[int]:
    """Which axes come one after another in a kernel before its last two become one."""
    return sorted(range(len(axes)), key=lambda i: axes[i] != "qkv")


def _norm_specs(config: GLMConfig) -> LayerNorm:
    shape, axes = (config.hidden_size,), ("stream",)
    bias = None if config.norm == "rmsnorm" else ParamSpec(shape, axes, zeros)
    return LayerNorm(ParamSpec(shape, axes, ones), bias)


def _quantized(
    quantization: Quantization,
    kernel: Kernel | Literal["embeddings"],
    packed: bool,
    outputs: dict[str, int],
    inputs: dict[str, int],
) -> Quantized:
    """The integers of a kernel with these axes and sizes."""
    groups = quantization.groups(kernel, math.prod(inputs.values()))
    *first, last = inputs.values()
    dtype = "int8"
    if quantization.bits == 4:
        dtype, last = ("int8", last // 2) if packed else ("int4", last)
    shape = (*outputs.values(), *first, last)
    scale = ParamSpec(
        (groups, *outputs.values()), ("group", *_whole_axes(outputs)), no_init, "float16"
    )
    zero = replace(scale, dtype="float32") if quantization.scheme == "zeropoint" else None
    return Quantized(ParamSpec(shape, (*outputs, *inputs), no_init, dtype), scale, zero)


def _whole_axes(outputs: dict[str, int]) -> tuple[str, ...]:
    """Axes of what has one number for each output, which is small: the model width is not split."""
    return tuple("stream" if axis == "embed" else axis for axis in outputs)


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


def param_shardings(
    config: GLMConfig, mesh: Mesh | AbstractMesh, arrangement: Arrangement = STORED
) -> Params:
    """The sharding of every parameter on a mesh.

    Raises:
        ValueError: a mesh axis does not divide a parameter's dimension.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: named_sharding(mesh, spec.axes, spec.shape, leaf_name(path)),
        specs(config, arrangement),
    )


def abstract_params(config: GLMConfig, arrangement: Arrangement = STORED) -> Params:
    """Shapes and types of the parameters, without values."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs(config, arrangement)
    )


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
