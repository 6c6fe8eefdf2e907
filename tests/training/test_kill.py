"""A run that is killed ends with the parameters of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from glmjax.config import Experiment, MeshConfig, replace
from glmjax.sharding import make_mesh
from glmjax.training.checkpoint import Checkpoints
from glmjax.training.metrics import read_metrics
from glmjax.training.step import TrainState, abstract_state

KILLS = 5


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """60 steps with a line for each and a checkpoint every three."""
    folder = tmp_path_factory.mktemp("kill")
    tiny_run.write_text(folder / "text")
    return replace(
        tiny_run.make_experiment(folder),
        **{"train.log_every": 1, "train.checkpoint_every": 3, "train.evaluate_every": 30},
    )


def start(experiment: Experiment, devices: int = 8) -> subprocess.Popen:
    """`glmjax train` in a process of its own that compiles everything anew."""
    run = Path(experiment.train.run)
    file = tiny_run.write_experiment(run.with_suffix(".py"), experiment)
    return subprocess.Popen(
        [sys.executable, "-m", "glmjax", "train", file, "--json"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=tiny_run.environment(devices),
    )  # fmt: skip


def finish(experiment: Experiment, devices: int = 8) -> TrainState:
    """Lets a run reach its end; the state it ends with."""
    process = start(experiment, devices)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    folder = Path(experiment.train.run) / "checkpoints"
    with jax.set_mesh(mesh), Checkpoints(folder, keep=99) as checkpoints:
        found = checkpoints.restore_latest(abstract_state(experiment, mesh), experiment)
    assert found is not None and found[0] == 60
    return jax.device_get(found[1])


def kill_at(experiment: Experiment, step: int, delay: float) -> int:
    """Runs until a step is logged and a moment longer, then kill -9; the last step logged."""
    metrics = Path(experiment.train.run) / "metrics.jsonl"
    before = metrics.stat().st_ino if metrics.exists() else None
    process = start(experiment)
    # A run that continues begins with a new file, without the rows after its checkpoint.
    while not metrics.exists() or metrics.stat().st_ino == before or last_step(metrics) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return last_step(metrics)


def last_step(metrics: Path) -> int:
    return max((row["step"] for row in read_metrics(metrics)), default=0)


@pytest.fixture(scope="module")
def uninterrupted(experiment) -> TrainState:
    return finish(experiment)


@pytest.mark.slow
def test_killed_run_ends_bit_for_bit_like_the_uninterrupted_one(experiment, uninterrupted):
    killed = replace(experiment, **{"train.run": experiment.train.run + "-killed"})
    steps = sorted(random.sample(range(4, 51), KILLS))
    reached = [kill_at(killed, step, random.uniform(0, 0.03)) for step in steps]
    state = finish(killed)
    different = sum(
        int((a != b).sum())
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(uninterrupted), strict=True)
    )
    assert different == 0, f"{different} numbers differ after kills at steps {reached}"
    metrics, expected = (
        [(row["step"], row.get("loss"), row.get("heldout_loss")) for row in read_metrics(path)]
        for path in (Path(e.train.run) / "metrics.jsonl" for e in (killed, experiment))
    )
    assert metrics == expected


@pytest.mark.slow
def test_killed_run_continues_on_half_the_devices(experiment, uninterrupted):
    """In each step another order of sums may round a parameter, which is below 2, to the next
    number, and a gradient, a sum over 8 x 64 tokens, by 2 x 512 roundings, of which an Adam step
    carries the share of the learning rate into the parameter."""
    tolerance = 60 * (2.0**-23 + 2 * 8 * 64 * 2.0**-24 * experiment.optimizer.learning_rate)
    killed = replace(experiment, **{"train.run": experiment.train.run + "-halved"})
    reached = kill_at(killed, random.randrange(4, 51), random.uniform(0, 0.03))
    state = finish(killed, devices=4)
    found, expected = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(s.params)])
        for s in (state, uninterrupted)
    )
    difference = np.abs(found - expected).max()
    assert np.abs(expected).max() < 2
    assert 0 < difference < tolerance, (
        f"killed at {reached}: largest difference {difference:.3g}, tolerance {tolerance:.3g}"
    )
