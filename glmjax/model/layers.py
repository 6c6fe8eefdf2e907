"""Layers without attention: arrays in, arrays out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.config import GLMConfig
from glmjax.model.params import LayerNorm, Linear


def layer_norm(params: LayerNorm, x_BTD: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm with float32 statistics, in the type of x."""
    x = x_BTD.astype(jnp.float32)
    centered = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), -1, keepdims=True)
    normal = centered * jax.lax.rsqrt(variance + epsilon)
    return (normal * params.scale + params.bias).astype(x_BTD.dtype)


def linear(equation: str, params: Linear, x: jax.Array) -> jax.Array:
    """einsum(equation, x, kernel) + bias, in the type of x."""
    return jnp.einsum(equation, x, params.kernel.astype(x.dtype)) + params.bias.astype(x.dtype)


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Sets elements to zero with probability `rate` and scales the rest; without a key, nothing."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= round(rate * 2**16)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, scale: float) -> jax.Array:
    """The identity, whose gradient is multiplied by `scale` (GLM-130B section 2.3, EGS)."""
    return x


scale_gradient.defvjp(lambda x, scale: (x, None), lambda scale, _, g: (g * scale,))


def rotary(config: GLMConfig, positions_B2T: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """Cosines and sines [B, T, part, J] in float32, or None for a model with learned positions.

    A head is cut into parts that rotate by one row of positions each (rope_1d: the whole head by
    the position; rope_2d: one half by position, one by block position), and a part into two halves
    of J that form the rotated pairs: angle = position * 10000^(-j / J).
    """
    if config.positions == "learned_2d":
        return None
    parts = {"rope_1d": 1, "rope_2d": 2}[config.positions]
    J = config.head_size // (2 * parts)
    # The official code makes frequencies in float32, then rounds; a float64 power differs.
    frequency_J = np.float32(1) / np.float32(10000) ** (np.arange(J, dtype=np.float32) / J)
    frequency_J = frequency_J.astype(config.rope_frequencies).astype(np.float32)
    positions_BTP = jnp.swapaxes(positions_B2T[:, :parts], 1, 2)
    angles_BTPJ = positions_BTP[..., None].astype(jnp.float32) * frequency_J
    return jnp.cos(angles_BTPJ), jnp.sin(angles_BTPJ)


def rotate(x_BTHK: jax.Array, cos_BTPJ: jax.Array, sin_BTPJ: jax.Array) -> jax.Array:
    """Rotates queries or keys by the angles of `rotary`, in float32, back to the type of x."""
    *batch, K = x_BTHK.shape
    parts, J = cos_BTPJ.shape[-2:]
    low, high = jnp.moveaxis(x_BTHK.astype(jnp.float32).reshape(*batch, parts, 2, J), -2, 0)
    cos, sin = cos_BTPJ[:, :, None], sin_BTPJ[:, :, None]
    turned = jnp.stack([low * cos - high * sin, high * cos + low * sin], axis=-2)
    return turned.reshape(*batch, K).astype(x_BTHK.dtype)
