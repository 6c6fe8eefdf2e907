"""A model in parts, so that no more of it than a layer need be in host memory.

A part is one layer of one parameter, or a whole parameter that has no layers, in the parameter's own
axes. Every checkpoint format is read as a mapping from keys to parts and written part by part;
loading, converting and quantising are loops over keys, layer by layer.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.config import GLMConfig
from glmjax.model.params import Params, ParamSpec, leaf_name, specs
from glmjax.sharding import named_sharding

AHEAD = 4
"""Parts that are read ahead: from any kernel of a block to the next one, over what is small."""

Key = tuple[str, int | None]
"""The dotted name of a parameter, and the layer; None where the parameter has no layers."""


class Part(NamedTuple):
    """One layer of a parameter, wherever it is stored."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def part_specs(config: GLMConfig) -> dict[Key, ParamSpec]:
    """What each part of a model is, layer by layer; specs without the layer axis."""
    leaves = {
        leaf_name(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs(config))
    }
    stacked = {name: spec for name, spec in leaves.items() if spec.axes[0] == "layer"}
    parts: dict[Key, ParamSpec] = {}
    for name, spec in leaves.items():
        if name not in stacked:
            parts[name, None] = spec
        elif name == next(iter(stacked)):
            for n in range(config.num_layers):
                for block_name, block_spec in stacked.items():
                    parts[block_name, n] = replace(
                        block_spec, shape=block_spec.shape[1:], axes=block_spec.axes[1:]
                    )
    return parts


def take_apart(config: GLMConfig, params: Params) -> dict[Key, Part]:
    """The parts of a model that is in memory."""
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def part(key: Key, spec: ParamSpec) -> Part:
        name, n = key
        leaf = leaves[name]
        return Part(spec.shape, leaf.dtype, lambda: np.asarray(leaf if n is None else leaf[n]))

    return {key: part(key, spec) for key, spec in part_specs(config).items()}


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
    config: GLMConfig, parts: Mapping[Key, Part], done: Callable[[Key], Any] = lambda key: None
) -> Params:
    """The parameters, with the types of the parts, on the mesh of `jax.set_mesh` if one is set.

    Parts go straight to their devices; `done` is called when one has been handed over.
    """
    mesh = jax.sharding.get_mesh()

    def sharding(name: str, spec: ParamSpec) -> jax.sharding.Sharding:
        if mesh.empty:
            return jax.device_put(0).sharding
        return named_sharding(mesh, spec.axes, spec.shape, name)

    of_parts = part_specs(config)
    tree = specs(config)
    leaves: dict[str, jax.Array] = {}
    setters: dict[str, Callable[..., jax.Array]] = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(tree):
        name = leaf_name(path)
        if spec.axes[0] == "layer":
            whole = sharding(name, spec)
            leaves[name] = jnp.zeros(spec.shape, parts[name, 0].dtype, device=whole)
            setters[name] = jax.jit(_set_layer, donate_argnums=0, out_shardings=whole)
    for key, array in read_ahead({key: parts[key] for key in of_parts}):
        name, n = key
        placed = jax.make_array_from_callback(
            array.shape, sharding(name, of_parts[key]), functools.partial(_at, array)
        )
        leaves[name] = placed if n is None else setters[name](leaves[name], placed, n)
        done(key)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[leaf_name(path)], tree)


def _at(array: np.ndarray, index: Any) -> np.ndarray:
    return array[index]


def _set_layer(stack: jax.Array, layer: jax.Array, n: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, n, 0)
