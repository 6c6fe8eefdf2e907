"""Figures: ours beside what was published."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import glm_130b
from experiments.reproduce import memory, scores
from glmjax.data.ramp import batch_size_at, rows_before
from glmjax.training.schedule import warm_up_and_decay

BLUE, ORANGE, GREEN, GRAY = "tab:blue", "tab:orange", "tab:green", "0.6"
FAMILIES = (
    ("GLM", scores.glm_sizes, scores.GLM_LAMBADA, BLUE),
    ("BLOOM", lambda: scores.BLOOM_SIZES, scores.BLOOM_LAMBADA, ORANGE),
)


def draw(folder: Path) -> None:
    """Writes every figure of the report."""
    int4_gap(folder / "reproduction_int4_gap.png")
    lambada(folder / "reproduction_lambada.png")
    schedule(folder / "reproduction_schedule.png")
    weights(folder / "reproduction_memory.png")


def _figure(columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * columns, 4.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def int4_gap(path: Path) -> None:
    """What INT4 costs over size, with power laws."""
    figure, panels = _figure(2)
    for axes, weights in zip(panels, ("absmax INT4", "zero-point INT4"), strict=True):
        for family, sizes, accuracy, color in FAMILIES:
            gaps = scores.gaps(accuracy, weights)
            size, gap = np.array(sizes()), np.array(gaps)
            law, some = scores.power_law(sizes(), gaps), gap > 0
            axes.plot(size[some], gap[some], "o", color=color)
            known = size[~np.isnan(gap)]
            line = np.array([known.min(), known.max()])
            exponent = round(law.slope, 2) + 0.0  # no -0.00
            label = f"{family}: exponent {exponent:.2f}, $R^2$ {law.r_squared:.2f}"
            axes.plot(line, 10**law.intercept * line**law.slope, color=color, label=label)
            for n, g in zip(size[gap <= 0], gap[gap <= 0], strict=True):
                axes.annotate(
                    f"{family}: {g} (gains)", (n, 0.3), ha="right", va="bottom", color=color
                )
        axes.set(
            xscale="log", yscale="log", title=weights, xlabel="parameters", ylim=(0.25, 60),
            ylabel="LAMBADA points lost against FP16",
        )  # fmt: skip
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.08))
    figure.savefig(path, dpi=120)


def lambada(path: Path) -> None:
    """Accuracy over size in FP16, with lines over log parameters."""
    figure, (axes,) = _figure()
    for family, sizes, accuracy, color in FAMILIES:
        size, found = np.array(sizes()), accuracy["FP16"]
        line = scores.fit_line([math.log10(n) for n in sizes()], found)
        ends = np.array([size.min(), size.max()])
        label = f"{family}: {line.slope:.1f} points a decade, $R^2$ {line.r_squared:.2f}"
        axes.plot(size, found, "o", color=color)
        axes.plot(ends, line.intercept + line.slope * np.log10(ends), color=color, label=label)
    axes.set(xscale="log", xlabel="parameters", ylabel="LAMBADA accuracy, FP16 (%)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def schedule(path: Path) -> None:
    """The learning rate and the batch of GLM-130B over rows."""
    experiment = glm_130b.experiment()
    train, optimizer = experiment.train, experiment.optimizer
    figure, (left, right) = _figure(2)
    rows = np.linspace(0, 2.2e8, 2000)
    left.plot(rows / 1e6, [warm_up_and_decay(optimizer, n) for n in rows], color=BLUE)
    released = rows_before(train, train.steps) / 1e6
    left.axvline(released, color=GRAY, linestyle="--")
    left.annotate("released: step 49,300 ", (released, 7.5e-5), ha="right", color="0.4")
    left.set(xlabel="million rows of 2048 tokens", ylabel="learning rate", ylim=0)
    steps = range(0, 4600, 10)
    before = [rows_before(train, step) / 1e6 for step in steps]
    right.step(before, [batch_size_at(train, step) for step in steps], where="post", color=GREEN)
    right.set(xlabel="million rows of 2048 tokens", ylabel="rows of a step", ylim=0)
    figure.savefig(path, dpi=120)


def weights(path: Path) -> None:
    """Weights and cache of GLM-130B as bars, the memory of GPUs as lines."""
    figure, (axes,) = _figure()
    kinds: tuple[memory.Weights, ...] = ("FP16", "INT8", "INT4")
    sizes = np.array([memory.weight_bytes("glm-130b", kind) for kind in kinds]) / memory.GIB
    cache = memory.cache_bytes("glm-130b") / memory.GIB
    axes.bar(kinds, sizes, color=BLUE, width=0.5, label="weights")
    axes.bar(kinds, cache, bottom=sizes, color=ORANGE, width=0.5, label="cache of 2048 tokens")
    rooms = dict.fromkeys((gpus, kind) for gpus, kind, *_ in memory.HARDWARE)
    for gpus, kind in rooms:
        room = gpus * memory.GPU_MEMORY[kind]
        axes.axhline(room, color=GRAY, linestyle="--", linewidth=1)
        side = "top" if kind == "RTX 2080 Ti" else "bottom"  # the line above is close
        axes.annotate(f"{gpus} x {kind}", (2.95, room), ha="right", va=side, color="0.4")
    axes.set(ylabel="GiB", ylim=(0, 340), xlim=(-0.5, 3))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, 0.93))
    figure.savefig(path, dpi=120)
