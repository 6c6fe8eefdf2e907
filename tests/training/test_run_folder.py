"""What is read from run folders is what the runs wrote, and what is broken is named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from run_folders import (
    TOKENS_OF_A_STEP,
    finished,
    make_experiment,
    training_row,
    write_lines,
    write_run,
)

from glmjax.config import Quantization, config_to_json, replace
from glmjax.model.params import count_params
from glmjax.training import run_folder
from glmjax.training.metrics import flops
from glmjax.training.run_folder import (
    changes,
    curve,
    differences,
    list_runs,
    loop_seconds,
    metric_names,
    open_run,
    smooth,
    status,
)


def test_a_trained_run_is_read_as_it_was(tiny_experiment, tiny_summary):
    run = open_run(tiny_experiment.train.run)
    assert run.experiment == tiny_experiment
    assert run.summary["heldout_loss"] == tiny_summary.heldout_loss
    reached = status(run)
    assert (reached.state, reached.step, reached.steps) == ("finished", 60, 60)
    assert reached.parameters == tiny_summary.parameters
    assert reached.tokens == tiny_summary.tokens
    assert reached.heldout_loss == tiny_summary.heldout_loss
    assert reached.tokens_per_second == tiny_summary.tokens_per_second
    steps, losses = curve(run, "loss")
    assert steps.tolist() == list(range(5, 61, 5))
    assert losses[-1] == reached.loss < losses[0]
    rows = curve(run, "rows", "tokens")
    np.testing.assert_array_equal(rows[0], rows[1] * 64)
    assert curve(run, "heldout_loss")[0].tolist() == [20, 40, 60]
    assert loop_seconds(run) == pytest.approx(tiny_summary.seconds, rel=0.2)
    assert list_runs(tiny_experiment.train.run) == [reached]


def test_along_counts_what_it_says(tmp_path):
    run = open_run(write_run(tmp_path / "run", heldout={20: 5.5}, summary=finished()))
    steps, losses = curve(run, "loss")
    assert steps.tolist() == [10, 20, 30] and losses.tolist() == [6, 5, 4]
    assert curve(run, "loss", "tokens")[0].tolist() == [5120, 10240, 15360]
    np.testing.assert_allclose(curve(run, "loss", "seconds")[0], [5.12, 10.24, 15.36])
    model = run.experiment.model
    np.testing.assert_allclose(
        curve(run, "loss", "flops")[0], [flops(model, 8 * step, 64) for step in (10, 20, 30)]
    )
    # An evaluation lies where the training rows were by then.
    assert curve(run, "heldout_loss", "tokens")[0].tolist() == [10240]
    np.testing.assert_allclose(curve(run, "heldout_loss", "seconds")[0], [10.24])


def test_tokens_follow_a_growing_batch(tmp_path):
    run = open_run(write_run(tmp_path / "run", **{"train.ramp": (4, 4, 80)}))
    tokens, _ = curve(run, "loss", "tokens")
    # 20 steps of 4 rows, then 8
    assert tokens.tolist() == [40 * 64, 80 * 64, 160 * 64]


def test_an_evaluation_between_two_rows_has_seconds_between_theirs(tmp_path):
    run = open_run(write_run(tmp_path / "run", heldout={15: 5.5}))
    np.testing.assert_allclose(curve(run, "heldout_loss", "seconds")[0], [1.5 * 5.12])


@pytest.mark.parametrize(
    ("losses", "summary", "state", "step"),
    [
        ((6.0, 5.0, 4.0), finished(), "finished", 30),
        ((6.0, 5.0), None, "unfinished", 20),
        ((6.0, 5.0), finished(23, signal="SIGTERM"), "stopped by SIGTERM", 23),
        ((6.0, 5.0, None), None, "diverged", 30),
        ((6.0, None, 4.0), finished(), "finished", 30),
        # It ended at step 10, and was continued since.
        ((6.0, 5.0), finished(10), "unfinished", 20),
        ((6.0, 5.0), finished(20), "unfinished", 20),
        ((), None, "unfinished", 0),
    ],
    ids=["finished", "running", "signal", "diverged", "recovered", "old", "continued", "new"],
)
def test_states(tmp_path, losses, summary, state, step):
    write_run(tmp_path / "run", losses, summary=summary)
    (reached,) = list_runs(tmp_path)
    assert (reached.state, reached.step) == (state, step)
    assert reached == status(open_run(tmp_path / "run"))
    assert reached.tokens == step * TOKENS_OF_A_STEP
    assert reached.parameters == count_params(make_experiment().model)


def test_runs_are_found_at_every_depth_the_newest_first(tmp_path):
    for age, name in enumerate(("new", "a/b/middle", "a/old")):
        path = write_run(tmp_path / name)
        os.utime(path / "metrics.jsonl", (1e9 - age, 1e9 - age))
    write_run(tmp_path / "new/checkpoints/inside")
    write_run(tmp_path / ".hidden/run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    found = [str(Path(each.path).relative_to(tmp_path)) for each in list_runs(tmp_path)]
    assert found == ["new", "a/b/middle", "a/old"]


def test_of_long_metrics_only_the_end_is_read(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", **{"train.steps": 10**6})
    rows = [training_row(step, 9 - step / 1e5) for step in range(1, 20_001)]
    write_lines(path / "metrics.jsonl", [{"step": 1, "heldout_loss": 7.0}, *rows])
    size = (path / "metrics.jsonl").stat().st_size
    parsed = []
    loads = json.loads
    monkeypatch.setattr(run_folder.json, "loads", lambda text: parsed.append(text) or loads(text))

    assert list_runs(tmp_path)[0].heldout_loss == 7.0  # at the very beginning
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20000, "heldout_loss": 6.5}\n{"step": 20001, "lo')
    parsed.clear()
    (reached,) = list_runs(tmp_path)
    assert (reached.heldout_loss, reached.loss, reached.step) == (6.5, rows[-1]["loss"], 20_000)
    assert sum(map(len, parsed)) < size / 50


def break_config(path: Path, text: str) -> None:
    (path / "config.json").write_text(text)


def experiment_text(**changes: object) -> str:
    values = config_to_json(make_experiment())
    for name, value in changes.items():
        values["train"][name] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: (path / "config.json").unlink(), "is no run folder: it has no config.json"),
        (lambda path: break_config(path, '{"model": '), "config.json is damaged"),
        (lambda path: break_config(path, "[1]"), "it holds a list, not an object"),
        (lambda path: break_config(path, '{"model_type": "bert"}'), "no field 'model_type'"),
        (lambda path: break_config(path, '{"train": 3}'), "not the configuration of a run"),
        (lambda path: break_config(path, experiment_text(steps="many")), "not the configuration"),
        (
            lambda path: break_config(path, experiment_text(steps=0)),
            "steps must be positive, got 0",
        ),
        (
            lambda path: (path / "metrics.jsonl").write_text('{"step": 1}\n{"st p}\n{"step": 3}\n'),
            "metrics.jsonl has a row that is not JSON: '{\"st p}'",
        ),
        (lambda path: write_lines(path / "metrics.jsonl", [{"loss": 1}]), "a row without a step"),
        (lambda path: (path / "metrics.jsonl").write_bytes(b'{"step": "\xff"}\n'), "is damaged"),
        (lambda path: (path / "summary.json").write_text('{"steps'), "summary.json is damaged"),
        (lambda path: (path / "summary.json").write_text("{}"), "how many steps were made"),
    ],
)
def test_broken_folders_are_explained_and_listed(tmp_path, damage, sentence):
    path = write_run(tmp_path / "run", summary=finished())
    damage(path)
    with pytest.raises(ValueError) as error:
        open_run(path)
    assert sentence in str(error.value) and str(path) in str(error.value)
    (listed,) = list_runs(tmp_path)
    assert listed.problem == str(error.value)
    assert listed.step is None and listed.state == "unreadable"


def test_folders_that_are_not_there_are_named(tmp_path):
    for read in (open_run, list_runs):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
            read(tmp_path / "nowhere")


def test_differences_have_a_value_of_each_run(tmp_path):
    quantized = Quantization(bits=8)
    runs = [
        open_run(write_run(tmp_path / "a")),
        open_run(write_run(tmp_path / "b", **{"train.seed": 1, "train.run": str(tmp_path / "a")})),
        open_run(write_run(tmp_path / "c", **{"optimizer.clip": 0.5})),
        open_run(write_run(tmp_path / "d", **{"data.skip": ("3:4",)})),
    ]
    found = differences(runs)
    assert found.pop("train.run") == [str(tmp_path / name) for name in ("a", "a", "c", "d")]
    assert found == {
        "data.skip": [(), (), (), ("3:4",)],
        "optimizer.clip": [1.0, 1.0, 0.5, 1.0],
        "train.seed": [0, 1, 0, 0],
    }
    model = replace(runs[0].experiment.model, quantization=quantized)
    other = open_run(
        write_run(tmp_path / "e", **{"model": model, "train.run": str(tmp_path / "a")})
    )
    assert differences([runs[0], other])["model.quantization.bits"] == [None, 8]
    assert differences([runs[0], runs[0]]) == {}


def test_unknown_metrics_name_the_near_ones(tmp_path):
    run = open_run(write_run(tmp_path / "run", heldout={20: 5.5}))
    with pytest.raises(ValueError, match=r"no metric 'heldout_los'; the nearest are heldout_loss"):
        curve(run, "heldout_los")
    with pytest.raises(ValueError, match=r"no metric 'xyz'; the nearest are .*gradient_norm"):
        curve(run, "xyz")
    with pytest.raises(ValueError, match="no step was logged yet"):
        curve(open_run(write_run(tmp_path / "empty", ())), "loss")
    assert "step" not in metric_names(run)


def test_smoothing_is_the_mean_of_the_last_points():
    values = np.array([4.0, 2.0, 6.0, 0.0])
    np.testing.assert_allclose(smooth(values, 1), values)
    np.testing.assert_allclose(smooth(values, 2), [4, 3, 4, 3])
    np.testing.assert_allclose(smooth(values, 9), [4, 3, 4, 3])
    np.testing.assert_allclose(smooth(np.array([5.0, 1.0, 1.0]), 9), [5, 3, 7 / 3])


def test_seconds_are_those_of_the_loop_over_all_starts(tmp_path):
    path = write_run(tmp_path / "run")
    assert loop_seconds(open_run(path)) == 20
    again = [
        {"step": 20, "time": 1e9 + 100, "run": "ab" * 16},
        {"step": 40, "time": 1e9 + 140, "seconds": {"init": 9.0, "step": 8.0, "data": 1.0}},
    ]
    with (path / "goodput.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in again))
    assert loop_seconds(open_run(path)) == pytest.approx(29)
    (path / "goodput.jsonl").unlink()
    assert loop_seconds(open_run(path)) is None


def test_changes_are_those_of_the_history(tmp_path):
    path = write_run(tmp_path / "run")
    assert changes(open_run(path)) == []
    line = {"step": 20, "time": "2026-11-30", "changes": {"train.steps": [30, 40]}}
    write_lines(path / "history.jsonl", [line])
    assert changes(open_run(path)) == [line]
