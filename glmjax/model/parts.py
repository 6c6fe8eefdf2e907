"""A model in parts, so that no more of it than a layer need be in host memory.

A part is one layer of one parameter, or a whole parameter that has no layers, in the parameter's own
axes, integers of 4 bits packed. Every checkpoint format is read as a mapping from keys to parts and
written part by part; loading, converting and quantising are loops over keys, layer by layer.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.config import GLMConfig
from glmjax.kernels.quantized_matmul import reference
from glmjax.model.params import (
    STORED,
    Arrangement,
    Params,
    ParamSpec,
    blocks_apart,
    leaf_name,
    merged_order,
    specs,
)
from glmjax.sharding import named_sharding

AHEAD = 4
"""Parts that are read ahead: from any kernel of a block to the next one, over what is small."""

Key = tuple[str, int | None]
"""The dotted name of a parameter, such as blocks.qkv.kernel, and the layer; None where the parameter
has no layers. It is the same in every `Arrangement`."""


Axes = tuple[str, ...]


class Part(NamedTuple):
    """One layer of a parameter, wherever it is stored."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def part_specs(config: GLMConfig) -> dict[Key, ParamSpec]:
    """What each part of a model is, layer by layer."""
    tree = specs(config, Arrangement(apart=True))
    parts: dict[Key, ParamSpec] = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(tree):
        name = leaf_name(path)
        if name.startswith("blocks."):
            _, n, rest = name.split(".", 2)
            parts[f"blocks.{rest}", int(n)] = spec
        else:
            parts[name, None] = spec
    return parts


def leaf_of(key: Key, apart: bool) -> Key:
    """Name of the leaf that holds a part, and its index in that; None: the leaf is the part."""
    name, n = key
    if n is None or not apart:
        return key
    return name.replace("blocks.", f"blocks.{n}.", 1), None


def take_apart(config: GLMConfig, params: Params) -> dict[Key, Part]:
    """The parts of a model that is in memory, in any arrangement."""
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    apart = isinstance(params.blocks, tuple)

    def part(key: Key, spec: ParamSpec) -> Part:
        name, n = leaf_of(key, apart)
        leaf = leaves[name]

        def read() -> np.ndarray:
            array = np.asarray(leaf if n is None else leaf[n])
            array = _pack_int4(array) if leaf.dtype == jnp.int4 else array
            return array if array.ndim == len(spec.shape) else _split_heads(array, spec)

        dtype = np.dtype(np.int8 if leaf.dtype == jnp.int4 else leaf.dtype)
        return Part(spec.shape, dtype, read)

    return {key: part(key, spec) for key, spec in part_specs(config).items()}


def _pack_int4(values: np.ndarray) -> np.ndarray:
    pairs = values.astype(np.int8)
    return (pairs[..., ::2] << 4) | (pairs[..., 1::2] & 0x0F)


def _split_heads(array: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """A part from what `_rearrange` makes of it."""
    order = merged_order(spec.axes)
    return array.reshape([spec.shape[i] for i in order]).transpose(np.argsort(order))


def read_ahead(parts: Mapping[Key, Part], threads: int = 1) -> Iterator[tuple[Key, np.ndarray]]:
    """Keys and arrays in order, read in the background while those before them are used."""
    waiting: deque[tuple[Key, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(threads, "read-ahead") as executor:
        for key, part in parts.items():
            waiting.append((key, executor.submit(part.read)))
            if len(waiting) > AHEAD:
                key, future = waiting.popleft()
                yield key, future.result()
        for key, future in waiting:
            yield key, future.result()


def assemble(
    config: GLMConfig,
    parts: Mapping[Key, Part],
    done: Callable[[Key], Any] = lambda key: None,
    arrangement: Arrangement = STORED,
) -> Params:
    """The parameters, with the types of the parts, on the mesh of `jax.set_mesh` if one is set.

    Parts go straight to their devices; `done` is called when one has been handed over.
    """
    mesh = jax.sharding.get_mesh()

    def sharding(name: str, spec: ParamSpec) -> jax.sharding.Sharding:
        if mesh.empty:
            return jax.device_put(0).sharding
        return named_sharding(mesh, spec.axes, spec.shape, name)

    of_parts, apart = part_specs(config), blocks_apart(config, arrangement)
    tree = specs(config, arrangement)
    leaf_specs = {leaf_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    leaves: dict[str, jax.Array] = {}
    place: dict[str, Callable[..., jax.Array]] = {}
    for name, spec in leaf_specs.items():
        whole = sharding(name, spec)
        if spec.axes[0] == "layer":
            dtype = jnp.int4 if spec.dtype == "int4" else parts[name, 0].dtype
            leaves[name] = jnp.zeros(spec.shape, dtype, device=whole)
            place[name] = jax.jit(
                _set_layer, static_argnums=3, donate_argnums=0, out_shardings=whole
            )
        elif spec.dtype == "int4" or arrangement.merged:
            place[name] = jax.jit(_rearrange, static_argnums=(1, 2, 3), out_shardings=whole)
    for key, array in read_ahead({key: parts[key] for key in of_parts}):
        name, n = leaf_of(key, apart)
        stored, spec = of_parts[key], leaf_specs[name]
        placed = jax.make_array_from_callback(
            array.shape, sharding(name, stored), functools.partial(_at, array)
        ).block_until_ready()  # Or what has been read would pile up.
        if n is not None:
            leaves[name] = place[name](leaves[name], placed, n, stored.axes)
        elif name in place:
            leaves[name] = place[name](placed, stored.axes, len(spec.shape), spec.dtype == "int4")
        else:
            leaves[name] = placed
        done(key)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], tree)


def _at(array: np.ndarray, index: Any) -> np.ndarray:
    return array[index]


def _set_layer(stack: jax.Array, layer: jax.Array, n: jax.Array, axes: Axes) -> jax.Array:
    layer = _rearrange(layer, axes, stack.ndim - 1, stack.dtype == jnp.int4)
    return jax.lax.dynamic_update_index_in_dim(stack, layer, n, 0)


def _rearrange(part: jax.Array, axes: Axes, rank: int, unpack: bool) -> jax.Array:
    """A part of these axes as it lies in memory: see `Arrangement`."""
    if unpack:
        part = reference.unpack(part, 2 * part.shape[-1]).astype(jnp.int4)
    if rank < part.ndim:
        part = part.transpose(merged_order(axes))
        part = part.reshape(*part.shape[:-2], -1)
    return part
