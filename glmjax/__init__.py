"""glmjax: the GLM family in JAX. The names a notebook needs."""

from glmjax.model.attention import BlankMask
from glmjax.model.params import count_params, init
from glmjax.model.transformer import forward
from glmjax.presets import get_config, list_configs
from glmjax.version import __version__

__all__ = [
    "BlankMask",
    "__version__",
    "count_params",
    "forward",
    "get_config",
    "init",
    "list_configs",
]
