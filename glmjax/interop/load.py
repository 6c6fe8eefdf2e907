"""Opens a model from whatever holds it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmjax.config import GLMConfig
from glmjax.interop.source import open_source
from glmjax.interop.transform import Dtype, Integers, transform
from glmjax.model.params import Params
from glmjax.model.parts import Key, assemble


def load(
    path: str | Path,
    *,
    dtype: Dtype | None = None,
    quantize: Integers | None = None,
    prefix: str | Path | None = None,
    progress: Callable[[Key], Any] = lambda key: None,
) -> tuple[GLMConfig, Params]:
    """The configuration and parameters of a model, on the mesh of `jax.set_mesh` if set.

    Reads a folder of `glmjax.save` or `glmjax convert`, a run of `glmjax train` (its newest whole
    checkpoint), one checkpoint of it, and every official format: folders of Hugging Face
    (safetensors or .bin, in one file or several), tensor-parallel ranks of THUDM/GLM and GLM-130B,
    quantised or not.

    Weights go to the devices layer by layer and keep the types of the file. `dtype` casts floats;
    `quantize` turns the kernels of the blocks into int8 or int4 on the way, or "float" turns those
    of a quantised checkpoint back into floats. `prefix` is a P-tuning v2 checkpoint to put in front.

    Raises:
        FileNotFoundError: nothing is there, or a file of it is missing.
        ValueError: it is none of these, or its tensors do not fit its configuration.
        CheckpointError: it is damaged.
        RuntimeError: .bin and .pt files need PyTorch 2.10.
    """
    source = open_source(path, prefix)
    config, parts = transform(source.config, source.parts, dtype, quantize)
    return config, assemble(config, parts, progress)
