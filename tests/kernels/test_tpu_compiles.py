"""The TPU kernels go through the TPU compiler, for chips that are not there.

It refuses what does not fit the memories of the chip. Needs libtpu, not a TPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.config import MeshConfig, replace
from glmjax.kernels.blank_attention import tpu, tpu_decode
from glmjax.model.attention import BlankMask
from glmjax.model.params import abstract_params, param_shardings
from glmjax.model.transformer import encode
from glmjax.planning.topologies import GENERATIONS, absent_mesh, compile_absent
from glmjax.presets import get_config
from glmjax.sharding import partition

pytestmark = pytest.mark.tpu

HEADS = 4
every_generation = pytest.mark.parametrize("generation", GENERATIONS)


def gradients(dropout, q, k, v, d_out, k_start, k_end, seeds):
    def attend(q, k, v):
        return tpu.attend(q, k, v, k_start, k_end, seeds, dropout)

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)


def compile_passes(generation, cases, dropout=0.0):
    """Temporary bytes of both passes together, for cases of (length, head size, type)."""
    mesh = absent_mesh(generation)
    array = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    temporaries = []
    for length, head_size, dtype in cases:
        arrays = [array((1, length, HEADS, head_size), dtype)] * 4
        bounds = [array((1, length), jnp.int32)] * 2
        with jax.set_mesh(mesh):
            compiled = (
                jax.jit(partial(gradients, dropout))
                .lower(*arrays, *bounds, array((1, HEADS, 2), jnp.int32))
                .compile()
            )
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    return temporaries


@every_generation
def test_both_passes_take_memory_linear_in_length(generation):
    lengths = [2048, 8192, 32768]
    cases = [(length, 128, "bfloat16") for length in lengths]
    for length, bytes in zip(
        lengths, compile_absent(compile_passes, generation, cases), strict=True
    ):
        # At most eight float32 arrays of the size of q; the scores of one head of 2048 tokens alone
        # are four.
        assert bytes <= 8 * 4 * HEADS * length * 128


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_head_sizes_types_and_ragged_lengths(generation):
    cases = [(1024, size, "bfloat16") for size in (64, 80, 96)]
    cases += [(1, 64, "bfloat16"), (1100, 128, "bfloat16"), (600, 80, "float32")]
    assert len(compile_absent(compile_passes, generation, cases)) == len(cases)


@pytest.mark.parametrize("generation", ["v5p", "v6e"])
def test_dropout(generation):
    compile_absent(compile_passes, generation, [(2048, 128, "bfloat16")], 0.1)


def compile_decode(generation, cases, heads=32, queries=1):
    """Temporary bytes of decode attention, for cases of (cache size, head size, cache type)."""
    mesh = absent_mesh(generation)
    array = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    temporaries = []
    for size, head_size, dtype in cases:
        cache = array((2, 4, heads, size, head_size), dtype)
        scales = [array((2, 4, heads, size), jnp.float32)] * 2 if dtype == "int8" else [None, None]
        q_dtype = "float32" if dtype == "float32" else "bfloat16"
        q_BTHK = array((4, queries, heads, head_size), q_dtype)
        bounds = [array((4, queries), jnp.int32)] * 2
        with jax.set_mesh(mesh):
            compiled = (
                jax.jit(tpu_decode.attend_cache)
                .lower(q_BTHK, cache, cache, array((), jnp.int32), *bounds, *scales)
                .compile()
            )
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    return temporaries


@every_generation
def test_decoding_copies_no_cache(generation):
    cases = [
        (size, 128, dtype) for size in (2048, 32768) for dtype in ("bfloat16", "float32", "int8")
    ]
    for bytes in compile_absent(compile_decode, generation, cases):
        # One layer of the smallest cache is 4 x 32 x 2048 x 128 bytes.
        assert bytes < 4 * 32 * 2048 * 128 / 4


@pytest.mark.parametrize("queries", [16, 128], ids=["one-token", "eight-tokens"])
def test_decoding_with_shared_keys_copies_no_cache(queries):
    """ChatGLM2-6B and GLM-4-9B: sixteen heads of queries share a head of keys."""
    cases = [(32768, 128, dtype) for dtype in ("bfloat16", "float32", "int8")]
    for bytes in compile_absent(partial(compile_decode, heads=2, queries=queries), "v5p", cases):
        assert bytes < 4 * 2 * 32768 * 128 / 4


def compile_training(generation):
    """The program of one model's gradients on four chips, as text."""
    mesh = absent_mesh(generation, MeshConfig(data=1, fsdp=2, tensor=2))
    config = replace(
        get_config("glm-base"), num_layers=2, dtype="bfloat16", max_positions=1024, remat="block"
    )
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_params(config), param_shardings(config, mesh),
    )  # fmt: skip
    rows = NamedSharding(mesh, partition(("batch", "length"), mesh))
    row = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=rows)
    positions = jax.ShapeDtypeStruct((4, 2, 1024), jnp.int32, sharding=rows)

    def loss(params, tokens, positions, k_start, k_end, key):
        mask = BlankMask(k_start, k_end)
        return encode(config, params, tokens, positions, mask, key).astype(jnp.float32).sum()

    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        return (
            jax.jit(jax.grad(loss)).lower(params, row, positions, row, row, key).compile().as_text()
        )


def test_the_model_trains_with_the_kernels_on_a_mesh():
    """Four chips: rows over two, heads over two; each gets its own part of rows and heads."""
    program = compile_absent(compile_training, "v5p")
    assert "blank_attention_forward" in program and "blank_attention_backward" in program
    # 4 rows and 12 heads, over two chips each.
    assert "bf16[2,6,1024,64]" in program and "bf16[4,12,1024,64]" not in program
