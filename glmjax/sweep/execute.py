"""Running trials: one of them in this process, or all of a sweep in processes side by side."""

import contextlib
import datetime
import json
import logging
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import jax

from glmjax.config import replace
from glmjax.data.cache import write_whole
from glmjax.data.ramp import rows_before
from glmjax.model.params import count_params
from glmjax.sweep.results import numbers_file, outcome
from glmjax.sweep.trials import Sweep, Trial, run_folder
from glmjax.training.checkpoint import versions
from glmjax.training.loop import TrainingError, fit
from glmjax.training.metrics import flops, read_metrics

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
GPU_MEMORY = 0.9
"""Share of a GPU's memory that processes on it divide among them."""


def train_trial(sweep: Sweep, trial: Trial, root: Path, command: str) -> Path:
    """Trains one trial here and measures what the sweep asks for; continues what was begun.

    A training that diverges is a result, not a failure. Returns the run folder.

    Raises:
        ValueError, CheckpointError: see `fit`.
        KeyboardInterrupt: a signal stopped the training, which has been saved.
    """
    run = run_folder(trial, root)
    run.mkdir(parents=True, exist_ok=True)
    if outcome(run) is None:
        _write(run / "provenance.json", provenance(run, command))
        try:
            summary = fit(replace(trial.experiment, **{"train.run": str(run)}))
        except TrainingError as error:
            logger.warning("%s", error)
            _write(run / "diverged.json", _diverged(trial, run, str(error)))
        else:
            if summary.signal is not None:
                raise KeyboardInterrupt
    if outcome(run) == "finished" and sweep.evaluate and not numbers_file(sweep, run).exists():
        _write(numbers_file(sweep, run), dict(sweep.evaluate(run)))
    return run


def is_done(sweep: Sweep, trial: Trial, root: Path) -> bool:
    """Whether nothing of a trial is left to compute."""
    run = run_folder(trial, root)
    how = outcome(run)
    measured = sweep.evaluate is None or numbers_file(sweep, run).exists()
    return how == "diverged" or (how == "finished" and measured)


def provenance(run: Path, command: str) -> dict[str, str]:
    """Where and with what a training was made."""
    device = jax.devices()[0]
    return {
        "run": run.name,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        **{name: str(version) for name, version in versions().items()},
    }


def _processor() -> str:
    """The name of the processor, where Linux tells it."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


def _diverged(trial: Trial, run: Path, message: str) -> dict[str, object]:
    """What is known of a training that had no end."""
    rows = read_metrics(run / "metrics.jsonl")
    train = trial.experiment.train
    steps = max((row["step"] for row in rows), default=0)
    return {
        "message": message,
        "steps": steps,
        "tokens": rows_before(train, steps) * trial.experiment.data.sequence_length,
        "parameters": count_params(trial.experiment.model),
    }


def _write(path: Path, values: object) -> None:
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


@dataclass(frozen=True)
class _Running:
    """A trial in a process of its own."""

    trial: Trial
    run: Path
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float


@dataclass(frozen=True)
class Progress:
    """How far a sweep is."""

    done: int
    trials: int
    share: float
    """Of the FLOPs of all its trials."""
    running: tuple[tuple[str, int, int], ...]
    """(trial, step, steps) of those under way."""
    finished: tuple[str, float] | None = None
    """The trial that has just ended, and its seconds."""


def run_sweep(
    sweep: Sweep,
    root: Path,
    command: Callable[[int], Sequence[str]],
    jobs: int,
    report: Callable[[Progress], object],
) -> list[str]:
    """Trains all trials that are not done, `jobs` at a time, the largest first.

    `command(i)` trains trial i. Processes share the cores, or the memory of the GPU, in equal parts,
    and the compiled programs in a folder of the root. What a process says goes to log.txt of its
    run. A process that fails does not end the others. Returns the names of the trials that failed;
    Ctrl-C stops all, which save first.
    """
    work = [training_flops(trial) for trial in sweep.trials]
    pending = [i for i, trial in enumerate(sweep.trials) if not is_done(sweep, trial, root)]
    pending.sort(key=lambda i: -work[i])
    failed: list[str] = []
    running: dict[int, _Running] = {}

    def tell(finished: tuple[str, float] | None = None) -> None:
        steps = {i: _last_step(item.run) for i, item in running.items()}
        waiting = sum(work[i] for i in pending) + sum(
            work[i] * (1 - steps[i] / item.trial.experiment.train.steps)
            for i, item in running.items()
        )
        report(
            Progress(
                done=len(sweep.trials) - len(pending) - len(running),
                trials=len(sweep.trials),
                share=1 - waiting / sum(work),
                running=tuple(
                    (item.trial.name, steps[i], item.trial.experiment.train.steps)
                    for i, item in running.items()
                ),
                finished=finished,
            )
        )

    with _stopping(running):
        while pending or running:
            for slot in sorted(set(range(jobs)) - {item.slot for item in running.values()}):
                # Trials with equal settings share a folder: the second waits for the first.
                busy = {item.run for item in running.values()}
                free = [i for i in pending if run_folder(sweep.trials[i], root) not in busy]
                if not free:
                    break
                pending.remove(free[0])
                if is_done(sweep, sweep.trials[free[0]], root):
                    continue
                running[free[0]] = _start(sweep.trials[free[0]], root, command(free[0]), slot, jobs)
            time.sleep(POLL_SECONDS)
            for i in [i for i, item in running.items() if item.process.poll() is not None]:
                item = running.pop(i)
                item.log.close()
                if item.process.returncode or not is_done(sweep, item.trial, root):
                    failed.append(item.trial.name)
                    logger.error("trial %s failed; see %s", item.trial.name, item.run / "log.txt")
                tell((item.trial.name, time.perf_counter() - item.began))
            tell()
    return failed


def training_flops(trial: Trial) -> float:
    """FLOPs of a trial's whole training."""
    train, length = trial.experiment.train, trial.experiment.data.sequence_length
    return flops(trial.experiment.model, rows_before(train, train.steps), length)


def _last_step(run: Path) -> int:
    rows = read_metrics(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def _start(trial: Trial, root: Path, command: Sequence[str], slot: int, jobs: int) -> _Running:
    """Starts a process with its part of the machine."""
    run = run_folder(trial, root)
    run.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs] or cores
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(root.absolute() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{GPU_MEMORY / jobs:.3f}",
        **os.environ,
    }
    log = (run / "log.txt").open("ab")
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    os.sched_setaffinity(process.pid, mine)  # before it has threads
    return _Running(trial, run, slot, process, log, time.perf_counter())


@contextlib.contextmanager
def _stopping(running: dict[int, _Running]) -> Iterator[None]:
    """Whatever ends the sweep early also stops its processes, and waits until they have saved."""
    try:
        yield
    finally:
        for item in running.values():
            item.process.send_signal(signal.SIGTERM)
        for item in running.values():
            item.process.wait()
            item.log.close()
