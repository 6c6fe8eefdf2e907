"""The fastest plan that fits: meshes, microbatches and remat policies are tried.

Compiling takes minutes, so few candidates are compiled. Rough models of time and memory order them
and drop what is hopeless. Down that list a candidate is compiled only until its memory is known,
which takes seconds; those that fit are compiled to the end, and the best estimate among them wins.
"""

"""The fastest plan that fits: meshes, microbatches and remat policies are tried.

Compiling takes minutes, so few candidates are compiled. A rough model of time orders them. Down that
list a candidate is compiled only until its memory is known, which takes seconds; those that fit are
compiled to the end, and the best estimate among them wins. What did not fit rules out others.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from glmjax.config import Experiment, GLMConfig, MeshConfig, Remat, replace
from glmjax.data.blanks import Batch
from glmjax.model.params import abstract_params, count_params
from glmjax.planning.arrange import abstract_mesh, batch_shards, place
from glmjax.planning.flops import count_flops
from glmjax.planning.plan import Plan, plan
from glmjax.planning.topologies import Generation, Topology
from glmjax.training.step import abstract_state, loss_and_metrics

PRODUCT_EFFICIENCY = 0.8
"""Share of the peak that the rough model gives to matrix products."""
EXPOSED = 0.5
"""Share of communication that the rough model does not hide behind computation."""
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Rows of a microbatch on each of the devices that split it, where the batch can be cut so."""


@dataclass(frozen=True)
class Candidate:
    """One way to run an experiment, with what the rough models say about it."""

    experiment: Experiment
    mesh: Mapping[str, int]
    rows: int
    """Of a microbatch on each of the devices that split it."""
    bytes: float
    """State and what is kept for the backward pass, on one device."""
    seconds: float
    """Of a step."""

    def __str__(self) -> str:
        axes = [f"{name} {size}" for name, size in self.mesh.items() if size > 1]
        layout = " x ".join(axes) or "one device"
        rows = f"{self.rows} {'row' if self.rows == 1 else 'rows'}"
        return f"{layout}, {rows} each, remat {self.remat}"

    @property
    def remat(self) -> str:
        return self.experiment.model.remat

    @property
    def kind(self) -> tuple[int, str]:
        """What the rough model of time cannot decide; of one kind the first that fits is compiled."""
        return self.mesh["tensor"], self.remat


@dataclass(frozen=True)
class Found:
    """A plan that was compiled to the end and fits, and the experiment that it is of."""

    experiment: Experiment
    plan: Plan


def search(
    experiment: Experiment,
    topology: Topology,
    most: int = 4,
    make_plan: Callable[..., Plan] = plan,
    report: Callable[[str], object] = lambda line: None,
) -> list[Found]:
    """Plans that fit, the fastest first.

    Args:
        experiment: Its batch size stays; its mesh, microbatch size and remat policy are varied.
        topology: The chips.
        most: How many candidates are compiled to the end.
        make_plan: Makes the plan of an experiment, as `plan` does.
        report: Is told what happens, a line at a time.

    Raises:
        RuntimeError: nothing fits.
    """
    ordered = candidates(experiment, topology)
    report(f"{len(ordered)} candidates; compiling the {most} most promising that fit")
    found: list[Found] = []
    settled: set[tuple[int, str]] = set()
    refused: list[tuple[Candidate, Plan]] = []
    for candidate in ordered:
        if candidate.kind in settled or _is_ruled_out(candidate, refused):
            continue
        try:
            made = make_plan(candidate.experiment, topology, memory_only=True)
            needed = f"{made.memory.needed / 2**30:.1f} of {made.hbm_bytes / 2**30:.1f} GiB"
            if not made.fits:
                refused.append((candidate, made))
                report(f"{candidate}: needs {needed}, too much")
                continue
            report(f"{candidate}: needs {needed}, compiling")
            made = make_plan(candidate.experiment, topology)
        except RuntimeError as error:
            report(f"{candidate}: {str(error).splitlines()[0]}")
            continue
        settled.add(candidate.kind)
        found.append(Found(candidate.experiment, made))
        assert made.estimate is not None
        report(f"{candidate}: {made.estimate.utilisation:.1%} of peak, estimated")
        if len(found) == most:
            break
    if not found:
        raise RuntimeError(f"of {len(ordered)} candidates none fits {topology}")
    return sorted(found, key=lambda f: f.plan.estimate.seconds if f.plan.estimate else math.inf)


def _is_ruled_out(candidate: Candidate, refused: list[tuple[Candidate, Plan]]) -> bool:
    """Whether a candidate needs too much memory, since one that differs in its rows only does:
    what it needs beside its arguments grows with the rows at most in proportion."""
    return any(
        made.memory.arguments + made.memory.temporaries * min(1, candidate.rows / other.rows)
        > made.hbm_bytes
        for other, made in refused
        if (candidate.mesh, candidate.remat) == (other.mesh, other.remat)
    )


def candidates(experiment: Experiment, topology: Topology) -> list[Candidate]:
    """Everything that is worth trying, by the rough model of time; what cannot be split over the
    devices, or cannot fit by the rough model of memory, is left out."""
    chip = topology.generation
    model, length = experiment.model, experiment.data.sequence_length
    costs = {r: _costs(replace(model, remat=r), length, chip) for r in get_args(Remat)}
    kept: list[Candidate] = []
    for mesh in _meshes(model, topology):
        shards = batch_shards(mesh)
        try:
            state = jax.tree.leaves(abstract_state(experiment, abstract_mesh(mesh)))
        except ValueError:  # An axis does not divide a parameter.
            continue
        state_bytes = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in state
        )
        for rows, remat in itertools.product(ROWS, costs):
            if experiment.train.batch_size % (rows * shards):
                continue
            flops, saved = costs[remat]
            size = state_bytes + rows * saved / mesh["tensor"]
            if size <= chip.hbm_bytes:
                changed = place(experiment, MeshConfig(**mesh), rows * shards)
                seconds = _seconds(experiment, topology, mesh, rows, flops)
                changed = replace(changed, **{"model.remat": remat})
                kept.append(Candidate(changed, mesh, rows, size, seconds))
    return sorted(kept, key=lambda candidate: candidate.seconds)


def _meshes(config: GLMConfig, topology: Topology) -> list[dict[str, int]]:
    """Ways to arrange the devices: `data` counts the slices, or more replicas."""
    devices, slices = topology.num_devices, topology.num_slices
    heads = config.kv_heads
    tensors = [n for n in range(1, heads + 1) if heads % n == 0 and devices // slices % n == 0]
    meshes = []
    for tensor in tensors:
        shards = devices // slices // tensor
        for replicas in (n for n in range(1, shards + 1) if shards % n == 0):
            fsdp = shards // replicas
            lines = {1, *(side for side in topology.sides if fsdp % side == 0 and fsdp > side)}
            for line in lines if fsdp > _plane(topology) else {1}:
                sizes = {"data": slices * replicas, "fsdp": fsdp // line, "fsdp_line": line}
                meshes.append(sizes | {"tensor": tensor})
    return meshes


def _plane(topology: Topology) -> int:
    """Devices of the largest plane of a slice's torus."""
    return math.prod(sorted(topology.sides)[-2:]) * topology.generation.devices_per_chip


@cache
def _costs(config: GLMConfig, length: int, chip: Generation) -> tuple[float, float]:
    """FLOPs of one row's forward and backward pass, and bytes kept in between."""
    names = [field.name for field in dataclasses.fields(MeshConfig)]
    device = AbstractDevice(device_kind=chip.device_kind, num_cores=chip.cores, platform="tpu")
    mesh = AbstractMesh((1,) * len(names), tuple(names), (AxisType.Auto,) * len(names),
                        abstract_device=device)  # fmt: skip

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    T = length
    batch = Batch(
        tokens_BT=array(T), positions_B2T=array(2, T), k_start_BT=array(T), k_end_BT=array(T),
        targets_BT=array(T), weights_BT=array(T, dtype=jnp.float32), objective_B=array(),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh):
        gradient = jax.value_and_grad(partial(loss_and_metrics, config), has_aux=True)
        jaxpr = jax.make_jaxpr(gradient)(abstract_params(config), batch)
    forward = next(e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan")
    stacked = [v.aval for v in forward.outvars if v.aval.shape[:1] == (config.num_layers,)]
    return count_flops(jaxpr), sum(aval.size * aval.dtype.itemsize for aval in stacked)


def _seconds(
    experiment: Experiment, topology: Topology, mesh: Mapping[str, int], rows: int, flops: float
) -> float:
    """Seconds of a step by the rough model: products near the peak, and half of the communication.

    Weights are gathered twice and their gradients reduced once over `fsdp`, activations gathered and
    reduced eight times a block over `tensor`, gradients summed over `data`; all in two bytes.
    """
    model, chip = experiment.model, topology.generation
    fsdp, tensor, data = mesh["fsdp"] * mesh["fsdp_line"], mesh["tensor"], mesh["data"]
    line = 2 * chip.link_bytes_per_second / chip.devices_per_chip
    compute = rows * flops / tensor / (PRODUCT_EFFICIENCY * chip.peak_flops)
    weights = 2 * count_params(model) / tensor
    activations = 2 * rows * experiment.data.sequence_length * model.hidden_size
    # libtpu turns a gather over three dimensions into an all-reduce, which moves twice as much.
    twice = 2 if mesh["fsdp"] > _plane(topology) else 1
    planes = max(1, topology.generation.torus_axes - (tensor > 1))
    communication = 3 * twice * weights * (1 - 1 / fsdp) / (planes * line)
    communication += 8 * model.num_layers * activations * (1 - 1 / tensor) / line
    if data > 1:
        across = chip.dcn_bytes_per_second if topology.num_slices > 1 else line
        communication += 2 * (weights / fsdp) * (1 - 1 / data) / across
    microbatches = experiment.train.batch_size // (rows * batch_shards(mesh))
    # Gradients are added up in float32 between microbatches; at the end state is read and written.
    state = (12 * (microbatches - 1) + 36) * count_params(model) / (fsdp * tensor)
    memory = state / chip.hbm_bytes_per_second
    return microbatches * (compute + EXPOSED * communication) + memory
