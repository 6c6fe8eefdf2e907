"""How many rows a step has: the batch-size ramp of GLM-130B (appendix, table 11)."""

import bisect
import functools
from typing import NamedTuple

from glmjax.config import TrainConfig


class Stage(NamedTuple):
    """Steps of equal batch size, up to the next stage."""

    first_step: int
    first_row: int
    batch_size: int


def batch_size_at(train: TrainConfig, step: int) -> int:
    """Rows of a step."""
    return _stage(train, step).batch_size


def rows_before(train: TrainConfig, step: int) -> int:
    """Rows of all steps before a step."""
    stage = _stage(train, step)
    return stage.first_row + (step - stage.first_step) * stage.batch_size


def batch_sizes(train: TrainConfig) -> list[int]:
    """All sizes that a batch takes in turn."""
    return [stage.batch_size for stage in _stages(train)]


def _stage(train: TrainConfig, step: int) -> Stage:
    stages = _stages(train)
    return stages[bisect.bisect_right(stages, step, key=lambda stage: stage.first_step) - 1]


@functools.cache
def _stages(train: TrainConfig) -> tuple[Stage, ...]:
    """With train.ramp = (start, increment, rows) a step that begins after n rows has start +
    increment * floor(n * increments / rows) rows, increments being those up to train.batch_size."""
    if train.ramp is None or train.ramp[0] == train.batch_size:
        return (Stage(0, 0, train.batch_size),)
    start, increment, ramp_rows = train.ramp
    increments = (train.batch_size - start) // increment
    stages = [Stage(0, 0, start)]
    while stages[-1].batch_size < train.batch_size:
        step, row, size = stages[-1]
        reached = (size - start) // increment
        end = -(-(reached + 1) * ramp_rows // increments)  # the next stage begins at or after it
        steps = -(-(end - row) // size)
        row += steps * size
        size = start + increment * min(row * increments // ramp_rows, increments)
        stages.append(Stage(step + steps, row, size))
    return tuple(stages)
