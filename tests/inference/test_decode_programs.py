"""What the compiler makes of decoding: nothing copies the cache, and prompts take memory linear in
their length."""

import math
import re

import jax
import numpy as np
import pytest
from decode_programs import LENGTH, NUM_SLOTS, compile_for_tpu, copies, facts, lower_all

from glmjax.config import MeshConfig
from glmjax.model.params import abstract_params, param_shardings
from glmjax.planning.topologies import GENERATIONS, compile_absent
from glmjax.presets import get_config
from glmjax.sharding import make_mesh


@pytest.fixture
def optimised():
    """Programs compiled as users compile them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def cache_elements(config, parts=1):
    """Numbers of one layer's keys that a device has."""
    return NUM_SLOTS * config.kv_heads * LENGTH * config.head_size // parts


def check_cache_stays(config, programs, parts=1):
    """Each program writes into the arrays that it is given, and makes nothing of a layer's size."""
    layer = cache_elements(config, parts)
    bytes = np.dtype(config.cache_dtype or config.dtype).itemsize
    for _, temporaries, aliased in programs.values():
        assert aliased >= 2 * config.num_layers * layer * bytes
        assert temporaries < layer * bytes
    assert copies(programs["step"][0], layer) == []


@pytest.mark.parametrize("cache_dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_steps_on_a_cpu_leave_the_cache_where_it_is(optimised, cache_dtype):
    config = get_config("chatglm-tiny", cache_dtype=cache_dtype)
    lowered = lower_all(config, abstract_params(config), prompt=64)
    check_cache_stays(config, {name: facts(low.compile()) for name, low in lowered.items()})


@pytest.mark.slow
def test_devices_keep_their_parts_of_the_cache(optimised):
    config, mesh = get_config("chatglm-tiny"), make_mesh(MeshConfig(2, 2, 2))
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_params(config), param_shardings(config, mesh),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        lowered = lower_all(config, params, mesh, prompt=64)
        check_cache_stays(config, {name: facts(low.compile()) for name, low in lowered.items()}, 8)


@pytest.mark.slow
def test_prompts_hold_no_pairs_of_tokens(optimised):
    """Neither scores of all pairs of tokens nor those of every token over the vocabulary exist."""
    config = get_config("chatglm-tiny", vocab_size=2 * LENGTH)
    lowered = lower_all(config, abstract_params(config), prompt=LENGTH)
    program, temporaries, _ = facts(lowered["insert"].compile())
    arrays = re.findall(r"\w+\[([\d,]+)\]", program)
    largest = max(math.prod(map(int, sizes.split(","))) for sizes in arrays)
    assert largest == config.num_layers * cache_elements(config) < LENGTH**2
    assert temporaries < 4 * LENGTH**2


# For tpu7x libtpu lays every bfloat16 stack of weights out anew, once before the loop of steps.
COPIES_STACKS = pytest.mark.xfail(strict=True, reason="libtpu copies stacks of weights for tpu7x")


@pytest.mark.tpu
@pytest.mark.parametrize(
    "generation",
    [pytest.param(name, marks=[COPIES_STACKS] * (name == "tpu7x")) for name in GENERATIONS],
)
def test_steps_on_a_tpu_leave_the_cache_where_it_is(generation):
    for cache_dtype in ("bfloat16", "int8"):
        config = get_config(
            "chatglm-6b", num_layers=2, ffn_size=1024, dtype="bfloat16",
            cache_dtype=cache_dtype,
        )  # fmt: skip
        check_cache_stays(config, compile_absent(compile_for_tpu, generation, config))


@pytest.mark.tpu
def test_tpus_keep_their_parts_of_the_cache():
    config = get_config("chatglm-6b", num_layers=2, ffn_size=1024, dtype="bfloat16")
    programs = compile_absent(compile_for_tpu, "v5e", config, (2, 1, 2))
    check_cache_stays(config, programs, parts=4)
