"""Blank attention by cuDNN's fused kernels, for NVIDIA GPUs from Ampere on.

cuDNN knows no mask of one interval of keys per query, so this is the one place outside the
reference where a T x S mask exists: booleans [B, 1, T, S], shared by the heads, which jax turns
into a bias in the type of q. Scores never leave the kernel, but every key block is computed, and
the bias (in jax 0.10 its gradient too) costs 2 B T S bytes.

The bias of a hidden key is -2.2e12 in bfloat16 and -32768 in float16: hidden keys weigh exactly
nothing as long as scaled scores are far smaller than that, less than a tenth, say. To a query that
sees nothing all keys would look alike, so its output is set to zero, and with that its gradient.
"""

from typing import Literal

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
    """Attention output [B, T, H, K]; holds masks [B, 1, T, S].

    Raises:
        ValueError: what `refusal` says of the type, the head size, dropout or the GPU.
    """
    if reason := refusal(q_BTHK.dtype, q_BTHK.shape[-1], dropout, compute_capability()):
        raise ValueError(f'{reason}; choose attention "blockwise"')
    return masked_attention(q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT, "cudnn")


def refusal(dtype: DTypeLike, head_size: int, dropout: float, capability: float) -> str | None:
    """Why cuDNN cannot compute this on a GPU of that compute capability; None if it can."""
    if capability < 8:
        return (
            "attention by cudnn needs an NVIDIA GPU of compute capability 8.0 or newer, and this "
            f"device has {capability or 'none'}"
        )
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"attention by cudnn takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if head_size % 8 or head_size > 128:
        return f"attention by cudnn takes head sizes 8, 16, ..., 128, not {head_size}"
    if dropout:
        return f"attention by cudnn has no dropout, and the dropout is {dropout}"
    return None


def masked_attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """Blank attention by jax.nn.dot_product_attention with a boolean mask."""
    length, size = q_BTHK.shape[1], k_BSHK.shape[1]
    k_end_BT = jnp.minimum(k_end_BT, size)
    # cuDNN has gradients for even lengths only: a padded query sees nothing, nothing a padded key.
    q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT = (
        _pad_to_even(x) for x in (q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT)
    )
    key_S = jnp.arange(k_BSHK.shape[1])
    mask_BTS = (k_start_BT[..., None] <= key_S) & (key_S < k_end_BT[..., None])
    out_BTHK = jax.nn.dot_product_attention(
        q_BTHK, k_BSHK, v_BSHK, mask=mask_BTS[:, None], implementation=implementation
    )
    sees_BT = jnp.maximum(k_start_BT, 0) < k_end_BT
    return jnp.where(sees_BT[..., None, None], out_BTHK, 0)[:, :length]


def _pad_to_even(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, x.shape[1] % 2 if axis == 1 else 0) for axis in range(x.ndim)])
