"""Tile sizes of the TPU kernels: data, chosen by counting cycles of compiled kernels.

`tiles.json` holds the best found for each device kind, head size and length;
`glmjax bench attention --tune` measures them anew and rewrites it.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from glmjax.kernels.blank_attention.tpu_backward import BackwardTiles
from glmjax.kernels.blank_attention.tpu_forward import ForwardTiles

TILES_FILE = Path(__file__).with_name("tiles.json")


class Tiles(NamedTuple):
    """The tiles of both passes."""

    forward: ForwardTiles
    backward: BackwardTiles


def tiles_for(device_kind: str, head_size: int, length: int) -> Tiles:
    """The tiles measured for the nearest longer head and the nearest shorter length.

    Raises:
        ValueError: nothing was measured for this device kind or for heads this long.
    """
    measured = [row for row in _table() if row["device_kind"] == device_kind]
    if not measured:
        known = ", ".join(sorted({row["device_kind"] for row in _table()}))
        raise ValueError(f"no attention tiles for device kind {device_kind!r}; known are {known}")
    longer = [row for row in measured if row["head_size"] >= head_size]
    if not longer:
        raise ValueError(f"no attention tiles for head size {head_size} on {device_kind}")
    nearest = min(row["head_size"] for row in longer)
    rows = sorted(
        (row for row in longer if row["head_size"] == nearest), key=lambda row: row["length"]
    )
    row = next((row for row in reversed(rows) if row["length"] <= length), rows[0])
    return Tiles(ForwardTiles(**row["forward"]), BackwardTiles(**row["backward"]))


@functools.cache
def _table() -> list[dict]:
    return json.loads(TILES_FILE.read_text())
