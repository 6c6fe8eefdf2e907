"""FLOPs of programs whose products can be counted by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from glmjax.config import (
    DataConfig,
    Experiment,
    MeshConfig,
    ObjectiveConfig,
    TrainConfig,
    replace,
)
from glmjax.planning.flops import count_flops, loop_rounds
from glmjax.presets import get_config
from glmjax.sharding import make_mesh
from glmjax.training.step import trace_train_step

x_34 = jnp.ones((3, 4))
w_45 = jnp.ones((4, 5))
ONE = 2 * 3 * 4 * 5
"""FLOPs of x_34 @ w_45."""


def two_layers(w1_44, w2_45):
    return jnp.sum(jnp.tanh(x_34 @ w1_44) @ w2_45)


def repeat(count):
    return lambda x: jax.lax.scan(lambda x, _: (x @ jnp.ones((4, 4)), None), x, length=count)[0]


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, d: (d @ kept[1].T, kept[0].T @ d))

W1 = jnp.ones((4, 4))
FIRST, SECOND = 2 * 3 * 4 * 4, ONE


@pytest.mark.parametrize(
    ("function", "arguments", "flops"),
    [
        (jnp.matmul, (x_34, w_45), ONE),
        (lambda x, w: (x @ w).sum() * 2 + x.sum(), (x_34, w_45), ONE),
        (partial(jnp.einsum, "bik,bkj->bij"), (jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))), 7 * ONE),
        (partial(jnp.einsum, "ik,jkl->ijl"), (x_34, jnp.ones((6, 4, 5))), 6 * ONE),
        (jax.jit(jax.jit(jnp.matmul)), (x_34, w_45), ONE),
        (jax.vmap(jnp.matmul, (0, None)), (jnp.ones((9, 3, 4)), w_45), 9 * ONE),
        (repeat(10), (x_34,), 10 * FIRST),
        (lambda x: jax.lax.map(repeat(10), x), (jnp.ones((6, 3, 4)),), 6 * 10 * FIRST),
        (lambda x: jax.lax.cond(x.sum() > 0, repeat(2), repeat(5), x), (x_34,), 5 * FIRST),
        (product, (x_34, w_45), ONE),
        (jax.grad(two_layers, (0, 1)), (W1, w_45), 2 * FIRST + 3 * SECOND),
        (jax.grad(jax.checkpoint(two_layers), (0, 1)), (W1, w_45), 3 * FIRST + 3 * SECOND),
        (jax.grad(lambda x, w: product(x, w).sum(), (0, 1)), (x_34, w_45), 3 * ONE),
    ],
    ids=[
        "product", "elementwise is free", "batched", "contracted in the middle", "jit", "vmap",
        "scan", "nested loops", "cond takes the dearer branch", "custom_vjp",
        "gradient", "remat", "gradient of custom_vjp",
    ],
)  # fmt: skip
def test_products_are_counted(function, arguments, flops):
    assert count_flops(jax.make_jaxpr(function)(*arguments)) == flops


def in_chunks(x_TD, count):
    """A loop of unknown length over chunks of three rows, each sliced again by something else."""

    def body(i, total):
        chunk_CD = jax.lax.dynamic_slice_in_dim(x_TD, i * 3, 3)
        part = jax.lax.dynamic_slice_in_dim(chunk_CD, count % 2, 1)
        return total + (chunk_CD @ jnp.ones((4, 4))).sum() + part.sum()

    return jax.lax.fori_loop(0, count, body, 0.0)


def test_a_loop_of_unknown_length_goes_through_what_it_slices():
    jaxpr = jax.make_jaxpr(in_chunks)(jnp.ones((31, 4)), 2)
    assert count_flops(jaxpr) == 11 * FIRST
    assert loop_rounds(jaxpr) == {"in_chunks": 11}


def test_what_every_device_does_by_itself_counts_for_every_device():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        share = partial(jax.shard_map, jnp.matmul, out_specs=P("a"), check_vma=False)
        both = share(in_specs=(P("a"), P()))  # The two devices along b do the same.
        one = share(in_specs=(P("a"), P()), axis_names={"a"})
        arguments = jnp.ones((12, 4)), w_45
        assert count_flops(jax.make_jaxpr(both)(*arguments)) == 2 * 4 * ONE
        assert count_flops(jax.make_jaxpr(one)(*arguments)) == 4 * ONE


def kernel(body, **options):
    return pl.pallas_call(
        body, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), grid=(4,), interpret=True,
        name="probe", **options,
    )  # fmt: skip


def copy(x_ref, y_ref):
    y_ref[...] = x_ref[...]


def multiply(x_ref, y_ref):
    y_ref[...] = x_ref[...] @ jnp.ones((128, 128))


def test_kernels_count_what_they_say():
    x = jnp.ones((8, 128))
    cost = pl.CostEstimate(flops=1234, transcendentals=0, bytes_accessed=0)
    counted = kernel(multiply, cost_estimate=cost)
    assert count_flops(jax.make_jaxpr(repeat_call(counted, 3))(x)) == 3 * 1234
    assert count_flops(jax.make_jaxpr(kernel(copy))(x)) == 0
    with pytest.raises(ValueError, match="the kernel 'probe' has no cost_estimate"):
        count_flops(jax.make_jaxpr(kernel(multiply))(x))


def repeat_call(function, count):
    return lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, length=count)[0]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    model = get_config(
        "glm-130b-tiny", remat="none", attention="reference",
        embedding_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    return Experiment(
        model=model,
        objective=ObjectiveConfig(positions="1d"),
        data=DataConfig(sequence_length=128),
        mesh=MeshConfig(data=1, fsdp=2, tensor=4),
        train=TrainConfig(batch_size=8, microbatch_size=4),
    )


def test_a_training_step_does_three_times_its_forward_pass(experiment):
    traced = trace_train_step(experiment, make_mesh(experiment.mesh))
    model, T = experiment.model, 128
    N, D, F, V = model.num_layers, model.hidden_size, model.ffn_size, model.vocab_size
    forward = 2 * N * (4 * D * D + 3 * D * F) + 4 * N * T * D + 2 * V * D
    # What else the step multiplies, as to rotate heads of 16, is little even in so small a model.
    assert 1 <= count_flops(traced.jaxpr) / (3 * 8 * T * forward) < 1.02
    assert loop_rounds(traced.jaxpr)["train_step"] == 2


def test_recomputing_blocks_costs_less_than_another_forward_pass(experiment):
    mesh = make_mesh(experiment.mesh)
    none, block = (
        count_flops(trace_train_step(replace(experiment, **{"model.remat": remat}), mesh).jaxpr)
        for remat in ("none", "block")
    )
    assert 1.1 < block / none < 4 / 3
