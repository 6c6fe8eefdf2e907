"""Meshes for a number of devices, and what a batch has to be so that they can share it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from glmjax.config import Experiment, MeshConfig, replace
from glmjax.planning.programs import Job
from glmjax.planning.topologies import Topology
from glmjax.sharding import num_parts, resolve_sizes


def abstract_mesh(sizes: Mapping[str, int]) -> Any:
    """A mesh of these axes without devices, on which shardings can be checked."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh splits a batch."""
    return num_parts("batch", abstract_mesh(sizes))


def arrange(experiment: Experiment, topology: Topology, job: Job = "train") -> Experiment:
    """The experiment with a mesh for that many devices: its own, if that fits.

    In training `tensor` stays, or grows until the rows of the batch can be shared out, and `fsdp`
    takes the rest; a microbatch becomes one row for each of its devices where its own size does not
    divide. In serving `tensor` takes as many devices as can share the heads, and `data` the rest.

    Raises:
        ValueError: no such mesh splits the rows of the batch evenly.
    """
    devices, train = topology.num_devices, experiment.train
    sizes = resolve_sizes(experiment.mesh, devices)
    fits = math.prod(sizes.values()) == devices and sizes["data"] % topology.num_slices == 0
    if job == "train" and fits:
        return experiment
    heads = experiment.model.kv_heads
    tensors = [n for n in range(1, heads + 1) if heads % n == 0 and devices % n == 0]
    if job != "train":
        return replace(experiment, mesh=MeshConfig(data=devices // tensors[-1], tensor=tensors[-1]))
    for tensor in (n for n in tensors if n >= experiment.mesh.tensor):
        shards, rows = devices // tensor, train.microbatch_size or train.batch_size
        if train.batch_size % shards == 0 and shards % topology.num_slices == 0:
            fsdp = shards // topology.num_slices
            mesh = MeshConfig(data=topology.num_slices, fsdp=fsdp, tensor=tensor)
            return place(experiment, mesh, shards if rows % shards else rows)
    raise ValueError(
        f"the {train.batch_size} rows of a batch cannot be split over {devices} devices of which "
        f"{experiment.mesh.tensor} or more share a row"
    )


def place(experiment: Experiment, mesh: MeshConfig, rows: int) -> Experiment:
    """The experiment on another mesh with other microbatches; where its batch ramp does not consist
    of whole ones it starts at, and grows by, the next number that does."""
    ramp = experiment.train.ramp
    if ramp is not None and (ramp[0] % rows or ramp[1] % rows):
        start = min(-(-ramp[0] // rows) * rows, experiment.train.batch_size)
        ramp = (start, rows, ramp[2])
    changes = {"train.microbatch_size": rows, "train.ramp": ramp}
    return replace(experiment, mesh=mesh, **changes)


def flags(experiment: Experiment, default: Experiment) -> list[str]:
    """The flags that make one experiment of another, as `glmjax train` takes them."""
    words: list[str] = []
    for section in ("model", "mesh", "train"):
        old = dataclasses.asdict(getattr(default, section))
        for name, value in dataclasses.asdict(getattr(experiment, section)).items():
            if value != old[name]:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{section}.{name.replace('_', '-')}", *map(str, values)]
    return words
