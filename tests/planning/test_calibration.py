import json
from pathlib import Path

import pytest

from glmjax.planning import calibration
from glmjax.planning.calibration import PAIRS, Pair
from glmjax.planning.topologies import GENERATIONS, Topology

PEER = json.loads(
    (Path(__file__).parents[2] / "experiments/results/peer_maxtext.json").read_text()
)  # fmt: skip
RUNS = {run["name"]: run for run in PEER["runs"] if "measured_tokens_per_second" in run}


def pair(topology, measured, estimated, computing):
    return Pair("", topology, "", measured, estimated, computing, "")


def test_the_error_is_that_of_the_time(monkeypatch):
    pairs = pair("v5p:4x4x8", 100.0, 80.0, 100.0), pair("v5p:8x8x8", 100.0, 120.0, 110.0)
    monkeypatch.setattr(calibration, "PAIRS", pairs)
    error = calibration.step_error("v5p", "estimated")
    assert (error.pairs, error.mean, error.worst) == (2, pytest.approx(1 / 24), 0.25)
    assert calibration.statement("v5p") == (
        "on 2 published runs the estimated time was +4% off on the average and +25% at worst, "
        "that of computation alone -5% and -9%"
    )
    assert calibration.statement("v4") == (
        "estimates for v4 are not calibrated: no published run to compare with"
    )


@pytest.mark.parametrize("family", GENERATIONS)
def test_every_generation_says_whether_it_is_calibrated(family):
    known = any(pair.topology.startswith(f"{family}:") for pair in PAIRS)
    assert known == calibration.statement(family).startswith("on ")


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.model} {pair.topology}")
def test_pairs_are_what_the_peer_programs_say(pair):
    run = RUNS[f"MaxText {pair.model} {pair.topology}"]
    tokens = run["rows"] * run["length"] / run["devices"]
    assert run["devices"] == Topology(pair.topology).num_devices
    assert pair.measured == pytest.approx(run["measured_tokens_per_second"], rel=2e-3)
    assert pair.estimated == pytest.approx(tokens / run["estimate"]["seconds"], rel=2e-3)
    assert pair.computing == pytest.approx(tokens / run["estimate"]["compute_seconds"], rel=2e-3)
