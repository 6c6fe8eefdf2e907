"""What a compiled TPU program does in one run, read from its scheduled HLO text.

XLA's own cost analysis counts the body of a loop once, and a model of scanned layers is almost all
loop. Here the program becomes a tree of what the chip does in the order of the schedule, loops with
their trip counts, and everything else is a sum over that tree (`executed`).

FLOPs are those of the matrix products, counted from shapes as XLA does, so that products it
rewrites as convolutions count once. Cycles are the compiler's own `estimated_cycles`: it has none
for Pallas kernels and for communication, which are events of their own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from glmjax.planning.hlo_text import (
    ARRAY,
    Computation,
    Instruction,
    Module,
    byte_count,
    called_computations,
    device_groups,
    hbm_traffic,
    inner_instructions,
    parse,
    product_flops,
)
from glmjax.planning.trip_counts import expected_trips, known_trips

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute",
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """An instruction that XLA itself generated code for: a fusion, a copy, a broadcast."""

    name: str
    opcode: str
    shape: str
    source: str
    """What it comes from in the traced program: jit(train_step)/.../dot_general."""
    flops: float
    """Of its matrix products."""
    cycles: int
    """As the compiler estimates."""
    hbm_bytes: float
    """Read and written outside the chip's vector memory; only the parts that slices touch."""


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel. The compiler does not know how long it takes."""

    name: str
    operands: tuple[str, ...]
    """Shapes of what it reads."""
    hbm_bytes: float


@dataclass(frozen=True)
class Collective:
    """Communication of one device with others."""

    name: str
    kind: str
    size: float
    """Bytes of the whole array: what an all-gather leaves, what a reduction takes."""
    groups: tuple[tuple[int, ...], ...]
    """Devices that take part together; for a permutation (source, target)."""
    how: str
    """synchronous; asynchronous (a start and a done); loop (the same in the loop of a collective
    matrix product); fused (runs in steps inside fusions that compute); offloaded (to the
    SparseCores)."""
    source: str

    @property
    def group_size(self) -> int:
        """Devices that take part together; two in a permutation."""
        return len(self.groups[0])

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Axes of a mesh, in the order of its devices, along which the devices differ."""
        place = np.array(np.unravel_index(np.array(self.groups), tuple(mesh.values())))
        differs = (place != place[:, :, :1]).any((1, 2))
        return tuple(name for name, along in zip(mesh, differs, strict=True) if along)


@dataclass(frozen=True)
class Transfer:
    """A copy between HBM and the memory of the host that runs beside the rest."""

    name: str
    size: float
    """Bytes."""


@dataclass(frozen=True)
class Wait:
    """Where the schedule needs what an asynchronous collective or a transfer brings."""

    awaited: str


@dataclass(frozen=True)
class Loop:
    """Events that repeat. A whole program is a loop of one trip."""

    name: str
    trips: float
    dynamic: bool
    """Whether the count is known only when the program runs, and was assumed or given here."""
    events: "tuple[Event, ...]"


Event: TypeAlias = Operation | Kernel | Collective | Transfer | Wait | Loop


def executed(loop: Loop, trips: float = 1) -> Iterator[tuple[float, Event]]:
    """Every event below, with how often it happens in a run of the program."""
    for event in loop.events:
        if isinstance(event, Loop):
            yield from executed(event, trips * loop.trips)
        yield trips * loop.trips, event


def flops(program: Loop) -> float:
    """FLOPs of the matrix products of a run outside Pallas kernels."""
    return sum(n * event.flops for n, event in executed(program) if isinstance(event, Operation))


def cycles(program: Loop) -> float:
    """The compiler's estimate of a run without Pallas kernels and communication."""
    return sum(n * event.cycles for n, event in executed(program) if isinstance(event, Operation))


def hbm_bytes(program: Loop) -> float:
    """Bytes that a run moves between vector memory and HBM, communication left out."""
    return sum(
        n * event.hbm_bytes
        for n, event in executed(program)
        if isinstance(event, Operation | Kernel)
    )


def kernels(program: Loop) -> dict[str, float]:
    """How often each Pallas kernel runs."""
    counts: dict[str, float] = {}
    for n, event in executed(program):
        if isinstance(event, Kernel):
            counts[event.name] = counts.get(event.name, 0) + n
    return counts


def read_program(text: str, dynamic_trips: Mapping[str, float] | None = None) -> Loop:
    """The program of `compiled.as_text()`, or of a dump of the scheduled module.

    Args:
        text: Scheduled HLO, instructions with the sigil % on names.
        dynamic_trips: Trip counts of loops whose count the program computes, by the name of the
            Python function that holds the loop. Other such loops work through arrays in slices and
            are taken to reach their end.

    Raises:
        ValueError: a loop has a count that is computed, not given, and slices no array.
    """
    module = parse(text)
    return Loop(module.entry, 1, False, _events(module, module.entry, {}, dynamic_trips or {}))


# Instructions that name, group or place values and do nothing when the program runs.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "async-update", "optimization-barrier", "recv", "send", "send-done",
}  # fmt: skip
_HOST = "S(5)"


def _events(
    module: Module, name: str, carry: Mapping[int, int], dynamic_trips: Mapping[str, float]
) -> tuple[Event, ...]:
    """Events of a computation; `carry` are the elements of its tuple parameter that are known."""
    computation = module.computations[name]
    events: list[Event] = []
    # A collective in steps is several fusions with one channel: start, work beside it, done.
    steps: dict[str, list[str]] = {}
    for at in computation.values():
        for inside, _ in _communication(module, computation, at):
            steps.setdefault(_channel(at, inside), []).append(at.name)
    for at in computation.values():
        if at.opcode == "while":
            events.append(_loop(module, computation, at, carry, dynamic_trips))
        elif at.opcode in ("call", "conditional"):
            # Every branch of a conditional counts: an upper bound.
            for called in called_computations(at):
                events += _events(module, called, {}, dynamic_trips)
        elif at.opcode not in _FREE or "_xla_megascale_target" in at.attributes:
            events += _event(module, computation, at, steps)
    return tuple(events)


def _loop(
    module: Module,
    computation: Computation,
    at: Instruction,
    carry: Mapping[int, int],
    dynamic_trips: Mapping[str, float],
) -> Loop:
    body = at.called("body")
    trips, counter, invariants = known_trips(module, computation, at, carry)
    dynamic = trips is None
    if trips is None:
        trips = expected_trips(module, at, counter, dynamic_trips)
    events = _events(module, body, invariants, dynamic_trips)
    if "windowed_dot_general" in body:
        events = tuple(
            replace(event, how="loop")
            if isinstance(event, Collective) and event.how == "asynchronous"
            else event
            for event in events
        )
    return Loop(at.name, trips, dynamic, events)


def _event(
    module: Module, computation: Computation, at: Instruction, steps: Mapping[str, list[str]]
) -> list[Event]:
    """What one instruction does; a fusion that communicates may also compute."""
    if at.opcode == "send":
        return [_between_slices(module, computation, at)]
    if at.opcode == "recv":
        return []
    if at.opcode == "recv-done":
        return [Wait(_rendezvous(computation[at.operands[0]]))]
    if at.opcode.endswith("-done"):
        return [Wait(at.operands[0])]
    if at.opcode.endswith("-start") and _HOST in at.shape:
        on_chip = (array[0] for array in ARRAY.finditer(at.shape) if _HOST not in array[0])
        return [Transfer(at.name, max(map(byte_count, on_chip)))]
    traffic = hbm_traffic(module, computation, at)
    if at.opcode == "custom-call" and '"tpu_custom_call"' in at.attributes:
        operands = tuple(computation[name].shape for name in at.operands)
        return [Kernel(re.sub(r"(\.\d+)+$", "", at.name), operands, traffic)]
    products = sum(
        product_flops(i, s) for i, s in [(at, computation), *inner_instructions(module, at)]
    )
    starts: list[Event] = []
    waits: list[Event] = []
    communication = _communication(module, computation, at)
    for inside, shapes in communication:
        parts = steps[_channel(at, inside)]
        collective = _collective(module, at, inside, shapes, len(parts) > 1 or products > 0)
        if at.name == parts[0]:
            starts.append(collective)
        if at.name == parts[-1] and collective.how == "fused":
            waits.append(Wait(collective.name))
    if communication and not products:
        return [*starts, *waits]
    estimate = int(at.attribute(r'"estimated_cycles":"(\d+)"') or 0)
    operation = Operation(at.name, at.opcode, at.shape, at.source, products, estimate, traffic)
    return [*starts, operation, *waits]


def _communication(
    module: Module, computation: Computation, at: Instruction
) -> list[tuple[Instruction, Computation]]:
    """Collectives that an instruction is or has inside, with the computation they stand in."""
    return [
        (inside, shapes)
        for inside, shapes in [(at, computation), *inner_instructions(module, at)]
        if inside.opcode.removesuffix("-start") in COLLECTIVES
    ]


def _channel(outer: Instruction, at: Instruction) -> str:
    """What the fusions of one collective have in common; other instructions stand alone."""
    channel = at.attribute(r"channel_id=(\d+)")
    return f"{at.opcode} channel {channel}" if channel and outer.opcode == "fusion" else outer.name


def _collective(
    module: Module, outer: Instruction, at: Instruction, shapes: Computation, fused: bool
) -> Collective:
    kind, name = at.opcode.removesuffix("-start"), outer.name
    groups = device_groups(at.attributes, module.num_partitions)
    size = sum(byte_count(shapes[operand].shape) for operand in at.operands)
    size *= len(groups[0]) if kind == "all-gather" else 1
    if kind == "all-reduce" and any(
        "reduce-scatter" in called for called in called_computations(outer)
    ):
        kind = "reduce-scatter"  # libtpu writes one as a fusion of an all-reduce and a slice
    if "sparsecore" in outer.attributes:
        how = "offloaded"
    elif outer.opcode.endswith("-start"):
        how = "asynchronous"
    elif fused:
        how, name = "fused", _channel(outer, at)
    else:
        how = "synchronous"
    return Collective(name, kind, size, groups, how, at.source or outer.source)


def _between_slices(module: Module, computation: Computation, at: Instruction) -> Collective:
    """A collective over the data center network: a send and a recv that name the slices, from 1 on,
    and the devices of each that take part."""
    kind = at.attribute(r'_xla_megascale_transfer_type="(\w+)"') or "ALL_REDUCE"
    slices, first, last = re.findall(
        r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}', at.attributes
    )[0]
    groups = tuple(
        tuple((int(number) - 1) * module.num_partitions + device for number in slices.split(","))
        for device in range(int(first), int(last) + 1)
    )
    size = byte_count(computation[at.operands[0]].shape)
    size *= len(groups[0]) if kind == "ALL_GATHER" else 1
    kind = kind.lower().replace("_", "-")
    return Collective(_rendezvous(at), kind, size, groups, "asynchronous", at.source)


def _rendezvous(at: Instruction) -> str:
    return at.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"') or at.name
