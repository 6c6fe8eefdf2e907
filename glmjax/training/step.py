"""One optimizer step and one evaluation step: pure functions of state and batch."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from glmjax.config import DistributedConfig, Experiment, GLMConfig, TrainConfig
from glmjax.data.blanks import OBJECTIVES, Batch
from glmjax.data.ramp import batch_sizes
from glmjax.model.attention import BlankMask
from glmjax.model.params import Params, abstract_params, init, param_shardings
from glmjax.model.transformer import encode, output_table
from glmjax.sharding import batch_shards, mesh_axes, num_parts
from glmjax.training.loss import cross_entropy
from glmjax.training.optimizer import adamw, optimizer_shardings


@struct.dataclass
class TrainState:
    """Everything a step changes. Data order and dropout follow from seed and step."""

    step: Any
    params: Params
    optimizer: optax.OptState
    gradient_norm_mean: Any
    """Running mean of the gradient norm over the steps that were taken; 0 before the first."""
    skipped: Any
    """Steps skipped in a row up to now."""


@struct.dataclass
class Controls:
    """What the schedules say about one step, as device scalars."""

    num_microbatches: Any
    """How many microbatches of the batch count; the rest is room for a batch that grows."""
    learning_rate: Any
    embedding_gradient_scale: Any
    """Takes the place of the model's own where optimizer.embedding_gradient_scale_changes is set."""


@struct.dataclass
class StepMetrics:
    """What a step reports, as device scalars; losses are in nats."""

    loss: Any
    objective_losses: Any
    """Sum of the losses of each objective."""
    objective_weights: Any
    """Number of target tokens of each objective."""
    gradient_norm: Any
    embedding_gradient_norm: Any
    taken: Any
    """False when the step was skipped as non-finite or exploding."""
    skipped: Any


def init_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The state before the first step, sharded over the mesh, which must be the ambient one."""
    params = init(experiment.model, jax.random.key(experiment.train.seed))
    make = partial(_start, experiment)
    return jax.jit(make, out_shardings=state_shardings(experiment, mesh), donate_argnums=0)(params)


def _start(experiment: Experiment, params: Params) -> TrainState:
    optimizer = adamw(experiment.model, experiment.optimizer).init(params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer, jnp.zeros((), jnp.float32), zero)


def state_shardings(experiment: Experiment, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shardings of the state: moments like their parameters, the rest on every device.

    Raises:
        ValueError: a mesh axis does not divide a parameter's dimension.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(experiment.model, mesh)
    state = jax.eval_shape(
        adamw(experiment.model, experiment.optimizer).init, abstract_params(experiment.model)
    )
    optimizer = optimizer_shardings(params, state, experiment.optimizer)
    return TrainState(everywhere, params, optimizer, everywhere, everywhere)


def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, without values."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(partial(_start, experiment), abstract_params(experiment.model)),
        state_shardings(experiment, mesh),
    )


def microbatch_size(experiment: Experiment, mesh: Mesh) -> int:
    """Rows of one pass: what was asked for, else as much as every batch is a multiple of.

    Raises:
        ValueError: the devices that split the batch do not divide it.
    """
    train = experiment.train
    size = train.microbatch_size or math.gcd(*batch_sizes(train))
    parts = num_parts("batch", mesh)
    if size % parts:
        raise ValueError(
            f"the {parts} devices of mesh axes {mesh_axes('batch', mesh)} do not divide a microbatch of "
            f"{size} rows"
        )
    return size


def abstract_batch(experiment: Experiment, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of the batch [M, B / M, ...] of a step, without values."""
    rows, length = microbatch_size(experiment, mesh), experiment.data.sequence_length
    shape = (experiment.train.batch_size // rows, rows)
    sharding = NamedSharding(mesh, PartitionSpec(None, mesh_axes("batch", mesh)))

    def array(*rest: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((*shape, *rest), dtype, sharding=sharding)

    T = length
    return Batch(
        tokens_BT=array(T),
        positions_B2T=array(2, T),
        k_start_BT=array(T),
        k_end_BT=array(T),
        targets_BT=array(T),
        weights_BT=array(T, dtype=np.float32),
        objective_B=array(),
    )


def put_batch(mesh: Mesh, batch: Batch, num_microbatches: int = 1, room: int = 1) -> Batch:
    """The rows of this process's `batch_shards` as a global array [M, B / M, ...], split by rows.

    Row i of a device's rows goes to microbatch i mod M, so that every microbatch is spread evenly.
    With more room than microbatches the rest is zeros, so that a growing batch keeps its shape.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, mesh_axes("batch", mesh)))
    shards, num_shards = batch_shards(mesh)
    empty = max(0, room - num_microbatches)

    def put(rows: np.ndarray) -> jax.Array:
        rows = rows.reshape(-1, num_microbatches, *rows.shape[1:]).swapaxes(0, 1)
        rows = np.pad(rows, [(0, empty), *[(0, 0)] * (rows.ndim - 1)]) if empty else rows
        size = rows.shape[1] // len(shards)  # rows of a shard in one microbatch

        def rows_of(index: Any) -> np.ndarray:
            shard = shards.index((index[1].start or 0) // size)
            return rows[:, shard * size : (shard + 1) * size]

        shape = (rows.shape[0], size * num_shards, *rows.shape[2:])
        return jax.make_array_from_callback(shape, sharding, rows_of)

    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(put, batch)


def put_controls(mesh: Mesh, controls: Controls) -> Controls:
    """The controls on every device. Unlike `jax.device_put` it does not ask the other processes
    whether theirs are equal, for which all would wait."""
    sharding = NamedSharding(mesh, PartitionSpec())
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(
            lambda value: jax.make_array_from_callback((), sharding, lambda _: value), controls
        )


def loss_and_metrics(
    config: GLMConfig, params: Params, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Sum of the losses of a batch in nats, and (losses, target counts) by objective."""
    tokens_BT, positions_B2T, k_start_BT, k_end_BT, targets_BT, weights_BT, objective_B = map(
        jnp.asarray, batch
    )
    mask = BlankMask(k_start_BT, k_end_BT)
    x_BTD = encode(config, params, tokens_BT, positions_B2T, mask, dropout_key)
    total, losses_BT = cross_entropy(x_BTD, output_table(config, params), targets_BT, weights_BT)
    is_objective_BO = objective_B[:, None] == jnp.arange(len(OBJECTIVES))
    by_objective = partial(jnp.einsum, "bt,bo->o", precision="highest")
    losses = by_objective(losses_BT * weights_BT, is_objective_BO.astype(jnp.float32))
    weights = by_objective(weights_BT, is_objective_BO.astype(jnp.float32))
    return total, (losses, weights)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    experiment: Experiment,
    state: TrainState,
    batch: Batch,
    controls: Controls,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step over the microbatches that count of a batch [M, B / M, ...].

    The loss is the mean over all target tokens of the batch. A step whose loss or gradient is not
    finite, or whose gradient norm exceeds `exploding_ratio` times its running mean, changes nothing
    but the step number.
    """
    config, train = experiment.model, experiment.train
    dropout_key = jax.random.fold_in(jax.random.key(train.seed), state.step)

    def microbatch(m: jax.Array | int) -> tuple[Any, Any]:
        rows = jax.tree.map(lambda x: x[m], batch)
        key = jax.random.fold_in(dropout_key, m) if _has_dropout(config) else None
        gradient = jax.value_and_grad(loss_and_metrics, argnums=1, has_aux=True)
        (_, sums), gradients = gradient(config, state.params, rows, key)
        return gradients, sums

    if batch.tokens_BT.shape[0] == 1:
        gradients, (losses_O, weights_O) = microbatch(0)
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(microbatch, 0))
        gradients, (losses_O, weights_O) = jax.lax.fori_loop(
            0,
            controls.num_microbatches,
            lambda m, sums: jax.tree.map(jnp.add, sums, microbatch(m)),
            zeros,
        )

    if experiment.optimizer.embedding_gradient_scale_changes:
        factor = controls.embedding_gradient_scale / config.embedding_gradient_scale
        gradients = _scale_embeddings(gradients, factor)
    weight = jnp.maximum(weights_O.sum(), 1)
    loss = losses_O.sum() / weight
    gradient_norm = optax.tree_utils.tree_norm(gradients) / weight
    embedding_norm = optax.tree_utils.tree_norm(gradients.word_embedding) / weight
    mean = state.gradient_norm_mean
    taken = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    taken &= (mean == 0) | (gradient_norm <= train.exploding_ratio * mean)

    scale = jnp.minimum(1, experiment.optimizer.clip / gradient_norm) / weight
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    updates, optimizer = _update(experiment, gradients, state, taken)
    params = jax.tree.map(lambda p, u: p - controls.learning_rate * u, state.params, updates)
    new = TrainState(
        step=state.step,
        params=params,
        optimizer=optimizer,
        gradient_norm_mean=jnp.where(mean == 0, gradient_norm, 0.99 * mean + 0.01 * gradient_norm),
        skipped=jnp.zeros_like(state.skipped),
    )
    old = dataclasses.replace(state, skipped=state.skipped + 1)
    if experiment.optimizer.offload:
        old = dataclasses.replace(old, optimizer=optimizer)  # chosen already, where it was updated
    state = jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, old)
    state = dataclasses.replace(state, step=state.step + 1)
    # XLA would choose other shardings, with which the state fits neither its memory nor the next step.
    shardings = state_shardings(experiment, jax.sharding.get_abstract_mesh())
    state = jax.lax.with_sharding_constraint(state, shardings)
    return state, StepMetrics(
        loss, losses_O, weights_O, gradient_norm, embedding_norm, taken, state.skipped
    )


def _update(
    experiment: Experiment, gradients: Params, state: TrainState, taken: jax.Array
) -> tuple[Params, optax.OptState]:
    """Adam's updates and its new state.

    A state on the host is fetched inside a branch, since XLA would fetch it at once and keep it on
    the device throughout the backward pass.
    """

    def update(optimizer: optax.OptState) -> tuple[Params, optax.OptState]:
        transformation = adamw(experiment.model, experiment.optimizer)
        if not experiment.optimizer.offload:
            return transformation.update(gradients, optimizer, state.params)
        optimizer = _move_moments(optimizer, jax.memory.Space.Device)
        updates, optimizer = transformation.update(gradients, optimizer, state.params)
        return updates, _move_moments(optimizer, jax.memory.Space.Host)

    if not experiment.optimizer.offload:
        return update(state.optimizer)
    keep = jax.tree.map(jnp.zeros_like, state.params)
    return jax.lax.cond(taken, update, lambda optimizer: (keep, optimizer), state.optimizer)


def _move_moments(optimizer: optax.OptState, space: Any) -> optax.OptState:
    adam, *rest = optimizer
    mu, nu = jax.device_put((adam.mu, adam.nu), space)
    return (adam._replace(mu=mu, nu=nu), *rest)


def _scale_embeddings(gradients: Params, factor: jax.Array) -> Params:
    tables = {name: getattr(gradients, name) for name in ("word_embedding", "output_embedding")}
    return dataclasses.replace(gradients, **jax.tree.map(lambda g: g * factor, tables))


def lower_train_step(experiment: Experiment, mesh: Mesh) -> jax.stages.Lowered:
    """The step of an experiment on a mesh, which may be of absent devices, ready to compile."""
    return trace_train_step(experiment, mesh).lower()


def trace_train_step(experiment: Experiment, mesh: Mesh) -> jax.stages.Traced:
    """The step of an experiment on a mesh as a traced program, whose FLOPs can be counted."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    controls = Controls(
        num_microbatches=jax.ShapeDtypeStruct((), np.int32, sharding=everywhere),
        learning_rate=jax.ShapeDtypeStruct((), np.float32, sharding=everywhere),
        embedding_gradient_scale=jax.ShapeDtypeStruct((), np.float32, sharding=everywhere),
    )
    state, batch = abstract_state(experiment, mesh), abstract_batch(experiment, mesh)
    with jax.set_mesh(mesh):
        return train_step.trace(step_settings(experiment), state, batch, controls)


def step_settings(experiment: Experiment) -> Experiment:
    """What of an experiment a step is compiled for: runs of another length or folder share it."""
    train = TrainConfig(
        seed=experiment.train.seed, exploding_ratio=experiment.train.exploding_ratio
    )
    return dataclasses.replace(experiment, train=train, distributed=DistributedConfig())


@partial(jax.jit, static_argnums=0)
def evaluate_step(config: GLMConfig, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(losses, target counts) by objective of a batch [1, B, ...], without dropout."""
    return loss_and_metrics(config, params, jax.tree.map(lambda x: x[0], batch))[1]


def mean_losses(
    config: GLMConfig, params: Params, batches: Sequence[Batch], mesh: Mesh
) -> dict[str, float]:
    """Nats per target token over some batches: "loss", and "loss/mask" and so on for each objective
    there is. The mesh must be the ambient one."""
    sums = [evaluate_step(config, params, put_batch(mesh, batch)) for batch in batches]
    losses, weights = np.sum(jax.device_get(sums), axis=0)
    return {
        "loss": float(losses.sum() / weights.sum()),
        **{
            f"loss/{name}": float(loss / weight)
            for name, loss, weight in zip(OBJECTIVES, losses, weights, strict=True)
            if weight
        },
    }


def _has_dropout(config: GLMConfig) -> bool:
    return any((config.embedding_dropout, config.attention_dropout, config.hidden_dropout))
