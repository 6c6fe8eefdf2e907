"""Products with narrow weights: every form against the weights in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.kernels import quantized_matmul
from glmjax.kernels.quantized_matmul import cpu, reference, xla

EQUATIONS = {
    "btd,chkd->cbthk": ((2, 3, 32), (3, 4, 5)),
    "bthk,dhk->btd": ((2, 3, 8, 4), (7,)),
    "btd,gfd->gbtf": ((1, 1, 32), (2, 9)),
    "btd,vd->btv": ((3, 1, 32), (130,)),
}
FORMS = pytest.mark.parametrize("form", [cpu, xla, reference], ids=["cpu", "xla", "reference"])


def draw(equation, bits, groups, has_zero, arrange="packed"):
    """Arrays of `multiply`, and the weights [*outputs, *inputs] in float64."""
    x_shape, outputs = EQUATIONS[equation]
    random = np.random.default_rng(0)
    inputs = x_shape[2:]
    x = random.standard_normal(x_shape).astype(np.float32)
    # Rows of very different sizes, and one of zeros.
    x *= 10.0 ** random.integers(-6, 6, (*x_shape[:2], *[1] * len(inputs)))
    x[-1, -1] = 0 if x.shape[0] * x.shape[1] > 1 else x[-1, -1]
    most = 2 ** (bits - 1) - 1
    integers = random.integers(-most, most + 1, (*outputs, *inputs))
    scale = random.uniform(0.5, 1, (groups, *outputs)).astype(np.float16)
    zero = random.integers(-most, most + 1, scale.shape).astype(np.float32) if has_zero else None
    values = integers.astype(np.int8)
    if bits == 4 and arrange == "packed":
        values = (values[..., ::2] * 16 + values[..., 1::2] % 16).astype(np.int8)
    elif bits == 4:
        values = jnp.asarray(values, jnp.int4)
    grouped = integers.reshape(*outputs, groups, -1).astype(np.float64)
    if zero is not None:
        grouped += np.moveaxis(zero, 0, -1)[..., None]
    weights = grouped * np.moveaxis(scale, 0, -1)[..., None].astype(np.float64)
    arrays = [None if a is None else jnp.asarray(a) for a in (x, values, scale, zero)]
    return arrays, weights.reshape(integers.shape)


def assert_is_product(found, equation, x, weights):
    """To eight roundings of a number as large as the row, for each of the inputs at worst."""
    assert found.dtype == jnp.float32
    x = np.asarray(x, np.float64)
    expected = np.einsum(equation, x, weights)
    largest = np.einsum(equation, np.broadcast_to(
        np.abs(x).max(tuple(range(2, x.ndim)), keepdims=True), x.shape), np.abs(weights)
    )  # fmt: skip
    assert np.all(np.abs(found - expected) <= 8 * 2.0**-24 * largest)


@FORMS
@pytest.mark.parametrize("has_zero", [False, True], ids=["absmax", "zeropoint"])
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (8, 4), (4, 2)])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_every_form_is_the_product_with_the_weights(equation, bits, groups, has_zero, form):
    (x, *arrays), weights = draw(equation, bits, groups, has_zero)
    assert_is_product(form.multiply(equation, x, *arrays), equation, x, weights)


@pytest.mark.parametrize("form", [cpu, xla], ids=["cpu", "xla"])
def test_int4_may_come_unpacked(form):
    equation = "bthk,dhk->btd"
    (x, *arrays), weights = draw(equation, 4, 2, True, "unpacked")
    assert arrays[0].dtype == jnp.int4
    assert_is_product(form.multiply(equation, x, *arrays), equation, x, weights)


@pytest.mark.parametrize("bits", [4, 8])
def test_three_digits_hold_a_float32(bits):
    """The largest number of a row is exact; one 2^20 times smaller keeps the leading bits that a
    float32 sum would have kept of it."""
    x = jnp.array([[[1.0, 0, 0, 0], [1.0, -(2.0**-20), 2.0**-20, 3e-7]]])
    ones = jnp.eye(4, dtype=jnp.int8)
    values = ones if bits == 8 else ones[:, ::2] * 16 + ones[:, 1::2]
    y = cpu.multiply("btd,vd->btv", x, values, jnp.ones((1, 4), jnp.float16), None)
    assert y[0, 0].tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(y[0, 1], x[0, 1], rtol=0, atol=2.0**-23)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("equation", "kernel"),
    [
        ("btd,vd->btv", (130, 32)),
        ("btd,dchk->cbthk", (32, 3, 4, 5)),
        ("btd,gdf->gbtf", (2, 32, 9)),
        ("bthk,hkd->btd", (8, 4, 7)),
    ],
)
@pytest.mark.parametrize("at_a_time", [1, 40, 10**6])
def test_narrow_floats_are_not_rounded_further(equation, kernel, dtype, at_a_time, monkeypatch):
    """Nor is x; float16 products of float32 numbers would be off by 2^-11."""
    monkeypatch.setattr(cpu, "AT_A_TIME", at_a_time)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 3, 8, 4) if "hkd" in equation else (2, 3, 32)))
    weights = jnp.asarray(random.standard_normal(kernel), dtype)
    assert quantized_matmul.needs_narrow(x, weights)
    found = quantized_matmul.multiply_narrow(equation, x, weights)
    assert_is_product(found, equation, x, np.asarray(weights, np.float64))


@pytest.mark.parametrize("at_a_time", [1, 100, 33 * 50])
def test_weights_are_converted_a_few_rows_at_a_time(at_a_time, monkeypatch):
    """Whatever their number: the last rows may be fewer."""
    monkeypatch.setattr(cpu, "AT_A_TIME", at_a_time)
    for groups in (1, 4):
        (x, *arrays), weights = draw("btd,vd->btv", 4, groups, True)
        assert_is_product(cpu.multiply("btd,vd->btv", x, *arrays), "btd,vd->btv", x, weights)


def test_the_form_follows_the_platform_and_the_mesh():
    (x, *arrays), _ = draw("btd,vd->btv", 8, 1, False)
    plain = jax.make_jaxpr(lambda *a: quantized_matmul.multiply("btd,vd->btv", *a))(x, *arrays)
    assert "i32" in str(plain) and "round" in str(plain)
    with jax.set_mesh(jax.make_mesh((2,), ("tensor",), (jax.sharding.AxisType.Auto,))):
        split = jax.make_jaxpr(lambda *a: quantized_matmul.multiply("btd,vd->btv", *a))(x, *arrays)
    assert "round" not in str(split)
