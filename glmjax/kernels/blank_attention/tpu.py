"""Blank attention on TPU: Pallas kernels for both passes, joined into one differentiable function.

The kernels take [B, H, length, K] arrays whose lengths are whole tiles. Padded queries see nothing
and padded keys lie beyond every k_end, so that padding changes no number.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from glmjax.kernels.blank_attention.padding import pad
from glmjax.kernels.blank_attention.tiles import Tiles, tiles_for
from glmjax.kernels.blank_attention.tpu_backward import backward
from glmjax.kernels.blank_attention.tpu_forward import LANES, forward
from glmjax.sharding import target_device


class _Static(NamedTuple):
    """What is fixed when a call is compiled."""

    tiles: Tiles
    scale: float
    dropout: float
    interpret: bool | pltpu.InterpretParams


def attend(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    seeds_BH2: jax.Array | None = None,
    dropout: float = 0.0,
    *,
    tiles: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Attention output [B, T, H, K]; memory linear in T and S.

    Tiles are those measured for the device unless given; `interpret` runs the kernels anywhere.

    Raises:
        ValueError: there are no tiles for the device or the head size.
    """
    _, length, heads, head_size = q_BTHK.shape
    size = k_BSHK.shape[1]
    tiles = tiles or tiles_for(target_device().device_kind, head_size, max(length, size))
    tiles, padded_length, padded_size = _fit(tiles, length, size, heads)
    q_BHTK = pad(jnp.swapaxes(q_BTHK, 1, 2), padded_length, axis=2)
    k_BHSK, v_BHSK = (pad(jnp.swapaxes(x, 1, 2), padded_size, axis=2) for x in (k_BSHK, v_BSHK))
    k_start_BT = pad(jnp.maximum(k_start_BT, 0), padded_length, axis=1)
    k_end_BT = pad(jnp.minimum(k_end_BT, size), padded_length, axis=1)
    static = _Static(tiles, head_size**-0.5, dropout, interpret)
    out_BHTK = _attend(static, q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2)
    return jnp.swapaxes(out_BHTK[:, :, :length], 1, 2)


def _fit(tiles: Tiles, length: int, size: int, heads: int) -> tuple[Tiles, int, int]:
    """The tiles cut down to what is there, and the lengths of queries and keys as whole tiles."""
    forward_q, padded_length = _blocks(length, tiles.forward.block_q)
    forward_k, padded_size = _blocks(size, tiles.forward.block_k)
    fitted = Tiles(
        tiles.forward._replace(
            block_q=forward_q, block_k=forward_k, block_h=_divisor(heads, tiles.forward.block_h, 1)
        ),
        tiles.backward._replace(
            block_q=_divisor(padded_length, tiles.backward.block_q, LANES),
            block_k=_divisor(padded_size, tiles.backward.block_k, LANES),
            block_h=_divisor(heads, tiles.backward.block_h, 1),
        ),
    )
    return fitted, padded_length, padded_size


def _blocks(length: int, most: int) -> tuple[int, int]:
    """The smallest block of whole lanes that cuts the length into the fewest blocks of at most so
    many rows, and the length of those blocks together."""
    count = -(-length // most)
    block = -(-length // (count * LANES)) * LANES
    return block, count * block


def _divisor(size: int, most: int, unit: int) -> int:
    """The largest multiple of a unit, at most `most`, that divides a size."""
    return next(n for n in range(most // unit * unit, 0, -unit) if size % n == 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2):
    return _forward(static, q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2)[0]


def _forward(static: _Static, q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2):
    out_BHTK, lse_BHT = forward(
        q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2,
        scale=static.scale, dropout=static.dropout, tiles=static.tiles.forward,
        interpret=static.interpret,
    )  # fmt: skip
    # Remat policies may keep these by name, so that the kernel does not run again.
    out_BHTK, lse_BHT = (checkpoint_name(x, "attention") for x in (out_BHTK, lse_BHT))
    residuals = q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2, lse_BHT, out_BHTK
    return out_BHTK, residuals


def _backward(static: _Static, residuals, d_out_BHTK):
    q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2, lse_BHT, out_BHTK = residuals
    dq_BHTK, dk_BHSK, dv_BHSK = backward(
        q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2, lse_BHT, out_BHTK, d_out_BHTK,
        scale=static.scale, dropout=static.dropout, tiles=static.tiles.backward,
        interpret=static.interpret,
    )  # fmt: skip
    return dq_BHTK, dk_BHSK, dv_BHSK, None, None, None


_attend.defvjp(_forward, _backward)
