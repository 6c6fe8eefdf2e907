"""TPU generations, and their chips as compilation targets on a machine that has none."""

import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

Result = TypeVar("Result")


@dataclass(frozen=True)
class Generation:
    """One TPU generation. Figures are of one core, from cloud.google.com/tpu/docs."""

    device_kind: str
    """What JAX calls its devices."""
    topology: str
    """The smallest slice that libtpu compiles for."""
    cores: int
    """Cores that one JAX device drives; Pallas splits parallel grid axes over them."""
    mxu_size: int
    """Rows and columns of a matrix unit: shorter sides of a product leave part of it idle."""
    flops_per_cycle: int
    """Of all matrix units in bfloat16."""
    delay_slots: int | None
    """Bundles that issue after a branch, read off compiled programs; None where it varies."""
    chip_config: str | None = None
    """How the cores of a chip become devices, where libtpu's default is not what jobs run on."""

    def attention_cycles(self, scores: float, head_size: int, products: int) -> float:
        """Cycles that the matrix units need for that many products of all scores of one head."""
        filled = -(-head_size // self.mxu_size) * self.mxu_size
        return scores * products * 2 * filled / self.flops_per_cycle


GENERATIONS: dict[str, Generation] = {
    "v4": Generation("TPU v4", "v4:2x2x1", 2, 128, 131_072, 1, chip_config="megacore"),
    "v5e": Generation("TPU v5 lite", "v5e:2x2", 1, 128, 131_072, 4),
    "v5p": Generation("TPU v5", "v5p:2x2x1", 2, 128, 131_072, 4),
    "v6e": Generation("TPU v6 lite", "v6e:2x2", 1, 256, 524_288, 4),
    "tpu7x": Generation("TPU7x", "tpu7x:2x2x1", 1, 256, 524_288, None),
}


def absent_mesh(generation: str, *sizes: int) -> Mesh:
    """A mesh (data, fsdp, tensor) of chips that are not there; one chip without sizes.

    Compile under `jax.set_mesh` of it, with arguments sharded on it. libtpu must not have started
    in this process for another purpose; `compile_absent` takes a new one.

    Raises:
        ValueError: there is no such generation.
    """
    if generation not in GENERATIONS:
        raise ValueError(f"no TPU generation {generation!r}; known are {', '.join(GENERATIONS)}")
    shape = sizes or (1, 1, 1)
    devices = absent_devices(GENERATIONS[generation].topology)
    return Mesh(
        np.array(devices[: math.prod(shape)]).reshape(shape),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )


def absent_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices of slices that are not there, such as v5p:4x4x8, for `glmjax.sharding.make_mesh`.

    As `absent_mesh`, for a process that libtpu has to itself.

    Raises:
        ValueError: there is no such generation or libtpu knows no such topology.
    """
    generation = topology.partition(":")[0]
    if generation not in GENERATIONS:
        raise ValueError(f"no TPU generation {generation!r}; known are {', '.join(GENERATIONS)}")
    chip = GENERATIONS[generation]
    options: dict[str, Any] = {"chip_config_name": chip.chip_config} if chip.chip_config else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def compile_absent(
    compile: Callable[..., Result], *arguments: Any, dump: Path | None = None
) -> Result:
    """What `compile(*arguments)` returns in a process where libtpu compiles without a TPU.

    Needs libtpu (`pip install "glmjax[tpu]"`). With `dump`, libtpu writes every program that it
    compiles into that folder, for `bundles.read_program`.
    """
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        # libtpu asks a metadata server where it is unless told, and wants to be alone there.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    if dump is not None:
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(compile, *arguments).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
