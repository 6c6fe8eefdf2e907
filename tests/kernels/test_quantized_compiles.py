"""Products with weights go through the TPU compiler, for chips that are not there: no copy of integers
as floats exists, and a layer is read out of its stack in place. Needs libtpu, not a TPU."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.config import Quantization, replace
from glmjax.kernels.quantized_matmul import xla
from glmjax.model.attention import KVCache
from glmjax.model.params import decoding_arrangement
from glmjax.model.transformer import decode_step
from glmjax.planning.programs import serving_params
from glmjax.planning.topologies import GENERATIONS, absent_mesh, compile_absent
from glmjax.presets import get_config

pytestmark = pytest.mark.tpu
every_generation = pytest.mark.parametrize("generation", GENERATIONS)

INPUTS, OUTPUTS = 512, 4096
ROWS = (1, 8, 32, 128, 256)
SCHEMES = {"absmax": (1, False), "zeropoint": (1, True), "groups of 128": (INPUTS // 128, False)}


def compile_products(generation):
    """For each kind of weights, the text of a program with a product for each number of rows, all
    with weights of their own."""
    mesh = absent_mesh(generation)
    array = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    found = {}
    for dtype in ("int8", "int4"):
        for scheme, (groups, has_zero) in SCHEMES.items():
            zero = array((groups, OUTPUTS), jnp.float32) if has_zero else None
            weights = array((OUTPUTS, INPUTS), dtype), array((groups, OUTPUTS), jnp.float16), zero
            cases = [(array((rows, 1, INPUTS), jnp.bfloat16), *weights) for rows in ROWS]

            def products(cases):
                return [xla.multiply("btd,fd->btf", *case) for case in cases]

            with jax.set_mesh(mesh):
                compiled = jax.jit(products).lower(cases).compile()
            found[dtype, scheme] = compiled.as_text()
    return found


@every_generation
def test_weights_are_converted_inside_the_product(generation):
    for kind, program in compile_absent(compile_products, generation).items():
        floats = [size for dtype, size in made(program) if dtype in ("bf16", "f16", "f32")]
        assert max(floats) == max(ROWS) * OUTPUTS < INPUTS * OUTPUTS, kind  # the largest result


KINDS = {
    "floats": None,
    "int8 zeropoint": Quantization(8, scheme="zeropoint"),
    "int4": Quantization(4),
}


def compile_steps(generation, name, rows):
    """The text of the decode step of a model for each kind of weights."""
    mesh = absent_mesh(generation)
    place = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    found = {}
    for kind, quantization in KINDS.items():
        config = replace(
            get_config(name), num_layers=2, ffn_size=2048, dtype="bfloat16",
            quantization=quantization,
        )  # fmt: skip
        with jax.set_mesh(mesh):
            assert decoding_arrangement().merged
            cache = jax.eval_shape(partial(KVCache.empty, config, rows, 256))
            compiled = (
                jax.jit(decode_step, static_argnums=0, donate_argnums=2)
                .lower(
                    config, serving_params(config),
                    jax.tree.map(lambda x: place(x.shape, x.dtype), cache),
                    place((rows, 1), jnp.int32), place((rows, 2, 1), jnp.int32),
                )
                .compile()
            )  # fmt: skip
        found[kind] = compiled.as_text()
    return found


@pytest.mark.parametrize(
    "generation, name",
    [*((generation, "chatglm-6b") for generation in GENERATIONS), ("v5p", "glm-4-9b")],
)
def test_steps_read_each_layer_in_its_stack(generation, name):
    """The smallest kernel is that of the attention output, or of keys and values that are shared."""
    config = get_config(name)
    smallest = config.hidden_size * config.head_size * min(2 * config.kv_heads, config.num_heads)
    for kind, program in compile_absent(compile_steps, generation, name, 8).items():
        sizes = [size for _, size in made(program, in_loops=True)]
        assert 8 * 2048 <= max(sizes) < smallest, kind


INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%\S+ = (.+?) ([\w-]+)\(", re.MULTILINE)
NOT_MADE = {"parameter", "get-tuple-element", "bitcast", "copy-done", "slice-done", "custom-call"}
"""What names an array that is there, brings one as it is into the memory of the chip, where a product
then reads it, or calls a kernel of ours."""


def made(program, in_loops=False):
    """Types and sizes of the arrays that a program makes: the results of instructions outside
    fusions, all or those of the bodies of loops."""
    inside = set(re.findall(r"calls=(%[\w.-]+)", program))
    bodies = set(re.findall(r"body=(%[\w.-]+)", program))
    found = []
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        name = computation.partition(" ")[0]
        if name in inside or (in_loops and name not in bodies):
            continue
        for result, operation in INSTRUCTION.findall(computation):
            if operation in NOT_MADE or (result.startswith("(") and operation != "fusion"):
                continue
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]+)\]", result):
                found.append((dtype, math.prod(map(int, sizes.split(",")))))
    return found
