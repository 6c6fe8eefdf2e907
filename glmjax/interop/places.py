"""Which rows of which official tensors hold which part of a model, on how many ranks.

Tensor parallelism splits heads, the feed-forward width and the vocabulary. Each rank's tensor is the
official layout of that rank's share of the parameter, and this one rule is all of Megatron's and
SwissArmyTransformer's: thirds of a query-key-value matrix split one by one, halves of a GeGLU too,
an output projection splits its columns (THUDM/GLM `change_mp.py`, THUDM/GLM-130B
`tools/convert_tp.py`).
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from glmjax.config import GLMConfig
from glmjax.interop import layout
from glmjax.interop.names import SCALE, Family, Weight, table
from glmjax.model.params import ParamSpec
from glmjax.model.parts import Key, part_specs

PARALLEL = ("heads", "mlp", "vocab", "group")
"""The axes that ranks split; of each part one. A rank has one scale a row, so several ranks may share
a group of scales."""


@dataclass(frozen=True)
class Place:
    """Where every rank of a checkpoint keeps its share of a part, or of one of the pair in it."""

    tensor: str
    layout: str
    spec: ParamSpec
    """Axes and shape of the share."""
    split: int | None
    """The axis that the ranks split; None: each has all of it."""
    starts: tuple[int, ...]
    """Where the share of each rank starts along that axis."""
    entry: tuple[Any, ...]
    """Index of what is here in the part: keys or values of both; (): the whole part is."""
    first_row: int
    """Of the tensor, which may hold other parts above."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows in a rank's tensor."""
        return layout.official_shape(self.layout, self.spec.axes, self.spec.shape)

    def share(self, rank: int) -> tuple[slice, ...]:
        """Index of a rank's share in what is here."""
        if self.split is None:
            return ()
        start, size = self.starts[rank], self.spec.shape[self.split]
        return (slice(None),) * self.split + (slice(start, start + size),)


Places = dict[Key, list[Place]]


def find_places(config: GLMConfig, family: Family, num_ranks: int = 1) -> Places:
    """The places of every part of a model.

    Raises:
        ValueError: the ranks do not divide the model, or the family has no name for a part.
    """
    specs = part_specs(config)
    places: Places = defaultdict(list)
    for name, weights in table(family).items():
        for n in range(config.num_layers) if "{n}" in name else [None]:
            rows: dict[str, int] = defaultdict(int)
            for weight in weights:
                for key, suffix, layout_ in _leaves(weight, n):
                    if key in specs:
                        place = _place(
                            name.format(n=n) + suffix, layout_, specs[key], weight.entry,
                            rows[suffix], num_ranks, key,
                        )  # fmt: skip
                        places[key].append(place)
                        rows[suffix] += place.shape[0]
    without = [parameter for parameter, _ in specs if (parameter, _) not in places]
    if without:
        raise ValueError(
            f"the format of {family} has no place for {', '.join(sorted(set(without)))}"
        )
    return {key: places[key] for key in specs}


def tensor_shapes(places: Places) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a rank."""
    shapes: dict[str, tuple[int, ...]] = {}
    for found in places.values():
        for place in found:
            rows, *columns = place.shape
            above = shapes.get(place.tensor, (0,))[0]
            shapes[place.tensor] = (max(above, place.first_row + rows), *columns)
    return shapes


def _leaves(weight: Weight, n: int | None) -> Iterator[tuple[Key, str, str]]:
    """Key, suffix of the official name and layout of what may stand for a weight: itself, or its
    integers under the same name and their scales, one for each row, under a name beside it."""
    rows = layout.axes_of_rows(weight.layout).replace("embed", "stream")
    yield (weight.parameter, n), "", weight.layout
    yield (f"{weight.parameter}.values", n), "", weight.layout
    yield (f"{weight.parameter}.scale", n), SCALE, f"(group {rows})"


def _place(
    tensor: str,
    layout_: str,
    spec: ParamSpec,
    entry_of_pair: int | None,
    first_row: int,
    num_ranks: int,
    key: Key,
) -> Place:
    entry: tuple[Any, ...] = ()
    if entry_of_pair is not None:
        at = spec.axes.index("qkv")
        entry = (slice(None),) * at + (entry_of_pair,)
        axes, shape = ([*x[:at], *x[at + 1 :]] for x in (spec.axes, spec.shape))
        spec = replace(spec, axes=tuple(axes), shape=tuple(shape))
    split = next(
        (
            i for i, axis in enumerate(spec.axes)
            if axis in PARALLEL and (axis != "group" or spec.shape[i] > 1)
        ), None,
    )  # fmt: skip
    starts: tuple[int, ...] = ()
    if split is not None:
        axis, whole = spec.axes[split], spec.shape[split]
        size, rest = (1, num_ranks % whole) if axis == "group" else divmod(whole, num_ranks)
        if rest:
            raise ValueError(
                f"{whole} scales a row of {key[0]} do not fit {num_ranks} ranks: each has one"
                if axis == "group"
                else f"{num_ranks} ranks do not divide {axis} = {whole} of {key[0]}"
            )
        spec = replace(spec, shape=(*spec.shape[:split], size, *spec.shape[split + 1 :]))
        starts = tuple(rank * whole // num_ranks for rank in range(num_ranks))
    return Place(tensor, layout_, spec, split, starts, entry, first_row)
