"""The training run, from text to a checkpoint: read `fit` from top to bottom."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from glmjax.config import DistributedConfig, Experiment, config_to_json, parse_range
from glmjax.data.baselines import count_targets, uniform_loss, unigram_loss
from glmjax.data.blanks import OBJECTIVES, Batch
from glmjax.data.cache import write_whole
from glmjax.data.pipeline import batches, make_dataset, make_heldout_dataset
from glmjax.data.prepare import Corpora, prepare
from glmjax.data.ramp import batch_size_at, rows_before
from glmjax.data.tokenizers import check_vocabulary
from glmjax.model.params import Params, count_params
from glmjax.sharding import batch_shards, make_mesh
from glmjax.training.agreement import check_equal, check_shared, from_process_0
from glmjax.training.checkpoint import Checkpoints
from glmjax.training.compiler_options import options_for
from glmjax.training.goodput import Ledger
from glmjax.training.history import record_changes
from glmjax.training.local import LocalCheckpoints
from glmjax.training.metrics import (
    Writer,
    flops,
    model_flops_utilisation,
    open_writers,
    read_metrics,
    truncate_metrics,
)
from glmjax.training.plot import plot_losses
from glmjax.training.progress import Progress
from glmjax.training.schedule import embedding_gradient_scale, learning_rate
from glmjax.training.step import (
    Controls,
    StepMetrics,
    TrainState,
    abstract_state,
    init_state,
    lower_train_step,
    mean_losses,
    microbatch_size,
    put_batch,
    put_controls,
)
from glmjax.training.stopping import stop_signals

logger = logging.getLogger(__name__)

BASELINE_BATCHES = 64
"""Training batches whose targets the unigram baseline counts."""


class TrainingError(RuntimeError):
    """The run cannot go on; its checkpoints are as they were."""


@dataclass(frozen=True)
class Summary:
    """How a run ended; what `summary.json` holds."""

    steps: int
    tokens: int
    """Tokens of all rows up to here, context included."""
    heldout_loss: float | None
    """Nats per target token; None when a signal ended the run before its last evaluation."""
    unigram_loss: float
    uniform_loss: float
    tokens_per_second: float
    seconds: float
    """Wall time of this process, from its first step to its last."""
    parameters: int
    signal: str | None = None
    """The signal that ended the run early."""
    goodput: dict[str, float] = field(default_factory=dict)
    """Share of each kind in the time of all starts of the run, see `Ledger`."""


@dataclass
class _Interval:
    """Sums over the steps since the last line of metrics.jsonl."""

    began: float
    losses_O: np.ndarray = field(default_factory=lambda: np.zeros(len(OBJECTIVES)))
    weights_O: np.ndarray = field(default_factory=lambda: np.zeros(len(OBJECTIVES)))
    rows: int = 0
    skipped: int = 0


def fit(experiment: Experiment, program_began: float | None = None) -> Summary:
    """Trains until `train.steps`, or until SIGTERM or SIGINT, which save first.

    A run folder with checkpoints is continued from the newest whole one. All processes of a job
    call this with the same experiment. The ledger counts from `program_began`, a Unix time.

    Raises:
        ValueError: the configuration, the data or an earlier checkpoint does not fit.
        TrainingError: `train.max_skipped` steps in a row were not finite or exploded.
        CheckpointError: a checkpoint could not be written or none could be read.
    """
    began = time.time() if program_began is None else program_began
    train, run = experiment.train, Path(experiment.train.run)
    is_main = jax.process_index() == 0
    if train.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", train.compilation_cache)

    # Devices
    mesh = make_mesh(experiment.mesh)
    microbatch = microbatch_size(experiment, mesh)
    room = train.batch_size // microbatch
    shards, num_shards = batch_shards(mesh)

    # Data
    corpora = prepare(experiment.data, experiment.objective, experiment.model.special_tokens)
    check_vocabulary(experiment.model, corpora.tokenizer)
    if experiment.model.special_tokens != corpora.tokenizer.special_tokens:
        raise ValueError(
            f"model.special_tokens = {experiment.model.special_tokens} differ from the tokenizer's "
            f"{corpora.tokenizer.special_tokens}"
        )
    settings = dataclasses.replace(experiment, distributed=DistributedConfig())
    check_equal(json.dumps(config_to_json(settings)), "the configuration")
    check_equal(corpora.digest + corpora.tokenizer.digest, "the text or the vocabulary")
    check_shared(run)
    dataset = make_dataset(
        experiment, corpora, shards=shards, num_shards=num_shards, multiple=microbatch
    )
    heldout = list(make_heldout_dataset(experiment, corpora, shards=shards, num_shards=num_shards))
    baselines = _baselines(experiment, corpora)

    with (
        jax.set_mesh(mesh),
        Checkpoints(
            run / "checkpoints", train.keep_checkpoints, experiment.distributed.barrier_seconds
        ) as checkpoints,
        stop_signals() as stop,
        Progress(train.steps, enabled=is_main) as progress,
        _profiler(train.profile, run) as profile,
    ):
        # State: the newest whole checkpoint, else a new one
        ledger = Ledger(began, run / "goodput.jsonl" if is_main else None)
        local = _open_local(experiment, ledger) if train.local_checkpoints else None
        first_step, state = _first_state(experiment, mesh, checkpoints, local)
        finished = _finished(run, first_step)
        if finished is not None and first_step >= train.steps:
            progress.finished(first_step, run)
            return finished

        # Run folder
        if is_main:
            _open_run(experiment, corpora, run, first_step)
            truncate_metrics(run / "metrics.jsonl", first_step)
        ledger.start(first_step)
        writers = open_writers(experiment) if is_main else []
        progress.start(first_step, run)

        # Loop
        with ledger.spending("compile"):
            options = options_for(mesh.devices.flat[0].device_kind)
            train_step = lower_train_step(experiment, mesh).compile(options or None)
        ledger.enter("step")
        loop_began = time.perf_counter()
        interval = _Interval(loop_began)
        pending: tuple[int, StepMetrics] | None = None
        heldout_loss = None
        step = first_step
        stream = batches(dataset, first_step, experiment.data.workers)
        report = functools.partial(_report, experiment, writers, progress, ledger)
        with jax.transfer_guard("disallow"), contextlib.closing(stream):
            while step < train.steps and not stop.requested(step):
                profile(step, state)
                num_microbatches = -(-batch_size_at(train, step) // microbatch)
                with ledger.spending("data"):
                    rows = next(stream)
                batch = put_batch(mesh, rows, num_microbatches, room)
                controls = Controls(
                    np.int32(num_microbatches),
                    np.float32(learning_rate(experiment, step)),
                    np.float32(embedding_gradient_scale(experiment, step)),
                )
                state, metrics = train_step(state, batch, put_controls(mesh, controls))
                if pending is not None:
                    interval = report(interval, *pending)
                pending = (step, metrics)
                step += 1

                last = step == train.steps
                evaluates = last or step % train.evaluate_every == 0
                saves = last or step % train.checkpoint_every == 0
                if evaluates or saves:
                    interval, pending = report(interval, *pending), None
                heldout_loss = None
                if evaluates:
                    paused = time.perf_counter()
                    with ledger.spending("evaluate"):
                        heldout_loss = _evaluate(
                            experiment, mesh, state.params, heldout, writers, step
                        )
                    progress.evaluated(step, heldout_loss, baselines["unigram"])
                    interval.began += time.perf_counter() - paused
                with ledger.spending("checkpoint"):
                    if saves:
                        checkpoints.save(step, state, experiment)
                    elif local is not None and step % train.local_checkpoint_every == 0:
                        local.save(step, state, experiment)
            if pending is not None:
                report(interval, *pending)
            if stop.signal and step > first_step:
                with ledger.spending("checkpoint"):
                    checkpoints.save(step, state, experiment)
        if heldout_loss is None and not stop.signal:  # an earlier process made the last steps
            with ledger.spending("evaluate"):
                heldout_loss = _evaluate(experiment, mesh, state.params, heldout, [], step)
        with ledger.spending("checkpoint"):
            checkpoints.wait()
        seconds = time.perf_counter() - loop_began

    # Results
    tokens = rows_before(train, step) * experiment.data.sequence_length
    new_tokens = tokens - rows_before(train, first_step) * experiment.data.sequence_length
    summary = Summary(
        steps=step,
        tokens=tokens,
        heldout_loss=heldout_loss,
        unigram_loss=baselines["unigram"],
        uniform_loss=baselines["uniform"],
        tokens_per_second=new_tokens / seconds,
        seconds=seconds,
        parameters=count_params(experiment.model),
        signal=stop.signal.name if stop.signal else None,
        goodput=ledger.note(step),
    )
    if is_main:
        _write_json(run / "summary.json", dataclasses.asdict(summary))
        changes = [row["step"] for row in read_metrics(run / "history.jsonl")]
        plot_losses(read_metrics(run / "metrics.jsonl"), baselines, run / "loss.png", changes)
    return summary


def _finished(run: Path, step: int) -> Summary | None:
    """The summary that an earlier process wrote when it ended at this step."""
    path = run / "summary.json"
    summary = Summary(**json.loads(path.read_text())) if path.exists() else None
    return summary if summary is not None and summary.steps == step and not summary.signal else None


def _first_state(
    experiment: Experiment, mesh: Mesh, checkpoints: Checkpoints, local: LocalCheckpoints | None
) -> tuple[int, TrainState]:
    """Where the run goes on from: the newest checkpoint, durable or local, else the beginning."""
    abstract = abstract_state(experiment, mesh)
    newest = local.newest(abstract) if local is not None else -1
    restored = checkpoints.restore_latest(abstract, experiment, after=newest)
    if restored is None and local is not None and newest >= 0:
        restored = newest, local.restore(newest, abstract, experiment)
    if restored is None:
        restored = 0, init_state(experiment, mesh)
    if local is not None:
        local.drop_after(restored[0])
    return restored


def _open_local(experiment: Experiment, ledger: Ledger) -> LocalCheckpoints:
    """The local checkpoints of this run, whose ledger process 0 has."""
    run_id = from_process_0(ledger.run_id).hex
    return LocalCheckpoints(str(experiment.train.local_checkpoints), run_id)


def _baselines(experiment: Experiment, corpora: Corpora) -> dict[str, float]:
    """Losses of models that know nothing, and only how often each token is a target."""
    size = corpora.tokenizer.vocab_size

    def count(batches: Any) -> np.ndarray:
        mine = range(jax.process_index(), len(batches), jax.process_count())
        counts_V = count_targets((batches[i] for i in mine), size).astype(np.int32)
        return multihost_utils.process_allgather(counts_V).reshape(-1, size).sum(0, np.int64)

    training = make_dataset(experiment, corpora)[:BASELINE_BATCHES]
    heldout = make_heldout_dataset(experiment, corpora)
    return {
        "uniform": uniform_loss(size),
        "unigram": unigram_loss(count(training), count(heldout)),
    }


def _open_run(experiment: Experiment, corpora: Corpora, run: Path, first_step: int) -> None:
    """Makes the run folder and its descriptions.

    Raises:
        ValueError: the folder belongs to a run whose corpus or vocabulary was another.
    """
    run.mkdir(parents=True, exist_ok=True)
    contents = {"rows": corpora.digest, "tokenizer": corpora.tokenizer.digest}
    identity = run / "corpus.json"
    if identity.exists() and json.loads(identity.read_text()) != contents:
        raise ValueError(
            f"the text or the vocabulary of {run} changed since that run began; restore the files "
            "or choose another --train.run"
        )
    corpora.tokenizer.save(run)
    record_changes(run, first_step, experiment)
    _write_json(run / "config.json", config_to_json(experiment))
    _write_json(identity, contents)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def _report(
    experiment: Experiment,
    writers: list[Writer],
    progress: Progress,
    ledger: Ledger,
    interval: _Interval,
    step: int,
    metrics: StepMetrics,
) -> _Interval:
    """Reads the metrics of a finished step, and writes a line when an interval is full.

    An interval also ends at a checkpoint, so that a resumed run writes the same lines.

    Raises:
        TrainingError: too many steps in a row were skipped.
    """
    train, length = experiment.train, experiment.data.sequence_length
    metrics = jax.device_get(metrics)
    rows = batch_size_at(train, step)
    interval.rows += rows
    if metrics.taken:
        interval.losses_O += metrics.objective_losses
        interval.weights_O += metrics.objective_weights
    else:
        interval.skipped += 1
        first = rows_before(train, step)
        logger.warning(
            "skipped step %d (loss %.4g, gradient norm %.4g), made from rows %d to %d; leave them "
            "out for good with --data.skip %d:%d",
            step, metrics.loss, metrics.gradient_norm, first, first + rows - 1, step, step,
        )  # fmt: skip
        if metrics.skipped >= train.max_skipped:
            raise TrainingError(
                f"{train.max_skipped} steps in a row up to step {step} were not finite or exploded "
                f"(last gradient norm {metrics.gradient_norm:.4g}); the last checkpoint is kept"
            )
    done = step + 1
    if done % train.log_every and done % train.checkpoint_every and done != train.steps:
        return interval

    now = time.perf_counter()
    seconds = now - interval.began
    flops_per_second = flops(experiment.model, interval.rows, length) / seconds
    weights = interval.weights_O
    row: dict[str, Any] = {
        "loss": float(interval.losses_O.sum() / weights.sum()) if weights.any() else math.nan,
        **{
            f"loss/{name}": float(loss / weight)
            for name, loss, weight in zip(OBJECTIVES, interval.losses_O, weights, strict=True)
            if weight
        },
        "gradient_norm": float(metrics.gradient_norm),
        "embedding_gradient_norm": float(metrics.embedding_gradient_norm),
        "learning_rate": learning_rate(experiment, step),
        "rows": rows_before(train, done),
        "skipped_steps": interval.skipped,
        "tokens_per_second": interval.rows * length / seconds,
        "flops_per_second": flops_per_second,
    }
    if experiment.optimizer.embedding_gradient_scale_changes:
        row["embedding_gradient_scale"] = embedding_gradient_scale(experiment, step)
    utilisation = model_flops_utilisation(
        flops_per_second, jax.devices()[0].device_kind, jax.device_count()
    )
    if utilisation is not None:
        row["model_flops_utilisation"] = utilisation
    row |= {f"goodput/{kind}": round(share, 4) for kind, share in ledger.note(done).items()}
    row = {name: value for name, value in row.items() if math.isfinite(value)}  # JSON has no NaN
    for write in writers:
        write(done, row)
    progress.logged(done, row)
    return _Interval(now)


def _evaluate(
    experiment: Experiment,
    mesh: Mesh,
    params: Params,
    heldout: list[Batch],
    writers: list[Writer],
    step: int,
) -> float:
    """Held-out loss in nats per target token, written as a line of its own."""
    losses = mean_losses(experiment.model, params, heldout, mesh)
    row = {f"heldout_{name}": loss for name, loss in losses.items()}
    for write in writers:
        write(step, row)
    return row["heldout_loss"]


@contextlib.contextmanager
def _profiler(steps: str | None, run: Path) -> Iterator[Callable[[int, TrainState], None]]:
    """A function to call before each step, which traces those that train.profile names."""
    first, last = parse_range(steps, "train.profile") if steps else (-1, -1)
    tracing = False

    def before(step: int, state: TrainState) -> None:
        nonlocal tracing
        if tracing == (first <= step <= last):
            return
        tracing = not tracing
        jax.block_until_ready(state.step)
        if tracing:
            jax.profiler.start_trace(str(run / "profile"))
        else:
            jax.profiler.stop_trace()

    try:
        yield before
    finally:
        if tracing:
            jax.profiler.stop_trace()
