"""The chunked cross entropy against the plain one, and the memory it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.config import MeshConfig
from glmjax.sharding import make_mesh, partition
from glmjax.training import loss
from glmjax.training.loss import cross_entropy

B, T, D, V = 8, 24, 16, 200
SUM_ROUNDING = 2 * V * 2.0**-24
"""Relative error of a float32 sum of V terms, the longest here, whatever its order, and of the
exponential of one of them."""
BFLOAT16_ROUNDING = 2.0**-8

LOSS_AND_GRADIENTS = jax.value_and_grad(cross_entropy, argnums=(0, 1), has_aux=True)


def make_inputs(weights: str = "some", dtype: str = "float32"):
    """Hidden states, a table, targets and weights, of which the two first fit into bfloat16."""
    random = np.random.default_rng(0)
    x_BTD, table_VD = (
        jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in ((B, T, D), (V, D))
    )
    chosen_BT = {
        "none": np.zeros((B, T)),
        "all": np.ones((B, T)),
        "some": random.random((B, T)) < np.linspace(0, 0.6, B)[:, None],
        "fractional": random.random((B, T)) * (random.random((B, T)) < 0.3),
    }[weights]
    return (
        x_BTD.astype(dtype),
        table_VD.astype(jnp.float32),
        jnp.asarray(random.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(chosen_BT, jnp.float32),
    )


def plain(x_BTD, table_VD, targets_BT, weights_BT):
    """The same in float64, and how far rounding of each product's terms can move the gradients.

    Returns the loss, losses_BT, both gradients, and for each gradient the sum of the magnitudes of
    its terms.
    """
    x_BTD, table_VD, weights_BT = (np.asarray(a, np.float64) for a in (x_BTD, table_VD, weights_BT))
    logits_BTV = np.einsum("btd,vd->btv", x_BTD, table_VD)
    top_BT1 = logits_BTV.max(-1, keepdims=True)
    lse_BT1 = np.log(np.exp(logits_BTV - top_BT1).sum(-1, keepdims=True)) + top_BT1
    hit_BTV = np.eye(V)[np.asarray(targets_BT)]
    losses_BT = (lse_BT1[..., 0] - (logits_BTV * hit_BTV).sum(-1)) * (weights_BT != 0)
    d_BTV = (np.exp(logits_BTV - lse_BT1) - hit_BTV) * weights_BT[..., None]

    def products(d_BTV, x_BTD, table_VD):
        dx_BTD = np.einsum("btv,vd->btd", d_BTV, table_VD)
        return dx_BTD, np.einsum("btv,btd->vd", d_BTV, x_BTD)

    sizes = products(*map(np.abs, (d_BTV, x_BTD, table_VD)))
    gradients = products(d_BTV, x_BTD, table_VD)
    return (losses_BT * weights_BT).sum(), losses_BT, gradients, sizes


def assert_agrees(result, inputs, rounding: float = SUM_ROUNDING):
    (total, losses_BT), gradients = result
    expected_total, expected_BT, expected_gradients, sizes = plain(*inputs)
    logit_rounding = SUM_ROUNDING * float(jnp.abs(inputs[0]).max() * jnp.abs(inputs[1]).max()) * D
    np.testing.assert_allclose(losses_BT, expected_BT, rtol=0, atol=logit_rounding)
    assert abs(float(total) - expected_total) <= logit_rounding * float(inputs[3].sum())
    for gradient, expected, size in zip(gradients, expected_gradients, sizes, strict=True):
        error = np.abs(np.asarray(gradient, np.float64) - expected)
        assert (error <= (rounding + logit_rounding) * size).all(), f"{(error / size).max()}"


@pytest.mark.parametrize(
    ("weights", "chunk_positions"),
    [("none", 7), ("all", 7), ("fractional", 7), ("some", 1), ("some", 7), ("some", 24)],
)
def test_agrees_with_plain_cross_entropy(monkeypatch, weights, chunk_positions):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": chunk_positions * B * V})
    inputs = make_inputs(weights)
    loss_and_losses, gradients = LOSS_AND_GRADIENTS(*inputs)
    assert_agrees((loss_and_losses, gradients), inputs)
    assert_agrees((cross_entropy(*inputs), gradients), inputs)


def test_agrees_with_log_softmax():
    x_BTD, table_VD, targets_BT, weights_BT = make_inputs("fractional")

    def reference(x_BTD, table_VD):
        scores_BTV = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x_BTD, table_VD))
        losses_BT = -jnp.take_along_axis(scores_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return jnp.sum(losses_BT * weights_BT)

    expected, gradients = jax.value_and_grad(reference, argnums=(0, 1))(x_BTD, table_VD)
    (total, _), found = LOSS_AND_GRADIENTS(x_BTD, table_VD, targets_BT, weights_BT)
    np.testing.assert_allclose(total, expected, rtol=SUM_ROUNDING)
    for gradient, wanted in zip(found, gradients, strict=True):
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=SUM_ROUNDING * 4 * scale)


def test_loss_of_a_scaled_sum_scales_the_gradients_exactly():
    x_BTD, table_VD, targets_BT, weights_BT = make_inputs()

    def half(x_BTD, table_VD):
        return cross_entropy(x_BTD, table_VD, targets_BT, weights_BT)[0] / 2

    whole = LOSS_AND_GRADIENTS(x_BTD, table_VD, targets_BT, weights_BT)[1]
    for gradient, full in zip(jax.grad(half, (0, 1))(x_BTD, table_VD), whole, strict=True):
        np.testing.assert_array_equal(gradient, full / 2)


def test_losses_carry_no_gradient():
    x_BTD, *rest = make_inputs()
    gradient = jax.grad(lambda x: cross_entropy(x, *rest)[1].sum())(x_BTD)
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_products():
    """Logits are exact to float32; their gradient is rounded once to bfloat16, the hidden states'
    gradient a second time."""
    inputs = make_inputs("some", "bfloat16")
    result = LOSS_AND_GRADIENTS(*inputs)
    assert [g.dtype for g in result[1]] == [jnp.bfloat16, jnp.float32]
    assert_agrees(result, inputs, 2 * BFLOAT16_ROUNDING)


@pytest.mark.parametrize("table_bytes", [0, 2**30], ids=["split-table", "whole-table"])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=1, fsdp=2, fsdp_line=4),
        MeshConfig(data=1, tensor=8),
    ],
    ids=["data-8", "data-2-fsdp-2-tensor-2", "fsdp-2-line-4", "tensor-8"],
)
def test_sharded_equals_unsharded(monkeypatch, mesh, table_bytes):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": 4 * B * V // 8})
    monkeypatch.setattr(loss, "TABLE_BYTES", table_bytes)
    jax.clear_caches()
    inputs = make_inputs()
    with jax.set_mesh(make_mesh(mesh)):
        axes = ("batch", "length", "stream"), ("vocab", "embed"), *[("batch", "length")] * 2
        placed = jax.device_put(inputs, tuple(map(partition, axes)))
        result = jax.jit(LOSS_AND_GRADIENTS)(*placed)
    assert_agrees(jax.device_get(result), inputs)


def test_words_are_split_as_far_as_devices_divide_them(monkeypatch):
    """Of 12 words each of 4 devices gets 3, which the 2 devices of the other axis both have."""
    monkeypatch.setattr(loss, "TABLE_BYTES", 0)
    jax.clear_caches()
    x_BTD, table_VD, targets_BT, weights_BT = make_inputs()
    inputs = x_BTD, table_VD[:12], targets_BT % 12, weights_BT
    expected = LOSS_AND_GRADIENTS(*inputs)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, fsdp_line=2))):
        axes = ("batch", "length", "stream"), ("vocab", "embed"), *[("batch", "length")] * 2
        placed = jax.device_put(inputs, tuple(map(partition, axes)))
        found = jax.jit(LOSS_AND_GRADIENTS)(*placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


def temporary_bytes(length: int) -> int:
    """Memory of loss and gradients beside arguments and results, for GLM-130B's vocabulary."""
    batch, width, vocabulary = 2, 8, 150528
    compiled = jax.jit(LOSS_AND_GRADIENTS).lower(
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )
    return compiled.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_length_times_vocabulary():
    """Chunks of 26 and 27 positions; all logits of the longer row would be 1233 MB."""
    short, long = temporary_bytes(128), temporary_bytes(1024)
    assert long < 27 / 26 * short + 2 * 1024 * 8 * 4 * 8, f"{short} and {long} bytes"
    assert long < 2 * 1024 * 150528 * 4 / 10, f"{long} bytes"
