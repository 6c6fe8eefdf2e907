"""Moments in fewer bytes: close to what they stand for, and good enough to train with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.config import DataConfig, Experiment, MeshConfig, OptimizerConfig, TrainConfig
from glmjax.data.blanks import Batch
from glmjax.presets import get_config
from glmjax.sharding import make_mesh
from glmjax.training.optimizer import FIRST, SECOND, _decode, _encode
from glmjax.training.step import (
    Controls,
    abstract_state,
    init_state,
    put_batch,
    put_controls,
    train_step,
)


@pytest.mark.parametrize("kind", [FIRST, SECOND], ids=["first", "second"])
def test_codes_are_within_a_step_of_the_numbers(kind):
    _, limit, power = kind
    x = jax.random.normal(jax.random.key(0), (64, 256)) ** 3
    x = jnp.abs(x) if kind is SECOND else x
    (stored,) = _encode([x], jax.random.key(1), *kind)
    (found,) = _decode([stored], *kind)
    top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # In the scale in which codes are evenly spaced.
    codes, exact = ((jnp.abs(y) / top) ** (1 / power) * limit for y in (found, x))
    assert stored.code.dtype.itemsize == 1
    assert float(jnp.max(jnp.abs(codes - exact))) <= 1 + 1e-3
    np.testing.assert_array_equal(jnp.sign(found), jnp.sign(x))


def test_rounding_is_right_on_average():
    x = jnp.full((512, 256), 0.3).at[:, 0].set(1.0)
    (stored,) = _encode([x], jax.random.key(1), *FIRST)
    codes = np.asarray(stored.code[:, 1:], np.float64)
    assert set(np.unique(codes)) == {69, 70}
    standard_error = 0.5 / np.sqrt(codes.size)
    assert abs(codes.mean() - np.sqrt(0.3) * 127) < 5 * standard_error


def experiment(moments, **options):
    model = get_config("glm-tiny", hidden_size=32, ffn_size=64, vocab_size=64)
    return Experiment(
        model=model,
        data=DataConfig(sequence_length=32),
        optimizer=OptimizerConfig(moments=moments, epsilon=1e-8, beta2=0.95, **options),
        mesh=MeshConfig(data=1, fsdp=4, tensor=2),
        train=TrainConfig(batch_size=8),
    )


@pytest.mark.parametrize(("moments", "size"), [("float32", 8), ("bfloat16", 4), ("int8", 2)])
def test_moments_take_the_bytes_they_should(moments, size):
    config = experiment(moments)
    state = abstract_state(config, make_mesh(config.mesh))
    kernel = state.params.blocks.ffn_in.kernel
    for moment in (state.optimizer[0].mu, state.optimizer[0].nu):
        leaves = jax.tree.leaves(moment.blocks.ffn_in.kernel)
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        scales = 4 * kernel.size / kernel.shape[-1] if moments == "int8" else 0
        assert stored == kernel.size * size / 2 + scales


def losses(moments, steps=40, **options):
    """Of a model that learns one batch by heart."""
    config = experiment(moments, **options)
    mesh = make_mesh(config.mesh)
    random = np.random.default_rng(0)
    shape = (8, 32)
    position_T = np.broadcast_to(np.arange(32, dtype=np.int32), shape)
    batch = Batch(
        tokens_BT=random.integers(0, 64, shape, dtype=np.int32),
        positions_B2T=np.stack([position_T, np.zeros_like(position_T)], axis=1),
        k_start_BT=np.zeros(shape, np.int32),
        k_end_BT=position_T + 1,
        targets_BT=random.integers(0, 64, shape, dtype=np.int32),
        weights_BT=np.ones(shape, np.float32),
        objective_B=np.zeros(8, np.int32),
    )
    found = []
    with jax.set_mesh(mesh):
        state, rows = init_state(config, mesh), put_batch(mesh, batch)
        controls = put_controls(mesh, Controls(np.int32(1), np.float32(3e-3), np.float32(1)))
        for _ in range(steps):
            state, metrics = train_step(config, state, rows, controls)
            found.append(float(metrics.loss))
    return found


@pytest.fixture(scope="module")
def exact():
    return losses("float32")


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_training_goes_as_with_exact_moments(exact, moments):
    found = losses(moments)
    assert exact[-1] < 0.75 * exact[0]
    assert found[0] == exact[0]
    assert found != exact
    np.testing.assert_allclose(found[-1], exact[-1], rtol=0.03)


def test_small_moments_train_the_same_twice():
    assert losses("int8", steps=5) == losses("int8", steps=5)


def test_moments_on_the_host_train_the_same():
    config = experiment("float32", offload=True)
    state = abstract_state(config, make_mesh(config.mesh))
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.optimizer[0].mu)}
    assert kinds == {"pinned_host"}
    # Two programs, which the compiler may fuse and round in other places.
    np.testing.assert_allclose(
        losses("float32", steps=5, offload=True), losses("float32", steps=5), rtol=2.0**-20
    )
