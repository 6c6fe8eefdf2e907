"""Cycles of the attention kernels on TPUs that are not there, beside splash attention.

Everything is compiled ahead of time and the instruction bundles that would issue are counted
(`planning/bundles.py`): static figures, without waits for memory or copies. Kernels are counted
whole, grid steps and skipped blocks included, and divided by the rows and heads of one core.

The bound is what the matrix units need for the 512 x 512 blocks that a mask touches, at the chip's
peak rate. In places the compiler lets products start closer together than that rate, so a count may
fall below the bound; then the bound is the better figure. splash attention masks by a function of
positions fixed at compilation, so it is compiled for every prefix anew and not at all for packed
samples. The sum of its partial dq over key blocks is left to XLA and not counted.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.kernels.blank_attention import tpu
from glmjax.kernels.blank_attention.tiles import Tiles, tiles_for
from glmjax.planning.bundles import Program, execute, read_program
from glmjax.planning.prefetch import prefetched_scalars
from glmjax.planning.topologies import GENERATIONS, Generation, absent_mesh, compile_absent

LENGTH, HEAD_SIZE, ROWS, HEADS = 2048, 128, 2, 24
PREFIXES = 0, 700, 1400, 2048
PACKED = {"8 x 256": (256,) * 8, "8 ragged": (97, 411, 180, 305, 256, 350, 149, 300)}
BLOCK = 512

KERNELS = {"forward": "blank_attention_forward", "backward": "blank_attention_backward"}
SPLASH = {"forward": "splash_mha_fwd_no_residuals", "backward": "splash_mha_dkv_no_residuals"}
PRODUCTS = {"forward": 2, "backward": 5}
"""Matrix products of each pass, as many FLOPs each."""


class Intervals(NamedTuple):
    """Who sees whom in one row, int32 [T] each."""

    k_start_T: np.ndarray
    k_end_T: np.ndarray


def prefix(length: int, context: int) -> Intervals:
    """A sample whose first `context` tokens see each other."""
    query_T = np.arange(length, dtype=np.int32)
    return Intervals(0 * query_T, np.maximum(query_T + 1, np.int32(context)))


def packed(lengths: tuple[int, ...]) -> Intervals:
    """Samples side by side; the first three fifths of each see each other."""
    start_T = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths).astype(np.int32)
    k_end_T = np.concatenate([prefix(n, 3 * n // 5).k_end_T for n in lengths])
    return Intervals(start_T, start_T + k_end_T)


def bound(generation: str, mask: Intervals, products: int) -> float:
    """Cycles of the matrix units for every 512 x 512 block with a visible key."""
    key_T = np.arange(len(mask.k_end_T))
    visible_TT = (mask.k_start_T[:, None] <= key_T) & (key_T < mask.k_end_T[:, None])
    blocks = visible_TT.reshape(len(key_T) // BLOCK, BLOCK, -1, BLOCK).any((1, 3)).sum()
    return GENERATIONS[generation].attention_cycles(blocks * BLOCK**2, HEAD_SIZE, products)


def run(generations: tuple[str, ...] = ("v5p", "v6e")) -> dict[str, Any]:
    """Counts both kernels for every mask on every generation.

    Returns:
        The versions of jax and libtpu, and under `generations` for each mask and pass the static
        cycles per row and head of `glmjax`, with its fullest unit and spilled stores, the `bound`,
        for prefixes those of `splash`, and for packed samples the sum of the samples `alone`.
    """
    results = {generation: _measure(generation) for generation in generations}
    return {"jax": jax.__version__, "libtpu": version("libtpu"), "generations": results}


def _measure(generation: str) -> dict[str, Any]:
    masks = {f"prefix {context}": prefix(LENGTH, context) for context in PREFIXES}
    masks |= {name: packed(lengths) for name, lengths in PACKED.items()}
    kernels = cache(partial(compile_attention, generation))
    results: dict[str, Any] = {name: {} for name in masks}
    for name, mask in masks.items():
        results[name] = kernels(LENGTH).count(mask)
        for kind, row in results[name].items():
            row["bound"] = bound(generation, mask, PRODUCTS[kind])
        for length in PACKED.get(name, ()):
            alone = prefix(length, 3 * length // 5)
            for kind, row in kernels(length).count(alone).items():
                results[name][kind]["alone"] = results[name][kind].get("alone", 0) + row["cycles"]
    for context in PREFIXES:
        for kind, cycles in _splash(generation, context).items():
            results[f"prefix {context}"][kind]["splash"] = cycles
    return results


@dataclass(frozen=True)
class Kernels:
    """Both passes of blank attention, compiled for an absent chip."""

    programs: dict[str, Program]
    tiles: Tiles
    length: int
    head_size: int
    chip: Generation

    def count(self, mask: Intervals) -> dict[str, dict[str, Any]]:
        """For each pass the static cycles per row and head, the fullest unit and the spills."""
        array = jnp.zeros((ROWS, self.length, HEADS, self.head_size), jnp.bfloat16)
        bounds = [jnp.broadcast_to(x_T, (ROWS, self.length)) for x_T in mask]
        scalars = prefetched_scalars(partial(_both_passes, self.tiles), *[array] * 4, *bounds)
        per_head = self.chip.cores / (ROWS * HEADS)
        results = {}
        for kind, kernel in KERNELS.items():
            counts = execute(self.programs[kind], scalars[kernel], self.chip.delay_slots)
            unit, share = counts.busiest()
            results[kind] = {
                "cycles": round(counts.cycles * per_head),
                "busiest": f"{unit} {share:.0%}",
                "spills": round(counts.slots("VSTORE:SPILL") * per_head),
            }
        return results


def compile_attention(
    generation: str, length: int, head_size: int = HEAD_SIZE, tiles: Tiles | None = None
) -> Kernels:
    """Compiles both passes for an absent chip; `tiles` replaces those of the table."""
    chip = GENERATIONS[generation]
    tiles = tiles or tiles_for(chip.device_kind, head_size, length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compile_absent(_compile_attention, generation, length, head_size, tiles, dump=folder)
        programs = {kind: read_program(folder, kernel) for kind, kernel in KERNELS.items()}
    return Kernels(programs, tiles, length, head_size, chip)


def _compile_attention(generation: str, length: int, head_size: int, tiles: Tiles) -> None:
    mesh = absent_mesh(generation)
    sharding = NamedSharding(mesh, PartitionSpec())
    array = jax.ShapeDtypeStruct((ROWS, length, HEADS, head_size), jnp.bfloat16, sharding=sharding)
    bounds = jax.ShapeDtypeStruct((ROWS, length), jnp.int32, sharding=sharding)
    with jax.set_mesh(mesh):
        jax.jit(partial(_both_passes, tiles)).lower(*[array] * 4, bounds, bounds).compile()


def _both_passes(tiles: Tiles, q_BTHK, k_BSHK, v_BSHK, d_out_BTHK, k_start_BT, k_end_BT):
    def attend(q_BTHK, k_BSHK, v_BSHK):
        return tpu.attend(q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT, tiles=tiles)

    return jax.vjp(attend, q_BTHK, k_BSHK, v_BSHK)[1](d_out_BTHK)


def _splash(generation: str, context: int) -> dict[str, int]:
    """Cycles of splash attention's forward and fused backward kernel per row and head."""
    array = jnp.zeros((ROWS, HEADS, LENGTH, HEAD_SIZE), jnp.bfloat16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compile_absent(_compile_splash, generation, context, dump=folder)
        forward, gradients = _splash_passes(context)
        scalars = prefetched_scalars(forward, *[array] * 3)
        scalars |= prefetched_scalars(gradients, *[array] * 4)
        chip = GENERATIONS[generation]
        cycles = {}
        for kind, kernel in SPLASH.items():
            counts = execute(read_program(folder, kernel), scalars[kernel], chip.delay_slots)
            cycles[kind] = round(counts.cycles * chip.cores / (ROWS * HEADS))
        return cycles


def _compile_splash(generation: str, context: int) -> None:
    mesh = absent_mesh(generation)
    array = jax.ShapeDtypeStruct(
        (ROWS, HEADS, LENGTH, HEAD_SIZE), jnp.bfloat16,
        sharding=NamedSharding(mesh, PartitionSpec()),
    )  # fmt: skip
    forward, gradients = _splash_passes(context)
    jax.jit(forward).lower(*[array] * 3).compile()
    jax.jit(gradients).lower(*[array] * 4).compile()


class _PrefixMask(splash_mask._ComputableMask):
    """splash attention's fastest kind of mask: a function of positions, computed in the kernel."""

    def __init__(self, context: int) -> None:
        self.context = context
        super().__init__((LENGTH, LENGTH), lambda q, k: (k < context) | (k <= q))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PrefixMask) and self.context == other.context

    def __hash__(self) -> int:
        return hash(self.context)


def _splash_passes(context: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    blocks: dict[str, Any] = dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
         "block_kv_dkv_compute"), BLOCK,
    )  # fmt: skip
    kernel = jax.vmap(
        splash.make_splash_mha_single_device(
            splash_mask.MultiHeadMask([_PrefixMask(context)] * HEADS),
            block_sizes=splash.BlockSizes(**blocks, use_fused_bwd_kernel=True),
        )
    )
    return kernel, lambda q, k, v, d_out: jax.vjp(kernel, q, k, v)[1](d_out)


def show(results: dict[str, Any]) -> None:
    """Prints what `run` counted."""
    print(f"static cycles per row and head, {LENGTH} tokens, head size {HEAD_SIZE}, bfloat16; "
          f"jax {results['jax']}, libtpu {results['libtpu']}")  # fmt: skip
    for generation, masks in results["generations"].items():
        for kind in KERNELS:
            print(f"\n{generation} {kind}")
            print(f"{'mask':12} {'glmjax':>8} {'bound':>8} {'ratio':>6} {'splash':>8} {'ratio':>6} "
                  f"{'alone':>8} {'ratio':>6}  fullest unit, spilled stores")  # fmt: skip
            for name, passes in masks.items():
                row = passes[kind]
                print(f"{name:12} {row['cycles']:>8,}{_against(row, 'bound')}"
                      f"{_against(row, 'splash')}{_against(row, 'alone')}"
                      f"  {row['busiest']}, {row['spills']:,}")  # fmt: skip


def _against(row: dict[str, Any], other: str) -> str:
    if other not in row:
        return f" {'':>8} {'':>6}"
    return f" {row[other]:>8,.0f} {row['cycles'] / row[other]:>6.2f}"
