"""How long a compiled TPU program takes, estimated: nothing here is a measurement.

The model is a roofline along the schedule. An operation takes the compiler's estimate of its
cycles, at least the time its bytes need to pass HBM. A Pallas attention kernel takes what its
products need on the matrix units over `KERNEL_EFFICIENCY`. A collective takes its bytes over the
links of the torus that its group spans, or over the data center network between slices; latency is
left out. A synchronous collective adds its time; an asynchronous one runs beside what the schedule
puts between its start and the wait for it, after those before it on the same links, and adds only
what is left over then. So do copies to and from the host.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from glmjax.config import GLMConfig
from glmjax.planning import hlo
from glmjax.planning.hlo_text import dimensions
from glmjax.planning.topologies import Generation, Topology

LINK_EFFICIENCY = 0.9
"""Share of a link's data-sheet bandwidth that collectives reach (Austin et al., How to Scale Your
Model, chapter 2: 9e10 of 1e11 byte/s on v5p and v6e, 4.5e10 of 5e10 on v4 and v5e)."""

KERNEL_EFFICIENCY = 0.5
"""Share of the matrix units' rate that attention kernels reach, of half the square of scores. One
number for all, so that no comparison rests on it: counted bundles give 0.45 to 0.83 for this
package's kernels and 0.26 to 0.59 for splash attention (`glmjax bench attention --static`)."""

HOST_BYTES_PER_SECOND = 1.5e10
"""Between a device and its host over PCIe (Austin et al., chapter 2)."""

PRODUCTS = {"forward": 2, "fwd": 2, "backward": 5, "dkv": 5, "dq": 0}
"""Matrix products of an attention kernel by a word of its name. Where a backward pass has a kernel
of its own for dq, it counts as part of the one for dk and dv."""


def model_flops(config: GLMConfig, rows: int, length: int) -> float:
    """FLOPs that a training step needs without recomputing anything: six for each weight of a
    matrix product and each token, and the full square of attention scores (Chowdhery et al. 2022,
    PaLM, appendix B)."""
    N, D, F, V = config.num_layers, config.hidden_size, config.ffn_size, config.vocab_size
    attention = 2 * D * (D + config.kv_heads * config.head_size)
    weights = N * (attention + (2 if config.ffn == "gelu" else 3) * D * F) + V * D
    return rows * length * (6.0 * weights + 12.0 * N * D * length)


def attention_seconds(kernel: hlo.Kernel, chip: Generation) -> float:
    """Time of an attention kernel whose largest operand is [..., heads, tokens, head size], if half
    of its scores are visible.

    Raises:
        ValueError: the name is not that of an attention kernel.
    """
    words = [word for word in PRODUCTS if word in kernel.name]
    if not words:
        raise ValueError(f"how long the kernel {kernel.name} takes is not known")
    *batch, length, head_size = max(map(dimensions, kernel.operands), key=math.prod)
    scores = math.prod(batch) * length**2 / 2
    cycles = chip.attention_cycles(scores, head_size, PRODUCTS[words[0]]) / chip.cores
    return cycles / KERNEL_EFFICIENCY / chip.clock


@dataclass(frozen=True)
class Network:
    """The links between the devices of a mesh."""

    topology: Topology
    mesh: dict[str, int]
    places: np.ndarray
    """Slice and chip coordinates of each device, int [devices, 4], in the order of the mesh."""

    def seconds(self, collective: hlo.Collective) -> float:
        """Time of a collective that has its links to itself."""
        chip = self.topology.generation
        link = LINK_EFFICIENCY * chip.link_bytes_per_second / chip.devices_per_chip
        places = self.places[np.array(collective.groups)]
        if collective.kind == "collective-permute":
            if (places[:, 0, 0] != places[:, 1, 0]).any():
                return collective.size / chip.dcn_bytes_per_second
            return collective.size / link
        slices = len(np.unique(places[0, :, 0]))
        group = collective.group_size // slices
        passes = 2.0 if collective.kind == "all-reduce" else 1.0
        if "all-to-all" in collective.kind:
            passes = group / 4  # of its own part only, a quarter of the ring on the average
        seconds = 0.0
        if group > 1:
            links = self._links(places[0][places[0, :, 0] == places[0, 0, 0], 1:])
            seconds += passes * collective.size * (1 - 1 / group) / (links * link)
        if slices > 1:
            part = collective.size / group
            seconds += passes * part * (1 - 1 / slices) / chip.dcn_bytes_per_second
        return seconds

    def _links(self, places: np.ndarray) -> int:
        """Links over which a device takes part in a collective of the chips at those places: two
        along every side of the torus that they span, one where the side is open."""
        sides = self.topology.sides
        extents = [len(np.unique(column)) for column in places.T]
        closed = [
            all(s % 4 == 0 for s in sides) if len(sides) == 3 else side == 16 for side in sides
        ]
        links = [
            2 if wraps and extent == side else 1
            for extent, side, wraps in zip(extents, sides, closed, strict=False)
            if extent > 1
        ]
        return sum(links) or 6  # halves of one chip: the link between them is six times as fast


def device_places(mesh: Mesh) -> np.ndarray:
    """Slice and chip coordinates of a mesh's TPU devices, int [devices, 4]."""
    return np.array(
        [(getattr(device, "slice_index", 0), *device.coords) for device in mesh.devices.flat]
    )


@dataclass(frozen=True)
class Times:
    """Seconds of a step, estimated."""

    compute: float = 0.0
    """Operations and kernels, as the compiler's cycles say."""
    kernels: float = 0.0
    """Part of it that Pallas kernels take."""
    memory: float = 0.0
    """What operations take beyond that, for their bytes have to pass HBM."""
    synchronous: float = 0.0
    """Collectives during which nothing else runs."""
    asynchronous: float = 0.0
    """Collectives that run beside computation, hidden or not."""
    host: float = 0.0
    """Copies to and from the memory of the host, which run beside the rest."""
    waiting: float = 0.0
    """For asynchronous collectives and copies that computation did not cover."""

    def __add__(self, other: "Times") -> "Times":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Times(*(one + another for one, another in pairs))

    def __mul__(self, trips: float) -> "Times":
        return Times(*(trips * seconds for seconds in dataclasses.astuple(self)))

    @property
    def step(self) -> float:
        """Everything along the schedule."""
        return self.compute + self.memory + self.synchronous + self.waiting

    @property
    def exposed(self) -> float:
        """Computation and synchronous collectives, asynchronous ones taken as free unless they are
        longer than the rest."""
        return max(self.compute + self.synchronous, self.asynchronous)


def estimate(
    program: hlo.Loop,
    network: Network,
    kernel_seconds: Callable[[hlo.Kernel, Generation], float] = attention_seconds,
) -> Times:
    """Seconds of one run of a program, walking along its schedule."""
    chip = network.topology.generation
    spent = Times()
    busy: dict[object, float] = {}  # until when links are taken
    done: dict[str, float] = {}  # when asynchronous collectives and copies are through
    for event in program.events:
        now = spent.step
        match event:
            case hlo.Operation():
                seconds = event.cycles / chip.clock
                memory = event.hbm_bytes / chip.hbm_bytes_per_second
                if event.opcode.endswith("-start"):
                    memory = 0.0  # a prefetch runs beside the rest
                spent += Times(compute=seconds, memory=max(0.0, memory - seconds))
            case hlo.Kernel():
                seconds = kernel_seconds(event, chip)
                spent += Times(compute=seconds, kernels=seconds)
            case hlo.Loop():
                spent += estimate(event, network, kernel_seconds)
            case hlo.Transfer():
                seconds = event.size / HOST_BYTES_PER_SECOND
                done[event.name] = busy["host"] = max(now, busy.get("host", 0.0)) + seconds
                spent += Times(host=seconds)
            case hlo.Collective():
                seconds = network.seconds(event)
                # Permutations in the two directions of a ring do not share links.
                permutes = event.kind == "collective-permute"
                links = event.groups if permutes else event.axes(network.mesh)
                begin = max(now, busy.get(links, 0.0))
                busy[links] = begin + seconds
                if event.how == "synchronous":
                    spent += Times(synchronous=seconds, waiting=begin - now)
                else:
                    spent += Times(asynchronous=seconds)
                    done[event.name] = begin + seconds
            case hlo.Wait():
                spent += Times(waiting=max(0.0, done.pop(event.awaited, now) - now))
    late = max(done.values(), default=0.0) - spent.step
    return (spent + Times(waiting=max(0.0, late))) * program.trips


@dataclass(frozen=True)
class Throughput:
    """What a step time means."""

    utilisation: float
    """Model FLOPs over what the devices could do: MFU."""
    tokens_per_second: float
    """Of one device."""


def throughput(seconds: float, step_flops: float, tokens: float, topology: Topology) -> Throughput:
    """Utilisation and speed of a step of that many model FLOPs and tokens on all devices."""
    chip = topology.generation
    devices = math.prod(topology.sides) * chip.devices_per_chip * topology.num_slices
    peak = devices * chip.peak_flops
    return Throughput(step_flops / (seconds * peak), tokens / (seconds * devices))
