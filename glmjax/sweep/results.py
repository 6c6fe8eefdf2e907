"""What the trials of a sweep came to, and the Parquet file that keeps it."""

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from glmjax.data.cache import write_whole
from glmjax.sweep.trials import Factor, Sweep, Trial, run_folder
from glmjax.training.metrics import flops, read_metrics

Curve = tuple[tuple[int, float], ...]
"""Pairs of a step and a loss."""


@dataclass(frozen=True)
class Result:
    """What one trial came to. Losses are in nats per target token."""

    trial: str
    seed: int
    factors: Mapping[str, Factor]
    status: Literal["finished", "diverged"]
    parameters: int
    flops: float
    """Of the whole training, by `glmjax.training.metrics.flops`."""
    steps: int
    """Steps that were made."""
    tokens: int
    heldout_loss: float
    """At the end; not a number where the training diverged."""
    unigram_loss: float
    seconds: float
    tokens_per_second: float
    heldout_curve: Curve
    loss_curve: Curve
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the sweep's `evaluate` measured."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """The folder, command, date, machine and versions of the training."""


def outcome(run: Path) -> Literal["finished", "diverged"] | None:
    """How a run folder ended; None: it did not, or has not begun."""
    if (run / "diverged.json").exists():
        return "diverged"
    summary = _read_json(run / "summary.json")
    return "finished" if summary and summary["signal"] is None else None


def collect(sweep: Sweep, root: Path) -> list[Result]:
    """The results of the trials that have ended, in the order of the sweep."""
    found = ((trial, run_folder(trial, root)) for trial in sweep.trials)
    return [read_result(sweep, trial, run) for trial, run in found if outcome(run) is not None]


def read_result(sweep: Sweep, trial: Trial, run: Path) -> Result:
    """The result of a trial whose run has ended."""
    status = outcome(run)
    assert status is not None
    rows = read_metrics(run / "metrics.jsonl")
    summary = _read_json(run / ("summary.json" if status == "finished" else "diverged.json"))
    experiment, steps = trial.experiment, summary["steps"]
    length = experiment.data.sequence_length
    return Result(
        trial=trial.name,
        seed=trial.seed,
        factors=dict(trial.factors),
        status=status,
        parameters=summary["parameters"],
        flops=flops(experiment.model, summary["tokens"] // length, length),
        steps=steps,
        tokens=summary["tokens"],
        heldout_loss=summary["heldout_loss"] if status == "finished" else math.nan,
        unigram_loss=summary.get("unigram_loss", math.nan),
        seconds=summary.get("seconds", math.nan),
        tokens_per_second=summary.get("tokens_per_second", math.nan),
        heldout_curve=_curve(rows, "heldout_loss"),
        loss_curve=_curve(rows, "loss"),
        numbers=_read_json(numbers_file(sweep, run)) or {},
        provenance=_read_json(run / "provenance.json") or {},
    )


def made_by(results: Sequence[Result]) -> str:
    """A sentence on how results were made: commands, dates, machines, versions, time."""

    def every(name: str) -> str:
        values = {result.provenance.get(name, "unknown") for result in results}
        return ", ".join(sorted(values))

    programs = {
        result.provenance.get("command", "unknown").partition(" --trial")[0] for result in results
    }
    seconds = sum(result.seconds for result in results if math.isfinite(result.seconds))
    return (
        f"Made by {' and '.join(f'`{program}`' for program in sorted(programs))} on "
        f"{every('date')}: {len(results)} trainings, {seconds / 60:.0f} minutes of training in all, "
        f"each on {every('machine')} ({every('device')}); Python {every('python')}, jax "
        f"{every('jax')}, glmjax {every('glmjax')}, commit {every('commit')}."
    )


def numbers_file(sweep: Sweep, run: Path) -> Path:
    """Where what a sweep measured on a run is kept."""
    return run / f"numbers-{sweep.name}.json"


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    return tuple((row["step"], row[name]) for row in rows if name in row)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


# Mappings become a column for each key, NAME.KEY; curves a column for steps and one for losses.
_MAPPINGS = ("factors", "numbers", "provenance")
_CURVES = ("heldout_curve", "loss_curve")


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Writes results as one Parquet file, a row for each, a column for each factor and number."""
    rows = []
    for result in results:
        row = dataclasses.asdict(result)
        for name in _MAPPINGS:
            row |= {f"{name}.{key}": value for key, value in row.pop(name).items()}
        for name in _CURVES:
            curve = row.pop(name)
            row[f"{name}.step"] = [step for step, _ in curve]
            row[f"{name}.loss"] = [loss for _, loss in curve]
        rows.append(row)
    columns = {name: None for row in rows for name in row}
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_whole(path, content.getvalue())


def read_results(path: Path) -> list[Result]:
    """The results that `write_results` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no results {path}; run the sweep first")
    try:
        rows = pq.read_table(path).to_pylist()
        return [_from_row(row) for row in rows]
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold the results of a sweep: {error}") from None


def _from_row(row: dict[str, Any]) -> Result:
    values: dict[str, Any] = {name: value for name, value in row.items() if "." not in name}
    for name in _MAPPINGS:
        prefix = f"{name}."
        values[name] = {
            column.removeprefix(prefix): value
            for column, value in row.items()
            if column.startswith(prefix) and value is not None
        }
    for name in _CURVES:
        values[name] = tuple(zip(row[f"{name}.step"], row[f"{name}.loss"], strict=True))
    return Result(**values)
