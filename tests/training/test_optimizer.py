"""Learning rates of published runs, AdamW by hand, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.config import OptimizerConfig
from glmjax.model.params import abstract_params, leaf_name
from glmjax.presets import get_config
from glmjax.training.optimizer import adamw, decays, learning_rate

GLM_130B = OptimizerConfig(
    learning_rate=8e-5, floor_ratio=0.1, warmup=1_098_632, decay=197_753_905,
    schedule_unit="samples",
)  # fmt: skip
GLM_LARGE = OptimizerConfig(learning_rate=2e-4, floor_ratio=0.05, warmup=8000, decay=160_000)
GLM_ROBERTA = OptimizerConfig(
    learning_rate=4e-4, floor_ratio=0.025, warmup=30_000, decay=500_000, schedule="linear"
)


@pytest.mark.parametrize(
    ("config", "position", "rate"),
    [
        (GLM_130B, 0, 0.0),
        (GLM_130B, 549_316, 4.0e-5),
        (GLM_130B, 1_098_632, 8.0e-5),
        (GLM_130B, 50_000_000, 6.956234817e-5),
        (GLM_130B, 99_426_268, 4.4e-5),
        (GLM_130B, 197_753_905, 8e-6),
        (GLM_130B, 219_726_562, 8e-6),
        (GLM_LARGE, 0, 0.0),
        (GLM_LARGE, 4000, 1e-4),
        (GLM_LARGE, 8000, 2e-4),
        (GLM_LARGE, 84_000, 1.05e-4),
        (GLM_LARGE, 160_000, 1e-5),
        (GLM_LARGE, 10**9, 1e-5),
        (GLM_ROBERTA, 15_000, 2e-4),
        (GLM_ROBERTA, 30_000, 4e-4),
        (GLM_ROBERTA, 265_000, 2.05e-4),
        (GLM_ROBERTA, 500_000, 1e-5),
        (GLM_ROBERTA, 10**9, 1e-5),
    ],
)
def test_learning_rates_of_published_runs(config, position, rate):
    assert learning_rate(config, position) == pytest.approx(rate, rel=1e-8, abs=0)


def test_cosine_is_the_published_one_in_glm_large_steps():
    """THUDM/GLM learning_rates.py, with R = 1 / floor_ratio."""
    for step in range(8000, 160_001, 7600):
        share = (np.cos(np.pi * (step - 8000) / 152_000) + 1) * 19 / 2 + 1
        assert learning_rate(GLM_LARGE, step) == pytest.approx(2e-4 / 20 * share, rel=1e-9)


def test_constant_schedule_only_warms_up():
    config = OptimizerConfig(learning_rate=3e-4, schedule="constant", warmup=10, decay=100)
    rates = [learning_rate(config, position) for position in (0, 5, 10, 50, 100, 1000)]
    assert rates == pytest.approx([0, 1.5e-4, 3e-4, 3e-4, 3e-4, 3e-4])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_no_warm_up_starts_at_the_peak(schedule):
    config = OptimizerConfig(learning_rate=3e-4, schedule=schedule, warmup=0, decay=100)
    assert learning_rate(config, 0) == 3e-4
    assert 0 < learning_rate(config, 1) <= 3e-4


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_that_ends_with_the_warm_up(schedule):
    config = OptimizerConfig(
        learning_rate=1e-3, floor_ratio=0.1, schedule=schedule, warmup=10, decay=10
    )
    assert [learning_rate(config, n) for n in (5, 10, 11, 99)] == pytest.approx(
        [5e-4, 1e-3, 1e-4, 1e-4]
    )


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
