"""Learning rates of published runs, and values that change at a step."""

import numpy as np
import pytest

from glmjax.config import Experiment, OptimizerConfig, TrainConfig, replace
from glmjax.presets import get_config
from glmjax.training.schedule import embedding_gradient_scale, learning_rate, warm_up_and_decay

GLM_130B = OptimizerConfig(
    learning_rate=8e-5, floor_ratio=0.1, warmup=1_098_632, decay=197_753_905,
    schedule_unit="samples",
)  # fmt: skip
GLM_LARGE = OptimizerConfig(learning_rate=2e-4, floor_ratio=0.05, warmup=8000, decay=160_000)
GLM_ROBERTA = OptimizerConfig(
    learning_rate=4e-4, floor_ratio=0.025, warmup=30_000, decay=500_000, schedule="linear"
)


@pytest.mark.parametrize(
    ("config", "position", "rate"),
    [
        (GLM_130B, 0, 0.0),
        (GLM_130B, 549_316, 4.0e-5),
        (GLM_130B, 1_098_632, 8.0e-5),
        (GLM_130B, 50_000_000, 6.956234817e-5),
        (GLM_130B, 99_426_268, 4.4e-5),
        (GLM_130B, 197_753_905, 8e-6),
        (GLM_130B, 219_726_562, 8e-6),
        (GLM_LARGE, 0, 0.0),
        (GLM_LARGE, 4000, 1e-4),
        (GLM_LARGE, 8000, 2e-4),
        (GLM_LARGE, 84_000, 1.05e-4),
        (GLM_LARGE, 160_000, 1e-5),
        (GLM_LARGE, 10**9, 1e-5),
        (GLM_ROBERTA, 15_000, 2e-4),
        (GLM_ROBERTA, 30_000, 4e-4),
        (GLM_ROBERTA, 265_000, 2.05e-4),
        (GLM_ROBERTA, 500_000, 1e-5),
        (GLM_ROBERTA, 10**9, 1e-5),
    ],
)
def test_learning_rates_of_published_runs(config, position, rate):
    assert warm_up_and_decay(config, position) == pytest.approx(rate, rel=1e-8, abs=0)


def test_cosine_is_the_published_one_in_glm_large_steps():
    """THUDM/GLM learning_rates.py, with R = 1 / floor_ratio."""
    for step in range(8000, 160_001, 7600):
        share = (np.cos(np.pi * (step - 8000) / 152_000) + 1) * 19 / 2 + 1
        assert warm_up_and_decay(GLM_LARGE, step) == pytest.approx(2e-4 / 20 * share, rel=1e-9)


def test_constant_schedule_only_warms_up():
    config = OptimizerConfig(learning_rate=3e-4, schedule="constant", warmup=10, decay=100)
    rates = [warm_up_and_decay(config, position) for position in (0, 5, 10, 50, 100, 1000)]
    assert rates == pytest.approx([0, 1.5e-4, 3e-4, 3e-4, 3e-4, 3e-4])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_no_warm_up_starts_at_the_peak(schedule):
    config = OptimizerConfig(learning_rate=3e-4, schedule=schedule, warmup=0, decay=100)
    assert warm_up_and_decay(config, 0) == 3e-4
    assert 0 < warm_up_and_decay(config, 1) <= 3e-4


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_that_ends_with_the_warm_up(schedule):
    config = OptimizerConfig(
        learning_rate=1e-3, floor_ratio=0.1, schedule=schedule, warmup=10, decay=10
    )
    assert [warm_up_and_decay(config, n) for n in (5, 10, 11, 99)] == pytest.approx(
        [5e-4, 1e-3, 1e-4, 1e-4]
    )


def test_schedule_counts_steps_or_the_rows_of_a_growing_batch():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup=100, decay=1000)
    train = TrainConfig(batch_size=30, ramp=(10, 10, 40))  # 10, 10, 20, 30, 30 ...
    steps = Experiment(optimizer=optimizer, train=train)
    assert [learning_rate(steps, n) for n in (0, 1, 99)] == pytest.approx([0.01, 0.02, 1.0])
    rows = replace(steps, **{"optimizer.schedule_unit": "samples"})
    assert [learning_rate(rows, n) for n in (0, 1, 2, 4)] == pytest.approx([0.1, 0.2, 0.4, 1.0])


def test_learning_rate_changes_hold_from_their_step_on():
    """GLM-130B halved the peak at 26000 and, later, the rate at the end (its training log)."""
    before = Experiment(optimizer=GLM_130B, train=TrainConfig(batch_size=4224))
    after = replace(
        before,
        **{"optimizer.learning_rate_changes": ((26000, 4e-5, 0.2), (42700, 4e-5, 0.1))},
    )
    halved, lower = (
        replace(before, **{"optimizer.learning_rate": 4e-5, "optimizer.floor_ratio": ratio})
        for ratio in (0.2, 0.1)
    )
    for step, experiment in (
        (0, before), (25_999, before), (26_000, halved), (42_699, halved), (42_700, lower),
        (60_000, lower),
    ):  # fmt: skip
        assert learning_rate(after, step) == learning_rate(experiment, step)
    assert learning_rate(after, 60_000) == pytest.approx(4e-6)


def test_embedding_gradient_scale_goes_over_steps_or_at_once():
    """The course of GLM-130B's alpha (its training log)."""
    changes = (
        (6000, 500, 1.0), (22_800, 0, 0.2), (22_800, 6000, 1.0), (33_600, 0, 0.5), (35_200, 0, 0.1),
    )  # fmt: skip
    experiment = Experiment(
        model=get_config("glm-base", embedding_gradient_scale=0.1),
        optimizer=OptimizerConfig(embedding_gradient_scale_changes=changes),
    )
    expected = {
        0: 0.1, 6000: 0.1, 6250: 0.55, 6500: 1.0, 22_799: 1.0, 22_800: 0.2, 25_800: 0.6,
        28_800: 1.0, 33_599: 1.0, 33_600: 0.5, 35_199: 0.5, 35_200: 0.1, 10**6: 0.1,
    }  # fmt: skip
    found = {step: embedding_gradient_scale(experiment, step) for step in expected}
    assert found == pytest.approx(expected)


def test_a_change_interrupts_the_one_before_it():
    changes = ((10, 10, 1.0), (15, 5, 0.0))
    experiment = Experiment(
        model=get_config("glm-base", embedding_gradient_scale=0.5),
        optimizer=OptimizerConfig(embedding_gradient_scale_changes=changes),
    )
    found = [embedding_gradient_scale(experiment, step) for step in (10, 14, 15, 16, 20, 30)]
    assert found == pytest.approx([0.5, 0.7, 0.75, 0.6, 0.0, 0.0])
