"""Products with integer weights go through the TPU compiler, for chips that are not there: no copy of
the weights as floats exists. Needs libtpu, not a TPU."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.kernels.quantized_matmul import xla
from glmjax.planning.topologies import GENERATIONS, absent_mesh, compile_absent

pytestmark = pytest.mark.tpu

INPUTS, OUTPUTS = 2048, 4096
ROWS = (8, 32, 128, 256)
SCHEMES = {"absmax": (1, False), "zeropoint": (1, True), "groups": (INPUTS // 128, False)}


def compile_products(generation, dtype, scheme):
    """For each number of rows: temporary bytes and the program's text."""
    mesh = absent_mesh(generation)
    array = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    groups, has_zero = SCHEMES[scheme]
    values = array((OUTPUTS, INPUTS), dtype)
    scale = array((groups, OUTPUTS), jnp.float16)
    zero = array((groups, OUTPUTS), jnp.float32) if has_zero else None
    found = []
    for rows in ROWS:
        x = array((rows, 1, INPUTS), jnp.bfloat16)
        with jax.set_mesh(mesh):
            program = jax.jit(partial(xla.multiply, "btd,fd->btf"))
            compiled = program.lower(x, values, scale, zero).compile()
        found.append((compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()))
    return found


def largest_float(program: str) -> int:
    """Elements of the largest array of floats that a program keeps in a memory: results of
    instructions outside fusions."""
    entry = program[program.index("\nENTRY") :]
    types = re.findall(r"= \(?((?:bf16|f16|f32)\[[\d,]*\])", entry)
    return max(math.prod(int(n) for n in re.findall(r"\d+", t.partition("[")[2])) for t in types)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_weights_are_converted_inside_the_product(generation, dtype, scheme):
    programs = compile_absent(compile_products, generation, dtype, scheme)
    for rows, (bytes, text) in zip(ROWS, programs, strict=True):
        assert largest_float(text) <= max(rows * OUTPUTS, SCHEMES[scheme][0] * OUTPUTS)
        # Less than the integers of the weights, packed: what there is belongs to the rows.
        assert bytes < INPUTS * OUTPUTS / 4
