"""The programs of a running batch, compiled and as text, for tests that read them."""

import dataclasses
import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.config import MeshConfig
from glmjax.inference import slots
from glmjax.inference.generate import as_batch
from glmjax.inference.prompts import Row
from glmjax.inference.sampling import Sampling, per_row
from glmjax.model.attention import CACHE_AXES
from glmjax.planning.programs import serving_params
from glmjax.planning.topologies import absent_mesh
from glmjax.sharding import named_sharding

NUM_SLOTS, LENGTH = 8, 2048


def compile_for_tpu(generation, config, sizes=(1, 1, 1)):
    """`lower_all` for an absent mesh of TPUs, compiled: for each program what `facts` says."""
    mesh = absent_mesh(generation, MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        lowered = lower_all(config, serving_params(config), mesh)
        return {name: facts(low.compile()) for name, low in lowered.items()}


def lower_all(config, params, mesh=None, prompt=512):
    """The programs of `step` and `insert`, lowered for parameters and slots without values."""
    sampling = per_row([Sampling()] * NUM_SLOTS)
    empty = jax.eval_shape(
        lambda params, sampling: slots._empty(config, params, sampling, NUM_SLOTS, LENGTH, 1),
        params, sampling,
    )  # fmt: skip

    def place(leaf, axes=()):
        if mesh is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        sharding = NamedSharding(mesh, PartitionSpec())
        if axes:
            sharding = named_sharding(mesh, axes, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    decoding = jax.tree.map(place, empty)
    cache = jax.tree.map(
        lambda leaf: place(leaf, CACHE_AXES[: leaf.ndim] if leaf.ndim > 1 else ()), empty.cache
    )
    decoding = dataclasses.replace(decoding, cache=cache)
    positions_2T = np.zeros((2, prompt), np.int32)
    row = Row([0] * prompt, positions_2T, 9, 0, positions_2T[:, :1].T, np.zeros(1, np.int32))
    batch = as_batch([row], [8], [(0, 0)], 1, prompt, 1)
    return {
        "step": slots._run.lower(
            config, params, decoding, np.ones(NUM_SLOTS, bool), np.int32(8)
        ),
        "insert": slots._insert.lower(
            config, params, decoding, np.int32(3), batch, per_row([Sampling()])
        ),
    }  # fmt: skip


def facts(compiled):
    """Its text, temporary bytes and bytes of arguments whose memory it gives to results."""
    memory = compiled.memory_analysis()
    return compiled.as_text(), memory.temp_size_in_bytes, memory.alias_size_in_bytes


def copies(program, elements):
    """Instructions of a compiled program that make an array of so many elements anew: copies,
    transposes, conversions and gathers that stand alone or in a fusion."""
    made = re.compile(
        r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|convert|all-gather|all-to-all|copy-start)\("
    )
    return [
        line.strip()
        for line in program.splitlines()
        for match in made.finditer(line)
        if np.prod([int(size) for size in match[1].split(",")]) >= elements
    ]
