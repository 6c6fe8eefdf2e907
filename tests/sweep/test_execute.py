"""Running trials side by side. The trials here are programs that write what a training would."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from glmjax.config import Experiment, replace
from glmjax.sweep import execute
from glmjax.sweep.execute import is_done, run_sweep
from glmjax.sweep.results import outcome
from glmjax.sweep.trials import Sweep, Trial, run_folder

PROGRAM = """
import json, os, pathlib, sys, time
run, seconds, status = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
with open(sys.argv[4], "a") as log:
    log.write(json.dumps([sys.argv[5], sorted(os.sched_getaffinity(0)), time.time()]) + "\\n")
print("said by trial", sys.argv[5], flush=True)
(run / "metrics.jsonl").write_text(json.dumps({"step": 10, "loss": 4.0}) + "\\n")
time.sleep(seconds)
if status == 0:
    (run / "summary.json").write_text(json.dumps({"signal": None}))
sys.exit(status)
"""


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(execute, "POLL_SECONDS", 0.02)


def make_sweep(steps=(20, 40, 30)):
    trials = [
        Trial({"steps": n}, replace(Experiment(), **{"train.steps": n, "train.seed": i}))
        for i, n in enumerate(steps)
    ]
    return Sweep("lengths", tuple(trials), lambda results, stem: "")


def run(sweep, tmp_path, jobs=2, seconds=0.3, statuses=None):
    """Failed trials, what the programs noted when they began, and what was reported."""
    log, reports = tmp_path / "began.jsonl", []
    log.touch()

    def command(i):
        folder = run_folder(sweep.trials[i], tmp_path / "runs")
        status = (statuses or {}).get(i, 0)
        return [sys.executable, "-c", PROGRAM, *map(str, (folder, seconds, status, log, i))]

    failed = run_sweep(sweep, tmp_path / "runs", command, jobs, reports.append)
    return failed, [json.loads(line) for line in log.read_text().splitlines()], reports


def test_the_largest_begins_first_and_nothing_is_computed_again(tmp_path):
    sweep = make_sweep()
    failed, began, reports = run(sweep, tmp_path)
    assert failed == [] and {name for name, *_ in began[:2]} == {"1", "2"}
    assert began[2][0] == "0"
    assert all(is_done(sweep, trial, tmp_path / "runs") for trial in sweep.trials)
    assert reports[-1].done == 3 and reports[-1].share == 1
    assert any(("steps=40 seed=1", 10, 40) in report.running for report in reports)
    assert [r.finished for r in reports if r.finished is not None][-1] is not None
    assert run(sweep, tmp_path)[1] == began


def test_each_process_has_its_part_of_the_cores_and_a_log(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    sweep = make_sweep()
    _, began, _ = run(sweep, tmp_path, jobs=len(cores))
    assert all(len(mine) == 1 and set(mine) <= set(cores) for _, mine, _ in began)
    _, whole, _ = run(make_sweep((11,)), tmp_path, jobs=1)
    assert whole[-1][1] == cores
    log = run_folder(sweep.trials[1], tmp_path / "runs") / "log.txt"
    assert "said by trial 1" in log.read_text()


def test_a_trial_that_fails_is_named_and_the_others_go_on(tmp_path):
    sweep = make_sweep()
    failed, _, _ = run(sweep, tmp_path, seconds=0, statuses={1: 3})
    assert failed == ["steps=40 seed=1"]
    done = [is_done(sweep, trial, tmp_path / "runs") for trial in sweep.trials]
    assert done == [True, False, True]


def test_settings_that_two_trials_share_are_trained_once(tmp_path):
    base = Experiment()
    sweep = Sweep("twice", (Trial({"a": 1}, base), Trial({"b": 1}, base)), lambda *_: "")
    failed, began, _ = run(sweep, tmp_path)
    assert failed == [] and len(began) == 1
    assert all(is_done(sweep, trial, tmp_path / "runs") for trial in sweep.trials)


def test_ctrl_c_stops_all_and_waits_for_them(tmp_path):
    sweep = make_sweep()
    log = tmp_path / "began.jsonl"

    def interrupt():
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    # A program that a script started in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(sweep, tmp_path, seconds=60)
    signal.signal(signal.SIGINT, before)
    began = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(began) == 2
    assert all(outcome(run_folder(trial, tmp_path / "runs")) is None for trial in sweep.trials)
