"""Opens a model from whatever holds it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmjax.config import GLMConfig
from glmjax.interop import lora as adapters
from glmjax.interop.source import open_source
from glmjax.interop.transform import Dtype, Quantize, transform, widen_tables
from glmjax.model.params import STORED, Params, decoding_arrangement
from glmjax.model.parts import Key, assemble
from glmjax.sharding import target_device


def load(
    path: str | Path,
    *,
    dtype: Dtype | None = None,
    quantize: Quantize | None = None,
    prefix: str | Path | None = None,
    lora: str | Path | None = None,
    for_decoding: bool = False,
    progress: Callable[[Key], Any] = lambda key: None,
) -> tuple[GLMConfig, Params]:
    """The configuration and parameters of a model, on the mesh of `jax.set_mesh` if set.

    Reads a folder of `glmjax.save` or `glmjax convert`, a run of `glmjax train` (its newest whole
    checkpoint), one checkpoint of it, and every official format: folders of Hugging Face
    (safetensors or .bin, in one file or several), tensor-parallel ranks of THUDM/GLM and GLM-130B,
    quantised or not.

    Weights go to the devices layer by layer and keep the types of the file. `dtype` casts floats;
    `quantize` turns the kernels of the blocks into int8 or int4 on the way, or what a `Quantization`
    says into integers of its kind; "float" turns those of a quantised checkpoint back into floats.
    `prefix` is a P-tuning v2 checkpoint to put in front, `lora` a folder with a LoRA adapter of PEFT
    that is added to the kernels before they are cast or quantised. With `for_decoding` the
    parameters lie as decoding is fastest on the platform, see `Arrangement`; training and notebooks
    that look at `params.blocks` want them as they are stored. On CPUs float16 tables of words then
    become float32.

    Raises:
        FileNotFoundError: nothing is there, or a file of it is missing.
        ValueError: it is none of these, or its tensors do not fit its configuration.
        CheckpointError: it is damaged.
        RuntimeError: .bin and .pt files need PyTorch 2.10.
    """
    source = open_source(path, prefix)
    if lora is not None:
        source = adapters.merge(source, lora, quantize)
    config, parts = transform(source.config, source.parts, dtype, quantize)
    arrangement = decoding_arrangement() if for_decoding else STORED
    if for_decoding and target_device().platform == "cpu":
        parts = widen_tables(parts)
    return config, assemble(config, parts, progress, arrangement)
