"""Run folders, read again: what a run was told, how far it came, and how its numbers went."""

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glmjax.config import Experiment, config_from_json
from glmjax.data.ramp import rows_before
from glmjax.model.params import count_params
from glmjax.training.goodput import seconds_spent
from glmjax.training.history import changed_fields
from glmjax.training.metrics import flops, read_metrics

Along = Literal["step", "tokens", "flops", "seconds"]
Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Name of a run -> where a metric was written down and its values, both [n]."""


@dataclass(frozen=True)
class Run:
    """A run folder: what `train.run` named."""

    path: Path
    experiment: Experiment
    """The configuration of its last start."""
    metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl, one of training or one of a held-out evaluation each."""
    summary: dict[str, Any] | None
    """How its last start ended, the fields of `loop.Summary`; None while steps come after that."""


@dataclass(frozen=True)
class Status:
    """How far a run has come; None is what its folder does not tell."""

    path: str
    parameters: int | None = None
    step: int | None = None
    """Steps that are done."""
    steps: int | None = None
    """Steps that it is to have."""
    tokens: int | None = None
    """Tokens of all rows up to here, context included."""
    loss: float | None = None
    """The last training loss, nats per target token."""
    heldout_loss: float | None = None
    tokens_per_second: float | None = None
    """Of its last start when that has ended, else of the last row of metrics."""
    state: str = "unreadable"
    """finished; stopped by a signal; diverged: every step of the last row was skipped; unfinished:
    still running, or dead."""
    written: float | None = None
    """When its metrics were last written, a Unix time."""
    problem: str | None = None
    """Why nothing but the path is known."""


def open_run(path: str | Path) -> Run:
    """Reads a run folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no run, or one of its files is damaged.
    """
    return _open(Path(path), read_metrics)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders in a folder, itself included, those that lack a file too.

    A folder that has a config.json alone holds a model.
    """
    for path, folders, files in os.walk(folder):
        if "metrics.jsonl" in files or {"config.json", "corpus.json"} <= set(files):
            folders.clear()  # of checkpoints, which are large
            yield Path(path)
        folders[:] = [name for name in folders if not name.startswith(".")]


def list_runs(folder: str | Path) -> list[Status]:
    """How far each run in a folder has come, the last written first; reads the ends of files.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found = []
    for path in find_runs(Path(folder)):
        try:
            found.append(status(_open(path, _last_rows)))
        except (ValueError, OSError) as error:
            found.append(Status(str(path), problem=str(error)))
    return sorted(found, key=lambda status: -(status.written or 0))


def status(run: Run) -> Status:
    """How far a run has come, by the last rows of its metrics and its summary."""
    experiment, summary = run.experiment, run.summary or {}
    latest: dict[str, Any] = {"step": 0}
    for row in run.metrics:
        latest |= row
    step = summary.get("steps", latest["step"])
    training = [row for row in run.metrics if "learning_rate" in row]
    if training and "loss" not in training[-1]:
        state = "diverged"
    elif summary.get("signal"):
        state = f"stopped by {summary['signal']}"
    else:
        state = "finished" if summary and step >= experiment.train.steps else "unfinished"
    files = (run.path / "metrics.jsonl", run.path / "config.json")
    return Status(
        path=str(run.path),
        parameters=summary.get("parameters") or count_params(experiment.model),
        step=step,
        steps=experiment.train.steps,
        tokens=_tokens(experiment, step),
        loss=latest.get("loss"),
        heldout_loss=summary.get("heldout_loss") or latest.get("heldout_loss"),
        tokens_per_second=summary.get("tokens_per_second") or latest.get("tokens_per_second"),
        state=state,
        written=next(file.stat().st_mtime for file in files if file.exists()),
    )


def loop_seconds(run: Run) -> float | None:
    """Seconds in the training loop over all starts, evaluations, checkpoints and lost work included,
    starting and compiling not; None when the run kept no ledger."""
    spent = seconds_spent(_rows(run.path / "goodput.jsonl", read_metrics))
    return sum(spent[kind] for kind in spent if kind not in ("init", "compile", "down")) or None


def changes(run: Run) -> list[dict[str, Any]]:
    """What `history.record_changes` noted: the step, the time and the fields that changed."""
    return _rows(run.path / "history.jsonl", read_metrics)


def corpus(run: Run) -> dict[str, Any]:
    """Digests of the rows of text and of the tokenizer; runs in which they differ saw other text, or
    the same in other pieces. Empty when the folder does not tell."""
    file = run.path / "corpus.json"
    return _json(file) if file.exists() else {}


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The fields in which configurations differ, by name such as train.steps: the value of each run."""
    first = runs[0].experiment
    changed = [changed_fields(first, run.experiment) for run in runs]
    originals = {name: old for fields in changed for name, (old, _) in fields.items()}
    return {
        name: [fields.get(name, (None, old))[1] for fields in changed]
        for name, old in sorted(originals.items())
    }


def metric_names(run: Run) -> list[str]:
    """Everything that the rows of its metrics tell."""
    return sorted({name for row in run.metrics for name in row} - {"step"})


def check_metric(metric: str, names: Sequence[str]) -> None:
    """Checks that there is such a metric.

    Raises:
        ValueError: it is none of `names`; the nearest are named.
    """
    if metric not in names:
        near = difflib.get_close_matches(metric, names, cutoff=0.4) or names
        known = f"the nearest are {', '.join(near)}" if near else "no step was logged yet"
        raise ValueError(f"there is no metric {metric!r}; {known}")


def curve(run: Run, metric: str, along: Along = "step") -> tuple[np.ndarray, np.ndarray]:
    """Where a metric was written down and its values, both [n].

    `along` counts steps; tokens of all rows; model FLOPs, see `metrics.flops`; or seconds of
    training steps alone, by the tokens per second of the rows.

    Raises:
        ValueError: the run has no such metric; the nearest are named.
    """
    check_metric(metric, metric_names(run))
    rows = [row for row in run.metrics if metric in row]
    steps = np.array([row["step"] for row in rows])
    values = np.array([row[metric] for row in rows], float)
    experiment = run.experiment
    if along == "tokens":
        return np.array([_tokens(experiment, int(step)) for step in steps]), values
    if along == "flops":
        length = experiment.data.sequence_length
        done = [rows_before(experiment.train, int(step)) for step in steps]
        return np.array([flops(experiment.model, rows, length) for rows in done]), values
    if along == "seconds":
        timed = [row for row in run.metrics if "tokens_per_second" in row]
        speeds = np.array([row["tokens_per_second"] for row in timed])
        tokens = np.array([_tokens(experiment, row["step"]) for row in timed])
        seconds = np.cumsum(np.diff(tokens, prepend=0) / speeds)
        return np.interp(steps, [0, *(row["step"] for row in timed)], [0, *seconds]), values
    return steps, values


def smooth(values: np.ndarray, points: int) -> np.ndarray:
    """The mean of each value and those before it, `points` in all or as many as there are."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - points)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _tokens(experiment: Experiment, step: int) -> int:
    return rows_before(experiment.train, step) * experiment.data.sequence_length


def _open(path: Path, read: Callable[[Path], list[dict[str, Any]]]) -> Run:
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    file = path / "config.json"
    if not file.exists():
        raise ValueError(f"{path} is no run folder: it has no config.json")
    values = _json(file)
    try:
        experiment = config_from_json(Experiment, values)
    except (ValueError, TypeError, AttributeError) as error:  # JSON of another shape
        raise ValueError(f"{file} is not the configuration of a run: {error}") from error
    rows = _rows(path / "metrics.jsonl", read)
    file = path / "summary.json"
    summary = _json(file) if file.exists() else None
    if summary is not None and "steps" not in summary:
        raise ValueError(f"{file} does not say how many steps were made")
    if summary is not None and rows and summary["steps"] < rows[-1]["step"]:
        summary = None  # the run went on
    return Run(path, experiment, rows, summary)


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if isinstance(values, dict):
        return values
    raise ValueError(f"{file} is damaged: it holds a {type(values).__name__}, not an object")


def _rows(path: Path, read: Callable[[Path], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    try:
        rows = read(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a row that is not JSON: {error.doc[:60]!r}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not all("step" in row for row in rows):
        raise ValueError(f"{path} has a row without a step")
    return rows


def _last_rows(path: Path, block: int = 1 << 14) -> list[dict[str, Any]]:
    """The last rows of a metrics.jsonl: so many that both losses are there, if they are anywhere."""
    size = path.stat().st_size if path.exists() else 0
    rows: list[dict[str, Any]] = []
    taken = 0
    while taken < size and not {"loss", "heldout_loss"} <= {name for row in rows for name in row}:
        taken = min(size, max(block, 4 * taken))
        with path.open("rb") as file:
            file.seek(size - taken)
            lines = file.read(taken).splitlines()
        whole = lines if taken == size else lines[1:]
        rows = [json.loads(line) for line in whole if line.endswith(b"}")]
    return rows
