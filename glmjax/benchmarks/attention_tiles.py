"""The search for tile sizes: every candidate is compiled for an absent chip and its cycles counted.

The cost of a candidate is the sum of its static cycles (`attention_static.py`) for one sample with a
third of part A and for eight packed samples. The best of each pass goes into `tiles.json`, which
the kernels read.
"""

import itertools
import json
import logging
from typing import Any

import jax

from glmjax.benchmarks.attention_static import compile_attention, packed, prefix
from glmjax.kernels.blank_attention.tiles import TILES_FILE, Tiles
from glmjax.kernels.blank_attention.tpu_backward import BackwardTiles
from glmjax.kernels.blank_attention.tpu_forward import ForwardTiles
from glmjax.planning.topologies import GENERATIONS

logger = logging.getLogger(__name__)

HEAD_SIZES = 64, 128
LENGTHS = 2048, 8192
MIB = 2**20
# Heads worked on together need VMEM, of which the v4 has 16 MiB and others 64 or more.
FORWARD = [
    ForwardTiles(block_q, 512, block_h, vmem * MIB)
    for block_q in (256, 512)
    for block_h, vmem in ((1, 15), (3, 15), (4, 32), (6, 32), (8, 48))
]
BACKWARD = [
    BackwardTiles(512, 512, edge, block_h, vmem * MIB)
    for edge in (256, 512)
    for block_h, vmem in ((1, 16), (2, 32), (2, 60), (4, 60), (8, 60))
]

# More heads are faster by count, but how long a program may be before its instructions come too
# late is not known without a TPU.
MOST_BUNDLES = 16_384


def run(
    generations: tuple[str, ...],
    head_sizes: tuple[int, ...] = HEAD_SIZES,
    lengths: tuple[int, ...] = LENGTHS,
    candidates: list[Tiles] | None = None,
) -> dict[str, Any]:
    """Measures all candidates and replaces the rows of the table for these generations.

    Returns:
        Under `rows` what was put into the table.
    """
    if candidates is None:
        candidates = [Tiles(*pair) for pair in zip(FORWARD, BACKWARD, strict=True)]
    rows = []
    for generation, head_size, length in itertools.product(generations, head_sizes, lengths):
        row = {
            "device_kind": GENERATIONS[generation].device_kind,
            "head_size": head_size,
            "length": length,
        }
        for kind, (tiles, cycles) in _best(generation, head_size, length, candidates).items():
            row |= {kind: tiles._asdict(), f"{kind}_cycles": cycles}
        logger.info("%s", row)
        rows.append(row)
    key = "device_kind", "head_size", "length"
    table = {tuple(row[k] for k in key): row for row in json.loads(TILES_FILE.read_text())}
    table |= {tuple(row[k] for k in key): row for row in rows}
    lines = ",\n".join(json.dumps(table[k]) for k in sorted(table))
    TILES_FILE.write_text(f"[\n{lines}\n]\n")
    return {"rows": rows}


def show(results: dict[str, Any]) -> None:
    """Prints what `run` found."""
    for row in results["rows"]:
        print(f"{row['device_kind']}, head size {row['head_size']}, length {row['length']}")
        for kind in ("forward", "backward"):
            print(f"  {kind:9} {row[f'{kind}_cycles']:>10,} static cycles  {row[kind]}")


def _best(
    generation: str, head_size: int, length: int, candidates: list[Tiles]
) -> dict[str, tuple[Any, int]]:
    """The tiles with the fewest cycles, and the cycles, of each pass."""
    masks = prefix(length, length // 3), packed((length // 8,) * 8)
    best: dict[str, tuple[Any, int]] = {}
    for tiles in candidates:
        try:
            kernels = compile_attention(generation, length, head_size, tiles)
        except jax.errors.JaxRuntimeError as error:
            # Most often too large for VMEM, which is an answer too.
            logger.info("%s: %s", tiles, str(error).splitlines()[0])
            continue
        counts = [kernels.count(mask) for mask in masks]
        for kind, part in tiles._asdict().items():
            cycles = sum(count[kind]["cycles"] for count in counts)
            if len(kernels.programs[kind].bundles) > MOST_BUNDLES:
                continue
            if kind not in best or cycles < best[kind][1]:
                best[kind] = part, cycles
    return best
