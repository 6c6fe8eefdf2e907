"""A step is the same on every mesh, in every number of microbatches, or does not happen."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glmjax.config import (
    DataConfig,
    Experiment,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    replace,
)
from glmjax.data.blanks import Batch
from glmjax.model.params import abstract_params
from glmjax.presets import get_config
from glmjax.sharding import make_mesh
from glmjax.training import loss
from glmjax.training.optimizer import adamw
from glmjax.training.step import (
    Controls,
    TrainState,
    evaluate_step,
    put_batch,
    state_shardings,
    train_step,
)

B, T, V = 8, 32, 64
ROUNDING = B * T * 2.0**-23
"""Relative error of a float32 sum over all tokens of a batch, the longest in a gradient."""
RATE = CLIP = 0.125

EXPERIMENT = Experiment(
    model=get_config(
        "glm-tiny", hidden_size=32, num_heads=8, ffn_size=64, vocab_size=V, initializer_scale=0.2,
        embedding_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0,
    ),
    data=DataConfig(sequence_length=T),
    # A large epsilon, so that Adam's quotient does not magnify rounding.
    optimizer=OptimizerConfig(clip=CLIP, epsilon=1e-2),
    train=TrainConfig(batch_size=B),
)  # fmt: skip


def make_batch(seed: int = 0) -> Batch:
    """One GLM sample a row, of random tokens."""
    random = np.random.default_rng(seed)
    context_B1 = random.integers(4, T - 4, (B, 1))
    query_T = np.arange(T)
    generated_BT = query_T >= context_B1
    positions_BT = np.where(generated_BT, context_B1 // 2, query_T)
    blocks_BT = np.where(generated_BT, query_T - context_B1 + 1, 0)
    return Batch(
        tokens_BT=random.integers(0, V, (B, T), dtype=np.int32),
        positions_B2T=np.stack([positions_BT, blocks_BT], axis=1).astype(np.int32),
        k_start_BT=np.zeros((B, T), np.int32),
        k_end_BT=np.maximum(query_T + 1, context_B1).astype(np.int32),
        targets_BT=random.integers(0, V, (B, T), dtype=np.int32),
        weights_BT=generated_BT.astype(np.float32),
        objective_B=np.arange(B, dtype=np.int32) % 3,
    )


@pytest.fixture(scope="module")
def start():
    """A state on the host after some steps, so that weight decay and both moments show."""
    random = np.random.default_rng(0)

    def noise(leaf, scale):
        return scale * random.standard_normal(leaf.shape, np.float32)

    shapes = abstract_params(EXPERIMENT.model)
    params = jax.tree.map(lambda leaf: noise(leaf, 0.2), shapes)
    moments = optax.ScaleByAdamState(
        count=np.int32(7),
        mu=jax.tree.map(lambda leaf: noise(leaf, 1e-3), shapes),
        nu=jax.tree.map(lambda leaf: noise(leaf, 1e-3) ** 2, shapes),
    )
    _, *rest = adamw(EXPERIMENT.model, EXPERIMENT.optimizer).init(params)
    return TrainState(np.int32(0), params, (moments, *rest), np.float32(1.0), np.int32(0))


def run_step(state, batch, mesh=None, experiment=EXPERIMENT, microbatches=1, room=1, scale=1):
    """New state and metrics on the host; one device without a mesh."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = jax.device_put(state, state_shardings(experiment, mesh))
        rows = put_batch(mesh, batch, microbatches, room)
        everywhere = jax.NamedSharding(mesh, jax.P())
        controls = Controls(np.int32(microbatches), np.float32(RATE), np.float32(scale))
        controls = jax.device_put(controls, everywhere)
        with jax.transfer_guard("disallow"):
            new, metrics = train_step(experiment, state, rows, controls)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
        return jax.device_get((new, metrics))


def assert_same_bits(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected):
    """Within what the order of float32 sums allows."""
    (state, metrics), (expected_state, expected_metrics) = found, expected
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=4 * ROUNDING), metrics, expected_metrics
    )
    # Gradients are clipped, so that no element is larger than CLIP.
    adam, expected_adam = state.optimizer[0], expected_state.optimizer[0]
    atol = 0.1 * CLIP * ROUNDING
    for moment in ("mu", "nu"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-22, atol=atol),
            getattr(adam, moment),
            getattr(expected_adam, moment),
        )
    # An update is mu / (1 - 0.9^8) / (sqrt(nu) + epsilon), epsilon = 0.01.
    atol = RATE * atol / (1 - 0.9**8) / 1e-2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-22, atol=atol),
        state.params,
        expected_state.params,
    )


@pytest.fixture(scope="module")
def reference(start):
    """The step on one device in one piece."""
    return run_step(start, make_batch())


def test_step_moves_every_parameter_and_counts(start, reference):
    state, metrics = reference
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, start.params)
    assert all(jax.tree.leaves(moved))
    assert (state.step, state.skipped, metrics.taken) == (1, 0, True)
    np.testing.assert_allclose(
        state.gradient_norm_mean, 0.99 + 0.01 * metrics.gradient_norm, rtol=2.0**-22
    )


def test_loss_is_the_mean_over_targets_and_its_parts_add_up(reference):
    metrics, batch = reference[1], make_batch()
    by_row = batch.weights_BT.sum(axis=1)
    expected = [by_row[batch.objective_B == o].sum() for o in range(4)]
    np.testing.assert_array_equal(metrics.objective_weights, expected)
    np.testing.assert_allclose(
        metrics.loss, metrics.objective_losses.sum() / sum(expected), rtol=2.0**-22
    )
    # Random targets: about the entropy of a uniform word, and none for the absent objective.
    assert 0.5 * np.log(V) < metrics.loss < 2 * np.log(V)
    assert metrics.objective_losses[3] == 0


AXES = [field.name for field in dataclasses.fields(MeshConfig)]
MESHES = [
    sizes
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))
    if math.prod(sizes) <= jax.device_count()
]
FEW = [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]
SPLIT, WHOLE = 0, 2**30
"""Bytes above which the loss splits its words over the devices."""


def mesh_case(sizes, table_bytes, fast):
    name = "-".join(f"{a}{n}" for a, n in zip(AXES, sizes, strict=True) if n > 1) or "one"
    words = "split" if table_bytes == SPLIT else "whole"
    return pytest.param(
        sizes, table_bytes, id=f"{name}-{words}", marks=() if fast else pytest.mark.slow
    )


@pytest.mark.parametrize(
    ("sizes", "table_bytes"),
    [
        *(mesh_case(sizes, SPLIT, fast=sizes in FEW) for sizes in MESHES),
        *(mesh_case(sizes, WHOLE, fast=sizes == FEW[1]) for sizes in FEW),
    ],
)
def test_meshes_agree(start, reference, sizes, table_bytes, monkeypatch):
    """Every way to arrange up to eight devices, and both ways to spread the words of the loss."""
    monkeypatch.setattr(loss, "TABLE_BYTES", table_bytes)
    jax.clear_caches()
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    assert_close(run_step(start, make_batch(), mesh), reference)


@pytest.mark.parametrize("microbatches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_microbatches_agree(start, reference, microbatches):
    assert_close(run_step(start, make_batch(), microbatches=microbatches), reference)


def test_growing_batch_compiles_once_and_equals_the_exact_one(start):
    """Room for four microbatches of two rows, of which one, two or all four are there."""
    batch = make_batch()
    exact, found = {}, {}
    for count in (1, 2, 4):
        has_targets_B1 = np.arange(B)[:, None] < 2 * count
        exact[count] = run_step(start, batch._replace(weights_BT=batch.weights_BT * has_targets_B1))
    compiled = train_step._cache_size()
    for count in (1, 2, 4):
        rows = Batch(*(field[: 2 * count] for field in batch))
        found[count] = run_step(start, rows, microbatches=count, room=4)
        assert_close(found[count], exact[count])
    assert train_step._cache_size() <= compiled + 1
    assert len({float(metrics.loss) for _, metrics in found.values()}) == 3


def poisoned(state, batch, kind):
    if kind == "parameter":
        table = state.params.word_embedding.copy()
        table[3, 5] = np.nan
        return state.replace(params=state.params.replace(word_embedding=table)), batch
    if kind == "explosion":
        return state.replace(gradient_norm_mean=np.float32(1e-3)), batch
    weights_BT = batch.weights_BT.copy()
    weights_BT[2, -1] = {"nan": np.nan, "infinity": np.inf}[kind]
    return state, batch._replace(weights_BT=weights_BT)


@pytest.mark.parametrize("kind", ["parameter", "nan", "infinity", "explosion"])
def test_bad_step_changes_only_its_number(start, kind):
    state, batch = poisoned(start, make_batch(), kind)
    new, metrics = run_step(state, batch)
    assert not metrics.taken
    assert_same_bits(new, state.replace(step=np.int32(1), skipped=np.int32(1)))
    again, metrics = run_step(new, batch)
    assert (again.step, again.skipped, metrics.skipped) == (2, 2, 2)


def test_good_step_ends_a_row_of_skipped_ones(start, reference):
    new, metrics = run_step(start.replace(skipped=np.int32(4)), make_batch())
    assert (new.skipped, metrics.skipped) == (0, 0)
    assert_same_bits(new.params, reference[0].params)


def test_first_gradient_never_explodes(start):
    new, metrics = run_step(start.replace(gradient_norm_mean=np.float32(0)), make_batch())
    assert metrics.taken
    assert new.gradient_norm_mean == metrics.gradient_norm


def test_embedding_gradient_scale_shrinks_exactly_the_word_embedding(start):
    """The first moments after a first step are (1 - beta1) times the clipped gradients."""
    first = start.replace(optimizer=jax.tree.map(np.zeros_like, start.optimizer))
    shrunk = replace(EXPERIMENT, **{"model.embedding_gradient_scale": 0.25})
    whole, quarter = (run_step(first, make_batch(), experiment=e) for e in (EXPERIMENT, shrunk))
    assert quarter[1].loss == whole[1].loss
    assert quarter[1].embedding_gradient_norm == whole[1].embedding_gradient_norm / 4
    for _, metrics in (whole, quarter):
        assert metrics.gradient_norm > CLIP

    def gradients(state, metrics):
        return jax.tree.map(lambda m: m / 0.1 / CLIP * metrics.gradient_norm, state.optimizer[0].mu)

    expected, found = gradients(*whole), gradients(*quarter)
    expected = expected.replace(word_embedding=expected.word_embedding / 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-20, atol=1e-12), found, expected
    )


def test_scheduled_embedding_gradient_scale_takes_the_place_of_the_models(start):
    """Powers of two, so that two scalings are one, but for what two programs fuse and round apart."""

    def untied(params):
        return dataclasses.replace(params, output_embedding=params.word_embedding)

    moments, *rest = start.optimizer
    moments = moments._replace(mu=untied(moments.mu), nu=untied(moments.nu))
    state = start.replace(params=untied(start.params), optimizer=(moments, *rest))

    def run(static, changes=(), **arguments):
        experiment = replace(
            EXPERIMENT,
            **{
                "model.tied_embeddings": False, "model.embedding_gradient_scale": static,
                "optimizer.embedding_gradient_scale_changes": changes,
            },
        )  # fmt: skip
        return run_step(state, make_batch(), experiment=experiment, **arguments)

    quarter = run(0.25)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-20, atol=1e-12),
        run(0.5, ((0, 0, 0.25),), scale=0.25),
        quarter,
    )
    unscaled = run(0.5, ((0, 0, 0.25),), scale=0.5)
    assert unscaled[1].embedding_gradient_norm == 2 * quarter[1].embedding_gradient_norm


def test_gradient_is_clipped_to_its_norm(start):
    first = start.replace(optimizer=jax.tree.map(np.zeros_like, start.optimizer))
    state, metrics = run_step(first, make_batch())
    assert metrics.gradient_norm > CLIP
    norm = optax.tree_utils.tree_norm(state.optimizer[0].mu) / (1 - 0.9)
    np.testing.assert_allclose(norm, CLIP, rtol=ROUNDING)


def test_dropout_differs_per_step_and_repeats(start):
    rates = dict.fromkeys(("embedding_dropout", "attention_dropout", "hidden_dropout"), 0.1)
    experiment = replace(EXPERIMENT, **{f"model.{name}": rate for name, rate in rates.items()})
    first = run_step(start, make_batch(), experiment=experiment)
    assert_same_bits(run_step(start, make_batch(), experiment=experiment), first)
    second = run_step(start.replace(step=np.int32(1)), make_batch(), experiment=experiment)
    assert second[1].loss != first[1].loss


def test_rows_without_targets_contribute_nothing(start):
    batch, other = make_batch(), make_batch(seed=1)
    weights_BT = batch.weights_BT.copy()
    weights_BT[4:] = 0
    batch = batch._replace(weights_BT=weights_BT)
    mixed = Batch(*(np.concatenate([a[:4], b[4:]]) for a, b in zip(batch, other, strict=True)))
    mixed = mixed._replace(weights_BT=weights_BT, objective_B=batch.objective_B)
    assert_same_bits(run_step(start, mixed), run_step(start, batch))


def test_batch_without_targets_changes_only_by_decay(start):
    batch = make_batch()
    new, metrics = run_step(start, batch._replace(weights_BT=0 * batch.weights_BT))
    assert (metrics.loss, metrics.gradient_norm, bool(metrics.taken)) == (0, 0, True)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params))


def test_put_batch_deals_rows_to_microbatches_in_turn():
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    batch = make_batch()
    placed = put_batch(mesh, batch, num_microbatches=2, room=3)
    assert placed.tokens_BT.shape == (3, 4, T)
    for m in (0, 1):
        np.testing.assert_array_equal(placed.tokens_BT[m], batch.tokens_BT[m::2])
    np.testing.assert_array_equal(placed.weights_BT[2], 0)
    shards = {shard.data.shape for shard in placed.positions_B2T.addressable_shards}
    assert shards == {(3, 2, 2, T)}


def test_evaluation_equals_the_training_loss(start, reference):
    """The step's metrics are of the state before it."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        losses_O, weights_O = evaluate_step(
            EXPERIMENT.model, jax.tree.map(jnp.asarray, start.params), put_batch(mesh, make_batch())
        )
    np.testing.assert_allclose(losses_O, reference[1].objective_losses, rtol=4 * ROUNDING)
    np.testing.assert_array_equal(weights_O, reference[1].objective_weights)
