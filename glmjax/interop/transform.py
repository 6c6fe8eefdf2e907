"""Changes to a model on its way from one place to another: types of floats, integers for kernels.

Each takes parts and gives parts; nothing is read before the new part is.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by it)
import numpy as np

from glmjax.config import GLMConfig, Quantization
from glmjax.interop.quantization import dequantize, pack_int4, quantize, unpack_int4
from glmjax.model.parts import Key, Part, part_specs

Dtype = Literal["float32", "bfloat16", "float16"]
Integers = Literal["int8", "int4", "float"]
Parts = Mapping[Key, Part]

INPUTS = {
    "qkv": ("embed",), "q": ("embed",), "kv": ("embed",), "attention_out": ("heads", "head"),
    "ffn_in": ("embed",), "ffn_out": ("mlp",),
}  # fmt: skip
"""The axes of each kernel of a block that its product sums over."""


def transform(
    config: GLMConfig,
    parts: Parts,
    dtype: Dtype | None = None,
    integers: Integers | None = None,
    shards: int = 1,
) -> tuple[GLMConfig, Parts]:
    """The model with other types; None leaves those that it has.

    `integers` is that of the kernels of the blocks, "float" makes floats of them. With `shards` the
    two kernels whose inputs tensor parallelism splits have a scale for each part.

    Raises:
        ValueError: the model has integers of another kind.
    """
    if integers == "float" and config.quantization is not None:
        config, parts = _to_floats(config, parts, dtype or "float16")
    elif integers in ("int8", "int4"):
        wanted = Quantization(4 if integers == "int4" else 8, shards)
        if config.quantization is None:
            config, parts = _to_integers(replace(config, quantization=wanted), parts)
        elif config.quantization != wanted:
            raise ValueError(
                f"the model has kernels of {_name(config.quantization)}, which cannot become "
                f"{_name(wanted)}: make floats of them first (float)"
            )
    if dtype is not None:
        parts = {key: _cast(part, np.dtype(dtype), key) for key, part in parts.items()}
    return config, parts


def _name(quantization: Quantization) -> str:
    shards = f" in {quantization.shards} shards" if quantization.shards > 1 else ""
    return f"int{quantization.bits}{shards}"


def _cast(part: Part, dtype: np.dtype, key: Key) -> Part:
    is_scale = key[0].endswith(".kernel.scale")
    if part.dtype == dtype or part.dtype == np.int8 or is_scale:
        return part
    return Part(part.shape, dtype, lambda: part.read().astype(dtype))


def _to_integers(config: GLMConfig, parts: Parts) -> tuple[GLMConfig, Parts]:
    """Quantised parts; values and scale of a kernel, which follow each other, come of one reading."""
    assert config.quantization is not None
    bits, shards = config.quantization.bits, config.quantization.shards
    dense = part_specs(replace(config, quantization=None))

    @functools.lru_cache(maxsize=1)
    def quantized(key: Key) -> tuple[np.ndarray, np.ndarray]:
        axes, names = dense[key].axes, _inputs(key)
        groups = 1 if names == ("embed",) else shards
        inputs = [axes.index(name) for name in names]
        values, scale = quantize(parts[key].read(), inputs, bits, groups)
        return (pack_int4(values, inputs[-1]) if bits == 4 else values), scale

    changed = {}
    for key, spec in part_specs(config).items():
        name, n = key
        kernel: Key = (name.rpartition(".")[0], n)
        if key in parts:
            changed[key] = parts[key]
        else:
            which = name.endswith(".scale")
            changed[key] = Part(
                spec.shape, np.dtype(spec.dtype),
                functools.partial(lambda kernel, which: quantized(kernel)[which], kernel, which),
            )  # fmt: skip
    return config, changed


def _to_floats(config: GLMConfig, parts: Parts, dtype: Dtype) -> tuple[GLMConfig, Parts]:
    assert config.quantization is not None
    bits = config.quantization.bits
    dense = replace(config, quantization=None)

    def read(key: Key, inputs: list[int]) -> np.ndarray:
        name, n = key
        values, scale = (parts[f"{name}.{leaf}", n].read() for leaf in ("values", "scale"))
        if bits == 4:
            values = unpack_int4(values, inputs[-1])
        return dequantize(values, scale, inputs, dtype)

    changed = {}
    for key, spec in part_specs(dense).items():
        if key in parts:
            changed[key] = parts[key]
        else:
            inputs = [spec.axes.index(name) for name in _inputs(key)]
            changed[key] = Part(
                spec.shape, np.dtype(dtype), functools.partial(read, key, inputs)
            )  # fmt: skip
    return dense, changed


def _inputs(key: Key) -> tuple[str, ...]:
    """Input axes of a kernel such as blocks.qkv.kernel."""
    return INPUTS[key[0].split(".")[1]]
