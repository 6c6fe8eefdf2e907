"""TPU generations, and their chips as compilation targets on a machine that has none."""

import dataclasses
import itertools
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from glmjax.config import MeshConfig
from glmjax.sharding import make_mesh
from glmjax.training.metrics import PEAK_FLOPS

ONE_DEVICE = MeshConfig(data=1)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Generation:
    """One TPU generation, from cloud.google.com/tpu/docs unless a field says otherwise.

    A device is what JAX calls one: a chip, for tpu7x half a chip.
    """

    device_kind: str
    """What JAX calls its devices."""
    topology: str
    """The smallest slice that libtpu compiles for."""
    most_chips: int
    """Chips of a pod, which is the largest slice."""
    devices_per_chip: int
    cores: int
    """Cores that one device drives; Pallas splits parallel grid axes over them."""
    mxu_size: int
    """Rows and columns of a matrix unit: shorter sides of a product leave part of it idle."""
    flops_per_cycle: int
    """Of all matrix units of a core in bfloat16."""
    delay_slots: int | None
    """Bundles that issue after a branch, read off compiled programs; None where it varies."""
    hbm_bytes: int
    """Memory of a device that a program may use: what libtpu says when it refuses a larger one."""
    hbm_bytes_per_second: float
    """Of one device."""
    link_bytes_per_second: float
    """Of one link between neighbouring chips in one direction: half the data sheet's bidirectional
    bandwidth of a chip over its links; v4's is in Jouppi et al. 2023, table 4."""
    dcn_bytes_per_second: float
    """Of one device to other slices; not published for v4, for which v5p's is taken."""
    chip_config: str | None = None
    """How the cores of a chip become devices, where libtpu's default is not what jobs run on."""

    @property
    def torus_axes(self) -> int:
        """Dimensions of its torus; a chip has two links along each."""
        return self.topology.partition(":")[2].count("x") + 1

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s of one device."""
        return PEAK_FLOPS[self.device_kind]

    @property
    def clock(self) -> float:
        """Cycles per second that the peak implies."""
        return self.peak_flops / (self.flops_per_cycle * self.cores)

    def attention_cycles(self, scores: float, head_size: int, products: int) -> float:
        """Cycles that the matrix units need for that many products of all scores of one head."""
        filled = -(-head_size // self.mxu_size) * self.mxu_size
        return scores * products * 2 * filled / self.flops_per_cycle


def _gibibytes(number: float) -> int:
    return int(number * 2**30)


GENERATIONS: dict[str, Generation] = {
    "v4": Generation(
        "TPU v4", "v4:2x2x1", most_chips=4096, devices_per_chip=1, cores=2,
        mxu_size=128, flops_per_cycle=131_072, delay_slots=1,
        hbm_bytes=_gibibytes(30.75), hbm_bytes_per_second=1200e9,
        link_bytes_per_second=50e9, dcn_bytes_per_second=6.25e9, chip_config="megacore",
    ),
    "v5e": Generation(
        "TPU v5 lite", "v5e:2x2", most_chips=256, devices_per_chip=1, cores=1,
        mxu_size=128, flops_per_cycle=131_072, delay_slots=4,
        hbm_bytes=_gibibytes(15.75), hbm_bytes_per_second=819e9,
        link_bytes_per_second=50e9, dcn_bytes_per_second=3.1e9,
    ),
    "v5p": Generation(
        "TPU v5", "v5p:2x2x1", most_chips=8960, devices_per_chip=1, cores=2,
        mxu_size=128, flops_per_cycle=131_072, delay_slots=4,
        hbm_bytes=_gibibytes(95.73), hbm_bytes_per_second=2765e9,
        link_bytes_per_second=100e9, dcn_bytes_per_second=6.25e9,
    ),
    "v6e": Generation(
        "TPU v6 lite", "v6e:2x2", most_chips=256, devices_per_chip=1, cores=1,
        mxu_size=256, flops_per_cycle=524_288, delay_slots=4,
        hbm_bytes=_gibibytes(31.25), hbm_bytes_per_second=1638e9,
        link_bytes_per_second=100e9, dcn_bytes_per_second=12.5e9,
    ),
    "tpu7x": Generation(
        "TPU7x", "tpu7x:2x2x1", most_chips=9216, devices_per_chip=2, cores=1,
        mxu_size=256, flops_per_cycle=524_288, delay_slots=None,
        hbm_bytes=_gibibytes(94.75), hbm_bytes_per_second=3690e9,
        link_bytes_per_second=100e9, dcn_bytes_per_second=6.25e9,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """Slices of TPU chips, such as two of v5p:8x8x16."""

    name: str
    num_slices: int = 1

    def __post_init__(self) -> None:
        generation, sides = self.generation, self.sides
        if len(sides) != generation.torus_axes:
            raise ValueError(
                f"a slice of {self.family} has {generation.torus_axes} sides, such as "
                f"{generation.topology}, got {self.name!r}"
            )
        if math.prod(sides) > generation.most_chips or min(sides) < 1:
            raise ValueError(
                f"{self.name!r} is no slice of {self.family}, which has up to "
                f"{generation.most_chips} chips"
            )
        if self.num_slices < 1:
            raise ValueError(f"the number of slices must be positive, got {self.num_slices}")

    @property
    def family(self) -> str:
        """The generation's name: v5p of v5p:8x8x16."""
        return self.name.partition(":")[0]

    @property
    def generation(self) -> Generation:
        return find_generation(self.family)

    @property
    def sides(self) -> tuple[int, ...]:
        """Chips along each side of a slice."""
        sides = self.name.partition(":")[2]
        if not re.fullmatch(r"\d+(x\d+)*", sides):
            raise ValueError(f"a topology is a name such as v5p:8x8x16, got {self.name!r}")
        return tuple(map(int, sides.split("x")))

    @property
    def chips(self) -> int:
        """Of all slices together."""
        return self.num_slices * math.prod(self.sides)

    @property
    def num_devices(self) -> int:
        """JAX devices of all slices together."""
        return self.chips * self.generation.devices_per_chip

    def __str__(self) -> str:
        return f"{self.num_slices} x {self.name}" if self.num_slices > 1 else self.name


def find_generation(name: str) -> Generation:
    """The generation of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in GENERATIONS:
        raise ValueError(f"no TPU generation {name!r}; known are {', '.join(GENERATIONS)}")
    return GENERATIONS[name]


def find_topology(generation: str, chips: int) -> Topology:
    """The most compact slice of that many chips; several equal slices where one is too small.

    Sides are those that cloud.google.com/tpu/docs lists: powers of two, and in three dimensions
    multiples of four from 64 chips on.

    Raises:
        ValueError: there is no such generation, or no slices have that many chips.
    """
    chip = find_generation(generation)
    smallest = Topology(chip.topology)
    num_slices = -(-chips // chip.most_chips)
    powers, fours = (1, 2, 4, 8, 16), range(4, 29, 4)
    within, left_over = divmod(chips, max(num_slices, 1))
    sides = powers if within < 64 or chip.torus_axes == 2 else fours
    shapes = [
        shape
        for shape in itertools.combinations_with_replacement(sides, chip.torus_axes)
        if math.prod(shape) == within and shape[-2] > 1
    ]
    if left_over or within < smallest.chips or not shapes:
        raise ValueError(f"no slices of {generation} have {chips} chips together")
    best = min(shapes, key=lambda shape: shape[-1] / shape[0])
    # The smallest slice of a three-dimensional torus is written 2x2x1.
    names = sorted(best, reverse=best[0] == 1)
    return Topology(f"{generation}:{'x'.join(map(str, names))}", num_slices)


def absent_mesh(generation: str, config: MeshConfig = ONE_DEVICE) -> Mesh:
    """A mesh of chips that are not there, in the smallest slice of a generation.

    Compile under `jax.set_mesh` of it, with arguments sharded on it. libtpu must not have started
    in this process for another purpose; `compile_absent` takes a new one.

    Raises:
        ValueError: there is no such generation.
    """
    devices = absent_devices(find_generation(generation).topology)
    return make_mesh(config, devices[: math.prod(dataclasses.astuple(config))])


def absent_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices of slices that are not there, such as v5p:4x4x8, for `glmjax.sharding.make_mesh`.

    As `absent_mesh`, for a process that libtpu has to itself.

    Raises:
        ValueError: there is no such generation or no such slice.
    """
    chips = Topology(topology, num_slices)
    options: dict[str, Any] = {}
    if chips.generation.chip_config is not None:
        options["chip_config_name"] = chips.generation.chip_config
    hosts = [*(1 if side % 2 else 2 for side in chips.sides[:2]), 1]
    if hosts != [2, 2, 1]:  # what libtpu takes unless told, and so refuses single chips
        options["chips_per_host_bounds"] = hosts
    if num_slices > 1:
        options["num_slices"] = num_slices
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def compile_absent(
    compile: Callable[..., Result], *arguments: Any, dump: Path | None = None
) -> Result:
    """What `compile(*arguments)` returns in a process where libtpu compiles without a TPU.

    Needs libtpu (`pip install "glmjax[plan]"`). With `dump`, libtpu writes every program that it
    compiles into that folder, for `bundles.read_program`.
    """
    variables = {}
    if dump is not None:
        variables["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    with (
        absent_environment(**variables),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(compile, *arguments).result()


def require_libtpu() -> None:
    """Raises ModuleNotFoundError with what to install, if libtpu is not."""
    if find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            'compiling for absent TPUs needs libtpu: pip install "glmjax[plan]"'
        )


@contextmanager
def absent_environment(**variables: str) -> Iterator[None]:
    """The environment in which processes to be started compile without a TPU, and some variables.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
    """
    require_libtpu()
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        # libtpu asks a metadata server where it is unless told, and wants to be alone there.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        **variables,
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
