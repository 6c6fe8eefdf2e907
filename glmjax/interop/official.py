"""Models of the official repositories in parts, both ways.

On one side tensors in official names and layouts, on the other the parts of a `Params` tree; the
tables in names.py are all that lies between. Everything wrong with a checkpoint is reported at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from glmjax.config import GLMConfig
from glmjax.interop import layout
from glmjax.interop.names import INV_FREQ, Family, name_of
from glmjax.interop.official_config import Tensor, Tensors, read_config
from glmjax.interop.places import Place, Places, find_places, tensor_shapes
from glmjax.interop.tensors import Stored, is_finite
from glmjax.model.parts import Key, Part, part_specs

FLOATS = ("float16", "bfloat16", "float32")
_ROWS = 8192
"""Rows of two embeddings that are compared at a time."""


def find_model(
    fields: Mapping[str, object] | None, ranks: Sequence[Tensors], source: Path
) -> tuple[Family, GLMConfig]:
    """Family and configuration of the tensors of all ranks, see `read_config`.

    Raises:
        ValueError: it is no model of these families.
    """
    family, config = read_config(fields, ranks[0], len(ranks), source)
    return family, replace(config, tied_embeddings=_is_tied(family, ranks))


def read_parts(
    config: GLMConfig, family: Family, ranks: Sequence[Tensors], source: object = "the checkpoint"
) -> dict[Key, Part]:
    """The parts of a model, to be read from the tensors of all ranks, with their types.

    `source` names the checkpoint in errors.

    Raises:
        ValueError: lists every missing, unexpected, wrongly shaped and wrongly typed tensor; or,
            when a part is read, it holds NaN or infinity.
    """
    places = find_places(config, family, len(ranks))
    _raise_problems(_compare(places, ranks, _copy(config, family)), source)
    return _parts(config, places, ranks)


def read_prefix(config: GLMConfig, tensors: Tensors, source: object) -> dict[Key, Part]:
    """The parts of the P-tuning v2 prefix of a model, from ChatGLM-6B's names for them.

    Raises:
        ValueError: lists every missing, unexpected, wrongly shaped and wrongly typed tensor.
    """
    places = {
        key: found
        for key, found in find_places(config, "chatglm-6b").items()
        if key[0].startswith("prefix.")
    }
    _raise_problems(_compare(places, [tensors]), source)
    return _parts(config, places, [tensors])


def part_writers(
    config: GLMConfig, family: Family, ranks: Sequence[Mapping[str, Stored]]
) -> dict[Key, Callable[[np.ndarray], None]]:
    """Functions that put the parts of a model into the tensors of all ranks.

    A tied output layer that the format stores beside the word embedding is written with it.
    """
    places = find_places(config, family, len(ranks))
    copy = _copy(config, family)
    if copy is not None and copy in ranks[0]:
        key: Key = ("word_embedding", None)
        places[key] = [*places[key], replace(places[key][0], tensor=copy)]
    return {key: partial(_write, found, ranks) for key, found in places.items()}


def find_problems(config: GLMConfig, family: Family, ranks: Sequence[Tensors]) -> list[str]:
    """Every way in which the tensors of the ranks are not those of the model, a line each."""
    return _compare(find_places(config, family, len(ranks)), ranks, _copy(config, family))


def _copy(config: GLMConfig, family: Family) -> str | None:
    """The tensor that may hold the word embedding a second time, as a tied output layer."""
    return name_of(family, "output_embedding") if config.tied_embeddings else None


def _compare(places: Places, ranks: Sequence[Tensors], copy: str | None = None) -> list[str]:
    """Problems of tensors that should be at these places; one may be there as a `copy` of another."""
    shapes = tensor_shapes(places)
    integers = {
        place.tensor for found in places.values() for place in found if place.spec.dtype == "int8"
    }
    problems = []
    for number, tensors in enumerate(ranks):
        rank = f"rank {number}: " if len(ranks) > 1 else ""
        for name, shape in shapes.items():
            if name not in tensors:
                problems.append(f"{rank}missing: {name} {list(shape)}")
                continue
            found, dtype = list(tensors[name].shape), tensors[name].dtype.name
            types = ("int8",) if name in integers else FLOATS
            if found != list(shape):
                problems.append(f"{rank}wrong shape: {name} {found}, expected {list(shape)}")
            if dtype not in types:
                problems.append(f"{rank}wrong type: {name} {dtype}, expected {' or '.join(types)}")
        problems += [rank + problem for problem in _mixed_types(places, tensors)]
        problems += [
            f"{rank}unexpected: {name} {list(tensors[name].shape)}"
            for name in tensors
            if not (name in shapes or name == copy or name.endswith(INV_FREQ))
        ]
    return problems


def _mixed_types(places: Places, tensors: Tensors) -> Iterator[str]:
    """Layers that have other types than the first one, with which they are stacked."""
    for (name, layer), found in places.items():
        first = places[name, layer and 0][0].tensor
        for place in found:
            if {first, place.tensor} <= tensors.keys():
                dtype, expected = tensors[place.tensor].dtype.name, tensors[first].dtype.name
                if dtype != expected:
                    yield f"wrong type: {place.tensor} {dtype}, but {expected} in layer 0"


def _raise_problems(problems: Sequence[str], source: object) -> None:
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"the tensors of {source} do not fit its configuration:\n  {lines}")


def _parts(config: GLMConfig, places: Places, ranks: Sequence[Tensors]) -> dict[Key, Part]:
    specs = part_specs(config)

    def part(key: Key) -> Part:
        shape, dtype = specs[key].shape, ranks[0][places[key][0].tensor].dtype
        return Part(shape, dtype, partial(_read, shape, dtype, places[key], ranks))

    return {key: part(key) for key in places}


def _is_tied(family: Family, ranks: Sequence[Tensors]) -> bool:
    """Whether the output layer is not stored, or is the word embedding."""
    words, output = (name_of(family, name) for name in ("word_embedding", "output_embedding"))
    if words is None or output is None or output not in ranks[0]:
        return True
    return all(
        words in tensors and output in tensors and _equal(tensors[words], tensors[output])
        for tensors in ranks
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices are the same, a block of rows at a time."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (isinstance(a, Stored) and isinstance(b, Stored)):
        return np.array_equal(a.read(), b.read())

    def block(stored: Stored, first: int) -> np.ndarray:
        rows, *columns = stored.shape
        offset = stored.offset + first * stored.nbytes // rows
        shape = (min(_ROWS, rows - first), *columns)
        return replace(stored, offset=offset, shape=shape).read()

    return all(
        np.array_equal(block(a, first), block(b, first)) for first in range(0, a.shape[0], _ROWS)
    )


def _read(
    shape: tuple[int, ...], dtype: np.dtype, places: Sequence[Place], ranks: Sequence[Tensors]
) -> np.ndarray:
    """A part from the shares of all ranks; where one tensor holds it whole, a view of that."""
    if len(places) == 1 and (len(ranks) == 1 or places[0].split is None):
        return _read_share(places[0], ranks[0])
    array = np.empty(shape, dtype)
    for place in places:
        for rank, tensors in enumerate(ranks if place.split is not None else ranks[:1]):
            target = array[place.entry][place.share(rank)]
            layout.copy_into(target, _read_share(place, tensors))
    return array


def _read_share(place: Place, tensors: Tensors) -> np.ndarray:
    tensor = tensors[place.tensor]
    rows = tensor.read()[place.first_row :][: place.shape[0]]
    if not is_finite(rows):
        where = f" in {tensor.file}" if isinstance(tensor, Stored) else ""
        raise ValueError(f"{place.tensor}{where} holds NaN or infinity")
    return layout.from_official(place.layout, place.spec.axes, place.spec.shape, rows)


def _write(
    places: Sequence[Place], ranks: Sequence[Mapping[str, Stored]], array: np.ndarray
) -> None:
    for place in places:
        for rank, tensors in enumerate(ranks):
            share = array[place.entry][place.share(rank)]
            tensors[place.tensor].write(layout.to_official(place.layout, place.spec.axes, share))
