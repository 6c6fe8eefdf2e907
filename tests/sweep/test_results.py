"""What comes of trials, and the Parquet file that keeps it."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmjax.config import Experiment, replace
from glmjax.sweep.results import collect, made_by, outcome, read_results, write_results
from glmjax.sweep.trials import Sweep, Trial, run_folder
from glmjax.training.metrics import flops

SUMMARY = {
    "steps": 4, "tokens": 4 * 32 * 512, "heldout_loss": 3.5, "unigram_loss": 5.0, "uniform_loss": 8.0,
    "tokens_per_second": 100.0, "seconds": 12.0, "parameters": 1234, "signal": None, "goodput": {},
}  # fmt: skip
ROWS = [{"step": 2, "loss": 5.5}, {"step": 2, "heldout_loss": 5.0}, {"step": 4, "loss": 4.0}]


def make_sweep():
    variants = [{"norm": "pre", "rate": 0.5}, {"norm": "post", "rate": 0.5}]
    trials = [
        Trial(factors, replace(Experiment(), **{"train.seed": seed}))
        for seed, factors in enumerate(variants)
    ]
    return Sweep("norms", tuple(trials), lambda results, stem: "")


def end(run, name, values):
    run.mkdir(exist_ok=True)
    (run / name).write_text(json.dumps(values))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def test_only_what_has_ended_is_collected(tmp_path):
    sweep = make_sweep()
    first, second = (run_folder(trial, tmp_path) for trial in sweep.trials)
    assert outcome(first) is None
    end(first, "summary.json", SUMMARY | {"signal": "SIGTERM"})
    assert outcome(first) is None and collect(sweep, tmp_path) == []
    end(first, "summary.json", SUMMARY)
    end(second, "diverged.json", {"steps": 3, "tokens": 96, "parameters": 1234, "message": ""})
    finished, diverged = collect(sweep, tmp_path)
    assert (finished.status, finished.heldout_loss, finished.seed) == ("finished", 3.5, 0)
    assert finished.heldout_curve == ((2, 5.0),) and finished.loss_curve == ((2, 5.5), (4, 4.0))
    assert finished.flops == flops(Experiment().model, rows=4 * 32, length=512)
    assert (diverged.status, diverged.steps, diverged.seed) == ("diverged", 3, 1)
    assert math.isnan(diverged.heldout_loss)


def test_results_come_back_from_parquet_as_they_were(tmp_path):
    sweep = make_sweep()
    for trial in sweep.trials:
        run = run_folder(trial, tmp_path)
        end(run, "summary.json", SUMMARY)
        (run / "provenance.json").write_text(json.dumps({"jax": "0.10.2", "date": "2026-11-30"}))
    (run / "numbers-norms.json").write_text(json.dumps({"loss/int4": 3.75}))
    results = collect(sweep, tmp_path)
    write_results(tmp_path / "norms.parquet", results)
    assert read_results(tmp_path / "norms.parquet") == results
    table = pq.read_table(tmp_path / "norms.parquet")
    assert table.column("factors.norm").to_pylist() == ["pre", "post"]
    assert table.column("numbers.loss/int4").to_pylist() == [None, 3.75]
    assert "2 trainings" in made_by(results) and "jax 0.10.2" in made_by(results)


def test_a_file_that_holds_no_results_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there are no results .*absent\.parquet"):
        read_results(tmp_path / "absent.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match=rf"{name}\.parquet does not hold the results"):
            read_results(tmp_path / f"{name}.parquet")
