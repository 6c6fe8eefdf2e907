"""Layer norm, dropout, gradient scaling and rotary positions, number by number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.config import GLMConfig
from glmjax.model.layers import dropout, layer_norm, rms_norm, rotary, rotate, scale_gradient
from glmjax.model.params import LayerNorm

KEY = jax.random.key(0)
ROTARY = jax.jit(rotary, static_argnums=0)
ROTATE = jax.jit(rotate, static_argnums=0)


def test_layer_norm_of_bfloat16_has_float32_statistics():
    random = np.random.default_rng(0)
    # Far from zero: a mean or a variance in bfloat16 would be off by a tenth and more.
    x_BTD = jnp.asarray(50 + random.standard_normal((2, 3, 512)), jnp.bfloat16)
    params = LayerNorm(*random.standard_normal((2, 512), np.float32))
    result = layer_norm(params, x_BTD, 1e-5)
    assert result.dtype == jnp.bfloat16
    x = np.asarray(x_BTD, np.float64)
    exact = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    exact = exact * params.scale + params.bias
    # One rounding to 8 bits at the end; 1e-4 covers float32 sums of 512 numbers around 50.
    assert np.all(np.abs(np.asarray(result, np.float64) - exact) <= 2**-8 * np.abs(exact) + 1e-4)


def test_rms_norm_of_bfloat16_has_float32_statistics():
    random = np.random.default_rng(0)
    x_BTD = jnp.asarray(50 + random.standard_normal((2, 3, 512)), jnp.bfloat16)
    params = LayerNorm(random.standard_normal(512, np.float32), None)
    result = rms_norm(params, x_BTD, 0.5)
    assert result.dtype == jnp.bfloat16
    x = np.asarray(x_BTD, np.float64)
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * params.scale
    assert np.all(np.abs(np.asarray(result, np.float64) - exact) <= 2**-8 * np.abs(exact))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_at_the_rate_and_scales_the_rest(rate):
    x = jnp.full((1000, 1000), 3.0)
    dropped = np.asarray(dropout(x, KEY, rate))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 3 / (1 - rate), rtol=1e-6)
    # Five standard errors; the rate itself is rounded to 2^-16.
    assert abs(np.mean(~kept) - rate) < 5 * np.sqrt(rate * (1 - rate) / x.size) + 2**-17
    both = np.mean(~kept[:, 1:] & ~kept[:, :-1])
    assert abs(both - rate**2) < 10 * np.sqrt(rate**2 / x.size)


def test_dropout_is_a_function_of_its_key():
    x = jax.random.normal(KEY, (64, 64), jnp.bfloat16)
    once, again = dropout(x, KEY, 0.1), dropout(x, KEY, 0.1)
    assert once.dtype == jnp.bfloat16
    np.testing.assert_array_equal(once, again)
    assert np.any(once != dropout(x, jax.random.key(1), 0.1))


def test_dropout_is_off_without_a_key_or_a_rate():
    x = jax.random.normal(KEY, (64, 64))
    assert dropout(x, None, 0.1) is x
    assert dropout(x, KEY, 0.0) is x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_scale_gradient_multiplies_the_gradient_alone(scale, dtype):
    x = jax.random.normal(KEY, (1000,), dtype)
    cotangent = jax.random.normal(jax.random.key(1), (1000,), dtype)
    value, pull = jax.vjp(lambda x: scale_gradient(x, scale), x)
    (gradient,) = pull(cotangent)
    bits = {2: np.uint16, 4: np.uint32}[dtype.dtype.itemsize]
    np.testing.assert_array_equal(np.asarray(value).view(bits), np.asarray(x).view(bits))
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, cotangent * scale)


def one_head(positions: str, head_size: int, frequencies: str = "float32") -> GLMConfig:
    return GLMConfig(
        hidden_size=head_size, num_heads=1, positions=positions, rope_frequencies=frequencies
    )


def angles(config: GLMConfig, ids):
    """Cosines and sines for rows of position ids [1 or 2, T]."""
    return ROTARY(config, np.atleast_2d(ids).astype(np.int32)[None])


def turn(positions: str, x_TK: np.ndarray, ids, dtype=jnp.float32) -> np.ndarray:
    """Rotates one head [T, K]."""
    x_BTHK = jnp.asarray(x_TK, dtype)[None, :, None]
    config = one_head(positions, x_TK.shape[-1])
    return np.asarray(ROTATE(config, x_BTHK, *angles(config, ids))[0, :, 0])


def test_rotation_pairs_the_two_halves():
    turned = turn("rope_1d", np.array([[1.0, 2, 3, 4]]), [3])
    np.testing.assert_allclose(turned, [[-1.413353, 1.879118, -2.828857, 4.058191]], atol=1e-6)


def test_rotation_of_interleaved_pairs_is_another_order_of_the_same():
    turned = turn("rope_1d", np.array([[1.0, 3, 2, 4]]), [3])[:, [0, 2, 1, 3]]
    np.testing.assert_allclose(turned, [[-1.272233, -1.838865, 2.878668, 4.088187]], atol=1e-6)


def test_rope_half_turns_neighbours_of_the_first_half_alone():
    turned = turn("rope_half", np.array([[1.0, 2, 3, 4, 5, 6, 7, 8]]), [3])
    expected = [[-1.272233, -1.838865, 2.878668, 4.088187, 5, 6, 7, 8]]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_frequencies_are_powers_of_the_base():
    config = dataclasses.replace(one_head("rope_half", 32), rope_base=5e6)
    cos, sin = angles(config, [1])
    expected = 5e6 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0, 0], expected, rtol=1e-6)


def test_rotation_is_computed_in_float32():
    x_TK = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    x_TK = np.asarray(jnp.asarray(x_TK, jnp.bfloat16))
    exact, rounded = (turn("rope_1d", x_TK, 40 * np.arange(5), t) for t in ("float32", "bfloat16"))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_frequencies_are_rounded_to_float16_as_chatglm_does():
    ids = [[1, 1000], [0, 0]]
    cos, sin = angles(one_head("rope_2d", 128, "float16"), ids)
    frequencies = np.arctan2(sin, cos)[0, 0, 0]
    np.testing.assert_allclose(
        frequencies[:6], [1, 0.75, 0.5625, 0.4216, 0.3162, 0.2372], atol=5e-5
    )
    np.testing.assert_allclose(cos[0, 1, 0, 1], -0.667, atol=5e-4)
    cos, _ = angles(one_head("rope_2d", 128), ids)
    np.testing.assert_allclose(cos[0, 1, 0, 1], -0.585, atol=5e-4)


def test_rope_2d_turns_each_half_by_its_own_positions():
    x_TK = np.random.default_rng(0).standard_normal((6, 128), np.float32)
    position, block = [0, 1, 2, 7, 7, 7], [0, 0, 0, 1, 2, 3]
    halves = [turn("rope_1d", x_TK[:, :64], position), turn("rope_1d", x_TK[:, 64:], block)]
    np.testing.assert_array_equal(
        turn("rope_2d", x_TK, [position, block]), np.concatenate(halves, axis=-1)
    )


@pytest.mark.parametrize(
    ("positions", "shift"),
    [("rope_1d", [[60]]), ("rope_2d", [[60], [17]]), ("rope_half", [[60]])],
    ids=["1d", "2d", "half"],
)
def test_scores_depend_on_differences_of_positions(positions, shift):
    random = np.random.default_rng(0)
    q_TK, k_TK = random.standard_normal((2, 8, 64), np.float32)
    ids = random.integers(0, 40, (len(shift), 8))

    def scores(ids):
        return turn(positions, q_TK, ids) @ turn(positions, k_TK, ids).T

    # Every angle is below 100, and right to 100 x 2^-24.
    norms = np.linalg.norm(q_TK, axis=-1)[:, None] * np.linalg.norm(k_TK, axis=-1)
    difference = np.abs(scores(ids + shift) - scores(ids))
    assert np.all(difference <= 4 * 100 * 2**-24 * norms)
    for row in range(len(ids)):
        moved = ids.copy()
        moved[row, 0] += 1
        assert np.abs(scores(moved) - scores(ids))[0, 1:].max() > 0.1


def test_learned_positions_have_no_angles():
    assert angles(one_head("learned_2d", 64), [[0], [0]]) is None
