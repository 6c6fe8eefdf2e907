"""AdamW by hand, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.config import OptimizerConfig
from glmjax.model.params import abstract_params, leaf_name
from glmjax.presets import get_config
from glmjax.training.optimizer import adamw, decays


@pytest.mark.parametrize("name", ["glm-tiny", "glm-130b-tiny", "chatglm-tiny"])
def test_all_but_layer_norms_and_biases_decay(name):
    config = get_config(name, tied_embeddings=False)
    leaves = jax.tree_util.tree_flatten_with_path(decays(config))[0]
    learned = {"position_embedding", "block_position_embedding"}
    assert {leaf_name(path) for path, decayed in leaves if decayed} == {
        "word_embedding",
        "output_embedding",
        "blocks.qkv.kernel",
        "blocks.attention_out.kernel",
        "blocks.ffn_in.kernel",
        "blocks.ffn_out.kernel",
        *(learned if name == "glm-tiny" else ()),
    }
    assert {leaf_name(path) for path, decayed in leaves if not decayed} == {
        "blocks.attention_norm.scale",
        "blocks.attention_norm.bias",
        "blocks.qkv.bias",
        "blocks.attention_out.bias",
        "blocks.ffn_norm.scale",
        "blocks.ffn_norm.bias",
        "blocks.ffn_in.bias",
        "blocks.ffn_out.bias",
        "final_norm.scale",
        "final_norm.bias",
    }


def test_adamw_by_hand():
    """Five steps of Loshchilov and Hutter's algorithm 2 in float64, decay coupled to the rate."""
    model = get_config("glm-tiny", num_layers=1, hidden_size=8, ffn_size=8, vocab_size=16)
    config = OptimizerConfig(beta1=0.9, beta2=0.95, epsilon=1e-3, weight_decay=0.3)
    random = np.random.default_rng(0)

    def noise():
        return jax.tree.map(
            lambda leaf: random.standard_normal(leaf.shape, np.float32), abstract_params(model)
        )

    start, gradients, rates = noise(), [noise() for _ in range(5)], (0.1, 0.2, 0.3, 0.2, 0.1)
    transformation = adamw(model, config)
    params = jax.tree.map(jnp.asarray, start)
    state = transformation.init(params)
    for gradient, rate in zip(gradients, rates, strict=True):
        updates, state = transformation.update(gradient, state, params)
        params = jax.tree.map(lambda p, u, rate=rate: p - rate * u, params, updates)

    def by_hand(p, decayed, *gradients):
        p = p.astype(np.float64)
        m = v = np.zeros_like(p)
        for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            g = g.astype(np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
            p = p - rate * (step + 0.3 * decayed * p)
        return p

    expected = jax.tree.map(by_hand, start, decays(model), *gradients)
    # Values of order 1 that five steps of about ten operations each have rounded.
    jax.tree.map(
        lambda p, e: np.testing.assert_allclose(p, e, rtol=0, atol=50 * 2.0**-22), params, expected
    )
