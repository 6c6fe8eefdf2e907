"""What is said of the runs of the scaling sweep: tables, sentences and pictures, all from their numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.reproduce.scores import GLM_LAMBADA, glm_sizes
from experiments.reproduce.scores import gaps as published_gaps
from glmjax.sweep.results import Result
from glmjax.sweep.scaling_law import (
    Fit,
    Law,
    Parabola,
    fit_law,
    fit_parabola,
    fit_power_law,
    frontier,
    interval,
    predict,
    predict_run,
)

LEVEL = 0.9
"""Share of what an interval is to hold."""
SAMPLES = 400
"""Bootstrap samples of the law."""


def report(results: Sequence[Result], stem: Path) -> str:
    """Fits, the held-out run beside what was foreseen, and the loss that integers cost, as Markdown;
    pictures are STEM_isoflop.png, STEM_fit.png and STEM_quantization.png."""
    finished = [result for result in results if result.status == "finished"]
    grid = [result for result in finished if not result.factors["held_out"]]
    heldout = [result for result in finished if result.factors["held_out"]]
    fit = fit_law(*columns(grid), samples=SAMPLES)
    parabolas = {
        budget: fit_parabola([run.parameters for run in runs], [run.heldout_loss for run in runs])
        for budget, runs in by_budget(grid).items()
    }
    plot_isoflop(grid, parabolas, Path(f"{stem}_isoflop.png"))
    plot_fit(grid, heldout, fit, Path(f"{stem}_fit.png"))
    plot_gaps(finished, Path(f"{stem}_quantization.png"))
    diverged = [result.trial for result in results if result.status == "diverged"]
    return "\n\n".join(
        [
            *(f"The training {trial} diverged and is in no fit." for trial in diverged),
            *("## The held-out run", foreseen(fit, heldout), f"![fit]({stem.name}_fit.png)"),
            *("## The law", coefficients(fit, grid)),
            *("## Equal FLOPs", isoflop(grid, parabolas), f"![parabolas]({stem.name}_isoflop.png)"),
            *("## Exponents beside the published ones", exponents(fit, grid, parabolas)),
            *("## Integers", quantization(finished), f"![gaps]({stem.name}_quantization.png)"),
            *("## Runs", runs_table(finished, fit)),
        ]
    )


def columns(runs: Sequence[Result]) -> tuple[list[float], list[float], list[float]]:
    """Parameters, tokens and held-out losses."""
    return (
        [run.parameters for run in runs],
        [run.tokens for run in runs],
        [run.heldout_loss for run in runs],
    )


def by_budget(runs: Sequence[Result]) -> dict[float, list[Result]]:
    budgets = sorted({float(run.factors["budget"]) for run in runs})
    return {budget: [run for run in runs if run.factors["budget"] == budget] for budget in budgets}


def flops_per_token_parameter(runs: Sequence[Result]) -> float:
    """C / (N D), the same for all runs but for how much of them is embeddings and attention."""
    return float(np.median([run.flops / (run.parameters * run.tokens) for run in runs]))


def foreseen(fit: Fit, heldout: Sequence[Result]) -> str:
    """What the law said of a run that it has not seen, and what was measured."""
    if not heldout:
        return "The held-out run has not finished."
    run = heldout[0]
    loss, low, high = predict_run(fit, run.parameters, run.tokens, LEVEL)
    off = run.heldout_loss - loss
    nearest = min(abs(run.heldout_loss - low), abs(run.heldout_loss - high))
    inside = low <= run.heldout_loss <= high
    where = "inside it" if inside else f"outside it by {nearest:.4f} nats"
    return (
        f"For {run.parameters:,} parameters and {run.tokens:,} tokens, {run.flops:.2g} FLOPs, the law "
        f"foresees a held-out loss of {loss:.4f} nats, and an interval of {LEVEL:.0%} from {low:.4f} "
        f"to {high:.4f}. Measured: {run.heldout_loss:.4f}, {where}, {abs(off):.4f} nats "
        f"({abs(off) / run.heldout_loss:.1%}) {'above' if off > 0 else 'below'} what was foreseen. "
        f"The unigram baseline is {run.unigram_loss:.4f}."
    )


def coefficients(fit: Fit, grid: Sequence[Result]) -> str:
    """The law with intervals, and how well it describes the runs it was fitted to."""
    rows = [
        f"| {name} | {_number(value)} | {' to '.join(map(_number, interval(samples, LEVEL)))} |"
        for name, value, samples in zip(Law._fields, fit.law, fit.samples, strict=True)
    ]
    typical = np.sqrt(np.mean(fit.residuals**2))
    worst = int(np.abs(fit.residuals).argmax())
    described = (
        f"{len(grid)} runs; R2 {fit.r2:.4f} of log L. Measured and fitted losses differ by {typical:.2%} "
        f"(root mean square), at most by {abs(fit.residuals[worst]):.2%} ({grid[worst].trial})."
    )
    said = [described]
    if len(grid) < 2 * len(Law._fields):
        said.append("So few runs leave the intervals uncertain.")
    if fit.law.E < 0.01 * min(run.heldout_loss for run in grid):
        said.append(
            "E comes out as 0, the edge of what is searched: these runs show no loss that more "
            "parameters and text would not lower, and the interval of E says nothing."
        )
    return "\n".join(
        [
            "L(N, D) = E + A / N^a + B / D^b, in nats per target token, N all parameters, D all tokens.",
            "",
            f"| | fitted | {LEVEL:.0%} interval |",
            "| --- | --- | --- |",
            *rows,
            "",
            " ".join(said),
        ]
    )


def isoflop(grid: Sequence[Result], parabolas: Mapping[float, Parabola]) -> str:
    """The best size of each budget, where its parabola says there is one."""
    k = flops_per_token_parameter(grid)
    lines = [
        "| FLOPs | best N | its D | loss there | best N among the sizes trained |",
        "| --- | --- | --- | --- | --- |",
    ]
    for budget, parabola in parabolas.items():
        N, best = parabola.parameters, min(by_budget(grid)[budget], key=lambda r: r.heldout_loss)
        if not parabola.inside:
            lines.append(f"| {budget:.2g} | not within the sizes | | | {best.parameters:,} |")
        else:
            lines.append(
                f"| {budget:.2g} | {N:,.0f} | {budget / (k * N):,.0f} | {parabola.loss:.4f} | "
                f"{best.parameters:,} |"
            )
    return "\n".join([*lines, "", f"D by C = {k:.2f} N D, the median of the runs."])


def minima(parabolas: Mapping[float, Parabola]) -> dict[float, Parabola]:
    return {budget: parabola for budget, parabola in parabolas.items() if parabola.inside}


def exponents(fit: Fit, grid: Sequence[Result], parabolas: Mapping[float, Parabola]) -> str:
    """Ours beside those of Hoffmann et al. and Kaplan et al., and why they need not agree."""
    best, samples = frontier(fit.law, 1.0), frontier(fit.samples, 1.0)
    low, high = interval(samples.size_exponent, LEVEL)
    rows = [
        (
            f"| parametric fit | {best.size_exponent:.2f} ({low:.2f} to {high:.2f}) | "
            f"{best.token_exponent:.2f} | {fit.law.a:.2f} | {fit.law.b:.2f} |"
        )
    ]
    found = minima(parabolas)
    if len(found) > 1:
        size = fit_power_law([p.parameters for p in found.values()], list(found)).exponents[0]
        loss = fit_power_law([p.loss for p in found.values()], list(found))
        rows.append(f"| parabolas, {len(found)} minima | {size:.2f} | {1 - size:.2f} | | |")
        falls = (
            f" Along the minima the loss itself falls as C^{loss.exponents[0]:.3f}; in Kaplan et al. as "
            "C^-0.050."
        )
    else:
        falls = ""
    rows += [
        f"| {source} | {' | '.join(values)} |"
        for source, values in (
            ("Hoffmann et al. 2022, approach 2", ("0.49", "0.51", "", "")),
            ("Hoffmann et al. 2022, approach 3", ("0.46", "0.54", "0.34", "0.28")),
            ("Kaplan et al. 2020", ("0.73", "0.27", "0.076", "0.095")),
        )
    ]
    shares = [1 - _in_blocks(run) / run.parameters for run in grid]
    return "\n".join(
        [
            "| | best N as C to the | best D as C to the | a | b |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Under the law the part of the loss above E falls as C^-{best.loss_exponent:.3f} at best.{falls}",
            "",
            (
                f"Of the parameters of these models {min(shares):.0%} to {max(shares):.0%} are not in the "
                "matrices of the blocks, most of them in the word embedding. They count in N here and in "
                "Hoffmann et al., and not in Kaplan et al., whose a and b are those of separate power laws "
                "without E. Theirs are causal models of 0.07 to 16 billion parameters "
                "(Hoffmann et al.) and up to 1.5 billion (Kaplan et al.) on other text: agreement is not to be "
                "expected, and where it shows it is no confirmation."
            ),
        ]
    )


def gaps(runs: Sequence[Result], weights: str) -> list[float]:
    """Nats that integers of a kind cost each run."""
    return [run.numbers[f"loss/{weights}"] - run.numbers["loss/float"] for run in runs]


def quantization(runs: Sequence[Result]) -> str:
    """What integers cost, by size; fitted where they cost anything, since a logarithm needs that."""
    kinds = [name.removeprefix("loss/") for name in runs[0].numbers if "int" in name]
    lines = [
        (
            "Weights of the blocks as integers with a scale for each row, activations as they were. The gap "
            "is the held-out loss with integers minus that with floats, in nats."
        ),
        "",
        "| weights | smallest and largest gap | runs that lose | gap as N to the | R2 | as N and D to the | R2 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for weights in kinds:
        all_gaps, (lost, cost) = gaps(runs, weights), losing(runs, weights)
        row = f"| {weights} | {min(all_gaps):.1e} to {max(all_gaps):.1e} | {len(lost)} of {len(runs)} |"
        if len(lost) > 3:
            sizes, tokens, _ = columns(lost)
            size_only = fit_power_law(cost, sizes)
            both = fit_power_law(cost, sizes, tokens)
            row += (
                f" {size_only.exponents[0]:.2f} | {size_only.r2:.2f} | {both.exponents[0]:.2f}, "
                f"{both.exponents[1]:.2f} | {both.r2:.2f} |"
            )
        else:
            row += " | | | |"
        lines.append(row)
    paper = fit_power_law(published_gaps(GLM_LAMBADA, "absmax INT4"), glm_sizes())
    published = (
        f"In Table 10 of GLM-130B the INT4 gap in LAMBADA accuracy goes as N^{paper.exponents[0]:.2f} from "
        f"110M to 130B (R2 {paper.r2:.2f}, absmax)."
    )
    lost, cost = losing(runs, "int4 absmax")
    if len(lost) < 3:
        return "\n".join([*lines, "", published, "Here too few runs lose anything to say how."])
    ours = fit_power_law(cost, [run.parameters for run in lost])
    exponent, error = ours.exponents[0], ours.errors[0]
    trend = "no trend shows" if abs(exponent) < 2 * error else "falls" if exponent < 0 else "grows"
    found = (
        f"Here, in nats and among the {len(lost)} runs that lose, the exponent is {exponent:.2f}, with a "
        f"standard error of {error:.2f} (R2 {ours.r2:.2f}): with N "
        f"{trend if trend.startswith('no') else f'it {trend}'}. The measures differ, and among runs of equal "
        "FLOPs larger models have read less; the columns of N and D tell the two apart."
    )
    return "\n".join([*lines, "", published, found])


def runs_table(runs: Sequence[Result], fit: Fit) -> str:
    lines = [
        "| FLOPs | width x layers | N | D | steps | held-out loss | of the law | INT8 absmax | INT4 absmax |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        int8, int4 = gaps([run], "int8 absmax")[0], gaps([run], "int4 absmax")[0]
        held_out = " (held out)" if run.factors["held_out"] else ""
        lines.append(
            f"| {run.flops:.2e}{held_out} | {run.factors['width']} x {run.factors['layers']} | "
            f"{run.parameters:,} | {run.tokens:,} | {run.steps:,} | {run.heldout_loss:.4f} | "
            f"{predict(fit.law, run.parameters, run.tokens):.4f} | {int8:+.5f} | {int4:+.5f} |"
        )
    return "\n".join(lines)


def losing(runs: Sequence[Result], weights: str) -> tuple[list[Result], list[float]]:
    """The runs that integers of a kind cost something, and how much."""
    lost = [run for run in runs if gaps([run], weights)[0] > 0]
    return lost, gaps(lost, weights)


def _in_blocks(run: Result) -> float:
    """Parameters of the matrices of the blocks."""
    return 12 * int(run.factors["layers"]) * int(run.factors["width"]) ** 2


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def plot_isoflop(grid: Sequence[Result], parabolas: Mapping[float, Parabola], path: Path) -> None:
    """Loss over size with a parabola for each budget, and its minimum where it lies within."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (budget, runs), color in zip(by_budget(grid).items(), _shades(len(parabolas)), strict=True):
        sizes, _, losses = columns(runs)
        parabola = parabolas[budget]
        axes.plot(sizes, losses, "o", color=color, label=f"{budget:.2g} FLOPs")
        N = np.geomspace(min(sizes), max(sizes), 100)
        axes.plot(N, np.polyval(np.polyfit(np.log(sizes), losses, 2), np.log(N)), color=color)
        if parabola.inside:
            axes.plot(parabola.parameters, parabola.loss, "*", color=color, markersize=16)
    if any(parabola.inside for parabola in parabolas.values()):
        axes.plot([], [], "*", color="gray", markersize=12, label="minimum")
    _finish(axes, "parameters N", "held-out loss (nats per target token)")
    figure.savefig(path, dpi=100)


def plot_fit(grid: Sequence[Result], heldout: Sequence[Result], fit: Fit, path: Path) -> None:
    """Loss over tokens with the law for each size, and measured loss over that of the law."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    sizes, tokens, losses = map(np.array, columns([*grid, *heldout]))
    held_out = np.arange(len(sizes)) >= len(grid)
    norm, colors = LogNorm(sizes.min(), sizes.max()), colormaps["viridis"]
    D = np.geomspace(tokens.min(), tokens.max(), 100)
    for size in sorted(set(sizes)):
        left.plot(D, predict(fit.law, size, D), color=colors(norm(size)), linewidth=1)
    style = {"c": sizes, "norm": norm, "cmap": colors, "edgecolor": "black", "zorder": 3}
    for axes, x in ((left, tokens), (right, predict(fit.law, sizes, tokens))):
        for marker, part in (("o", ~held_out), ("D", held_out)):
            kept = {name: value[part] if name == "c" else value for name, value in style.items()}
            axes.scatter(x[part], losses[part], marker=marker, **kept)
    ends = losses.min(), losses.max()
    right.plot(ends, ends, color="gray", label="law = measured")
    for run in heldout:
        loss, low, high = predict_run(fit, run.parameters, run.tokens, LEVEL)
        right.errorbar(
            loss, run.heldout_loss, xerr=[[loss - low], [high - loss]], fmt="none", capsize=4,
            color="tab:red", label=f"held-out run, {LEVEL:.0%} interval",
        )  # fmt: skip
    figure.colorbar(ScalarMappable(norm, colors), ax=left, label="parameters N")
    left.plot([], [], "D", color="gray", label="held-out run")
    _finish(left, "tokens D", "held-out loss (nats per target token)")
    _finish(right, "loss of the law", "held-out loss", scale="linear")
    figure.savefig(path, dpi=100)


def plot_gaps(runs: Sequence[Result], path: Path) -> None:
    """What integers cost over size: ours in nats, and GLM-130B's Table 10 in LAMBADA accuracy."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [run.tokens for run in runs]
    for weights, style in (
        ("int8 absmax", "C0v"),
        ("int4 zeropoint", "C1s"),
        ("int4 absmax", "C2o"),
    ):
        lost, cost = losing(runs, weights)
        if len(lost) > 2:
            _plot_power_law(left, cost, [run.parameters for run in lost], style, weights)
    _plot_power_law(
        right, published_gaps(GLM_LAMBADA, "absmax INT4"), glm_sizes(), "C2o", "INT4 absmax"
    )
    left.set_title(f"here, {min(tokens):.1g} to {max(tokens):.1g} tokens")
    right.set_title("GLM-130B, Table 10")
    for axes, unit in ((left, "nats per target token"), (right, "points of LAMBADA accuracy")):
        _finish(axes, "parameters N", f"cost of integers ({unit})")
        axes.set_yscale("log")
    figure.savefig(path, dpi=100)


def _plot_power_law(
    axes: Axes, y: Sequence[float], x: Sequence[float], style: str, name: str
) -> None:
    """Points, and the power law through them as a line."""
    law = fit_power_law(y, x)
    label = f"{name}: N^{law.exponents[0]:.2f}, R2 {law.r2:.2f}"
    axes.plot(x, y, style, label=label)
    ends = np.array([min(x), max(x)])
    axes.plot(ends, law.coefficient * ends ** law.exponents[0], style[:2], linewidth=1)


def _shades(number: int) -> np.ndarray:
    return colormaps["viridis"](np.linspace(0, 0.85, number))


def _finish(axes: Axes, x: str, y: str, scale: str = "log") -> None:
    axes.set(xlabel=x, ylabel=y, xscale=scale)
    if scale == "log":
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.grid(alpha=0.3)
    axes.legend()
