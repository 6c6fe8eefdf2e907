"""The command `glmjax compare`."""

import html
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from glmjax.cli.runs import format_loss, format_number, table_width
from glmjax.training.run_folder import (
    Along,
    Curves,
    Run,
    changes,
    check_metric,
    corpus,
    curve,
    differences,
    loop_seconds,
    metric_names,
    open_run,
    smooth,
    status,
)

HELP = """Compares runs: the fields in which their configurations differ, how far they came, and
their curves over each other. Differences are to the run that is named first. Seconds are those in
the training loop over all starts of a run, evaluations, checkpoints and lost work included.

examples:
  glmjax compare runs/base runs/deepnorm
  glmjax compare runs/seed0 runs/seed1 runs/seed2 --metric gradient_norm --smooth 10
  glmjax compare runs/small runs/large --x flops --png curves.png
  glmjax compare runs/*/ --html comparison.html
  glmjax compare runs/base runs/deepnorm --json"""

LOSSES = ("heldout_loss", "loss")
PLACES = ("train.run", "train.compilation_cache", "train.local_checkpoints", "data.cache")
XLABELS = {
    "step": "step", "tokens": "tokens", "flops": "model FLOPs",
    "seconds": "seconds of training steps",
}  # fmt: skip
COLORS = (33, 208, 34, 160, 129, 37, 130, 201, 244, 142)  # of 256; seen on black and on white
MARKERS = "ox+*#@%&$="

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>runs compared</title>
<style>
:root {{ color-scheme: light dark; --line: #ccc; }}
@media (prefers-color-scheme: dark) {{ :root {{ --line: #444; }} }}
body {{ background: Canvas; color: CanvasText; font: 15px/1.5 system-ui, sans-serif;
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin-bottom: 2rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: bold; padding: .3rem 0; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
</style>
<h1>runs compared</h1>
{body}
</html>
"""


@dataclass(frozen=True)
class CompareFlags:
    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN RUN ...", help_behavior_hint=""),
    ] = ()
    """Run folders, two or more."""
    metric: tuple[str, ...] = LOSSES
    """What curves show, by its name in metrics.jsonl."""
    x: Along = "step"
    """What curves are drawn over. flops are the model's by the Megatron formula; seconds are those of
    training steps alone."""
    smooth: int = 1
    """Draw the mean of so many points that follow each other."""
    places: bool = False
    """Also compare fields that only say where files lie."""
    png: Path | None = None
    """Write the curves to this picture."""
    html: Path | None = None
    """Write tables and curves to this page, which needs no other file."""
    json: bool = False
    """Print one JSON object instead of tables and curves."""


@dataclass(frozen=True)
class Grid:
    """A table as text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def main(arguments: list[str]) -> int:
    flags = tyro.cli(CompareFlags, args=arguments, prog="glmjax compare", description=HELP)
    if len(flags.runs) < 2:
        raise ValueError(f"name two run folders or more, got {len(flags.runs)}")
    if flags.smooth < 1:
        raise ValueError(f"--smooth takes a number of points from 1, got {flags.smooth}")
    runs = dict(zip(labels(flags.runs), map(open_run, flags.runs), strict=True))
    fields = {
        name: values
        for name, values in differences(list(runs.values())).items()
        if flags.places or name not in PLACES
    }
    results = {name: result(run) for name, run in runs.items()}
    panels = _panels(runs, flags)
    xlabel = XLABELS[flags.x]
    grids = [_fields_grid(fields, list(runs)), _results_grid(results)]
    notes = _notes(runs, fields, panels, flags.smooth)

    if flags.png is not None:
        from glmjax.training.plot import plot_curves

        if not panels:
            raise ValueError(f"there is nothing to draw in {flags.png}: no run has logged a step")
        plot_curves(panels, xlabel).savefig(flags.png, dpi=120)
    if flags.html is not None:
        flags.html.write_text(page(grids, notes, panels, xlabel), encoding="utf-8")
    for file in (flags.png, flags.html):
        if file is not None:
            print(f"wrote {file}", file=sys.stderr)
    if flags.json:
        curves = {
            metric: {
                name: {flags.x: xs.tolist(), metric: values.tolist()}
                for name, (xs, values) in panel.items()
            }
            for metric, panel in panels.items()
        }
        print(json.dumps({"runs": results, "differences": fields, "curves": curves}))
        return 0

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    for grid in grids:
        if grid.rows:
            console.print(_table(grid, console), "")
    for note in notes:
        console.print(escape(note), soft_wrap=True)
    colored = console.is_terminal and not console.no_color
    for metric, panel in panels.items():
        console.print(draw(metric, panel, list(runs), xlabel, console.width, colored), "")
    return 0


def labels(paths: Sequence[str]) -> list[str]:
    """What tells runs apart: their paths below the folder that holds all of them.

    Raises:
        ValueError: a run is named twice.
    """
    whole = [os.path.realpath(path) for path in paths]
    for i, path in enumerate(whole):
        if path in whole[:i]:
            raise ValueError(f"{paths[i]} is named twice")
    shared = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, shared) for path in whole]


def result(run: Run) -> dict[str, Any]:
    """What is compared of how far a run came."""
    reached, seconds = status(run), loop_seconds(run)
    return {
        "path": reached.path, "state": reached.state, "step": reached.step,
        "steps": reached.steps, "heldout_loss": reached.heldout_loss, "loss": reached.loss,
        "tokens": reached.tokens, "parameters": reached.parameters, "seconds": seconds,
        "tokens_per_second": reached.tokens / seconds if reached.tokens and seconds else None,
    }  # fmt: skip


def draw(
    title: str, curves: Curves, names: Sequence[str], xlabel: str, width: int, colored: bool
) -> Text:
    """Curves for a terminal of so many columns; without colours each has a character of its own."""
    import plotext

    plotext.terminal.limit(False, False)
    figure = plotext.figure.clear()
    figure.theme("simple")
    figure.plot_size(width, min(max(width // 5, 14), 24))
    figure.title(title)
    figure.label(xlabel)
    legend = Text()
    for name, (xs, values) in curves.items():
        i = names.index(name)
        color, symbol = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        marker = plotext.marker(
            "braille" if colored else symbol, plotext.pixel(color) if colored else None
        )
        figure.draw(figure.signal(xs.tolist(), values.tolist(), marker=marker).lines(len(xs) > 1))
        legend.append("━━" if colored else symbol, f"color({color})").append(f" {name}  ")
    lines = figure.build().string(colorless=not colored).splitlines()
    return Text.from_ansi("\n".join(line.rstrip() for line in lines)).append("\n").append(legend)


def page(
    grids: Sequence[Grid], notes: Sequence[str], panels: Mapping[str, Curves], xlabel: str
) -> str:
    """Tables and curves as one page, light or dark as the reader's system is."""
    from glmjax.training.plot import svg

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    parts = [
        "\n".join(
            [
                f"<div><table><caption>{html.escape(grid.title)}</caption>",
                row(grid.header, "th"),
                *(row(cells, "td") for cells in grid.rows),
                "</table></div>",
            ]
        )
        for grid in grids
        if grid.rows
    ]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    if panels:
        parts.append(svg(panels, xlabel))
    return PAGE.format(body="\n".join(parts))


def _panels(runs: Mapping[str, Run], flags: CompareFlags) -> dict[str, Curves]:
    """The curves of each metric; of the losses, unless asked for, those that are there."""
    known = sorted({metric for run in runs.values() for metric in metric_names(run)})
    panels: dict[str, Curves] = {}
    for metric in flags.metric:
        if flags.metric == LOSSES and metric not in known:
            continue
        check_metric(metric, known)
        curves = {
            name: curve(run, metric, flags.x)
            for name, run in runs.items()
            if metric in metric_names(run)
        }
        panels[metric] = {name: (xs, smooth(ys, flags.smooth)) for name, (xs, ys) in curves.items()}
    return panels


def _notes(
    runs: Mapping[str, Run], fields: Mapping[str, Any], panels: Mapping[str, Curves], points: int
) -> list[str]:
    """What the tables and curves do not show."""
    notes = [] if fields else ["the configurations are the same"]
    if points > 1:
        notes.append(f"a point of a curve is the mean of {points} that follow each other")
    first = next(iter(runs))
    for name, run in runs.items():
        if corpus(run) != corpus(runs[first]):
            notes.append(
                f"{name} has another text or vocabulary than {first}: losses may not compare"
            )
        for change in changes(run):
            for field, (old, new) in change["changes"].items():
                if field not in PLACES:
                    step = change["step"]
                    notes.append(f"{name}: from step {step} on {field} was {new}, no longer {old}")
    for metric, curves in panels.items():
        notes += [f"{name} has no {metric}" for name in runs if name not in curves]
    return notes


def _fields_grid(fields: Mapping[str, list[Any]], names: list[str]) -> Grid:
    rows = [[name, *map(str, values)] for name, values in fields.items()]
    return Grid("what differs", ["field", *names], rows)


def _results_grid(results: Mapping[str, dict[str, Any]]) -> Grid:
    first = next(iter(results.values()))
    header = [
        "run", "held-out loss", "loss", "steps", "tokens", "parameters", "seconds", "tokens/s",
        "state",
    ]  # fmt: skip

    def cell(run: dict[str, Any], name: str) -> str:
        value, base = run[name], first[name]
        is_loss = name in LOSSES
        text = format_loss(value) if is_loss else format_number(value)
        if value is None or not base or value == base:
            return text
        return f"{text} ({value - base:+.3f})" if is_loss else f"{text} ({value / base - 1:+.0%})"

    rows = [
        [
            name,
            *(cell(run, metric) for metric in LOSSES),
            f"{run['step']:,}/{run['steps']:,}",
            *(cell(run, each) for each in ("tokens", "parameters", "seconds", "tokens_per_second")),
            run["state"],
        ]
        for name, run in results.items()
    ]
    return Grid("results, and differences to the first run", header, rows)


def _table(grid: Grid, console: Console) -> Table:
    """A grid as it is or, where that is too wide and it helps, with its rows as columns."""
    cells = [grid.header, *grid.rows]
    tables = []
    for header, *rows in (cells, list(zip(*cells, strict=True))):
        table = Table(title=grid.title, title_justify="left", box=None, header_style="bold")
        for i, name in enumerate(header):
            table.add_column(escape(name), overflow="fold", justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        tables.append(table)
    if table_width(tables[0], console) <= console.width:
        return tables[0]
    return min(tables, key=lambda table: table_width(table, console))
