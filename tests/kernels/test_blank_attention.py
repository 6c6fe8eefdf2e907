"""Every implementation of blank attention against the reference, forward and backward."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.kernels.blank_attention import blockwise, reference
from glmjax.kernels.blank_attention.dropout import keep_scale

LENGTHS = [1, 7, 64, 300]


def intervals(name: str, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """k_start and k_end [B, T] of a kind of row."""
    q = np.arange(length)
    random = np.random.default_rng(0)
    start, end = np.zeros((batch, length)), np.empty((batch, length))
    for b in range(batch):
        if name == "causal":
            end[b] = q + 1
        elif name == "bidirectional":
            end[b] = length
        elif name == "prefix":
            end[b] = np.maximum(q + 1, random.integers(0, length + 1))
        elif name == "packed":
            cuts = np.sort(random.integers(0, length + 1, min(length, 5)))
            cuts = np.array([0, *cuts, length])
            for s, e in itertools.pairwise(cuts.tolist()):
                context = random.integers(0, e - s + 1)
                start[b, s:e] = s
                end[b, s:e] = np.maximum(q[s:e] + 1, s + context)
        elif name == "padded":
            left, right = length // 4, length - length // 5
            start[b], end[b] = left, np.minimum(np.maximum(q + 1, length // 2), right)
            start[b, [*range(left), *range(right, length)]] = 0
            end[b, [*range(left), *range(right, length)]] = 0
        elif name == "blind":
            end[b] = 0
    return start.astype(np.int32), end.astype(np.int32)


def inputs(batch: int, length: int, dtype: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(length), 4)
    return [jax.random.normal(k, (batch, length, 3, 16), jnp.float32).astype(dtype) for k in keys]


@partial(jax.jit, static_argnums=0, static_argnames="dropout")
def output_and_gradients(attend, q, k, v, cotangent, start, end, dropout_key=None, dropout=0.0):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, start, end, dropout_key, dropout), q, k, v)
    return [out, *pull(cotangent)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "prefix", "packed", "padded", "blind"])
def test_blockwise_is_the_reference(kind, length, dtype):
    start, end = intervals(kind, 2, length)
    arrays = inputs(2, length, dtype)
    expected = output_and_gradients(
        reference.attend, *[a.astype("float32") for a in arrays], start, end
    )
    # Unit normal inputs and cotangents: results are O(1), gradients sums of up to T such terms, and
    # each of a handful of roundings costs half a unit in the last place of the largest term.
    epsilon = float(jnp.finfo(dtype).eps)
    for got, want in zip(
        output_and_gradients(blockwise.attend, *arrays, start, end), expected, strict=True
    ):
        scale = max(1.0, float(jnp.abs(want).max()))
        assert jnp.abs(got.astype("float32") - want).max() <= 8 * epsilon * scale


@pytest.mark.parametrize(
    "attend", [reference.attend, blockwise.attend], ids=["reference", "blockwise"]
)
def test_a_query_that_sees_nothing_is_zero_and_has_no_gradient(attend):
    start, end = intervals("padded", 1, 40)
    q, k, v, cotangent = inputs(1, 40, "float32")
    out, dq, *_ = output_and_gradients(attend, q, k, v, cotangent, start, end)
    blind = np.flatnonzero(end[0] == 0)
    assert len(blind) == 18
    assert not out[0, blind].any() and not dq[0, blind].any()


@pytest.mark.parametrize(
    "attend", [reference.attend, blockwise.attend], ids=["reference", "blockwise"]
)
def test_only_visible_keys_matter(attend):
    """Changing keys and values outside a query's interval never changes the query's row."""
    length = 12
    start, end = intervals("packed", 1, length)
    q, k, v, noise = inputs(1, length, "float32")
    attend = jax.jit(attend)
    out = attend(q, k, v, start, end)
    for t in range(length):
        hidden = (np.arange(length) < start[0, t]) | (np.arange(length) >= end[0, t])
        other = jnp.where(hidden[None, :, None, None], noise, 0)
        changed = attend(q, k + other, v + other, start, end)
        np.testing.assert_array_equal(changed[0, t], out[0, t])
        if hidden.all():
            continue
        seen = jnp.where(hidden[None, :, None, None], 0, noise)
        assert (attend(q, k + seen, v + seen, start, end)[0, t] != out[0, t]).any()


def test_fewer_queries_than_keys():
    """Decoding: a few queries against a long cache with its own intervals."""
    q, k, v, _ = inputs(2, 300, "float32")
    start, end = np.zeros((2, 3), np.int32), np.array([[5, 6, 7], [290, 299, 300]], np.int32)
    want = reference.attend(q[:, :3], k, v, start, end)
    np.testing.assert_allclose(
        blockwise.attend(q[:, :3], k, v, start, end), want, atol=8 * np.finfo("float32").eps
    )


@pytest.mark.parametrize(
    "attend", [reference.attend, blockwise.attend], ids=["reference", "blockwise"]
)
def test_dropout_keeps_the_mean_and_its_backward_sees_the_same_bits(attend):
    start, end = intervals("prefix", 1, 64)
    q, k, v, cotangent = inputs(1, 64, "float32")

    def dropped(seed):
        key = jax.random.key(seed)
        return output_and_gradients(attend, q, k, v, cotangent, start, end, key, dropout=0.25)

    clean = attend(q, k, v, start, end)
    mean = jnp.mean(jnp.stack([dropped(seed)[0] for seed in range(200)]), 0)
    assert (dropped(0)[0] != clean).any()
    # 200 draws of a sum of weights at most 1: standard error below 0.05 for unit values.
    assert jnp.abs(mean - clean).mean() < 0.05
    # Output is linear in v, so <out, g> = <v, dv> holds only if both passes dropped the same weights.
    out, _, _, dv = dropped(0)
    np.testing.assert_allclose(jnp.vdot(out, cotangent), jnp.vdot(v, dv), rtol=1e-5)


def test_keep_scale_has_the_stated_rate():
    factors = keep_scale(jax.random.key(0), (1000, 1000), 0.1)
    assert set(np.unique(factors)) == {np.float32(0), np.float32(1 / 0.9)}
    # A million draws: three standard deviations are 0.0009.
    assert abs(float((factors == 0).mean()) - 0.1) < 1e-3


def test_blockwise_memory_is_linear_in_length():
    """2048 tokens of 8 heads train without a T x T float per head."""

    def temporary_bytes(attend, length):
        x = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)
        i = jax.ShapeDtypeStruct((1, length), jnp.int32)
        loss = jax.grad(lambda q, k, v, s, e: attend(q, k, v, s, e).sum(), (0, 1, 2))
        compiled = jax.jit(loss).lower(x, x, x, i, i).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    square = 8 * 2048 * 2048 * 4
    assert temporary_bytes(reference.attend, 2048) > square
    assert temporary_bytes(blockwise.attend, 2048) < square / 4
    assert temporary_bytes(blockwise.attend, 4096) < 2.2 * temporary_bytes(blockwise.attend, 2048)
