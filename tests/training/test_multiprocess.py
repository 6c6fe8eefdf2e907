"""Several processes on one machine, whose CPU devices talk through gloo, are one training run."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from glmjax.config import Experiment, MeshConfig, replace
from glmjax.sharding import make_mesh
from glmjax.training.checkpoint import Checkpoints
from glmjax.training.distributed import RESTART
from glmjax.training.metrics import read_metrics
from glmjax.training.step import TrainState, abstract_state

STEPS = 24
HEARTBEAT = 10
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """24 steps with a line for each and a checkpoint every six; programs are compiled once."""
    folder = tmp_path_factory.mktemp("job")
    tiny_run.write_text(folder / "text")
    settings = {
        "train.steps": STEPS, "train.log_every": 1, "train.checkpoint_every": 6,
        "train.evaluate_every": 12, "train.keep_checkpoints": 9,
        "train.compilation_cache": str(folder / "compiled"),
        "distributed.heartbeat_seconds": HEARTBEAT, "distributed.start_seconds": 60,
    }  # fmt: skip
    return replace(tiny_run.make_experiment(folder), **settings)


def start(experiment: Experiment, processes: int, alone: int | None = None) -> list:
    """Eight devices in so many processes of one job, or only one of these processes."""
    run = Path(experiment.train.run)
    file = tiny_run.write_experiment(run.with_suffix(".py"), experiment)
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "glmjax", "train", file, "--json"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=tiny_run.environment(8 // processes, **variables, JAX_PROCESS_ID=str(process)),
        )
        for process in ([alone] if alone is not None else range(processes))
    ]  # fmt: skip


def ends(job: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit status and messages of each process."""
    messages = [process.communicate()[1] for process in job]
    return [(process.returncode, text) for process, text in zip(job, messages, strict=True)]


def finish(experiment: Experiment, processes: int) -> None:
    for status, messages in ends(start(experiment, processes)):
        assert status == 0, messages


def await_step(experiment: Experiment, job: list[subprocess.Popen], step: int) -> None:
    """Waits until a job has logged a step."""
    metrics = Path(experiment.train.run) / "metrics.jsonl"
    while step not in {row["step"] for row in read_metrics(metrics)}:
        assert all(process.poll() is None for process in job), ends(job)
        time.sleep(0.001)


def final_state(experiment: Experiment, step: int = STEPS) -> TrainState:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    folder = Path(experiment.train.run) / "checkpoints"
    with jax.set_mesh(mesh), Checkpoints(folder, keep=99) as checkpoints:
        found = checkpoints.restore_latest(abstract_state(experiment, mesh), experiment)
    assert found is not None and found[0] == step
    return jax.device_get(found[1])


def losses(experiment: Experiment) -> list[tuple]:
    rows = read_metrics(Path(experiment.train.run) / "metrics.jsonl")
    return [(row["step"], row.get("loss"), row.get("heldout_loss")) for row in rows]


def in_folder(experiment: Experiment, name: str, **changes) -> Experiment:
    settings = {f"train.{field}": value for field, value in changes.items()}
    return replace(experiment, **{"train.run": f"{experiment.train.run}-{name}"}, **settings)


@pytest.fixture(scope="module")
def undisturbed(experiment) -> Experiment:
    """The run of two processes that nothing happens to."""
    finish(experiment, 2)
    return experiment


def distance(found: TrainState, expected: TrainState) -> float:
    return max(
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def kill(experiment: Experiment, processes: int, victim: int) -> tuple[int, str]:
    """Kills a process of a job at some step; the step and the message of another process."""
    job = start(experiment, processes)
    # At 17 a checkpoint of step 14 is whole: that of 16 has waited for it.
    await_step(experiment, job, random.randrange(17, STEPS - 2))
    job[victim].send_signal(signal.SIGKILL)
    ((status, messages),) = ends([process for i, process in enumerate(job) if i != victim])
    assert status == RESTART, messages
    return max(step for step, *_ in losses(experiment)), messages


def test_losses_are_those_of_one_process(undisturbed):
    """A sum over the 8 x 64 tokens of a batch in another order is off by as many roundings."""
    alone = in_folder(undisturbed, "alone")
    finish(alone, 1)
    found, expected = losses(undisturbed), losses(alone)
    assert [step for step, *_ in found] == [step for step, *_ in expected]
    for (_, *values), (_, *others) in zip(found, expected, strict=True):
        for value, other in zip(values, others, strict=True):
            assert value == other or abs(value / other - 1) < 8 * 64 * 2.0**-24
    summaries = [
        json.loads((Path(e.train.run) / "summary.json").read_text()) for e in (undisturbed, alone)
    ]
    assert summaries[0]["unigram_loss"] == summaries[1]["unigram_loss"]


def test_lost_process_ends_the_job_which_goes_on_from_local_checkpoints(undisturbed, tmp_path):
    killed = in_folder(
        undisturbed, "killed",
        local_checkpoints=str(tmp_path), local_checkpoint_every=2, checkpoint_every=12,
    )  # fmt: skip
    reached, messages = kill(killed, 2, victim=1)
    last = messages.splitlines()[-1]
    assert last == (
        f"glmjax: process 1 ({socket.gethostname()}) gave no sign of life for {HEARTBEAT} s; "
        "process 0 ends, start all processes again to go on from the last checkpoint"
    )
    finish(killed, 2)
    starts = [row for row in read_metrics(Path(killed.train.run) / "goodput.jsonl") if "run" in row]
    assert 12 < starts[1]["step"] <= reached and starts[1]["step"] % 2 == 0
    assert losses(killed) == losses(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, final_state(killed), final_state(undisturbed))
    summary = json.loads((Path(killed.train.run) / "summary.json").read_text())
    assert {"down", "step", "compile", "init"} < summary["goodput"].keys()


def test_lost_coordinator_ends_the_job_which_goes_on_with_more_processes(undisturbed):
    killed = in_folder(undisturbed, "coordinator")
    reached, messages = kill(killed, 2, victim=0)
    last = messages.splitlines()[-1]
    assert re.fullmatch(
        r"glmjax: process 0 at localhost:\d+, which coordinates the job, is lost; process 1 ends, .*",
        last,
    )
    finish(killed, 4)
    difference = distance(final_state(killed), final_state(undisturbed))
    assert difference == 0, f"largest difference {difference:.3g}, killed at step {reached}"
    assert losses(killed) == losses(undisturbed)


def test_sigterm_to_one_process_makes_all_save_the_same_step(undisturbed):
    stopped = in_folder(undisturbed, "stopped")
    job = start(stopped, 2)
    await_step(stopped, job, 3)
    job[1].send_signal(signal.SIGTERM)
    (status, messages), (other_status, other_messages) = ends(job)
    assert (status, other_status) == (RESTART, RESTART), messages + other_messages
    summary = json.loads((Path(stopped.train.run) / "summary.json").read_text())
    step = summary["steps"]
    assert summary["signal"] == "SIGTERM" and 3 <= step < STEPS
    assert f"stopped by SIGTERM and saved at step {step};" in messages
    final_state(stopped, step)
    assert losses(stopped) == losses(undisturbed)[: len(losses(stopped))]


@pytest.mark.parametrize(
    ("alone", "message"),
    [(0, r"process 1 did not start within 3 s"),
     (1, r"process 0 was not to be reached at localhost:\d+ within 3 s")],
    ids=["without-1", "without-0"],
)  # fmt: skip
def test_absent_process_is_named_at_the_start(experiment, alone, message):
    absent = replace(in_folder(experiment, "absent"), **{"distributed.start_seconds": 3})
    ((status, messages),) = ends(start(absent, 2, alone))
    assert status == RESTART
    assert re.fullmatch(f"glmjax train: {message}", messages.splitlines()[-1])
    assert not Path(absent.train.run).exists()


def run_script(script: str, processes: int, devices: int) -> list[tuple[int, str]]:
    """Python code in each process of a job, with the number of the process in `process`."""
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    head = f"""
        import os, time, jax, numpy as np
        from jax.experimental import multihost_utils
        from glmjax.config import DistributedConfig
        from glmjax.training.distributed import barrier, joined
        process = int(os.environ["JAX_PROCESS_ID"])
        with joined(DistributedConfig(heartbeat_seconds={HEARTBEAT})):
    """
    code = textwrap.dedent(head) + textwrap.indent(textwrap.dedent(script), "    ")
    job = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
            env=tiny_run.environment(devices, **variables, JAX_PROCESS_ID=str(process)),
        )
        for process in range(processes)
    ]  # fmt: skip
    return ends(job)


def test_error_in_one_process_ends_all_who_say_it():
    script = """
        if process == 1:
            raise ValueError("the text is gone")
        barrier("the meeting", 600)
    """
    (other, others_words), (failed, words) = run_script(script, 2, 1)
    assert failed == 1 and words.splitlines()[-1].endswith("process 1: the text is gone")
    assert other == RESTART
    assert "process 1 ended with an error: the text is gone; process 0 ends" in others_words


def test_abort_of_a_process_is_not_taken_for_a_lost_coordinator():
    (other, others_words), (aborted, words) = run_script(
        """
        if process == 1:
            os.abort()
        barrier("the meeting", 600)
        """, 2, 1,
    )  # fmt: skip
    assert aborted == -signal.SIGABRT
    assert "is lost" not in words
    assert other == RESTART
    assert "process 1" in others_words and "gave no sign of life" in others_words


def test_absent_process_is_named_at_a_barrier():
    script = """
        if process < 2:
            barrier("the meeting", 2)
        time.sleep(6)
    """
    *early, late = run_script(script, 3, 1)
    for process, (status, messages) in enumerate(early):
        assert status == RESTART
        assert f"process {process}: process 2 did not come to the meeting within 2 s" in messages
    assert late[0] == RESTART
    assert "ended with an error: process 2 did not come to the meeting within 2 s" in late[1]


def test_what_processes_must_have_in_common_is_checked(tmp_path):
    script = f"""
        from pathlib import Path
        from glmjax.training.agreement import check_equal, check_shared

        def refused(check, *arguments):
            try:
                check(*arguments)
            except ValueError as error:
                return str(error)

        folder = Path({str(tmp_path)!r})
        check_equal("text", "the text")
        check_shared(folder / "run")
        assert process or list((folder / "run").iterdir()) == []
        message = refused(check_equal, f"text {{process % 2}}", "the text")
        assert message == "the text of processes [1] differs from that of process 0", message
        message = refused(check_shared, folder / f"run of host {{process}}")
        assert message.startswith("processes [1, 2] do not see "), message
    """
    for status, messages in run_script(script, 3, 1):
        assert status == 0, messages


def test_every_device_gets_its_rows():
    """However the devices of two processes lie in the mesh (data, tensor): in order, in turn, so
    that a shard has devices of both, all in one replica, or mixed."""
    script = """
        from glmjax.data.blanks import Batch
        from glmjax.sharding import batch_shards
        from glmjax.training.step import put_batch
        for order, sizes in (
            ([0, 1, 2, 3], (4, 1)), ([0, 2, 1, 3], (4, 1)), ([0, 2, 1, 3], (2, 2)),
            ([0, 1, 2, 3], (1, 4)), ([3, 1, 2, 0], (4, 1)),
        ):
            devices = np.array(jax.devices())[order].reshape(sizes[0], 1, 1, sizes[1])
            mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "fsdp_line", "tensor"))
            shards, count = batch_shards(mesh)
            rows_SB = np.arange(24).reshape(count, -1)
            batch = Batch(*[rows_SB[list(shards)].ravel()] * 7)
            placed = put_batch(mesh, batch, num_microbatches=3, room=4).tokens_BT
            whole = multihost_utils.process_allgather(placed, tiled=True)
            expected = rows_SB.reshape(-1, 3).T  # row i of a shard is in microbatch i mod 3
            assert (whole[:3] == expected).all() and (whole[3] == 0).all(), (order, sizes, whole)
    """
    for status, messages in run_script(script, 2, 2):
        assert status == 0, messages
