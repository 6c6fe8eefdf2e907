"""The loss curve of a run as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


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
