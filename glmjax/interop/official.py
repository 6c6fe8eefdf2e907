"""Models of the official repositories as (configuration, parameters), both ways.

On one side numpy arrays in official names and layouts, on the other a `Params` tree; the tables in
names.py are all that lies between. Everything wrong with a checkpoint is reported at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from glmjax.config import GLMConfig, replace
from glmjax.interop import layout
from glmjax.interop.names import (
    INPUT,
    INV_FREQ,
    OUTPUT,
    PREFIX,
    PREFIX_ENCODER,
    SCALE,
    Weight,
    family,
)
from glmjax.interop.official_config import read_config
from glmjax.interop.quantization import dequantize, unpack_int4
from glmjax.model.params import Params, ParamSpec, leaf_name, specs
from glmjax.model.prefix import PrefixEncoder, prefix_specs
from glmjax.sharding import named_sharding

Tree = TypeVar("Tree")
Tensors = Mapping[str, np.ndarray]


def load_official(path: str | Path) -> tuple[GLMConfig, Params]:
    """The model in a folder with config.json and model.safetensors.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the configuration is not of a known family, or tensors do not fit it.
    """
    from safetensors.numpy import load_file

    config = read_config(path)
    weights = Path(path) / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{path} has no model.safetensors")
    tensors = load_file(weights)
    config = replace(config, tied_embeddings=not _has_own_output(config, tensors))
    return config, from_official(config, tensors)


def from_official(config: GLMConfig, tensors: Tensors) -> Params:
    """Parameters in float32 from official tensors of any float type, int8 or int4.

    They are placed on the ambient mesh where one is set (`jax.set_mesh`).

    Raises:
        ValueError: lists every missing, unexpected and wrongly shaped tensor.
    """
    if config.tied_embeddings:
        if _has_own_output(config, tensors):
            raise ValueError(f"{OUTPUT} differs from {INPUT}, but tied_embeddings is True")
        tensors = {name: array for name, array in tensors.items() if name != OUTPUT}
    return _read(family(config), specs(config), tensors)


def to_official(config: GLMConfig, params: Params) -> dict[str, np.ndarray]:
    """Official tensors of a model in float32; the inverse of `from_official`.

    Raises:
        ValueError: no official format holds such a model.
    """
    table = family(config)
    tensors = _write(table, specs(config), params)
    if config.tied_embeddings and OUTPUT in table:
        tensors[OUTPUT] = tensors[INPUT]
    return tensors


def prefix_from_official(config: GLMConfig, tensors: Tensors) -> PrefixEncoder:
    """The P-tuning v2 prefix among official tensors; those of the model itself are passed over.

    Raises:
        ValueError: there is none, or its tensors do not fit the model.
    """
    tensors = {name: array for name, array in tensors.items() if name.startswith(PREFIX)}
    embedding = tensors.get(f"{PREFIX}embedding.weight")
    if embedding is None:
        raise ValueError(f"no tensor is called {PREFIX}embedding.weight")
    shapes = prefix_specs(config, len(embedding), projection=len(tensors) > 1)
    return _read(PREFIX_ENCODER, shapes, tensors)


def prefix_to_official(config: GLMConfig, params: PrefixEncoder) -> dict[str, np.ndarray]:
    """Official tensors of a P-tuning v2 prefix; the inverse of `prefix_from_official`."""
    shapes = prefix_specs(config, len(params.embedding), params.hidden is not None)
    return _write(PREFIX_ENCODER, shapes, params)


@dataclass(frozen=True)
class _Source:
    """The official tensors of one parameter: a single one, or one for each layer."""

    parameter: str
    spec: ParamSpec
    names: list[str]
    layout: str
    stacked: bool

    @property
    def axes(self) -> tuple[str, ...]:
        return self.spec.axes[self.stacked :]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape[self.stacked :]

    @property
    def official_shape(self) -> tuple[int, ...]:
        return layout.official_shape(self.layout, self.axes, self.shape)


def _sources(table: Mapping[str, Weight], shapes: Tree) -> Tree:
    """The tree of specs with a `_Source` at every leaf."""
    rows = {weight.parameter: (name, weight.layout) for name, weight in table.items()}

    def source(path: tuple[Any, ...], spec: ParamSpec) -> _Source:
        parameter = leaf_name(path)
        name, layout = rows[parameter]
        stacked = "{n}" in name
        names = [name.format(n=n) for n in range(spec.shape[0])] if stacked else [name]
        return _Source(parameter, spec, names, layout, stacked)

    return jax.tree_util.tree_map_with_path(source, shapes)


def _read(table: Mapping[str, Weight], shapes: Any, tensors: Tensors) -> Any:
    sources = _sources(table, shapes)
    _check(
        {
            name: source.official_shape
            for source in jax.tree.leaves(sources)
            for name in source.names
        },
        tensors,
    )
    mesh = jax.sharding.get_mesh()

    def read(source: _Source) -> jax.Array:
        layers = [
            layout.from_official(
                source.layout, source.axes, source.shape,
                _dense(name, tensors, source.official_shape),
            )
            for name in source.names
        ]  # fmt: skip
        array = (
            np.stack(layers, dtype=np.float32)
            if source.stacked
            else np.array(layers[0], np.float32)
        )
        spec = source.spec
        return jax.device_put(
            array,
            None if mesh.empty else named_sharding(mesh, spec.axes, spec.shape, source.parameter),
        )

    return jax.tree.map(read, sources)


def _write(table: Mapping[str, Weight], shapes: Tree, params: Tree) -> dict[str, np.ndarray]:
    tensors = {}
    for source, array in zip(
        jax.tree.leaves(_sources(table, shapes)), jax.tree.leaves(params), strict=True
    ):
        layers = np.asarray(array) if source.stacked else np.asarray(array)[None]
        for name, layer in zip(source.names, layers, strict=True):
            tensors[name] = layout.to_official(source.layout, source.axes, layer)
    return tensors


def _has_own_output(config: GLMConfig, tensors: Tensors) -> bool:
    """Whether the output layer is stored and is not the word embedding."""
    if OUTPUT not in family(config) or not {INPUT, OUTPUT} <= tensors.keys():
        return False
    return not np.array_equal(tensors[INPUT], tensors[OUTPUT])


def _check(expected: Mapping[str, tuple[int, ...]], tensors: Tensors) -> None:
    """Compares names and shapes; matrices may be int8 or packed int4, with a scale per row."""
    allowed = {name: [shape] for name, shape in expected.items()}
    for name, shape in expected.items():
        if name in tensors and tensors[name].dtype == np.int8:
            allowed[name].append((*shape[:-1], shape[-1] // 2))
            allowed[name + SCALE] = [shape[:1]]
    problems = []
    for name, shapes in allowed.items():
        if name not in tensors:
            problems.append(f"missing: {name} {list(shapes[0])}")
        elif tensors[name].shape not in shapes:
            found = list(tensors[name].shape)
            problems.append(f"wrong shape: {name} {found}, expected {list(shapes[0])}")
    problems += [
        f"unexpected: {name} {list(tensors[name].shape)}"
        for name in tensors
        if name not in allowed and not name.endswith(INV_FREQ)
    ]
    if problems:
        raise ValueError("the tensors do not fit the model:\n  " + "\n  ".join(problems))


def _dense(name: str, tensors: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of that name, dequantised to float32 if it is stored as integers."""
    array = tensors[name]
    if array.dtype != np.int8:
        return array
    values = array if array.shape == shape else unpack_int4(array)
    return dequantize(values, tensors[name + SCALE], np.float32)
