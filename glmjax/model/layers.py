"""Layers without attention: arrays in, arrays out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.config import GLMConfig
from glmjax.kernels import quantized_matmul
from glmjax.kernels.quantized_matmul import reference
from glmjax.model.params import LayerNorm, Linear, Quantized, merged_order
from glmjax.sharding import (
    constrain,
    gather,
    mesh_axes,
    num_parts,
    per_device,
    row_major,
    sum_over_batch,
    target_device,
)


def norm(config: GLMConfig, params: LayerNorm, x_BTD: jax.Array) -> jax.Array:
    """The norm of a model."""
    function = rms_norm if config.norm == "rmsnorm" else layer_norm
    return function(params, x_BTD, config.layer_norm_epsilon)


def layer_norm(params: LayerNorm, x_BTD: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm with float32 statistics, in the type of x."""
    x = x_BTD.astype(jnp.float32)
    centered = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), -1, keepdims=True)
    normal = centered * jax.lax.rsqrt(variance + epsilon)
    return (normal * params.scale + params.bias).astype(x_BTD.dtype)


def rms_norm(params: LayerNorm, x_BTD: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm (Zhang and Sennrich 2019) with float32 statistics, in the type of x."""
    x = x_BTD.astype(jnp.float32)
    normal = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + epsilon)
    return (normal * params.scale).astype(x_BTD.dtype)


def linear(equation: str, params: Linear, x: jax.Array) -> jax.Array:
    """einsum(equation, x, kernel) + bias, in the type of x. Letters are the dimensions of `AXES`.

    A quantised kernel is constant: it has no gradient.
    """
    if _is_merged(equation, params.kernel):
        y = _merged_product(equation, params, x)
    else:
        y = product(equation, x.dtype.name, x, params.kernel)
    if params.bias is None:
        return y
    batched = [i for i, letter in enumerate(equation.split("->")[1]) if letter in "bt"]
    return y + jnp.expand_dims(params.bias.astype(x.dtype), batched)


def _is_merged(equation: str, kernel: jax.Array | Quantized) -> bool:
    """Whether the kernel has fewer axes than the equation's, see `Arrangement.merged`."""
    values = kernel.values if isinstance(kernel, Quantized) else kernel
    return values.ndim < len(equation.replace("->", ",").split(",")[1])


def _merged_product(equation: str, params: Linear, x: jax.Array) -> jax.Array:
    """The product with heads and head as one axis, which is named heads."""
    x_letters, letters, y_letters = equation.replace("->", ",").split(",")
    order = "".join(letters[i] for i in merged_order(_axes(letters)))
    merged = f"{x_letters},{order}->{y_letters}".replace("hk", "h")
    if "hk" in x_letters:
        return product(merged, x.dtype.name, x.reshape(*x.shape[:-2], -1), params.kernel)
    y = product(merged, x.dtype.name, x, params.kernel)
    # What has heads among its outputs has a bias for each of them.
    return y.reshape(*y.shape[:-1], *params.bias.shape[-2:])


AXES = {
    "b": "batch", "t": "length", "d": "embed", "c": "qkv", "h": "heads", "k": "head",
    "g": "gate", "f": "mlp", "v": "vocab",
}  # fmt: skip
"""Logical axis of each letter in the equations of products."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, dtype: str, x: jax.Array, kernel: jax.Array | Quantized) -> jax.Array:
    """einsum over a kernel that is gathered for it, and for the backward pass once more; the
    kernel's gradient is summed over devices straight into their parts of it.

    Barriers keep what comes before and after out of the loops of the matrix product, where XLA
    would compute a GELU or half a layer norm again for every tile.
    """
    x_letters, _, y_letters = equation.replace("->", ",").split(",")
    length = x.shape[x_letters.index("t")]
    x = jax.lax.optimization_barrier(fill_rows(x_letters, x))
    if isinstance(kernel, Quantized):
        y = _quantised_product(equation, x, kernel)
    elif quantized_matmul.needs_narrow(x, kernel):
        y = quantized_matmul.multiply_narrow(equation, x, kernel)
    else:
        y = _plain_product(equation, x, _whole(equation, kernel, x), dtype)
    y = jax.lax.slice_in_dim(y, 0, length, axis=y_letters.index("t"))
    return _pin(y_letters, y.astype(dtype))


def _plain_product(equation: str, x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    """The einsum. On CPUs the result comes in the order of x and the kernel and is put in that of the
    equation then: XLA would turn the kernel instead, all of it for every token."""
    if not quantized_matmul.on_one_cpu():
        return jnp.einsum(equation, x, kernel, preferred_element_type=dtype)
    terms, y_letters = equation.split("->")
    straight = "".join(sorted(y_letters, key=terms.index))
    y = jnp.einsum(f"{terms}->{straight}", x, kernel, preferred_element_type=dtype)
    return y.transpose([straight.index(letter) for letter in y_letters])


def _product_forward(equation, dtype, x, kernel):
    return product(equation, dtype, x, kernel), (x, kernel)


def _product_backward(equation, dtype, residuals, dy):
    x, kernel = residuals
    x, dy = jax.lax.optimization_barrier((x, dy))
    x_letters, kernel_letters, y_letters = equation.replace("->", ",").split(",")
    whole = _whole(equation, kernel, x)
    dx = _pin(x_letters, jnp.einsum(f"{y_letters},{kernel_letters}->{x_letters}", dy, whole))
    dx = dx.astype(x.dtype)
    if isinstance(kernel, Quantized):
        return jax.lax.optimization_barrier(dx), None
    # The axis that is split comes first: the last one would be summed whole on every device.
    first = "d" + kernel_letters.replace("d", "")
    into_kernel = functools.partial(jnp.einsum, f"{x_letters},{y_letters}->{first}")
    rows = _whole_axes(x_letters), _whole_axes(y_letters)
    dkernel = sum_over_batch(into_kernel, rows, _axes(first))(x, dy)
    dkernel = jnp.moveaxis(dkernel, 0, kernel_letters.index("d"))
    return jax.lax.optimization_barrier(dx), dkernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


def fill_rows(letters: str, x: jax.Array) -> jax.Array:
    """x [b, t ...] with zero tokens behind where a TPU would have fewer than eight rows: XLA gives a
    single row to the vector unit, which takes several times as long as reading the weights."""
    if target_device().platform != "tpu":
        return x
    rows = x.shape[letters.index("b")] // num_parts("batch")
    t = letters.index("t")
    padding = [(0, 0)] * x.ndim
    padding[t] = (0, max(-(-SUBLANES // max(rows, 1)) - x.shape[t], 0))
    return jnp.pad(x, padding)


SUBLANES = 8
"""Rows that a TPU's matrix unit takes at once."""


def _whole(equation: str, kernel: jax.Array | Quantized, x: jax.Array) -> jax.Array:
    """The gathered kernel in the type of x, laid out as it was stored: XLA for TPUs would turn it to
    have the inputs last, for which on v6e it takes longer than for the product."""
    x_letters, letters, _ = equation.replace("->", ",").split(",")
    if isinstance(kernel, Quantized):
        stored = _stored(equation)
        weights = dequantise(kernel, x.shape[x_letters.index(stored[-1])])
        kernel = weights.transpose([stored.index(letter) for letter in letters])
    return row_major(gather(kernel.astype(x.dtype), *_axes(letters)), *_whole_axes(letters))


def dequantise(kernel: Quantized, size: int) -> jax.Array:
    """The weights [*outputs, *inputs] in float32; `size` is that of their last axis."""
    return reference.dequantise(kernel.values, kernel.scale, kernel.zero, size)


def _stored(equation: str) -> str:
    """The letters of a kernel's outputs and inputs, as integers are stored."""
    _, letters, y_letters = equation.replace("->", ",").split(",")
    return "".join(sorted(letters, key=lambda letter: letter not in y_letters))


def _quantised_product(equation: str, x: jax.Array, kernel: Quantized) -> jax.Array:
    """The product in float32. Integers are gathered as they are."""
    x_letters, _, y_letters = equation.replace("->", ",").split(",")
    letters = _stored(equation)
    equation = f"{x_letters},{letters}->{y_letters}"
    values = gather(kernel.values, *_axes(letters))
    outputs, groups = kernel.scale.ndim - 1, len(kernel.scale)
    first = _whole_axes(letters)[outputs]
    parts = num_parts(first)
    if groups == 1 or parts == 1:
        return quantized_matmul.multiply(equation, x, values, kernel.scale, kernel.zero)
    if groups % parts and parts % groups:
        return reference.multiply(equation, x, values, kernel.scale, kernel.zero)

    def local(x: jax.Array, values: jax.Array, *numbers: Any) -> jax.Array:
        """On a device's inputs, with the scale and zero-point of their groups."""
        start = jax.lax.axis_index(mesh_axes(first)) * groups // parts
        scale, zero = jax.tree.map(
            lambda y: jax.lax.dynamic_slice_in_dim(y, start, max(groups // parts, 1)), numbers
        )
        y = quantized_matmul.multiply(equation, x, values, scale, zero)
        return jax.lax.psum(y, mesh_axes(first))

    per_output = ("group", *_whole_axes(letters[:outputs]))
    in_axes = _whole_axes(x_letters), _whole_axes(letters), per_output, per_output
    return per_device(local, in_axes, _whole_axes(y_letters))(x, values, kernel.scale, kernel.zero)


def _axes(letters: str) -> tuple[str, ...]:
    return tuple(AXES[letter] for letter in letters)


def _whole_axes(letters: str) -> tuple[str, ...]:
    """The same where the model width is not split."""
    return tuple("stream" if axis == "embed" else axis for axis in _axes(letters))


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
    """Cosines and sines [B, T, part, J] in float32, or None for a model without rotation.

    A head is cut into parts that rotate by one row of positions each (rope_1d: the whole head by
    the position; rope_2d: one half by position, one by block position; rope_half: one half by
    position), and a part into J pairs of dimensions: angle = position * rope_base^(-j / J).
    """
    if config.positions in ("learned_2d", "alibi"):
        return None
    rows = 2 if config.positions == "rope_2d" else 1
    frequency_J = rotary_frequencies(config)
    positions_BTP = jnp.swapaxes(positions_B2T[:, :rows], 1, 2)
    angles_BTPJ = positions_BTP[..., None].astype(jnp.float32) * frequency_J
    return jnp.cos(angles_BTPJ), jnp.sin(angles_BTPJ)


def rotary_frequencies(config: GLMConfig) -> np.ndarray:
    """Angle per position of each of the J pairs of a part, float32 [J]."""
    J = config.head_size // {"rope_1d": 2, "rope_2d": 4, "rope_half": 4}[config.positions]
    # The official code makes frequencies in float32, then rounds; a float64 power differs.
    frequency_J = np.float32(1) / np.float32(config.rope_base) ** (
        np.arange(J, dtype=np.float32) / J
    )
    return frequency_J.astype(config.rope_frequencies).astype(np.float32)


def rotate(
    config: GLMConfig, x_BTHK: jax.Array, cos_BTPJ: jax.Array, sin_BTPJ: jax.Array
) -> jax.Array:
    """Rotates queries or keys by the angles of `rotary`, in float32, back to the type of x.

    A pair (low, high) becomes (low, high) cos + (-high, low) sin; the two halves of a part form its
    pairs, for rope_half neighbours do. They trade places in a product with a signed permutation,
    which is exact: on TPUs moving lanes about takes three times as long.
    """
    parts, J = cos_BTPJ.shape[-2:]
    trade_22 = np.array([[0, 1], [-1, 0]])
    neighbours = config.positions == "rope_half"
    trade = np.kron(np.eye(J), trade_22) if neighbours else np.kron(trade_22, np.eye(J))
    still = x_BTHK.shape[-1] - 2 * parts * J
    trade_KK = np.pad(np.kron(np.eye(parts), trade), (0, still))
    traded_BTHK = jnp.einsum(
        "bthk,kl->bthl", x_BTHK, jnp.asarray(trade_KK, x_BTHK.dtype),
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip

    def whole_head(x_BTPJ: jax.Array, otherwise: float) -> jax.Array:
        doubled = jnp.stack([x_BTPJ] * 2, axis=-1 if neighbours else -2)
        x_BT1K = doubled.reshape(*x_BTPJ.shape[:2], 1, -1)
        return jnp.pad(x_BT1K, [(0, 0)] * 3 + [(0, still)], constant_values=otherwise)

    cos_BT1K, sin_BT1K = whole_head(cos_BTPJ, 1), whole_head(sin_BTPJ, 0)
    return (x_BTHK.astype(jnp.float32) * cos_BT1K + traded_BTHK * sin_BT1K).astype(x_BTHK.dtype)
