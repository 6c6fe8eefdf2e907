"""The programs of a job, traced and compiled for chips that are not there.

Every compilation has a process of its own, so that libtpu never starts in this one. XLA writes down
the schedule and the memory of a program seconds after it is started, long before its code is ready;
whoever only asks whether it fits need not wait for the rest.
"""

import importlib.metadata
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glmjax.config import Experiment, GLMConfig
from glmjax.model.attention import CACHE_AXES, KVCache
from glmjax.model.params import (
    Params,
    abstract_params,
    decoding_arrangement,
    leaf_name,
    param_shardings,
)
from glmjax.model.transformer import decode_step, prefill
from glmjax.planning.flops import count_flops, loop_rounds
from glmjax.planning.memory import Memory, read_memory
from glmjax.planning.roofline import device_places
from glmjax.planning.topologies import (
    Topology,
    absent_devices,
    absent_environment,
    require_libtpu,
)
from glmjax.sharding import make_mesh, named_sharding, num_parts, per_device
from glmjax.training.compiler_options import options_for
from glmjax.training.step import trace_train_step

Job = Literal["train", "decode", "prefill"]
"""train: an optimizer step. decode: a token for every row of a running batch. prefill: a prompt that
joins them."""


@dataclass(frozen=True)
class Serving:
    """How a model is served."""

    batch: int = 32
    """Rows that are decoded together."""
    length: int = 2048
    """Tokens that the cache of a row holds."""
    prompt: int | None = None
    """Tokens of the longest prompt; None: as many as the cache holds."""

    def __post_init__(self) -> None:
        for name in ("batch", "length", "prompt_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.prompt_length > self.length:
            raise ValueError(
                f"a prompt of {self.prompt} tokens does not fit a cache of {self.length}"
            )

    @property
    def prompt_length(self) -> int:
        return self.length if self.prompt is None else self.prompt


@dataclass(frozen=True)
class Program:
    """What is known of a compiled program."""

    flops: float
    """Of one run on all devices, counted over the traced program."""
    loop_rounds: Mapping[str, float]
    """How often its loops of unknown length run, by function."""
    places: list[list[int]]
    """Slice and chip coordinates of each device, in the order of the mesh."""
    memory: Memory
    fits: bool
    """Whether libtpu accepts it."""
    text: str | None
    """Its scheduled HLO with the compiler's cycles, for `hlo.read_program`; None if it was refused,
    or stopped as soon as its memory was known."""
    seconds: float
    """That it took to trace and compile."""


def versions() -> dict[str, str]:
    """The packages that decide what a program compiles to.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
    """
    require_libtpu()
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def compile_program(
    experiment: Experiment,
    topology: Topology,
    job: Job = "train",
    serving: Serving = Serving(),
    *,
    memory_only: bool = False,
) -> Program:
    """Compiles the step of a job for absent chips.

    With `memory_only` it stops when the memory is known, in seconds rather than minutes.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
        ValueError: the mesh does not fit the topology, or an axis does not divide an array.
        RuntimeError: libtpu cannot compile the program, for another reason than device memory.
    """
    start = time.monotonic()
    module = {"train": "jit_train_step", "decode": "jit_decode_step", "prefill": "jit_join"}[job]
    with tempfile.TemporaryDirectory(prefix="glmjax-plan-") as name:
        folder = Path(name)
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={module}$"
        problem = _compile_elsewhere(
            {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()},
            (experiment, topology, job, serving, folder),
            folder / f"**/*{module}*after_buffer_assignment*" if memory_only else None,
        )
        refused = problem is not None and bool(re.search(r"memory on HBM|space hbm", problem))
        if problem is not None and not refused:
            raise RuntimeError(problem)
        traced = json.loads((folder / "traced.json").read_text())
        memory = read_memory(folder, module)
        is_whole = not refused and not memory_only
        text = (folder / "program.txt").read_text() if is_whole else None
    return Program(**traced, memory=memory, fits=not refused, text=text,
                   seconds=time.monotonic() - start)  # fmt: skip


def _compile_elsewhere(
    variables: Mapping[str, str], arguments: tuple[Any, ...], enough: Path | None
) -> str | None:
    """Runs `_compile` in a process of its own, until a file appears; the reason of a failure."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compile, args=(sender, *arguments))
    with absent_environment(**variables):
        process.start()
    sender.close()
    try:
        while not receiver.poll(0.1):
            if enough is not None and any(enough.parents[1].glob(enough.name)):
                return None
        problem = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process that compiles ended with status {process.exitcode}"
        ) from None
    finally:
        process.terminate()
        process.join()
    if isinstance(problem, ValueError):
        raise problem
    return problem


def _compile(
    sender: Connection,
    experiment: Experiment,
    topology: Topology,
    job: Job,
    serving: Serving,
    folder: Path,
) -> None:
    """Traces and compiles; sends None, a ValueError, or what libtpu says when it refuses."""
    # libtpu logs to standard error what is of no interest here.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        mesh = make_mesh(experiment.mesh, absent_devices(topology.name, topology.num_slices))
        if job == "train":
            traced = trace_train_step(experiment, mesh)
            options = options_for(mesh.devices.flat[0].device_kind)
        else:
            trace = {"decode": trace_decode_step, "prefill": trace_join}[job]
            traced, options = trace(experiment.model, mesh, serving), {}
        known = {
            "flops": count_flops(traced.jaxpr),
            "loop_rounds": loop_rounds(traced.jaxpr),
            "places": device_places(mesh).tolist(),
        }
        (folder / "traced.json").write_text(json.dumps(known))
        compiled = traced.lower().compile(compiler_options=options)
        (folder / "program.txt").write_text(compiled.as_text())
    except ValueError as error:
        sender.send(ValueError(str(error)))
    except RuntimeError as error:
        sender.send(str(error))
    else:
        sender.send(None)


def trace_decode_step(config: GLMConfig, mesh: Mesh, serving: Serving) -> jax.stages.Traced:
    """The step that gives the scores of one token for every row."""
    with jax.set_mesh(mesh):
        step = jax.jit(decode_step, static_argnums=0, donate_argnums=2)
        return step.trace(
            config, serving_params(config), serving_cache(config, serving),
            _integers((serving.batch, 1), "batch", "length"),
            _integers((serving.batch, 2, 1), "batch", "qkv", "length"),
        )  # fmt: skip


def trace_join(config: GLMConfig, mesh: Mesh, serving: Serving) -> jax.stages.Traced:
    """The step that feeds a prompt, one for each part of the mesh that has rows of its own."""
    with jax.set_mesh(mesh):
        prompts, length = num_parts("batch"), serving.prompt_length
        row_B = _integers((prompts,), "batch")
        step = jax.jit(join, static_argnums=0, donate_argnums=2)
        return step.trace(
            config, serving_params(config), serving_cache(config, serving),
            _integers((prompts, length), "batch", "length"),
            _integers((prompts, 2, length), "batch", "qkv", "length"), row_B, row_B,
        )  # fmt: skip


def join(
    config: GLMConfig,
    params: Params,
    cache: KVCache,
    tokens_BT: jax.Array,
    positions_B2T: jax.Array,
    context_B: jax.Array,
    length_B: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """`prefill` into a cache of its own, whose keys and values then replace those of the first rows
    of a running batch: what `glmjax.inference.slots` does for one slot."""
    own = KVCache.empty(config, *tokens_BT.shape)
    logits_BV, own = prefill(config, params, own, tokens_BT, positions_B2T, context_B, length_B)

    def put(rows_NBHS: jax.Array, own_NBHS: jax.Array) -> jax.Array:
        axes = CACHE_AXES[: rows_NBHS.ndim]
        start = [0] * rows_NBHS.ndim
        update = per_device(
            lambda x, y: jax.lax.dynamic_update_slice(x, y, start), (axes, axes), axes
        )
        return update(rows_NBHS, own_NBHS)

    keys_values = jax.tree.map(put, *(replace(x, length_B=None) for x in (cache, own)))
    return logits_BV, replace(keys_values, length_B=cache.length_B)


def serving_params(config: GLMConfig) -> Params:
    """The parameters as `glmjax.load(..., for_decoding=True)` has them on the ambient mesh: floats
    in the type of the products."""
    mesh, arrangement = jax.sharding.get_mesh(), decoding_arrangement()

    def array(
        path: Any, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
    ) -> jax.ShapeDtypeStruct:
        # Zero-points stay in float32.
        casts = leaf.dtype == jnp.float32 and not leaf_name(path).endswith(".zero")
        dtype = config.dtype if casts else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(
        array, abstract_params(config, arrangement), param_shardings(config, mesh, arrangement)
    )


def serving_cache(config: GLMConfig, serving: Serving) -> KVCache:
    """The cache of a running batch on the ambient mesh."""
    cache = jax.eval_shape(lambda: KVCache.empty(config, serving.batch, serving.length))

    def array(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = CACHE_AXES[: leaf.ndim] if leaf.ndim > 1 else ("batch",)
        sharding = named_sharding(jax.sharding.get_mesh(), axes, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(array, cache)


def _integers(shape: tuple[int, ...], *axes: str) -> jax.ShapeDtypeStruct:
    sharding = named_sharding(jax.sharding.get_mesh(), axes, shape)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
