"""Curves as pictures: the losses of a run, and the metrics of several runs over each other."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from glmjax.training.run_folder import Curves

_INK = "#010203"  # what svg() looks for in what matplotlib wrote


def plot_losses(
    rows: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, float],
    path: Path,
    changes: Sequence[int] = (),
) -> None:
    """Training and held-out loss over steps, with a dashed line for each baseline, as a PNG.

    A dotted line marks each of the steps from which on the configuration was another.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("heldout_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    for (name, loss), color in zip(baselines.items(), ("gray", "tab:red"), strict=False):
        axes.axhline(loss, linestyle="--", color=color, label=f"{name} {loss:.2f}")
    for i, step in enumerate(changes):
        label = None if i else "configuration changed"
        axes.axvline(step, linestyle=":", color="tab:green", label=label)
    axes.set(xlabel="step", ylabel="cross entropy (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_curves(panels: Mapping[str, Curves], xlabel: str, ink: str = "black") -> Figure:
    """A panel for each metric, in which the curves of runs lie over each other."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    settings: dict[Any, Any] = {
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink,
        "ytick.color": ink, "text.parse_math": False,  # names of runs are no formulas
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8, 4 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), squeeze=False)
        for axes, (metric, curves) in zip(grid.flat, panels.items(), strict=True):
            lines = []
            for name, (xs, values) in curves.items():
                turn, color = divmod(names.index(name), 10)  # there are ten colours
                style, marker = ("-", "--", ":", "-.")[turn % 4], "." if len(xs) < 40 else None
                lines += axes.plot(xs, values, style, color=f"C{color}", marker=marker)
            axes.set(xlabel=xlabel, ylabel=metric)
            axes.grid(alpha=0.3)
            axes.legend(lines, list(curves), framealpha=0)
    return figure


def svg(panels: Mapping[str, Curves], xlabel: str) -> str:
    """The same as an element for a page, whose colour of text it takes."""
    file = io.StringIO()
    figure = plot_curves(panels, xlabel, _INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "glmjax"}):
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = file.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
