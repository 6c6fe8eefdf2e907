"""What serving takes of the memory of chips that are not there, and the time of a token on them.

Every figure comes from programs compiled ahead of time (`planning/programs.py`): the step that decodes
a token for every row, and the one that feeds a prompt as long as the cache beside those rows. Memory
is what the compilers laid out; times are estimates of the roofline model. For GPUs there is memory
alone. Nothing is run. `glmjax bench serving` writes `experiments/results/serving.json` and a table in
`docs/inference.md`.
"""

import datetime
import importlib.metadata
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies

from glmjax.benchmarks.document import fill
from glmjax.config import Experiment, MeshConfig, ObjectiveConfig, Quantization
from glmjax.data.cache import write_whole
from glmjax.planning.arrange import arrange
from glmjax.planning.plan import plan
from glmjax.planning.programs import Serving, trace_decode_step, trace_join
from glmjax.planning.topologies import Topology
from glmjax.presets import get_config
from glmjax.sharding import make_mesh

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "experiments/results/serving.json", ROOT / "docs/inference.md"
BEGIN, END = "<!-- written by glmjax bench serving -->", "<!-- end of bench serving -->"
GIB = 2**30

H200 = "H200"
H200_BYTES = 150_754_820_096
"""Memory of an NVIDIA H200 SXM, called 141 GB."""
H200_TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {H200_BYTES}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  name: "NVIDIA H200" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA H200"
"""
"""What XLA compiles for, as it describes a device (`xla/stream_executor/device_description.proto`)."""


@dataclass(frozen=True)
class Case:
    """A model as it is served."""

    model: str
    device: str
    """A slice of TPUs, or H200."""
    weights: Literal["bfloat16", "int8", "int4"]
    rows: int
    length: int = 2048


CASES = (
    *(
        Case("chatglm-6b", "v5e:1x1", weights, rows)
        for rows in (1, 8) for weights in ("bfloat16", "int8", "int4")
    ),
    *(
        Case("glm-130b", device, weights, rows)
        for device in ("v5e:2x4", "v6e:2x4", "v5p:2x2x2", H200)
        for weights in ("bfloat16", "int4") for rows in (1, 8)
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What one device needs. Bytes; seconds are estimates, None where there are none."""

    case: Case
    devices: int
    available: int
    weights_and_cache: int
    decode: int
    """To decode, weights and cache included."""
    prefill: int
    """To feed a prompt beside the rows, weights and cache included."""
    token_seconds: float | None
    least_seconds: float | None
    """To read weights and cache once."""

    @property
    def needed(self) -> int:
        return max(self.decode, self.prefill)


def run() -> dict[str, Any]:
    """Compiles every case and writes the results and the table.

    Raises:
        ModuleNotFoundError: libtpu or jax's CUDA plugin is not installed.
    """
    found = [measure(case) for case in CASES]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    versions["jax-cuda13-plugin"] = importlib.metadata.version("jax-cuda13-plugin")
    results = {
        "date": datetime.date.today().isoformat(), "versions": versions,
        "cases": [asdict(each) | {"needed": each.needed} for each in found],
    }  # fmt: skip
    write_whole(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    fill(DOCUMENT, BEGIN, END, f"\n{table(results)}")
    return results


def show(results: Mapping[str, Any]) -> None:
    """Prints the table."""
    print(table(results))


def measure(case: Case) -> Found:
    """What a case needs, from its two programs."""
    logger.info("compiling %s in %s for %s, %d rows", *asdict(case).values())
    experiment = experiment_of(case)
    if case.device == H200:
        return _measure_gpu(case, experiment)
    topology, serving = Topology(case.device), Serving(case.rows, case.length)
    experiment = arrange(experiment, topology, "decode")
    decode = plan(experiment, topology, job="decode", serving=serving)
    prefill = plan(experiment, topology, job="prefill", serving=serving, memory_only=True)
    return Found(
        case, topology.num_devices, decode.hbm_bytes, decode.memory.arguments,
        decode.memory.needed, prefill.memory.needed,
        None if decode.estimate is None else decode.estimate.seconds,
        decode.least_seconds if decode.fits else None,
    )  # fmt: skip


def experiment_of(case: Case) -> Experiment:
    """The model in an experiment for a mesh of one device."""
    integers = {"bfloat16": None, "int8": Quantization(8), "int4": Quantization(4)}
    model = get_config(case.model, dtype="bfloat16", quantization=integers[case.weights])
    objective = ObjectiveConfig(positions="1d" if model.positions == "rope_1d" else "2d")
    return Experiment(model=model, objective=objective, mesh=MeshConfig(data=1))


def _measure_gpu(case: Case, experiment: Experiment) -> Found:
    if find_spec("jax_cuda13_plugin") is None:
        raise ModuleNotFoundError(
            'compiling for GPUs needs their plugin: pip install "glmjax[gpu]"'
        )
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            serving = Serving(case.rows, case.length)
            sizes = pool.submit(_compile_gpu, experiment, serving).result()
    finally:
        if before is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = before
    return Found(case, 1, H200_BYTES, *sizes, None, None)


def _compile_gpu(experiment: Experiment, serving: Serving) -> tuple[int, int, int]:
    """Bytes of the arguments, and needed by the two programs, from XLA without autotuning."""
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H200_TARGET
    ).devices
    mesh = make_mesh(experiment.mesh, devices)

    def memory(trace: Callable[..., jax.stages.Traced]) -> Any:
        return trace(experiment.model, mesh, serving).lower().compile().memory_analysis()

    decode, prefill = memory(trace_decode_step), memory(trace_join)
    # Results that take the place of arguments need none of their own.
    needed = [
        each.argument_size_in_bytes + each.temp_size_in_bytes
        + each.output_size_in_bytes - each.alias_size_in_bytes
        for each in (decode, prefill)
    ]  # fmt: skip
    return decode.argument_size_in_bytes, needed[0], needed[1]


COLUMNS = (
    "model", "weights", "device", "rows", "weights and cache, GiB", "to decode", "with a prompt",
    "there are", "a token", "at least",
)  # fmt: skip


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"Made by `glmjax bench serving` on {results['date']} with {versions}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for each in results["cases"]:
        case = each["case"]
        device = case["device"] if each["devices"] == 1 else f"{case['device']} (8 chips)"
        sizes = [f"{each[name] / GIB:.2f}" for name in ("weights_and_cache", "decode", "prefill")]
        if each["needed"] > each["available"]:
            sizes[-1] = f"{sizes[-1]}, **does not fit**"
        times = [
            "" if each[name] is None else f"{each[name] * 1e3:.1f} ms"
            for name in ("token_seconds", "least_seconds")
        ]
        cells = [case["model"], case["weights"], device, str(case["rows"]), *sizes,
                 f"{each['available'] / GIB:.2f}", *times]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
