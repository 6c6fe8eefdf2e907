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
    """The parameter as a view of its official array, or a copy where no view exists."""
    sizes = dict(zip(axes, shape, strict=True))
    order = [axis for group in _groups(layout) for axis in group]
    split = array.reshape([sizes[axis] for axis in order])
    return split.transpose([order.index(axis) for axis in axes])


def to_official(layout: str, axes: Sequence[str], array: np.ndarray) -> np.ndarray:
    """The official array of a parameter."""
    order = [axis for group in _groups(layout) for axis in group]
    merged = array.transpose([axes.index(axis) for axis in order])
    return np.ascontiguousarray(merged.reshape(official_shape(layout, axes, array.shape)))


def _groups(layout: str) -> list[list[str]]:
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", layout)]
