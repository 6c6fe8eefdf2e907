"""Where arrays live: one table from logical axes to mesh axes.

Parameters and activations name their axes by meaning ("embed", "heads"); `RULES` says over which
mesh axes each meaning is split. The mesh is the ambient one of `jax.set_mesh`; without a mesh
everything here is the identity, so that notebooks need not know about it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from glmjax.config import MeshConfig

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
    "keys": (),
    "stream": (),
    # parameters, and the activations that they split
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layer": (),
    "position": (),
    "qkv": (),
    "head": (),
    "seed": (),
    "gate": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor over all devices, or over those given.

    Raises:
        ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and len(devices) % fixed == 0:
        sizes = {axis: len(devices) // fixed if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"a mesh of {sizes} does not fit {len(devices)} devices")
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices
    )


def partition(axes: Sequence[str]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes.

    Raises:
        ValueError: two logical axes of one array are split over the same mesh axis.
    """
    entries = [RULES[axis] for axis in axes]
    used = [mesh_axis for entry in entries for mesh_axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*(entry if len(entry) > 1 else (entry or (None,))[0] for entry in entries))


def named_sharding(
    mesh: Mesh | AbstractMesh, axes: Sequence[str], shape: Sequence[int], name: str = "array"
) -> NamedSharding:
    """The sharding on a mesh of an array with these logical axes and this shape.

    Raises:
        ValueError: a mesh axis does not divide its dimension; names the array and both numbers.
    """
    for axis, size in zip(axes, shape, strict=True):
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in RULES[axis])
        if size % parts:
            raise ValueError(
                f"axis {axis!r} of {name} has size {size}, which mesh axes {RULES[axis]} of total "
                f"size {parts} do not divide"
            )
    return NamedSharding(mesh, partition(axes))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins an intermediate to the sharding of its logical axes on the ambient mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes))


def target_device() -> jax.Device | AbstractDevice:
    """What the program that is being traced will run on: of the ambient mesh, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None else jax.devices()[0]


def per_device(function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """The function on each device's own part of its arguments, told by their logical axes.

    For kernels, which XLA cannot split. Without a mesh it is the function itself. Axes that are not
    named, at the end, are not split.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return function
    in_specs, out_specs = jax.tree.map(partition, (in_axes, out_axes), is_leaf=_names_axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _names_axes(axes: Any) -> bool:
    return all(isinstance(axis, str) for axis in axes)
