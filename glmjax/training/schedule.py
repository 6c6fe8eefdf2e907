"""What a schedule says about a step: the learning rate and the embedding gradient scale.

Plain Python: the loop computes the values of a step and passes them in, so that they can be printed,
tested and changed while a run is stopped without touching compiled code.
"""

import dataclasses
import math
from collections.abc import Sequence

from glmjax.config import Experiment, OptimizerConfig
from glmjax.data.ramp import rows_before


def learning_rate(experiment: Experiment, step: int) -> float:
    """The learning rate of a step; the first step is one step, or one batch, into the schedule."""
    config = experiment.optimizer
    position = step + 1
    if config.schedule_unit == "samples":
        position = rows_before(experiment.train, step + 1)
    for first, rate, ratio in config.learning_rate_changes:
        if first <= step:
            config = dataclasses.replace(config, learning_rate=rate, floor_ratio=ratio)
    return warm_up_and_decay(config, position)


def warm_up_and_decay(config: OptimizerConfig, position: float) -> float:
    """The learning rate after `position` steps (or rows, by `schedule_unit`), without changes.

    Linear warm-up to the peak, then a cosine or linear decay to peak * floor_ratio at `decay`,
    constant from there (THUDM/GLM learning_rates.py; GLM-130B table 11).
    """
    if position <= config.warmup:
        return config.learning_rate * (position / config.warmup if config.warmup else 1.0)
    progress = min(1.0, (position - config.warmup) / max(1, config.decay - config.warmup))
    share = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.schedule]
    floor = config.learning_rate * config.floor_ratio
    return floor + (config.learning_rate - floor) * share


def embedding_gradient_scale(experiment: Experiment, step: int) -> float:
    """What the gradient of the word embedding is multiplied by in a step (GLM-130B section 2.3)."""
    return _scale_after(
        experiment.model.embedding_gradient_scale,
        experiment.optimizer.embedding_gradient_scale_changes,
        step,
    )


def _scale_after(start: float, changes: Sequence[tuple[int, int, float]], step: int) -> float:
    begun = [change for change in changes if change[0] <= step]
    if not begun:
        return start
    *earlier, (first, steps, target) = begun
    start = _scale_after(start, earlier, first)
    share = min(1.0, (step - first) / steps) if steps else 1.0
    return (1 - share) * start + share * target
