"""Blank attention by tokamax's Mosaic GPU kernels, for NVIDIA Hopper and Blackwell.

tokamax's mask is ours: `Mask(k_start, k_end)`. Its forward pass skips key blocks that no query of a
tile sees; its backward pass computes all of them. Nothing is T x S. Its kernels give zeros for a
query that sees nothing, its XLA operation the mean of all values; here it is zeros in any case.

The public function `tokamax.dot_product_attention` takes no interval and falls back silently, so
the operation for Mosaic GPU itself is called. `Mask` is not public, hence the exact version in the
requirements.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from glmjax.kernels.blank_attention.gpu import compute_capability


def attend(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    seeds_BH2: jax.Array | None = None,
    dropout: float = 0.0,
) -> jax.Array:
    """Attention output [B, T, H, K].

    Raises:
        ValueError: what `refusal` says of the type, the head size, dropout, the GPU or the
            installation.
    """
    if reason := refusal(q_BTHK.dtype, q_BTHK.shape[-1], dropout, compute_capability()):
        raise ValueError(f'{reason}; choose attention "blockwise"')
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    operation = PallasMosaicGpuFlashAttention()
    return interval_attention(operation, q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT)


def refusal(dtype: DTypeLike, head_size: int, dropout: float, capability: float) -> str | None:
    """Why tokamax cannot compute this on a GPU of that compute capability; None if it can."""
    if not 9 <= capability < 11:
        return (
            "attention by tokamax needs an NVIDIA GPU of compute capability 9.x or 10.x, and this "
            f"device has {capability or 'none'}"
        )
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"attention by tokamax takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if head_size > 256:
        return f"attention by tokamax takes head sizes up to 256, not {head_size}"
    if dropout:
        return f"attention by tokamax has no dropout, and the dropout is {dropout}"
    if importlib.util.find_spec("tokamax") is None:
        return 'attention by tokamax needs Python 3.12 or newer and pip install "glmjax[gpu]"'
    return None


def interval_attention(
    operation: Any,
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
) -> jax.Array:
    """Blank attention by one of tokamax's attention operations."""
    from tokamax._src.ops.attention.base import Mask

    mask = Mask(k_start=k_start_BT[:, None], k_end=k_end_BT[:, None])
    out_BTHK = operation(q_BTHK, k_BSHK, v_BSHK, mask=mask)
    sees_BT = jnp.maximum(k_start_BT, 0) < jnp.minimum(k_end_BT, k_BSHK.shape[1])
    return jnp.where(sees_BT[..., None, None], out_BTHK, 0)
