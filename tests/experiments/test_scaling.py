import dataclasses
import math
import re

import numpy as np
import pytest

from experiments import scaling, scaling_report
from glmjax.config import replace
from glmjax.model.params import count_params
from glmjax.sweep.execute import train_trial
from glmjax.sweep.results import Result, read_result
from glmjax.sweep.scaling_law import Law, predict
from glmjax.sweep.trials import Sweep, Trial
from glmjax.training.metrics import flops

TRUE = Law(1.5, 60.0, 300.0, 0.3, 0.35)
NOISE = 0.003


def size_of(trial: Trial) -> tuple[int, int, float]:
    """Parameters, tokens and FLOPs."""
    model, train, data = trial.experiment.model, trial.experiment.train, trial.experiment.data
    rows = train.steps * train.batch_size
    return (
        count_params(model), rows * data.sequence_length, flops(model, rows, data.sequence_length)
    )  # fmt: skip


def made_up(trial: Trial, rng: np.random.Generator) -> Result:
    """A result that follows a law, with integers that cost more in small models."""
    parameters, tokens, total = size_of(trial)
    loss = float(predict(TRUE, parameters, tokens) * np.exp(NOISE * rng.standard_normal()))
    costs = {"int8 absmax": 1e-1, "int8 zeropoint": -1e-1, "int4 absmax": 30, "int4 zeropoint": 20}
    return Result(
        trial=trial.name, seed=0, factors=dict(trial.factors), status="finished",
        parameters=parameters, flops=total, steps=trial.experiment.train.steps, tokens=tokens,
        heldout_loss=loss, unigram_loss=7.0, seconds=1.0, tokens_per_second=1.0,
        heldout_curve=((1, loss),), loss_curve=((1, loss),),
        numbers={
            "loss/float": loss,
            **{f"loss/{kind}": loss + cost * parameters**-0.5 for kind, cost in costs.items()},
        },
    )  # fmt: skip


@pytest.fixture
def results(monkeypatch) -> list[Result]:
    monkeypatch.setattr(scaling_report, "SAMPLES", 10)
    rng = np.random.default_rng(0)
    return [made_up(trial, rng) for trial in scaling.sweep("cpu").trials]


@pytest.mark.parametrize("scale", ["tiny", "cpu", "gpu", "pod"])
def test_every_budget_is_spent_on_several_sizes(scale):
    grid, trials = scaling.GRIDS[scale], scaling.sweep(scale).trials
    for trial in trials:
        budget = float(trial.factors["budget"])
        assert size_of(trial)[2] == pytest.approx(budget, rel=0.03)
        assert trial.experiment.optimizer.decay == trial.experiment.train.steps
    for budget in grid.budgets:
        sizes = [size_of(trial)[0] for trial in trials if trial.factors["budget"] == budget]
        assert sorted(set(sizes)) == sizes and len(sizes) >= 3
    heldout = [trial for trial in trials if trial.factors["held_out"]]
    assert len(heldout) == 1 and heldout == [trials[-1]]
    assert heldout[0].factors["budget"] == pytest.approx(3 * max(grid.budgets), rel=0.01)
    evaluations = {
        (trial.experiment.train.batch_size, trial.experiment.train.evaluate_batches)
        for trial in trials
    }
    assert len(evaluations) == 1, "all are measured on the same rows"


def test_the_report_foresees_a_run_of_the_law(results, tmp_path):
    text = scaling_report.report(results, tmp_path / "scaling_cpu")
    loss = float(re.search(r"a held-out loss of ([\d.]+) nats", text)[1])
    N, D = results[-1].parameters, results[-1].tokens
    assert loss == pytest.approx(float(predict(TRUE, N, D)), rel=0.02)
    assert ", inside it," in text
    for name in re.findall(r"\]\((.*\.png)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("scaling_cpu*.png"))) == 3
    int4 = next(line for line in text.splitlines() if line.startswith("| int4 absmax |"))
    runs = len(results)
    assert f"| {runs} of {runs} | -0.50 | 1.00 |" in int4
    assert "| int8 zeropoint |" in text and f"| 0 of {runs} | | | | |" in text
    assert "E comes out as 0" not in text


def test_no_fit_sees_the_held_out_run(results, tmp_path):
    worse = dataclasses.replace(results[-1], heldout_loss=results[-1].heldout_loss + 1)
    first, second = (
        scaling_report.report([*results[:-1], run], tmp_path / "scaling_cpu")
        for run in (results[-1], worse)
    )
    parts = [text.split("## The law")[1].split("## Integers")[0] for text in (first, second)]
    assert parts[0] == parts[1]
    assert ", outside it by " in second and " above what was foreseen" in second


def test_a_diverged_run_is_named_and_left_out(results, tmp_path):
    lost = dataclasses.replace(
        results[3], status="diverged", heldout_loss=math.nan, numbers={}, seconds=math.nan
    )
    text = scaling_report.report([*results[:3], lost, *results[4:]], tmp_path / "scaling_cpu")
    assert f"The training {lost.trial} diverged and is in no fit." in text
    assert f"{len(results) - 2} runs;" in text and "nan" not in text


def test_runs_without_a_smallest_loss_are_said_to_have_none(results, tmp_path):
    endless = TRUE._replace(E=1e-9, b=0.06, B=13.0)
    runs = [
        dataclasses.replace(run, heldout_loss=float(predict(endless, run.parameters, run.tokens)))
        for run in results
    ]
    text = scaling_report.report(runs, tmp_path / "scaling_cpu")
    assert "E comes out as 0" in text


def test_a_diverged_held_out_run_is_not_compared(results, tmp_path):
    lost = dataclasses.replace(results[-1], status="diverged", heldout_loss=math.nan, numbers={})
    text = scaling_report.report([*results[:-1], lost], tmp_path / "scaling_cpu")
    assert "The held-out run has not finished." in text


@pytest.mark.slow
def test_a_trained_model_is_measured_with_integers(tmp_path):
    trial = scaling.sweep("tiny").trials[0]
    trial = dataclasses.replace(trial, experiment=replace(trial.experiment, **{"train.steps": 8}))
    sweep = Sweep("scaling", (trial,), scaling_report.report, scaling.evaluate)
    result = read_result(sweep, trial, train_trial(sweep, trial, tmp_path, "test"))
    numbers = result.numbers
    assert numbers["loss/float"] == pytest.approx(result.heldout_loss, abs=1e-5)
    gaps = {kind: abs(numbers[f"loss/{kind}"] - numbers["loss/float"]) for kind in scaling.WEIGHTS}
    assert set(gaps) == {"int8 absmax", "int8 zeropoint", "int4 absmax", "int4 zeropoint"}
    assert 0 < gaps["int8 absmax"] < gaps["int4 absmax"] < 0.1
