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
from glmjax.model.params import ParamSpec
from glmjax.model.parts import Key, Part, part_specs

Dtype = Literal["float32", "bfloat16", "float16"]
Integers = Literal["int8", "int4", "float"]
Parts = Mapping[Key, Part]


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
    bits, specs = config.quantization.bits, part_specs(config)

    @functools.lru_cache(maxsize=1)
    def quantized(kernel: Key) -> dict[str, np.ndarray]:
        inputs, groups = _inputs_and_groups(specs, kernel)
        values, scale = quantize(parts[kernel].read(), inputs, bits, groups)
        return {"values": pack_int4(values, inputs[-1]) if bits == 4 else values, "scale": scale}

    def part(key: Key, spec: ParamSpec) -> Part:
        if key in parts:
            return parts[key]
        kernel, _, leaf = key[0].rpartition(".")
        return Part(spec.shape, np.dtype(spec.dtype), lambda: quantized((kernel, key[1]))[leaf])

    return config, {key: part(key, spec) for key, spec in specs.items()}


def _to_floats(config: GLMConfig, parts: Parts, dtype: Dtype) -> tuple[GLMConfig, Parts]:
    assert config.quantization is not None
    bits, specs = config.quantization.bits, part_specs(config)

    def read(kernel: Key) -> np.ndarray:
        values, scale = (parts[key].read() for key in _values_and_scale(kernel))
        inputs, _ = _inputs_and_groups(specs, kernel)
        if bits == 4:
            values = unpack_int4(values, inputs[-1])
        return dequantize(values, scale, inputs, dtype)

    def part(key: Key, spec: ParamSpec) -> Part:
        return parts.get(key) or Part(spec.shape, np.dtype(dtype), lambda: read(key))

    config = replace(config, quantization=None)
    return config, {key: part(key, spec) for key, spec in part_specs(config).items()}


def _values_and_scale(kernel: Key) -> tuple[Key, Key]:
    name, n = kernel
    return (f"{name}.values", n), (f"{name}.scale", n)


def _inputs_and_groups(specs: Mapping[Key, ParamSpec], kernel: Key) -> tuple[list[int], int]:
    """The axes of a kernel that its product sums over, which its scale lacks, and into how many
    groups with a scale each they are cut."""
    values, scale = (specs[key] for key in _values_and_scale(kernel))
    outputs = ["embed" if axis == "stream" else axis for axis in scale.axes]
    inputs = [i for i, axis in enumerate(values.axes) if axis not in outputs]
    return inputs, scale.shape[0]
