"""The command `glmjax runs`."""

import dataclasses
import datetime
import json
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from glmjax.training.run_folder import Status, list_runs

HELP = """Lists the runs in folders, the last written first. Only files in the run folders are read,
and of long ones their ends, so that hundreds take about a second.

A run whose state is "unfinished" is still running or has died: see when it was last written. It is
"diverged" when every step of its last row of metrics was skipped. tokens/s are those of its last
start when that has ended, else those of the last row.

examples:
  glmjax runs
  glmjax runs runs ablations --sort heldout_loss
  glmjax runs --filter deepnorm
  glmjax runs --json | jq '.[] | select(.state == "finished") | .heldout_loss'"""

Column = Literal[
    "run", "parameters", "step", "tokens", "loss", "heldout_loss", "tokens_per_second", "state",
    "written",
]  # fmt: skip
ASCENDING = ("run", "loss", "heldout_loss", "state")
UNITS = {10**12: "T", 10**9: "B", 10**6: "M", 10**3: "K"}


@dataclass(frozen=True)
class RunsFlags:
    folders: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[FOLDER ...]")
    ] = ("runs",)
    """Folders that hold runs, at whatever depth."""
    sort: Column = "written"
    """Column to sort by: names and losses from the lowest, counts from the highest."""
    filter: str = ""
    """Only runs whose name, with its folder, contains this text."""
    json: bool = False
    """Print a JSON list instead of a table."""


def main(arguments: list[str]) -> int:
    flags = tyro.cli(RunsFlags, args=arguments, prog="glmjax runs", description=HELP)
    found = {run.path: run for folder in flags.folders for run in list_runs(folder)}
    chosen = sort([run for run in found.values() if flags.filter in run.path], flags.sort)
    if flags.json:
        print(json.dumps([_to_json(run) for run in chosen]))
        return 0
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # a line of the table is a line of the output
    readable = [run for run in chosen if run.problem is None]
    if readable:
        console.print(_table(readable, console))
    for run in chosen:
        if run.problem is not None:
            console.print(escape(run.problem), style="red", soft_wrap=True, highlight=False)
    if not chosen:
        named = f" with {flags.filter!r} in its name" if flags.filter else ""
        message = escape(f"there is no run{named} in {', '.join(flags.folders)}")
        console.print(message, soft_wrap=True, highlight=False)
    return 0


def sort(runs: list[Status], column: Column) -> list[Status]:
    """Runs by a column, those that do not have it last."""
    field = "path" if column == "run" else column
    known = [run for run in runs if getattr(run, field) is not None]
    missing = [run for run in runs if getattr(run, field) is None]
    key, descending = (lambda run: getattr(run, field)), column not in ASCENDING
    return sorted(known, key=key, reverse=descending) + missing


def format_number(value: float | None) -> str:
    """Three digits and a letter: 2.66M; a dash for None."""
    if value is None:
        return "-"
    for unit, letter in UNITS.items():
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:#.3g}".rstrip(".") + letter
    return f"{value:.3g}"


def format_loss(value: float | None) -> str:
    """Three decimals; a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def table_width(table: Table, console: Console) -> int:
    """Columns of the terminal that a table takes when nothing is folded."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def _table(runs: list[Status], console: Console) -> Table:
    """The runs, a row each; a narrow terminal does without some columns."""
    columns: dict[str, list[str]] = {
        "run": [escape(run.path) for run in runs],
        "parameters": [format_number(run.parameters) for run in runs],
        "step": [f"{run.step:,}/{run.steps:,}" for run in runs],
        "tokens": [format_number(run.tokens) for run in runs],
        "loss": [format_loss(run.loss) for run in runs],
        "held-out": [format_loss(run.heldout_loss) for run in runs],
        "tokens/s": [format_number(run.tokens_per_second) for run in runs],
        "state": [run.state for run in runs],
        "written": [_age(run.written) for run in runs],
    }
    for dispensable in ("tokens", "parameters", "tokens/s", "written", None):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in columns:
            is_text = name in ("run", "state")
            table.add_column(name, overflow="fold", justify="left" if is_text else "right")
        for run, *cells in zip(runs, *columns.values(), strict=True):
            table.add_row(*cells, style="red" if run.state == "diverged" else None)
        if dispensable is None or table_width(table, console) <= console.width:
            break
        del columns[dispensable]
    return table


def _age(written: float | None) -> str:
    """How long ago a Unix time was."""
    seconds = max(0.0, time.time() - (written or 0))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _to_json(run: Status) -> dict[str, object]:
    values = dataclasses.asdict(run)
    if run.written is not None:
        when = datetime.datetime.fromtimestamp(run.written, datetime.UTC)
        values["written"] = when.isoformat(timespec="seconds")
    return values
