"""What converting and loading cost: seconds and host memory, beside the speed of the disk.

Every measurement is a process of its own, `glmjax convert` or a program that loads a model, timed
from start to end, imports included. The models are synthetic and of full width; they and what is
made of them are deleted. Each source is dropped from the page cache before it is read.
"""

import datetime
import json
import logging
import math
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from glmjax.benchmarks.document import fill
from glmjax.config import GLMConfig, replace
from glmjax.data.cache import write_whole
from glmjax.interop import torch_files
from glmjax.interop.destination import Official, create_official
from glmjax.interop.names import family_of
from glmjax.interop.official_config import official_fields
from glmjax.interop.places import find_places, tensor_shapes
from glmjax.interop.source import open_source
from glmjax.model.parts import part_specs
from glmjax.presets import get_config
from glmjax.training import checksums

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "experiments/results/convert.json", ROOT / "docs/checkpoints.md"
BEGIN, END = "<!-- written by glmjax bench convert -->", "<!-- end -->"
MEMORY = Path("/dev/shm")
"""A file system in memory: with the target there, the disk only reads."""
FIXED_BYTES = 10**9
"""Host memory that a conversion may take beside two layers."""
SHARD_GIGABYTES = 1.9
BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Step:
    """A command: converts `source` to `target` with these flags, or loads `source`. What no later
    step reads is removed after it."""

    source: str
    target: str | None = None
    flags: tuple[str, ...] = ()
    in_memory: bool = False
    """The target is in MEMORY; left out where there is no room."""
    there_and_back: bool = False
    """The target should be the first source, byte for byte."""


@dataclass(frozen=True)
class Model:
    """A synthetic model, and what is done with it in order."""

    preset: str
    num_layers: int
    num_ranks: int | None
    """Sparse files of zeros for so many ranks; None: safetensors of random numbers."""
    steps: tuple[Step, ...]

    @property
    def config(self) -> GLMConfig:
        return replace(get_config(self.preset), num_layers=self.num_layers)


INT4 = ("--quantize", "int4")
MODELS = (
    Model(
        "chatglm-6b", 28, None,
        (
            Step("hf"),
            Step("hf", "int4", INT4),
            Step("hf", "int4 in memory", INT4, in_memory=True),
            Step("hf", "glmjax in memory", in_memory=True),
            Step("hf", "glmjax"),
            Step("glmjax"),
            Step(
                "glmjax", "hf again", ("--to", "hf", "--shard-gigabytes", str(SHARD_GIGABYTES)),
                there_and_back=True,
            ),
        ),
    ),
    Model(
        "glm-130b", 8, 8,
        (
            Step("8 ranks", "glmjax"),
            Step("8 ranks", "int4", INT4),
            Step("8 ranks", "hf", ("--to", "hf")),
            Step("8 ranks", "4 ranks", ("--to", "ranks", "--ranks", "4")),
        ),
    ),
)  # fmt: skip


def run(
    folder: str = ".",
    models: Iterable[Model] = MODELS,
    probe_bytes: int = 4 * 10**9,
    results: Path = RESULTS,
    document: Path = DOCUMENT,
) -> dict[str, Any]:
    """Measures all steps in a temporary folder below `folder`, which takes 35 GB for a while; writes
    the results, and the table into the document.

    Raises:
        RuntimeError: a command failed, or ranks need PyTorch.
    """
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "cpus": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "numpy")}, "models": [],
    }  # fmt: skip
    for model in models:
        with tempfile.TemporaryDirectory(prefix="glmjax-bench-", dir=folder) as scratch:
            found["models"].append(_measure_model(model, Path(scratch), probe_bytes))
    write_whole(results, (json.dumps(found, indent=1) + "\n").encode())
    fill(document, BEGIN, END, f"\n\n{table(found)}\n\n")
    return found


def show(results: Mapping[str, Any]) -> None:
    """Prints the table."""
    print(table(results))


def table(results: Mapping[str, Any]) -> str:
    """A Markdown table of all steps."""
    header = (
        "| model | from | to | seconds (of CPUs) | reads GB/s (of the disk) | "
        "writes GB/s (of the disk) | peak host memory GB: anonymous + of files | limit GB |"
    )
    lines = [header, "|" + " --- |" * 8]
    for model in results["models"]:
        for step in model["steps"]:
            lines.append(f"| {' | '.join(_cells(model, step))} |")
    return "\n".join(lines)


def _cells(model: Mapping[str, Any], step: Mapping[str, Any]) -> Iterable[str]:
    seconds, peak = step["seconds"], step["peak"]

    def rate(bytes: int, of: float | None) -> str:
        share = "" if of is None else f" ({bytes / seconds / of:.2f}x)"
        return f"{bytes / seconds / 1e9:.2f}{share}"

    yield f"{model['model']}, {step['source_bytes'] / 1e9:.1f} GB"
    yield step["source"]
    yield step["target"] or "devices (here host memory)"
    yield f"{seconds:.1f} ({step['cpu_seconds']:.1f})"
    yield rate(step["source_bytes"], None if model["sparse"] else model["read_rate"])
    if step["target"] is None:
        peak -= step["source_bytes"]
        yield "-"
    else:
        yield rate(step["target_bytes"], None if step["in_memory"] else model["write_rate"])
    parts = f": {step['anonymous'] / 1e9:.2f} + {step['of_files'] / 1e9:.2f}"
    beside = "" if step["target"] else " beside the model"
    yield f"{peak / 1e9:.2f}{beside}{parts if step['target'] else ''}"
    yield f"{model['limit'] / 1e9:.2f}"


def memory_limit(config: GLMConfig) -> int:
    """Host memory that a conversion may take: two layers in float16 and FIXED_BYTES."""
    layer = sum(math.prod(spec.shape) for (_, n), spec in part_specs(config).items() if n == 0)
    return 2 * 2 * layer + FIXED_BYTES


def make_source(model: Model, path: Path) -> None:
    """Writes the synthetic checkpoint that the first step reads."""
    config = model.config
    family, specs = family_of(config), part_specs(config)
    if model.num_ranks is not None:
        shapes = tensor_shapes(find_places(config, family, model.num_ranks))
        tensors = {name: (shape, np.dtype(np.float16)) for name, shape in shapes.items()}
        (path / "release").mkdir(parents=True)
        for rank in range(model.num_ranks):
            file = path / "release" / f"mp_rank_{rank:02}_model_states.pt"
            torch_files.create_file(file, tensors, {})
        (path / "latest").write_text("release")
        (path / "config.json").write_text(json.dumps(official_fields(family, config, "float16")))
        return
    types = {name: "float32" if "norm" in name else "float16" for name, _ in specs}
    target = Official(path, "hf", shard_bytes=round(SHARD_GIGABYTES * 1e9))
    random = np.random.default_rng(0).standard_normal(2**20, np.float32)
    with create_official(target, config, types, source=None) as writers:
        for number, (key, write) in enumerate(writers.items()):
            block = np.roll(random, number).astype(types[key[0]])
            write(np.resize(block, specs[key].shape))


def disk_rates(file: Path, nbytes: int) -> tuple[float, float]:
    """Bytes a second that the disk reads and writes in sequence past the page cache, the better of
    two passes."""
    direct = getattr(os, "O_DIRECT", 0)
    block = mmap.mmap(-1, BLOCK_BYTES)  # at a multiple of pages, as direct transfers need it
    block.write(np.random.default_rng(0).bytes(BLOCK_BYTES))
    count = max(1, nbytes // BLOCK_BYTES)
    rates: dict[str, float] = {"read": 0.0, "write": 0.0}
    for _ in range(2):
        for name, flags in (("write", os.O_WRONLY | os.O_CREAT), ("read", os.O_RDONLY)):
            descriptor = os.open(file, flags | direct)
            start = time.perf_counter()
            for _ in range(count):
                if name == "write":
                    os.write(descriptor, block)
                else:
                    os.readv(descriptor, [block])
            if name == "write":
                os.fsync(descriptor)
            seconds = time.perf_counter() - start
            os.close(descriptor)
            rates[name] = max(rates[name], count * BLOCK_BYTES / seconds)
        file.unlink()
    return rates["read"], rates["write"]


def measure(command: list[str]) -> dict[str, float]:
    """Seconds, those of all its processors together, and peak resident bytes of a command; where the
    kernel tells, also the most that was anonymous and that was of mapped files.

    Raises:
        RuntimeError: it failed; with the last line of its errors.
    """
    largest = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                sizes = _status(process.pid)
                largest = {name: max(size, sizes.get(name, 0)) for name, size in largest.items()}
                time.sleep(0.05)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            last = (errors.read().strip() or "no message").splitlines()[-1]
            raise RuntimeError(f"{' '.join(command)} failed: {last}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        # Elsewhere than on Linux; there, what a process was forked from counts in ru_maxrss.
        "peak": largest["VmHWM"] or usage.ru_maxrss,
        "anonymous": largest["RssAnon"],
        "of_files": largest["RssFile"],
    }


def _status(pid: int) -> dict[str, int]:
    """The bytes in /proc/PID/status, empty where there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    entries = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in entries}


def _measure_model(model: Model, folder: Path, probe_bytes: int) -> dict[str, Any]:
    read_rate, write_rate = disk_rates(folder / "probe", probe_bytes)
    logger.info("the disk reads %.2f and writes %.2f GB/s", read_rate / 1e9, write_rate / 1e9)
    first = folder / model.steps[0].source
    make_source(model, first)
    sums = _checksums(first) if any(step.there_and_back for step in model.steps) else {}
    rows = []
    for number, step in enumerate(model.steps):
        needed = {later.source for later in model.steps[number + 1 :]}
        row = _measure_step(step, folder, needed, sums)
        if row is None:
            logger.info("%s has no room for %s: left out", MEMORY, step.target)
        else:
            logger.info("%s", json.dumps(row))
            rows.append(row)
        if step.source not in needed:
            shutil.rmtree(folder / step.source)
    return {
        "model": f"{model.preset}, {model.num_layers} layers", "sparse": model.num_ranks is not None,
        "read_rate": read_rate, "write_rate": write_rate, "limit": memory_limit(model.config),
        "steps": rows,
    }  # fmt: skip


def _measure_step(
    step: Step, folder: Path, needed: set[str], sums: Mapping[str, str]
) -> dict[str, Any] | None:
    """What a step took; None where there is no room for its target."""
    source = folder / step.source
    source_bytes = _model_bytes(source)
    row: dict[str, Any] = {
        "source": step.source, "target": step.target, "in_memory": step.in_memory,
        "source_bytes": source_bytes,
    }  # fmt: skip
    _drop_from_cache(source)
    if step.target is None:
        load = "import sys, jax, glmjax; jax.block_until_ready(glmjax.load(sys.argv[1])[1])"
        return row | measure([sys.executable, "-c", load, str(source)])
    if step.in_memory:
        if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < 1.2 * source_bytes:
            return None
        folder = Path(tempfile.mkdtemp(prefix="glmjax-bench-", dir=MEMORY))
    target = folder / step.target
    try:
        command = [sys.executable, "-m", "glmjax", "convert", str(source), str(target), *step.flags]
        row |= measure(command)
        files = [file for file in target.rglob("*") if file.is_file()]
        row["target_bytes"] = sum(file.stat().st_size for file in files)
        if step.there_and_back:
            row["identical"] = _checksums(target) == sums
    finally:
        if step.in_memory:
            shutil.rmtree(folder)
        elif step.target not in needed:
            shutil.rmtree(target, ignore_errors=True)
    return row


def _model_bytes(path: Path) -> int:
    """Size of a model, a tied output layer counted once."""
    parts = open_source(path).parts.values()
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)


def _checksums(folder: Path) -> dict[str, str]:
    return {file.name: checksums.of_file(epath.Path(file)) for file in folder.iterdir()}


def _drop_from_cache(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and sys.platform == "linux":
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
