"""AdamW, its learning-rate schedule and which parameters decay.

The schedule is plain Python: the loop computes the rate of a step and passes it in, so that it can
be printed, tested and changed without touching compiled code.
"""

import math

import jax
import optax

from glmjax.config import GLMConfig, OptimizerConfig
from glmjax.model.params import leaf_name, specs


def learning_rate(config: OptimizerConfig, position: float) -> float:
    """The learning rate after `position` steps (or rows, by `schedule_unit`).

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


def decays(config: GLMConfig) -> object:
    """True for every parameter with weight decay: all but layer norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaf_name(path).rsplit(".", 1)[-1] not in ("scale", "bias"), specs(config)
    )


def adamw(model: GLMConfig, config: OptimizerConfig) -> optax.GradientTransformation:
    """Decoupled AdamW up to the factor -learning_rate, which `train_step` applies."""
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, decays(model)),
    )
