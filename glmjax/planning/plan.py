"""Does a job fit on chips that are not there, and how fast would it be?

A plan is made from the real step, compiled for those chips: its memory is what the compiler laid
out, its FLOPs are counted, its time is an estimate (`roofline`) and says how far off such estimates
were where the truth is published (`calibration`).
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glmjax.config import Experiment, config_to_json
from glmjax.data.cache import digest, write_whole
from glmjax.model.attention import KVCache
from glmjax.planning import calibration, hlo, roofline
from glmjax.planning.arrange import abstract_mesh, batch_shards
from glmjax.planning.memory import Contributor, Memory
from glmjax.planning.programs import Job, Program, Serving, compile_program, versions
from glmjax.planning.topologies import Generation, Topology
from glmjax.sharding import mesh_sizes
from glmjax.training.step import abstract_state, microbatch_size, step_settings

TOKENS = 400e9
"""Tokens that GLM-130B was trained on (arXiv 2210.02414, section 2.3), for days and chip-hours."""


@dataclass(frozen=True)
class Communication:
    """All collectives of one step that are of one kind, along the same axes."""

    axes: tuple[str, ...]
    """Mesh axes along which the devices differ that take part."""
    kind: str
    """all-gather, reduce-scatter, all-reduce, ..."""
    how: str
    """synchronous, or how it runs beside computation (`hlo.Collective`)."""
    count: float
    bytes: float
    """Of the whole arrays, all of them together, seen by one device."""
    seconds: float
    """Estimated, each having its links to itself."""


@dataclass(frozen=True)
class Estimate:
    """What a step takes by the roofline model. Nothing here is measured."""

    seconds: float
    """One step: computation, synchronous communication, and waiting for the rest."""
    compute_seconds: float
    """Operations at the compiler's cycles and kernels, HBM permitting."""
    synchronous_seconds: float
    """Communication beside which nothing runs."""
    asynchronous_seconds: float
    """Communication that runs beside computation."""
    host_seconds: float
    """Copies to and from the memory of the host, which run beside computation too."""
    waiting_seconds: float
    """For communication and copies that computation did not cover."""
    tokens_per_second_per_chip: float
    utilisation: float
    """Model FLOPs over what the chips could do in that time (MFU)."""
    compute_utilisation: float
    """The same if all communication were free."""


@dataclass(frozen=True)
class Plan:
    """What is known of a job on chips that are not there. Bytes are of one device."""

    job: Job
    model: str
    topology: str
    num_slices: int
    chips: int
    devices: int
    mesh: Mapping[str, int]
    weights: str
    """Type of the matrices of the blocks, such as bfloat16 or int4."""
    cache: str
    """Type of cached keys and values; empty in training."""
    rows: int
    """Rows of one step: of the batch in training, decoded together in serving."""
    microbatch_rows: int
    """Rows of one pass: of one forward and backward pass, or prompts that are fed together."""
    length: int
    """Tokens of a row; of its cache in serving."""
    prompt: int
    """Tokens of a prompt that is fed; 0 where none is."""
    remat: str
    fits: bool
    """Whether libtpu accepts the program."""
    hbm_bytes: int
    """What a program may use of a device's memory."""
    memory: Memory
    hardware_flops: float
    """Of one step on all devices, counted over the traced program."""
    model_flops: float
    """What the step needs without computing anything again."""
    communication: tuple[Communication, ...]
    estimate: Estimate | None
    """None where the program was refused, or not compiled to the end."""
    calibration: str
    """How far off such estimates were where the truth is published."""
    versions: Mapping[str, str]
    compile_seconds: float

    @property
    def margin(self) -> int:
        """Bytes left on a device; negative: bytes too many."""
        return self.hbm_bytes - self.memory.needed

    @property
    def days(self) -> float:
        """Of training on TOKENS tokens without interruption."""
        assert self.estimate is not None
        return TOKENS / (self.estimate.tokens_per_second_per_chip * self.chips) / 86400

    @property
    def least_seconds(self) -> float:
        """To read every argument once from HBM, which is what bounds decoding."""
        chip = Topology(self.topology).generation
        return self.memory.arguments / chip.hbm_bytes_per_second


def plan(
    experiment: Experiment,
    topology: str | Topology,
    num_slices: int = 1,
    job: Job = "train",
    serving: Serving = Serving(),  # noqa: B008 (frozen)
    *,
    memory_only: bool = False,
) -> Plan:
    """Plans a job; the result is kept in `experiment.data.cache`, so that asking again is instant.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
        ValueError: there is no such topology, the mesh does not fit it, or an axis does not divide
            an array.
        RuntimeError: libtpu cannot compile the program, for another reason than device memory.
    """
    if isinstance(topology, str):
        topology = Topology(topology, num_slices)
    mesh = mesh_sizes(experiment.mesh, topology.num_devices)
    if job == "train":
        rows = experiment.train.batch_size, microbatch_size(experiment, abstract_mesh(mesh))
        abstract_state(experiment, abstract_mesh(mesh))  # Refuses what does not divide at once.
    else:
        rows = serving.batch, batch_shards(mesh) if job == "prefill" else serving.batch
    settings = _settings(experiment), mesh, rows, topology, job, serving, versions(), _sources()
    folder = Path(experiment.data.cache).expanduser() / "plans"
    whole = folder / f"{digest(*settings)}.json"
    partial = whole.with_suffix(".memory.json")
    for file in (whole, partial) if memory_only else (whole,):
        if file.exists():
            return plan_from_json(json.loads(file.read_text()))
    program = compile_program(experiment, topology, job, serving, memory_only=memory_only)
    made = _describe(experiment, mesh, rows, topology, job, serving, program)
    file = partial if made.fits and made.estimate is None else whole
    write_whole(file, json.dumps(plan_to_json(made)).encode())
    return made


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """A plan as nested dictionaries, ready for `json.dumps`."""
    values = dataclasses.asdict(plan) | {"margin": plan.margin}
    if plan.estimate is not None and plan.job == "train":
        values |= {"days": plan.days, "chip_hours": plan.days * 24 * plan.chips}
    return values


def plan_from_json(values: Mapping[str, Any]) -> Plan:
    """The plan that `plan_to_json` wrote."""
    kept = {f.name: values[f.name] for f in dataclasses.fields(Plan)}
    memory, estimate = kept["memory"], kept["estimate"]
    contributors = tuple(Contributor(**c) for c in memory["contributors"])
    return Plan(**kept | {
        "memory": Memory(**memory | {"contributors": contributors}),
        "communication": tuple(
            Communication(**c | {"axes": tuple(c["axes"])}) for c in kept["communication"]
        ),
        "estimate": estimate and Estimate(**estimate),
    })  # fmt: skip


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What of an experiment its step is compiled for; where data lie does not matter."""
    settings = config_to_json(step_settings(experiment))
    settings["data"] = experiment.data.sequence_length
    return settings


@functools.cache
def _sources() -> str:
    """A digest of the package's code, since another version of it compiles to another program."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return digest(*(file.read_bytes() for file in files))


def _describe(
    experiment: Experiment,
    mesh: dict[str, int],
    rows: tuple[int, int],
    topology: Topology,
    job: Job,
    serving: Serving,
    program: Program,
) -> Plan:
    model, (batch, microbatch) = experiment.model, rows
    weights: str = model.dtype
    cache, prompt = "", 0
    if job == "train":
        length = experiment.data.sequence_length
        tokens, kernel_seconds = batch * length, roofline.attention_seconds
        model_flops = roofline.model_flops(model, batch, length)
        statement = calibration.statement(topology.family)
    else:
        statement = "estimates for serving are not calibrated: no published run to compare with"
        length, model_flops, cache = serving.length, program.flops, model.cache_dtype or model.dtype
        if model.quantization is not None:
            weights = f"int{model.quantization.bits}"
        if job == "prefill":
            prompt, kernel_seconds = serving.prompt_length, _prefill_seconds
            tokens = microbatch * prompt
        else:
            shapes = jax.eval_shape(lambda: KVCache.empty(model, batch, length))
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
            parts = model.num_layers * batch_shards(mesh) * mesh["tensor"]
            kernel_seconds = functools.partial(_decode_seconds, size / parts)
            tokens = batch
    communication: tuple[Communication, ...] = ()
    estimate = None
    if program.text is not None:
        events = hlo.read_program(program.text, program.loop_rounds)
        network = roofline.Network(topology, mesh, np.array(program.places))
        times = roofline.estimate(events, network, kernel_seconds)
        communication = _communication(events, network)
        estimate = _estimate(times, model_flops, tokens, topology)
    return Plan(
        job=job, model=model.name, topology=topology.name, num_slices=topology.num_slices,
        chips=topology.chips, devices=topology.num_devices, mesh=mesh, weights=weights, cache=cache,
        rows=batch, microbatch_rows=microbatch, length=length, prompt=prompt, remat=model.remat, fits=program.fits,
        hbm_bytes=topology.generation.hbm_bytes, memory=program.memory,
        hardware_flops=program.flops, model_flops=model_flops, communication=communication,
        estimate=estimate, calibration=statement,
        versions=versions(), compile_seconds=program.seconds,
    )  # fmt: skip


def _decode_seconds(cache_bytes: float, kernel: hlo.Kernel, chip: Generation) -> float:
    """Time of a kernel of the decoding step, of a layer whose cache has so many bytes.

    Attention reads the cache of the layer; what is written, one token, is left out.
    """
    return cache_bytes / chip.hbm_bytes_per_second if "decode" in kernel.name else 0.0


def _prefill_seconds(kernel: hlo.Kernel, chip: Generation) -> float:
    """Time of a kernel of the step that feeds a prompt, all of whose tokens may see each other; the
    kernel that writes them into the cache is left out."""
    return 2 * roofline.attention_seconds(kernel, chip) if "forward" in kernel.name else 0.0


def _communication(events: hlo.Loop, network: roofline.Network) -> tuple[Communication, ...]:
    """The collectives of a step by axes and kind, those that move most bytes first."""
    sums: dict[tuple[tuple[str, ...], str, str], list[float]] = {}
    for count, event in hlo.executed(events):
        if isinstance(event, hlo.Collective):
            key = event.axes(network.mesh), event.kind, event.how
            total = sums.setdefault(key, [0.0, 0.0, 0.0])
            for i, value in enumerate((1.0, event.size, network.seconds(event))):
                total[i] += count * value
    found = [Communication(*key, *total) for key, total in sums.items()]
    return tuple(sorted(found, key=lambda communication: -communication.bytes))


def _estimate(
    times: roofline.Times, model_flops: float, tokens: int, topology: Topology
) -> Estimate:
    compute = times.compute + times.memory
    step, free = (
        roofline.throughput(seconds, model_flops, tokens, topology)
        for seconds in (times.step, compute)
    )
    return Estimate(
        seconds=times.step,
        compute_seconds=compute,
        synchronous_seconds=times.synchronous,
        asynchronous_seconds=times.asynchronous,
        host_seconds=times.host,
        waiting_seconds=times.waiting,
        tokens_per_second_per_chip=tokens / times.step / topology.chips,
        utilisation=step.utilisation,
        compute_utilisation=free.utilisation,
    )
