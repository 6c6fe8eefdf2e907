"""glmjax: the GLM family in JAX. The names a notebook needs."""

from glmjax.inference.generate import generate
from glmjax.inference.infill import infill_text as infill
from glmjax.inference.sampling import Sampling
from glmjax.interop.load import load
from glmjax.model.attention import BlankMask
from glmjax.model.params import count_params, init
from glmjax.model.transformer import forward
from glmjax.presets import get_config, list_configs
from glmjax.training.model_folder import save_model as save
from glmjax.version import __version__

__all__ = [
    "BlankMask",
    "Sampling",
    "__version__",
    "count_params",
    "forward",
    "generate",
    "get_config",
    "infill",
    "init",
    "list_configs",
    "load",
    "save",
]
