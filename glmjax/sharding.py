"""Where arrays live: one table from logical axes to mesh axes.

Parameters and activations name their axes by meaning ("embed", "heads"); `RULES` says over which
mesh axes each meaning is split. The mesh is the ambient one of `jax.set_mesh`; without a mesh
everything here is the identity, so that notebooks need not know about it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from glmjax.config import MeshConfig

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "fsdp_line"),
    "replica": ("data",),
    "sequence": ("tensor",),
    "length": (),
    "keys": (),
    "stream": (),
    # parameters, and the activations that they split
    "embed": ("fsdp", "fsdp_line"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layer": (),
    "position": (),
    "qkv": (),
    "head": (),
    "seed": (),
    "gate": (),
    "group": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `MeshConfig` over all devices, or over those given; fsdp_line is an
    axis of it only where it is more than 1.

    Neighbours in the mesh are neighbours in the torus. Of several slices `data` counts the slices
    first, so that everything but the sum over replicas stays inside a slice.

    Raises:
        ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % num_slices:
        raise ValueError(
            f"mesh axis data = {sizes['data']} does not divide into {num_slices} slices"
        )
    if sizes["fsdp_line"] == 1:
        del sizes["fsdp_line"]
    shape = (sizes["data"] // num_slices, *list(sizes.values())[1:])
    slices = (num_slices, *[1] * (len(sizes) - 1))
    arranged = mesh_utils.create_hybrid_device_mesh(
        shape, slices, devices, allow_split_physical_axes=True
    ) if num_slices > 1 else mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True
    )  # fmt: skip
    return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The axes of a mesh, of which one that is -1 takes the devices that are left.

    Raises:
        ValueError: they do not multiply to the number of devices.
    """
    sizes = resolve_sizes(config, num_devices)
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"a mesh of {dataclasses.asdict(config)} does not fit {num_devices} devices"
        )
    return sizes


def resolve_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """As `mesh_sizes`, whether or not the mesh fits."""
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    return {axis: num_devices // fixed if n == -1 else n for axis, n in sizes.items()}


def mesh_axes(axis: str, mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
    """Mesh axes over which a logical axis is split, of those that the mesh has.

    Without a mesh the ambient one counts, and without that, all of `RULES`.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return tuple(a for a in RULES[axis] if mesh.empty or a in mesh.shape)


def num_parts(axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Into how many parts a logical axis is split; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape.get(a, 1) for a in RULES[axis])


def batch_shards(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """The shards of a batch's rows that this process has devices for, and how many there are."""
    count = num_parts("batch", mesh)
    sharding = NamedSharding(mesh, PartitionSpec(mesh_axes("batch", mesh)))
    indices = sharding.addressable_devices_indices_map((count,)).values()
    return tuple(sorted({index[0].start or 0 for index in indices if index})), count


def partition(axes: Sequence[str], mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec:
    """The mesh axes of an array with these logical axes.

    Raises:
        ValueError: two logical axes of one array are split over the same mesh axis.
    """
    entries = [mesh_axes(axis, mesh) for axis in axes]
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
        parts = num_parts(axis, mesh)
        if size % parts:
            raise ValueError(
                f"axis {axis!r} of {name} has size {size}, which mesh axes {mesh_axes(axis, mesh)} of "
                f"total size {parts} do not divide"
            )
    return NamedSharding(mesh, partition(axes, mesh))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins an intermediate to the sharding of its logical axes on the ambient mesh.

    A sequence that the devices cannot share evenly is whole on each of them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    axes = tuple(
        "length" if axis == "sequence" and size % num_parts(axis) else axis
        for axis, size in zip(axes, x.shape, strict=False)
    )
    return jax.lax.with_sharding_constraint(x, partition(axes))


def pin(x: jax.Array, *entries: tuple[str, ...]) -> jax.Array:
    """As `constrain`, for the few places that choose mesh axes themselves."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(entry or None for entry in entries)))


def gather(x: jax.Array, *axes: str) -> jax.Array:
    """A parameter with its embed axis whole on every device.

    One mesh axis at a time, the last one first: libtpu gathers over a plane of a torus at once, but
    turns a gather over three dimensions into an all-reduce of twice the bytes.
    """
    entries = [mesh_axes(axis) for axis in axes]
    embed = axes.index("embed")
    while entries[embed]:
        entries[embed] = entries[embed][:-1]
        x = pin(x, *entries)
    return x


def sum_over_batch(
    function: Callable[..., jax.Array], in_axes: Sequence[Sequence[str]], out_axes: Sequence[str]
) -> Callable[..., jax.Array]:
    """The function summed over all rows, and its result left split like a parameter of these axes.

    Every device applies it to the rows that it has; the sum over devices is a reduce-scatter. Left
    to XLA it often becomes an all-reduce, of which each device then drops all but its part.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return function
    embed = out_axes.index("embed")

    def local(*arrays: jax.Array) -> jax.Array:
        x = function(*arrays)
        if target_device().platform == "cpu":
            x = x.astype(jnp.float32)  # XLA for CPUs aborts on sums of bfloat16 here
        for mesh_axis in mesh_axes("embed"):
            x = jax.lax.psum_scatter(x, mesh_axis, scatter_dimension=embed, tiled=True)
        return jax.lax.psum(x, mesh_axes("replica"))

    return per_device(local, tuple(in_axes), out_axes)


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


def row_major(x: jax.Array, *axes: str) -> jax.Array:
    """Lays an array of these logical axes out in memory as it is written, the last axis densest."""

    def local(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return per_device(local, (axes,), axes)(x)


def _names_axes(axes: Any) -> bool:
    return all(isinstance(axis, str) for axis in axes)
