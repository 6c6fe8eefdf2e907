"""Between the axes of a parameter and the matrix that an official checkpoint stores.

A layout names the parameter's logical axes in the order of the official array, with merged ones in
brackets: a query-key-value matrix whose rows are head 0's query, key and value, then head 1's, is
"(heads qkv head) embed". It says both directions at once, and because it only permutes and
reshapes, nothing is lost either way.
"""

import math
import re
from collections.abc import Sequence

import numpy as np


def official_shape(layout: str, axes: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the official array of a parameter with these logical axes and this shape."""
    sizes = dict(zip(axes, shape, strict=True))
    return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(layout))


def from_official(
    layout: str, axes: Sequence[str], shape: Sequence[int], array: np.ndarray
) -> np.ndarray:
    """The parameter as a view of its official array."""
    sizes = dict(zip(axes, shape, strict=True))
    order = _order(layout)
    split = array.reshape([sizes[axis] for axis in order])
    return split.transpose([order.index(axis) for axis in axes])


def to_official(layout: str, axes: Sequence[str], array: np.ndarray) -> np.ndarray:
    """The official array of a parameter, contiguous."""
    shape = official_shape(layout, axes, array.shape)
    return contiguous(array.transpose([axes.index(axis) for axis in _order(layout)])).reshape(shape)


def axes_of_rows(layout: str) -> str:
    """The axes, in order, that the rows of the official matrix stand for."""
    return " ".join(_groups(layout)[0])


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array itself where it is contiguous, else a contiguous copy."""
    if array.flags.c_contiguous:
        return array
    copy = np.empty(array.shape, array.dtype)
    copy_into(copy, array)
    return copy


def copy_into(target: np.ndarray, array: np.ndarray) -> None:
    """Copies a transposed view, of whose last axis 16 entries or half a cache line are taken at a
    time: left to itself numpy goes along the axis that is slow to read, and takes eight times as
    long."""
    fastest = int(np.argmin(array.strides)) if array.ndim else 0
    if array.ndim < 2 or fastest == array.ndim - 1:
        target[...] = array
        return
    source, target = np.moveaxis(array, fastest, -2), np.moveaxis(target, fastest, -2)
    width = min(16, max(1, 32 // array.itemsize))
    for outer in np.ndindex(source.shape[:-2]):
        for first in range(0, source.shape[-1], width):
            columns = slice(first, first + width)
            target[outer][:, columns] = source[outer][:, columns]


def _order(layout: str) -> list[str]:
    return [axis for group in _groups(layout) for axis in group]


def _groups(layout: str) -> list[list[str]]:
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", layout)]
