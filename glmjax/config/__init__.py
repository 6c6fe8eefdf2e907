"""Every setting of glmjax, as frozen dataclasses.

A model is described by `GLMConfig`, a training run by `Experiment`. Both check themselves when they
are made, so a wrong combination fails before any array exists. The text under a field is also what
`glmjax train --help` prints.
"""

from glmjax.config.fields import (
    config_from_json,
    config_to_json,
    parse_range,
    replace,
)
from glmjax.config.model import (
    AttentionImplementation,
    Dtype,
    FeedForward,
    GLMConfig,
    Kernel,
    Norm,
    Positions,
    Quantization,
    Remat,
    Saved,
    SpecialTokens,
)
from glmjax.config.training import (
    DataConfig,
    DistributedConfig,
    Experiment,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "AttentionImplementation",
    "DataConfig",
    "DistributedConfig",
    "Dtype",
    "Experiment",
    "FeedForward",
    "GLMConfig",
    "Kernel",
    "MeshConfig",
    "Norm",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Positions",
    "Quantization",
    "Remat",
    "Saved",
    "SpecialTokens",
    "TrainConfig",
    "config_from_json",
    "config_to_json",
    "parse_range",
    "replace",
]
