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
from glmjax.interop.quantization import Integers, dequantize, quantize
from glmjax.model.params import ParamSpec
from glmjax.model.parts import Key, Part, part_specs

Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["int8", "int4", "float"] | Quantization
"""int8 and int4 are kernels as in the published models."""
Parts = Mapping[Key, Part]


def transform(
    config: GLMConfig,
    parts: Parts,
    dtype: Dtype | None = None,
    quantize: Quantize | None = None,
    shards: int = 1,
) -> tuple[GLMConfig, Parts]:
    """The model with other types; None leaves those that it has.

    `quantize` says what becomes integers, "float" makes floats of all that are. With `shards` the
    two kernels whose inputs tensor parallelism splits have scales for each part.

    Raises:
        ValueError: the model has integers of another kind.
    """
    if quantize == "float":
        if config.quantization is not None:
            config, parts = _to_floats(config, parts, dtype or "float16")
    elif quantize is not None:
        wanted = _quantization(quantize)
        if shards > 1:
            wanted = replace(wanted, shards=shards)
        if config.quantization is None:
            config, parts = _to_integers(replace(config, quantization=wanted), parts)
        elif config.quantization != wanted:
            raise ValueError(
                f"the model has kernels of {describe(config.quantization)}, which cannot become "
                f"{describe(wanted)}: make floats of them first (float)"
            )
    if dtype is not None:
        parts = {
            key: part if _is_of_integers(key, parts) else _cast(part, np.dtype(dtype))
            for key, part in parts.items()
        }
    return config, parts


def describe(quantization: Quantization) -> str:
    """What is integers, and how, such as "int4, zeropoint, a scale for 128 inputs"."""
    kind = quantization
    words = [f"int{kind.bits}"]
    if kind.scheme != "absmax":
        words.append(kind.scheme)
    if kind.group_size is not None:
        words.append(f"a scale for {kind.group_size} inputs")
    if kind.shards > 1:
        scales = "parts" if kind.group_size is not None else "scales"
        words.append(f"{kind.shards} {scales} a row of split inputs")
    if kind.kernels != Quantization.kernels:
        words.append(" and ".join(kind.kernels) or "no kernels")
    if kind.embeddings:
        words.append("with embeddings")
    if kind.float_layers:
        words.append(f"layers {' '.join(map(str, kind.float_layers))} floats")
    return ", ".join(words)


def _quantization(quantize: Quantize) -> Quantization:
    if isinstance(quantize, Quantization):
        return quantize
    return Quantization(4 if quantize == "int4" else 8)


def _is_of_integers(key: Key, parts: Parts) -> bool:
    """Whether a part is values, scale or zero of a quantised matrix."""
    return (f"{key[0].rpartition('.')[0]}.values", key[1]) in parts


def _cast(part: Part, dtype: np.dtype) -> Part:
    if part.dtype == dtype:
        return part
    return Part(part.shape, dtype, lambda: part.read().astype(dtype))


def widen_tables(parts: Parts) -> Parts:
    """Float16 tables of words as float32, which has the same numbers. CPUs read that faster than they
    convert float16, and the output layer reads all of it for every token."""

    def widen(key: Key, part: Part) -> Part:
        is_table = key[0] in ("word_embedding", "output_embedding")
        return _cast(part, np.dtype("float32")) if is_table and part.dtype == np.float16 else part

    return {key: widen(key, part) for key, part in parts.items()}


def _to_integers(config: GLMConfig, parts: Parts) -> tuple[GLMConfig, Parts]:
    """Quantised parts; those of a kernel, which follow each other, come of one reading."""
    assert config.quantization is not None
    bits, scheme, specs = config.quantization.bits, config.quantization.scheme, part_specs(config)
    kernel_specs = part_specs(replace(config, quantization=None))

    @functools.lru_cache(maxsize=1)
    def quantized(kernel: Key) -> Integers:
        values, scale = (
            specs[f"{kernel[0]}.values", kernel[1]],
            specs[f"{kernel[0]}.scale", kernel[1]],
        )
        axes = [kernel_specs[kernel].axes.index(axis) for axis in values.axes]
        return quantize(
            parts[kernel].read().transpose(axes), _num_inputs(values, scale), bits,
            groups=scale.shape[0], scheme=scheme,
        )  # fmt: skip

    def part(key: Key, spec: ParamSpec) -> Part:
        if key in parts:
            return parts[key]
        kernel, _, leaf = key[0].rpartition(".")
        return Part(
            spec.shape, np.dtype(spec.dtype), lambda: getattr(quantized((kernel, key[1])), leaf)
        )

    return config, {key: part(key, spec) for key, spec in specs.items()}


def _to_floats(config: GLMConfig, parts: Parts, dtype: Dtype) -> tuple[GLMConfig, Parts]:
    assert config.quantization is not None
    bits, specs = config.quantization.bits, part_specs(config)

    def read(kernel: Key, spec: ParamSpec) -> np.ndarray:
        values, scale, zero = ((f"{kernel[0]}.{leaf}", kernel[1]) for leaf in Integers._fields)
        integers = Integers(
            parts[values].read(), parts[scale].read(), parts[zero].read() if zero in parts else None
        )
        floats = dequantize(integers, _num_inputs(specs[values], specs[scale]), bits, dtype)
        return floats.transpose([specs[values].axes.index(axis) for axis in spec.axes])

    def part(key: Key, spec: ParamSpec) -> Part:
        return parts.get(key) or Part(spec.shape, np.dtype(dtype), lambda: read(key, spec))

    config = replace(config, quantization=None)
    return config, {key: part(key, spec) for key, spec in part_specs(config).items()}


def _num_inputs(values: ParamSpec, scale: ParamSpec) -> int:
    """Axes of integers that are no axes of their scales."""
    return len(values.axes) - (len(scale.axes) - 1)
