"""Ablations: one thing changed, a few seeds each, and a verdict that the numbers give.

Trials that differ in their seed alone are one variant. Variants are compared seed by seed: the same
seed means the same rows of text in the same order, so that what remains is the change and chance.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from scipy import stats  # jax depends on it

from glmjax.config import Experiment, replace
from glmjax.data.blanks import text_length
from glmjax.sweep.evaluate import heldout_batches, heldout_losses, open_trained
from glmjax.sweep.results import Result

Changes = Mapping[str, Any]
"""Fields of an experiment and their values, as `glmjax.config.replace` takes them."""
Values = Mapping[int, float]
"""A number for each seed; not a number where the training diverged."""

CONFIDENCE = 0.95
METRICS = {"heldout_loss": "held-out loss"}
OBJECTIVE_METRICS = {
    **METRICS,
    "loss/mask": "held-out loss, [MASK] rows",
    "loss/gmask": "held-out loss, [gMASK] rows",
}
STABILITY_METRICS = {
    **METRICS,
    "largest_rise": "largest rise of the training loss above its lowest",
}
UNGUARDED: Changes = {"train.exploding_ratio": 1e9, "train.max_skipped": 3}
"""No step is skipped for a large gradient; three in a row that are not finite end a training."""


# What is trained


def cross(first: Mapping[str, Changes], second: Mapping[str, Changes]) -> dict[str, dict[str, Any]]:
    """Every variant of one thing with every variant of another."""
    return {f"{a}, {b}": {**x, **y} for a, x in first.items() for b, y in second.items()}


def rates(base: Experiment) -> dict[str, Changes]:
    """The learning rate of an experiment, and ten times it, where a model shows how stable it is."""
    high = 10 * base.optimizer.learning_rate
    return {"usual rate": {}, "10 x rate": {"optimizer.learning_rate": high, **UNGUARDED}}


# What is measured


def heldout_by(ways: Mapping[str, Changes], run: Path) -> dict[str, float]:
    """Held-out loss of a trained model with the objective changed in several ways, by their names.

    All ways read the rows of text that the model's own evaluations read.
    """
    experiment, params = open_trained(run)
    length = text_length(experiment.objective, experiment.data.sequence_length)
    rows = {"data.text_length": experiment.data.text_length or length}
    return {
        name: heldout_losses(
            experiment.model, params, heldout_batches(replace(experiment, **{**rows, **changes}))
        )["loss"]
        for name, changes in ways.items()
    }


def by_objective(run: Path) -> dict[str, float]:
    """Held-out loss of rows with [MASK] blanks, and of rows with one [gMASK] blank at the end."""
    ways = {"loss/mask": {"objective.token": 1.0}, "loss/gmask": {"objective.token": 0.0}}
    return heldout_by(ways, run)


def largest_rise(result: Result) -> float:
    """How far the logged training loss rose above its lowest before, in nats."""
    losses = np.array([loss for _, loss in result.loss_curve])
    if _lost(result) or not len(losses):
        return math.nan
    return float(np.max(losses - np.minimum.accumulate(losses)))


def variant(result: Result) -> str:
    """What a result is a repetition of: its factors without the seed."""
    return ", ".join(map(str, result.factors.values()))


def values_of(results: Sequence[Result], name: str, metric: str) -> Values:
    """A metric of a variant: "heldout_loss", "largest_rise" or one of `Result.numbers`.

    Raises:
        ValueError: there is no such variant.
    """
    mine = [result for result in results if variant(result) == name]
    if not mine:
        names = ", ".join(dict.fromkeys(map(variant, results)))
        raise ValueError(f"there is no variant {name!r} among {names}")
    return {
        result.seed: {
            "heldout_loss": result.heldout_loss,
            "largest_rise": largest_rise(result),
            **result.numbers,
        }.get(metric, math.nan)
        for result in mine
    }


# What it says


@dataclass(frozen=True)
class Difference:
    """The mean of what one thing has more than another, over seeds that both finished."""

    mean: float
    low: float
    """Ends of the 95% interval by Student's t; not numbers for fewer than two seeds."""
    high: float
    seeds: int

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:+.4f}" if self.seeds else "-"
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def difference(values: Values, reference: Values) -> Difference:
    """Paired by seed."""
    pairs = [values[seed] - reference[seed] for seed in values if seed in reference]
    finite = np.array([pair for pair in pairs if math.isfinite(pair)])
    count = len(finite)
    mean = float(finite.mean()) if count else math.nan
    if count < 2:
        return Difference(mean, math.nan, math.nan, count)
    error = finite.std(ddof=1) / math.sqrt(count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error)
    return Difference(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Trend:
    """What others found, or expect: `better` is lower than `worse`."""

    better: str
    worse: str
    source: str
    """Where, and with which numbers."""
    metric: str = "heldout_loss"
    worse_metric: str | None = None
    """Where not the metric of `better`: a model measured in two ways."""


Kind = Literal["shows", "does not show", "is reversed", "cannot be judged"]

REASONS: Mapping[Kind, str] = {
    "shows": "shows at this scale",
    "does not show": "does not show at this scale, the difference is within the spread of the seeds",
    "is reversed": "is reversed at this scale",
    "cannot be judged": "cannot be judged, fewer than two seeds are left",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a trend shows in some results."""

    kind: Kind
    sentence: str


def verdict(results: Sequence[Result], trend: Trend, metrics: Mapping[str, str]) -> Verdict:
    """Whether a trend shows: by how often trainings of either variant diverged, where that is more
    than chance explains (Fisher's exact test, one-sided, 5%), else by where the 95% interval of the
    difference lies."""
    other = trend.worse_metric or trend.metric
    better = values_of(results, trend.better, trend.metric)
    worse = values_of(results, trend.worse, other)
    found = difference(better, worse)
    lost = [_diverged(results, name) for name in (trend.better, trend.worse)]
    kind = _judge(found, (lost[0], len(better)), (lost[1], len(worse)))

    numbers = []
    if any(lost):
        ends = f"{lost[0]} of {len(better)} against {lost[1]} of {len(worse)}"
        numbers.append(f"{ends} trainings diverged")
    if found.seeds:
        means = f"{_mean(better):.4f} against {_mean(worse):.4f}"
        numbers.append(f"{means}, difference {found}, {found.seeds} seeds")
    said = "; ".join(numbers)
    return Verdict(
        kind, f"{claim(trend, metrics)}: {REASONS[kind]}. {said}. Expected: {trend.source}."
    )


def claim(trend: Trend, metrics: Mapping[str, str]) -> str:
    """What a trend says, in the words of the metrics."""
    if trend.better == trend.worse:
        return f"{metrics[trend.metric]} below {metrics[trend.worse_metric or trend.metric]}"
    return f"{trend.better} below {trend.worse} in {metrics[trend.metric]}"


def _judge(found: Difference, better: tuple[int, int], worse: tuple[int, int]) -> Kind:
    """From the difference, and (diverged, trainings) of either."""
    if _more_often(worse, better):
        return "shows"
    if _more_often(better, worse):
        return "is reversed"
    if found.seeds < 2:
        return "cannot be judged"
    return "shows" if found.high < 0 else "is reversed" if found.low > 0 else "does not show"


def _more_often(these: tuple[int, int], those: tuple[int, int]) -> bool:
    table = [[lost, trainings - lost] for lost, trainings in (these, those)]
    return bool(stats.fisher_exact(table, alternative="greater").pvalue <= 1 - CONFIDENCE + 1e-9)


def _lost(result: Result) -> bool:
    return result.status == "diverged"


def _diverged(results: Sequence[Result], name: str) -> int:
    return sum(_lost(result) for result in results if variant(result) == name)


def _finite(values: Values) -> list[float]:
    return [value for value in values.values() if math.isfinite(value)]


def _mean(values: Values) -> float:
    finite = _finite(values)
    return float(np.mean(finite)) if finite else math.nan


# How it is shown


def report(
    results: Sequence[Result],
    stem: Path,
    metrics: Mapping[str, str] = METRICS,
    trends: Sequence[Trend] = (),
) -> str:
    """Markdown with a verdict on each trend and a table of each metric, and a picture STEM.png.

    `metrics` has headings by the names that `values_of` knows. Of a single variant the metrics
    are compared with one another.
    """
    plot(results, metrics, Path(f"{stem}.png"))
    verdicts = [verdict(results, trend, metrics) for trend in trends]
    return "\n\n".join(
        [
            "\n".join(f"* {verdict.sentence}" for verdict in verdicts),
            *(_table(heading, rows) for heading, rows in arms(results, metrics).items()),
            *_notices(results),
            f"![losses]({stem.name}.png)",
        ]
    )


def arms(results: Sequence[Result], metrics: Mapping[str, str]) -> dict[str, dict[str, Values]]:
    """What is compared with what: for each metric its values by variant, or, where there is one
    variant, the values by metric."""
    names = list(dict.fromkeys(map(variant, results)))
    by_metric = {
        heading: {name: values_of(results, name, metric) for name in names}
        for metric, heading in metrics.items()
    }
    if len(names) > 1:
        return by_metric
    return {"held-out loss": {heading: rows[names[0]] for heading, rows in by_metric.items()}}


def _table(heading: str, rows: Mapping[str, Values]) -> str:
    """Mean, standard deviation over seeds, and the difference to the first row."""
    first = next(iter(rows))
    lines = [
        f"| {heading} | mean | spread | difference to {first} (95%) | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in rows.items():
        finite = _finite(values)
        spread = f"{np.std(finite, ddof=1):.4f}" if len(finite) > 1 else "-"
        mean = f"{_mean(values):.4f}" if finite else "-"
        against = "" if name == first else str(difference(values, rows[first]))
        seeds = f"{len(finite)} of {len(values)}" if len(finite) < len(values) else len(finite)
        lines.append(f"| {name} | {mean} | {spread} | {against} | {seeds} |")
    return "\n".join(lines)


def _notices(results: Sequence[Result]) -> list[str]:
    """Sentences on the trainings that did not learn."""
    diverged = [f"{result.trial} at step {result.steps}" for result in results if _lost(result)]
    stuck = [result.trial for result in results if result.heldout_loss >= result.unigram_loss]
    notices = []
    if diverged:
        notices.append(f"Diverged, and left out of the numbers: {'; '.join(diverged)}.")
    if stuck:
        notices.append(
            f"Ended no better than the frequencies of tokens do (unigram loss): {'; '.join(stuck)}."
        )
    return notices


def plot(results: Sequence[Result], metrics: Mapping[str, str], path: Path) -> None:
    """Held-out loss over steps, the mean of each variant in the band of its seeds, and beside it
    the value of every training in each metric, as a PNG."""
    groups = arms(results, metrics)
    figure = Figure(figsize=(5.5 + 3.2 * len(groups), 5), layout="constrained")
    left, *others = figure.subplots(
        1, 1 + len(groups), width_ratios=[5.5, *[3.2] * len(groups)], squeeze=False
    )[0]
    for name in dict.fromkeys(map(variant, results)):
        curves = [dict(result.heldout_curve) for result in results if variant(result) == name]
        steps = sorted({step for curve in curves for step in curve})
        losses = [[curve[step] for curve in curves if step in curve] for step in steps]
        (line,) = left.plot(steps, [np.mean(row) for row in losses], label=name)
        low, high = [min(row) for row in losses], [max(row) for row in losses]
        left.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    left.set(xlabel="step", ylabel="held-out loss (nats per target)")
    figure.legend(loc="outside upper left", ncols=4, fontsize="small")
    left.grid(alpha=0.3)
    for axes, (heading, rows) in zip(others, groups.items(), strict=True):
        for i, values in enumerate(rows.values()):
            finite = _finite(values)
            axes.plot([i] * len(finite), finite, "o", color=f"C{i % 10}", alpha=0.6)
            axes.plot([i - 0.25, i + 0.25], [_mean(values)] * 2, color=f"C{i % 10}")
        axes.set_xticks(range(len(rows)), rows, rotation=45, ha="right", fontsize="small")
        axes.set_title(textwrap.fill(heading, 32), fontsize="medium")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def summary_line(
    file: str,
    question: str,
    results: Sequence[Result],
    metrics: Mapping[str, str],
    trends: Sequence[Trend],
) -> str:
    """A row of a table of ablations: file, question, and what became of each trend."""
    found = "; ".join(
        f"{claim(trend, metrics)}: {verdict(results, trend, metrics).kind}" for trend in trends
    )
    return f"| `{file}` | {question} | {found} |"
