"""Parameter counts of the published models and the statistics of fresh parameters."""

import functools
import math

import jax
import numpy as np
import pytest

from glmjax import count_params, get_config, init, list_configs
from glmjax.model.params import Params, abstract_params, leaf_name

COUNTS = {
    "glm-base": 109_338_624,
    "glm-large": 334_688_256,
    "glm-doc": 334_688_256,
    "glm-410m": 410_265_600,
    "glm-515m": 514_632_960,
    "glm-roberta-large": 354_873_344,
    "glm-2b": 1_920_122_880,
    "glm-10b": 9_880_682_496,
    "glm-large-chinese": 355_659_776,
    "glm-10b-chinese": 9_879_633_920,
    "glm-130b": 128_697_794_560,
    "chatglm-6b": 6_173_286_400,
    "chatglm-6b-v0": 6_255_206_400,
    "chatglm2-6b": 6_243_584_000,
    "chatglm3-6b": 6_243_584_000,
    "glm-4-9b": 9_399_951_360,
}
FAMILIES = ["glm-tiny", "glm-130b-tiny", "chatglm-tiny"]
RELATIVE = "glm-4-tiny"
OWN = [*FAMILIES, "glm-5m"]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_published_models(name):
    assert count_params(get_config(name)) == COUNTS[name]


@pytest.mark.parametrize(
    "name, count", [("chatglm-6b", 6_707_929_088), ("chatglm-6b-v0", 6_871_769_088)]
)
def test_counts_with_an_output_layer_of_its_own(name, count):
    assert count_params(get_config(name, tied_embeddings=False)) == count


def test_every_preset_has_a_count():
    assert set(list_configs()) == set(COUNTS) | {*OWN, RELATIVE}


@pytest.mark.parametrize("name", OWN)
def test_counts_follow_the_formulas(name):
    config = get_config(name)
    N, D, F, V = config.num_layers, config.hidden_size, config.ffn_size, config.vocab_size
    inputs = 2 * F if config.ffn == "geglu" else F
    block = 4 * D * D + 4 * D + (D * inputs + inputs) + (F * D + D) + 4 * D
    tables = 2 * (config.max_positions + 1) * D if config.positions == "learned_2d" else 0
    assert count_params(config) == V * D + tables + N * block + 2 * D
    assert count_params(config) == sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config))
    )


@functools.cache
def fresh(name: str) -> Params:
    return init(get_config(name), jax.random.key(0))


def leaves(name: str) -> dict[str, np.ndarray]:
    pairs = jax.tree_util.tree_leaves_with_path(fresh(name))
    return {leaf_name(path): np.asarray(x) for path, x in pairs}


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_start_at_zero_and_scales_at_one(name):
    for key, array in leaves(name).items():
        assert array.dtype == np.float32
        if key.endswith((".bias", ".scale")):
            np.testing.assert_array_equal(array, float(key.endswith(".scale")), err_msg=key)


def matrices_and_deviations(name: str) -> dict[str, tuple[np.ndarray, float]]:
    """Every matrix, queries, keys and values apart, and the deviation that the papers give it."""
    config = get_config(name)
    matrices = {
        key: array for key, array in leaves(name).items() if not key.endswith((".bias", ".scale"))
    }
    qkv = matrices.pop("blocks.qkv.kernel")
    matrices |= {part: qkv[:, :, c] for c, part in enumerate(("query", "key", "value"))}

    N, D, F = config.num_layers, config.hidden_size, config.ffn_size
    if config.norm == "pre":
        names = ("word_embedding", "position_embedding", "block_position_embedding")
        expected = dict.fromkeys((*names, "query", "key", "value", "blocks.ffn_in.kernel"), 0.02)
        outputs = ("blocks.attention_out.kernel", "blocks.ffn_out.kernel")
        expected |= dict.fromkeys(outputs, 0.02 / math.sqrt(2 * N))
    else:
        beta = 1 / math.sqrt(2 * N)
        expected = {"word_embedding": config.initializer_scale}
        expected |= dict.fromkeys(("query", "key"), math.sqrt(2 / (D + D)))
        attention = ("value", "blocks.attention_out.kernel")
        expected |= dict.fromkeys(attention, beta * math.sqrt(2 / (D + D)))
        ffn = ("blocks.ffn_in.kernel", "blocks.ffn_out.kernel")
        expected |= dict.fromkeys(ffn, beta * math.sqrt(2 / (D + F)))
    assert matrices.keys() == expected.keys()
    return {key: (matrices[key], expected[key]) for key in expected}


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_matrices_are_normal_with_the_stated_deviation(name):
    for key, (matrix, deviation) in matrices_and_deviations(name).items():
        # Relative standard errors: 1 / sqrt(2 n) of a deviation, 1 / sqrt(n) of a mean.
        assert abs(matrix.std() / deviation - 1) < 5 / math.sqrt(2 * matrix.size), key
        assert abs(matrix.mean() / deviation) < 5 / math.sqrt(matrix.size), key
        within = np.mean(np.abs(matrix) < deviation)
        assert abs(within - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / matrix.size), key


def test_every_parameter_draws_its_own_numbers():
    config = get_config("glm-tiny")
    params, other = fresh("glm-tiny"), init(config, jax.random.key(1))
    position, block = params.position_embedding, params.block_position_embedding
    assert abs(np.corrcoef(np.ravel(position), np.ravel(block))[0, 1]) < 0.1
    assert abs(np.corrcoef(np.ravel(position), np.ravel(other.position_embedding))[0, 1]) < 0.1
