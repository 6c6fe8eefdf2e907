"""A run goes on with another configuration, and writes down which."""

import json
import shutil
from pathlib import Path

import pytest

from glmjax.config import Experiment, config_from_json, replace
from glmjax.training.history import changed_fields, check_continuation
from glmjax.training.loop import fit
from glmjax.training.metrics import read_metrics

RATES = "optimizer.learning_rate_changes"
SCALES = "optimizer.embedding_gradient_scale_changes"
SAVED = replace(
    Experiment(),
    **{RATES: ((5, 1e-4, 0.1), (20, 1e-5, 0.1)), SCALES: ((8, 10, 0.5),), "data.skip": ("3:4",)},
)


def test_changed_fields_have_both_values():
    new = replace(SAVED, **{"train.steps": 7, RATES: ()})
    assert changed_fields(SAVED, new) == {
        RATES: (((5, 1e-4, 0.1), (20, 1e-5, 0.1)), ()),
        "train.steps": (1000, 7),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {RATES: ((5, 1e-4, 0.1), (10, 1e-5, 0.1))},
        {RATES: ((5, 1e-4, 0.1),)},
        {SCALES: ((8, 10, 0.5), (10, 0, 0.1))},
        {"data.skip": ("3:4", "10:12")},
    ],
    ids=["rate-from-now", "later-rate-dropped", "ramp-cut-short", "data"],
)
def test_schedules_may_change_from_the_next_step_on(changes):
    check_continuation(SAVED, replace(SAVED, **changes), 10, "runs/a/checkpoints/10")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {RATES: ((4, 1e-4, 0.1),)},
            rf"^{RATES}: .* -> \(\(4, 0.0001, 0.1\),\) would change .* 10",
        ),
        ({RATES: ((5, 1e-4, 0.1), (9, 1e-5, 0.1))}, f"^{RATES}: .* checkpoint folder/10; keep"),
        ({SCALES: ()}, f"^{SCALES}: .* would change steps before 10"),
        ({"data.skip": ("3:5",)}, r"^data.skip: \('3:4',\) -> \('3:5',\) would change"),
    ],
    ids=["moved", "added", "ramp-dropped", "data"],
)
def test_what_is_done_is_not_rewritten(changes, message):
    with pytest.raises(ValueError, match=message):
        check_continuation(SAVED, replace(SAVED, **changes), 10, "folder/10")


@pytest.fixture
def continued(tiny_experiment, tiny_summary, tmp_path) -> Experiment:
    """A finished run of 60 steps to be continued in another folder."""
    shutil.copytree(tiny_experiment.train.run, tmp_path / "run")
    return replace(
        tiny_experiment,
        **{
            "train.run": str(tmp_path / "run"), "train.steps": 64, "train.log_every": 1,
            RATES: ((62, 5e-4, 0.2),), SCALES: ((60, 2, 0.5),),
        },
    )  # fmt: skip


@pytest.mark.slow
def test_continued_run_says_records_and_follows_its_changes(
    continued, tiny_experiment, tmp_path, caplog
):
    run = Path(continued.train.run)
    assert not (run / "history.jsonl").exists()
    with caplog.at_level("INFO", "glmjax"):
        fit(continued)
    row = json.loads((run / "history.jsonl").read_text())
    assert (row["step"], row["changes"]) == (
        60,
        {
            "train.run": [tiny_experiment.train.run, str(run)], "train.steps": [60, 64],
            "train.log_every": [5, 1], RATES: [[], [[62, 5e-4, 0.2]]], SCALES: [[], [[60, 2, 0.5]]],
        },
    )  # fmt: skip
    for name in row["changes"]:
        assert sum(f"from step 60 on {name} is" in m for m in caplog.messages) == 1
    assert config_from_json(Experiment, json.loads((run / "config.json").read_text())) == continued

    rows = [
        row for row in read_metrics(run / "metrics.jsonl") if row["step"] > 60 and "loss" in row
    ]
    assert [row["learning_rate"] for row in rows] == pytest.approx([5e-5, 5e-5, 1e-4, 1e-4])
    assert [row["embedding_gradient_scale"] for row in rows] == pytest.approx([1, 0.75, 0.5, 0.5])

    fit(replace(continued, **{"train.steps": 65}))
    second = read_metrics(run / "history.jsonl")[1]
    assert (second["step"], second["changes"]) == (64, {"train.steps": [64, 65]})


def test_refused_change_is_not_recorded(continued):
    with pytest.raises(ValueError, match=f"{RATES}: .* would change steps before 60"):
        fit(replace(continued, **{RATES: ((59, 5e-4, 0.2),)}))
    assert not (Path(continued.train.run) / "history.jsonl").exists()
