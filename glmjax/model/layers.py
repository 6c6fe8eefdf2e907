"""Layers without attention: arrays in, arrays out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.config import GLMConfig
from glmjax.model.params import LayerNorm, Linear
from glmjax.sharding import constrain, gather, row_major, sum_over_batch


def layer_norm(params: LayerNorm, x_BTD: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm with float32 statistics, in the type of x."""
    x = x_BTD.astype(jnp.float32)
    centered = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), -1, keepdims=True)
    normal = centered * jax.lax.rsqrt(variance + epsilon)
    return (normal * params.scale + params.bias).astype(x_BTD.dtype)


def linear(equation: str, params: Linear, x: jax.Array) -> jax.Array:
    """einsum(equation, x, kernel) + bias, in the type of x. Letters are the dimensions of `AXES`."""
    y = _product(equation, x, params.kernel)
    batched = [i for i, letter in enumerate(equation.split("->")[1]) if letter in "bt"]
    return y + jnp.expand_dims(params.bias.astype(x.dtype), batched)


AXES = {
    "b": "batch", "t": "length", "d": "embed", "c": "qkv", "h": "heads", "k": "head",
    "g": "gate", "f": "mlp",
}  # fmt: skip
"""Logical axis of each letter in the equations of `linear`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """einsum over a kernel that is gathered for it, and for the backward pass once more; the
    kernel's gradient is summed over devices straight into their parts of it.

    Barriers keep what comes before and after out of the loops of the matrix product, where XLA
    would compute a GELU or half a layer norm again for every tile.
    """
    x = jax.lax.optimization_barrier(x)
    _, kernel_letters, y_letters = equation.replace("->", ",").split(",")
    return _pin(y_letters, jnp.einsum(equation, x, _whole(kernel, kernel_letters, x.dtype)))


def _product_forward(equation, x, kernel):
    return _product(equation, x, kernel), (x, kernel)


def _product_backward(equation, residuals, dy):
    x, kernel = residuals
    x, dy = jax.lax.optimization_barrier((x, dy))
    x_letters, kernel_letters, y_letters = equation.replace("->", ",").split(",")
    whole = _whole(kernel, kernel_letters, x.dtype)
    dx = _pin(x_letters, jnp.einsum(f"{y_letters},{kernel_letters}->{x_letters}", dy, whole))
    # The axis that is split comes first: the last one would be summed whole on every device.
    first = "d" + kernel_letters.replace("d", "")
    product = functools.partial(jnp.einsum, f"{x_letters},{y_letters}->{first}")
    rows = _whole_axes(x_letters), _whole_axes(y_letters)
    dkernel = sum_over_batch(product, rows, _axes(first))(x, dy)
    dkernel = jnp.moveaxis(dkernel, 0, kernel_letters.index("d"))
    return jax.lax.optimization_barrier(dx), dkernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def _whole(kernel: jax.Array, letters: str, dtype: jnp.dtype) -> jax.Array:
    """The gathered kernel, laid out as it was stored: XLA for TPUs would turn it to have the inputs
    last, for which on v6e it takes longer than for the product."""
    return row_major(gather(kernel.astype(dtype), *_axes(letters)), *_whole_axes(letters))


def _axes(letters: str) -> list[str]:
    return [AXES[letter] for letter in letters]


def _whole_axes(letters: str) -> list[str]:
    """The same where the model width is not split."""
    return ["stream" if axis == "embed" else axis for axis in _axes(letters)]


def _pin(letters: str, x: jax.Array) -> jax.Array:
    """Activations: the residual stream is split by tokens, all else by heads or width."""
    stream = {"length": "sequence", "embed": "stream"} if "d" in letters else {}
    return constrain(x, *(stream.get(axis, axis) for axis in _axes(letters)))


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
    """Rotates queries or keys by the angles of `rotary`, in float32, back to the type of x.

    (low, high) becomes (low, high) cos + (-high, low) sin. The halves trade places in a product
    with a signed permutation, which is exact: on TPUs moving lanes about takes three times as long.
    """
    parts, J = cos_BTPJ.shape[-2:]
    trade_KK = np.kron(np.eye(parts), np.kron([[0, 1], [-1, 0]], np.eye(J)))
    traded_BTHK = jnp.einsum(
        "bthk,kl->bthl", x_BTHK, jnp.asarray(trade_KK, x_BTHK.dtype),
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip

    def both_halves(x_BTPJ: jax.Array) -> jax.Array:
        return jnp.stack([x_BTPJ] * 2, axis=-2).reshape(*x_BTPJ.shape[:2], 1, -1)

    cos_BT1K, sin_BT1K = both_halves(cos_BTPJ), both_halves(sin_BTPJ)
    return (x_BTHK.astype(jnp.float32) * cos_BT1K + traded_BTHK * sin_BT1K).astype(x_BTHK.dtype)
