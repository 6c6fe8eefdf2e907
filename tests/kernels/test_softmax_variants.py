"""ALiBi and the softmax in bfloat16: the reference against numpy, key blocks against the reference."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blank_attention import HEADS, assert_close, inputs, intervals

from glmjax.kernels import blank_attention
from glmjax.kernels.blank_attention import blockwise, reference
from glmjax.kernels.blank_attention.alibi import Positions, slopes
from glmjax.kernels.blank_attention.dropout import head_seeds

KINDS = ["causal", "prefix", "packed 4", "padded", "anything"]
ATTEND = {"reference": reference.attend, "blockwise": blockwise.attend}


def text_positions(batch, length):
    """Positions as rows have them: rising in part A, standing still in the blanks."""
    random = np.random.default_rng(length)
    position_BT = np.cumsum(random.integers(0, 2, (batch, length)), 1).astype(np.int32)
    position_BT[:, length // 2 :] = random.integers(0, length, (batch, length - length // 2))
    return Positions(position_BT, position_BT)


def bfloat16(x):
    return np.asarray(x, jnp.bfloat16).astype(np.float64)


def meaning(q, k, v, start, end, positions=None, rounded=np.asarray):
    """Attention of every row, head and query in turn, in float64; `rounded` is the softmax's type."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(v[:, : q.shape[1]].shape)
    rate = {1: [2**-8.0], 3: [2**-4.0, 2**-8.0, 2**-2.0]}[q.shape[2]]
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = slice(max(start[b, t], 0), end[b, t])
        score = k[b, seen, h] @ q[b, t, h] / np.sqrt(q.shape[-1])
        if positions is not None:
            score -= rate[h] * abs(positions.query_BT[b, t] - positions.key_BS[b, seen])
        exp = rounded(np.exp(rounded(score) - rounded(score).max(initial=-1e30)))
        out[b, t, h] = rounded(exp / rounded(exp.sum())) @ v[b, seen, h]
    return out


@partial(jax.jit, static_argnames=("name", "softmax_dtype", "dropout"))
def output_and_gradients(
    name, q, k, v, cotangent, start, end, positions=None, softmax_dtype="float32", seeds=None,
    dropout=0.0,
):  # fmt: skip
    def attend(q, k, v):
        return ATTEND[name](q, k, v, start, end, seeds, dropout, positions, softmax_dtype)

    out, pull = jax.vjp(attend, q, k, v)
    return [out, *pull(cotangent)]


@pytest.mark.parametrize("name", ATTEND)
@pytest.mark.parametrize("kind", ["prefix", "packed 4"])
@pytest.mark.parametrize("heads", [1, 3])
def test_alibi_is_the_formula(name, kind, heads):
    start, end = intervals(kind, 2, 140)
    q, k, v, _ = (x[:, :, :heads] for x in inputs(2, 140, "float32"))
    positions = text_positions(2, 140)
    want = meaning(q, k, v, start, end, positions)
    got = ATTEND[name](q, k, v, start, end, positions=positions)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert np.abs(want - meaning(q, k, v, start, end)).max() > 0.05


def test_slopes():
    """Of 8 and 12 heads, from the paper's rule and the code that comes with it."""
    np.testing.assert_array_equal(slopes(8), [2.0**-h for h in range(1, 9)])
    between = [2.0 ** -(h / 2) for h in (1, 3, 5, 7)]
    np.testing.assert_array_equal(slopes(12), np.float32([*slopes(8), *between]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [7, 300])
def test_alibi_in_key_blocks_is_the_reference(kind, length):
    start, end = intervals(kind, 2, length)
    arrays, positions = inputs(2, length, "float32"), text_positions(2, length)
    want = output_and_gradients("reference", *arrays, start, end, positions)
    assert_close(output_and_gradients("blockwise", *arrays, start, end, positions), want, "float32")


@pytest.mark.parametrize("softmax_dtype", ["float32", "bfloat16"])
def test_both_with_dropout(softmax_dtype):
    start, end = intervals("prefix", 2, 300)
    arrays, positions = inputs(2, 300, "float32"), text_positions(2, 300)
    run = partial(
        output_and_gradients, start=start, end=end, positions=positions, dropout=0.25,
        softmax_dtype=softmax_dtype, seeds=head_seeds(jax.random.key(0), 2, HEADS),
    )  # fmt: skip
    assert_close(run("blockwise", *arrays), run("reference", *arrays), softmax_dtype)


def test_alibi_needs_no_square_of_the_length():
    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)
        i = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def total(q, k, v, *bounds):
            positions = Positions(*bounds[:2])
            return blockwise.attend(q, k, v, *bounds, positions=positions).sum()

        lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x, i, i)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2.2 * temporary_bytes(2048)
    assert temporary_bytes(2048) < 8 * 2048 * 2048


@pytest.mark.parametrize("name", ATTEND)
def test_a_softmax_in_bfloat16_is_one_of_rounded_numbers(name):
    """The same roundings as in numpy, so that what is left is float32's; in key blocks weights are
    rounded before they are divided, by half a unit in the last place more each."""
    start, end = intervals("prefix", 1, 64)
    q, k, v, _ = inputs(1, 64, "float32")
    exact = meaning(4 * q, k, v, start, end)
    want = meaning(4 * q, k, v, start, end, rounded=bfloat16)
    got = jax.jit(partial(ATTEND[name], softmax_dtype="bfloat16"))(4 * q, k, v, start, end)
    assert got.dtype == jnp.float32
    loss = np.sqrt(np.mean((want - exact) ** 2))
    assert 1e-3 < loss < 3e-2
    difference = np.sqrt(np.mean((got - want) ** 2))
    assert difference < (0.1 if name == "reference" else 0.5) * loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [7, 300])
def test_a_softmax_in_bfloat16_in_key_blocks_is_the_reference(kind, length):
    start, end = intervals(kind, 2, length)
    arrays = inputs(2, length, "float32")
    want = output_and_gradients("reference", *arrays, start, end, None, "bfloat16")
    got = output_and_gradients("blockwise", *arrays, start, end, None, "bfloat16")
    assert_close(got, want, "bfloat16")
    exact = output_and_gradients("reference", *arrays, start, end)
    for array, rounded in zip(exact, got, strict=True):
        assert length == 7 or np.abs(array - rounded).max() > 1e-3


@pytest.mark.parametrize("name", ATTEND)
def test_gradients_in_bfloat16_are_close_to_the_exact_ones(name):
    start, end = intervals("packed 4", 2, 300)
    arrays = inputs(2, 300, "float32")
    exact = output_and_gradients("reference", *arrays, start, end)
    assert_close(
        output_and_gradients(name, *arrays, start, end, None, "bfloat16"), exact, "bfloat16"
    )


def test_other_implementations_refuse_both():
    q, k, v, _ = inputs(1, 8, "bfloat16")
    start, end = intervals("causal", 1, 8)
    for name in ("tokamax", "cudnn"):
        for variant in ({"positions": text_positions(1, 8)}, {"softmax_dtype": "bfloat16"}):
            with pytest.raises(ValueError, match=f"'{name}' has neither ALiBi nor a bfloat16"):
                blank_attention.attend(q, k, v, start, end, implementation=name, **variant)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("variant", ["positions", "softmax_dtype"])
def test_automatic_choice_is_in_key_blocks_everywhere(monkeypatch, caplog, platform, variant):
    monkeypatch.setattr(blank_attention, "platform", lambda: platform)
    monkeypatch.setattr(blockwise, "attend", lambda *arrays: "key blocks")
    value = {"positions": text_positions(1, 8), "softmax_dtype": "bfloat16"}[variant]
    q, k, v, _ = inputs(1, 8, "bfloat16")
    blank_attention._automatic.cache_clear()
    with caplog.at_level(logging.INFO, logger="glmjax"):
        out = blank_attention.attend(q, k, v, *intervals("causal", 1, 8), **{variant: value})
    blank_attention._automatic.cache_clear()
    assert out == "key blocks"
    (message,) = caplog.messages
    assert message.startswith(f"attention: blockwise, chosen for {platform}; ALiBi and")


def test_neither_is_in_a_program_that_asks_for_neither():
    """Rounding and distances leave no trace where they are not wanted."""
    arrays, (start, end) = inputs(2, 300, "float32"), intervals("prefix", 2, 300)

    def program(**variant):
        return output_and_gradients.lower("blockwise", *arrays, start, end, **variant).as_text()

    assert "reduce_precision" not in program() and "abs" not in program()
    assert "reduce_precision" in program(softmax_dtype="bfloat16")
    assert "abs" in program(positions=text_positions(2, 300))
