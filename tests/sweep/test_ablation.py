"""What is said of ablations: differences paired by seed, and whether a trend shows."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from glmjax.sweep.ablation import (
    METRICS,
    Trend,
    claim,
    cross,
    difference,
    largest_rise,
    report,
    summary_line,
    values_of,
    variant,
    verdict,
)
from glmjax.sweep.results import Result

TREND = Trend("new", "old", "a paper: 1.0 against 2.0")


def result(name: str, seed: int, loss: float, **changes) -> Result:
    """A finished training; a loss that is not a number: one that diverged at step 7."""
    finished = math.isfinite(loss)
    made = Result(
        trial=f"norm={name} seed={seed}", seed=seed, factors={"norm": name},
        status="finished" if finished else "diverged", parameters=10, flops=1e6,
        steps=20 if finished else 7, tokens=100, heldout_loss=loss, unigram_loss=5.0, seconds=1.0,
        tokens_per_second=1.0, heldout_curve=((10, loss + 1), (20, loss)) if finished else (),
        loss_curve=((10, 4.0), (20, 3.0)),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def trainings(**losses: tuple[float, ...]) -> list[Result]:
    return [result(name, seed, x) for name, row in losses.items() for seed, x in enumerate(row)]


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than the variants do: only pairs can tell them apart. The half width
    is t(0.975, 2) = 4.302653 times 0.01 / sqrt(3)."""
    found = difference({0: 3.11, 1: 4.10, 2: 5.09}, {2: 5.0, 1: 4.0, 0: 3.0})
    assert found.seeds == 3
    assert found.mean == pytest.approx(0.1)
    half = 4.302653 * 0.01 / math.sqrt(3)
    np.testing.assert_allclose([found.low, found.high], [0.1 - half, 0.1 + half], rtol=1e-6)


def test_difference_leaves_out_seeds_of_which_one_diverged():
    found = difference({0: 3.0, 1: math.nan, 2: 3.2}, {0: 2.0, 1: 2.1, 2: math.nan})
    assert (found.seeds, found.mean) == (1, 1.0)
    assert math.isnan(found.low)
    assert difference({0: math.nan}, {0: 1.0}).seeds == 0


def test_trend_that_shows():
    said = verdict(trainings(old=(3.0, 4.0, 3.5), new=(2.9, 3.91, 3.4)), TREND, METRICS)
    assert said.kind == "shows"
    assert said.sentence.startswith("new below old in held-out loss: shows at this scale. 3.4033")
    assert "3.4033 against 3.5000, difference -0.0967 (" in said.sentence
    assert said.sentence.endswith("3 seeds. Expected: a paper: 1.0 against 2.0.")


def test_trend_that_does_not_show():
    said = verdict(trainings(old=(3.0, 4.0, 3.5), new=(2.7, 4.1, 3.4)), TREND, METRICS)
    assert said.kind == "does not show"
    assert "within the spread of the seeds" in said.sentence


def test_trend_that_is_reversed():
    said = verdict(trainings(old=(3.0, 4.0, 3.5), new=(3.1, 4.09, 3.6)), TREND, METRICS)
    assert said.kind == "is reversed"
    assert "difference +0.0967" in said.sentence


def test_one_seed_is_no_evidence():
    said = verdict(trainings(old=(3.0,), new=(2.0,)), TREND, METRICS)
    assert said.kind == "cannot be judged"


def test_all_diverged_against_none_is_evidence():
    lost = (math.nan,) * 3
    assert verdict(trainings(old=lost, new=(3.0, 3.1, 3.2)), TREND, METRICS).kind == "shows"
    said = verdict(trainings(old=(3.0, 3.1, 3.2), new=lost), TREND, METRICS)
    assert said.kind == "is reversed"
    assert "3 of 3 against 0 of 3 trainings diverged" in said.sentence


def test_one_that_diverged_is_told_and_proves_nothing():
    said = verdict(trainings(old=(math.nan, 3.1, 3.5), new=(3.0, 3.2, 3.4)), TREND, METRICS)
    assert said.kind == "does not show"
    assert "0 of 3 against 1 of 3 trainings diverged" in said.sentence
    assert "2 seeds" in said.sentence


def test_both_diverged_cannot_be_judged():
    lost = (math.nan,) * 3
    said = verdict(trainings(old=lost, new=lost), TREND, METRICS)
    assert said.kind == "cannot be judged"
    assert "nan" not in said.sentence


def test_two_measurements_of_one_model():
    rows = [
        result("one", seed, 3.0, numbers={"both": 2.0 + seed, "left": 2.5 + seed + 0.01 * seed})
        for seed in range(3)
    ]
    trend = Trend("one", "one", "a paper", "both", "left")
    said = verdict(rows, trend, {"both": "seen both ways", "left": "from left to right"})
    assert said.kind == "shows"
    assert said.sentence.startswith("seen both ways below from left to right: shows")
    assert "3.0000 against 3.5100" in said.sentence


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="there is no variant 'young' among old, new"):
        values_of(trainings(old=(3.0,), new=(2.0,)), "young", "heldout_loss")


def test_largest_rise_is_above_the_lowest_before():
    curve = tuple(enumerate((5.0, 3.0, 4.5, 2.0, 2.5), 1))
    assert largest_rise(result("new", 0, 2.5, loss_curve=curve)) == 1.5
    assert math.isnan(largest_rise(result("new", 0, math.nan, loss_curve=curve)))


def test_cross_joins_names_and_changes():
    crossed = cross({"a": {"x": 1}, "b": {"x": 2}}, {"slow": {}, "fast": {"y": 3}})
    assert crossed == {
        "a, slow": {"x": 1}, "a, fast": {"x": 1, "y": 3},
        "b, slow": {"x": 2}, "b, fast": {"x": 2, "y": 3},
    }  # fmt: skip


def test_report_tells_what_did_not_learn(tmp_path: Path):
    rows = trainings(old=(3.0, 4.0, 3.5), new=(2.9, math.nan, 5.5))
    text = report(rows, tmp_path / "norms_tiny", METRICS, (TREND,))
    assert "| old | 3.5000 | 0.5000 |  | 3 |" in text
    assert "| new | 4.2000 | 1.8385 | +0.9500 (" in text and "| 2 of 3 |" in text
    assert "Diverged, and left out of the numbers: norm=new seed=1 at step 7." in text
    assert "frequencies of tokens do (unigram loss): norm=new seed=2." in text
    assert "![losses](norms_tiny.png)" in text
    assert (tmp_path / "norms_tiny.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_one_variant_compares_its_metrics(tmp_path: Path):
    rows = [result("one", seed, 3.0, numbers={"a": 2.0, "b": 2.5 + seed}) for seed in range(2)]
    text = report(rows, tmp_path / "context", {"a": "seen both ways", "b": "seen one way"})
    assert "difference to seen both ways" in text
    assert "| seen one way | 3.0000 | 0.7071 | +1.0000 (" in text


def test_summary_line_names_every_trend():
    rows = trainings(old=(3.0, 4.0, 3.5), new=(2.9, 3.91, 3.4))
    assert summary_line("norms.py", "Which?", rows, METRICS, (TREND,)) == (
        "| `norms.py` | Which? | new below old in held-out loss: shows |"
    )
    assert [variant(row) for row in rows[::3]] == ["old", "new"]
    twice = Trend("old", "old", "", "both", worse_metric="left")
    assert claim(twice, {"both": "seen both ways", "left": "from left to right"}) == (
        "seen both ways below from left to right"
    )
