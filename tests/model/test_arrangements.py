"""However parameters lie in memory, the model is the same."""

import math

import jax
import numpy as np
import pytest

import glmjax
from glmjax.config import MeshConfig, Quantization
from glmjax.model import transformer
from glmjax.model.params import Arrangement, abstract_params, leaf_name, param_shardings
from glmjax.model.parts import assemble, take_apart
from glmjax.sharding import make_mesh

MERGED = Arrangement(packed=False, merged=True)
CASES = {
    "floats": ("chatglm-tiny", None, (1, 1, 1)),
    "floats of shared keys": ("glm-4-tiny", None, (2, 2, 2)),
    "int8": ("glm-130b-tiny", Quantization(8, shards=2, scheme="zeropoint"), (2, 2, 2)),
    "int4 of shared keys": ("glm-4-tiny", Quantization(4, shards=2), (1, 1, 1)),
}


def draw(config):
    """Random parameters as they are stored, integers and scales too."""
    random = np.random.default_rng(0)

    def leaf(path, abstract):
        if abstract.dtype == np.int8:
            return random.integers(-128, 128, abstract.shape).astype(np.int8)
        numbers = 0.1 * random.standard_normal(abstract.shape)
        numbers = numbers + ("norm" in leaf_name(path) and leaf_name(path).endswith("scale"))
        return (numbers / (20 if abstract.dtype == np.float16 else 1)).astype(abstract.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


@pytest.mark.parametrize("name, quantization, sizes", CASES.values(), ids=CASES)
def test_merged_heads_change_nothing(name, quantization, sizes, rows):
    config = glmjax.get_config(name, quantization=quantization)
    stored = draw(config)
    forward = jax.jit(transformer.forward, static_argnums=0)
    inputs = rows.tokens_BT, rows.positions_B2T, rows.mask
    expected = forward(config, stored, *inputs)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        params = assemble(config, take_apart(config, stored), arrangement=MERGED)
        found = forward(config, params, *inputs)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == param_shardings(config, mesh, MERGED)
    H, K, D = config.num_heads, config.head_size, config.hidden_size
    kernels = params.blocks.qkv or params.blocks.q, params.blocks.attention_out
    if quantization is None:
        assert kernels[0].kernel.shape[-2:] == (D, H * K)
    else:
        assert kernels[1].kernel.values.shape[-2:] == (D, H * K)
    assert np.asarray(expected).std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
