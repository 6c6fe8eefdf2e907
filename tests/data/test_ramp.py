"""The batch-size ramp in closed form against the rule applied step by step."""

import pytest

from glmjax.config import TrainConfig
from glmjax.data.ramp import batch_size_at, batch_sizes, rows_before

GLM_130B = TrainConfig(batch_size=4224, ramp=(192, 24, 5_493_164))


def test_constant_batches():
    train = TrainConfig(batch_size=32)
    assert batch_sizes(train) == [32]
    assert [batch_size_at(train, step) for step in (0, 1, 10**6)] == [32, 32, 32]
    assert rows_before(train, 10**6) == 32 * 10**6


def test_glm_130b():
    assert batch_sizes(GLM_130B) == list(range(192, 4225, 24))
    # One increment per 5,493,164 / 168 = 32,697.4 rows: 171 steps of 192 rows reach the first.
    assert batch_size_at(GLM_130B, 170) == 192
    assert batch_size_at(GLM_130B, 171) == 216
    assert rows_before(GLM_130B, 171) == 171 * 192


@pytest.mark.parametrize(
    ("batch_size", "ramp"),
    [(4224, (192, 24, 5_493_164)), (16, (4, 4, 100)), (64, (8, 8, 20)), (6, (1, 1, 5)), (8, (8, 4, 50))],
    ids=["glm-130b", "small", "skips-sizes", "one-row", "no-increments"],
)  # fmt: skip
def test_agrees_with_the_rule(batch_size, ramp):
    train = TrainConfig(batch_size=batch_size, ramp=ramp)
    start, increment, ramp_rows = ramp
    increments = (batch_size - start) // increment
    rows = 0
    for step in range(4000):
        reached = min(increments, rows * increments // ramp_rows)
        assert batch_size_at(train, step) == start + increment * reached
        assert rows_before(train, step) == rows
        rows += batch_size_at(train, step)
    assert batch_size_at(train, 10**6) == batch_size
