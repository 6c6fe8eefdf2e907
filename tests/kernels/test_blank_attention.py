"""Every implementation of blank attention against the reference, forward and backward.

The TPU kernels run in interpret mode here, with tiles small enough that rows have several blocks;
`test_tpu_compiles.py` compiles them for TPUs.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.kernels.blank_attention import blockwise, reference, tpu
from glmjax.kernels.blank_attention.dropout import head_seeds, keep
from glmjax.kernels.blank_attention.tiles import Tiles
from glmjax.kernels.blank_attention.tpu_backward import BackwardTiles
from glmjax.kernels.blank_attention.tpu_forward import ForwardTiles

SMALL = Tiles(ForwardTiles(128, 128, 1), BackwardTiles(128, 128, edge=128))
IMPLEMENTATIONS = {
    "reference": reference.attend,
    "blockwise": blockwise.attend,
    "tpu": partial(tpu.attend, tiles=SMALL, interpret=True),
}
FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
HEADS, HEAD_SIZE = 3, 16

every_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def sample(length, context, start=0):
    """k_start and k_end of one sample whose first `context` tokens are part A."""
    query = np.arange(length)
    return np.full(length, start), start + np.maximum(query + 1, context)


def packed(length, count, random):
    """Samples of random lengths and contexts, some of them empty."""
    cuts = np.sort(random.integers(0, length + 1, count - 1))
    lengths = np.diff([0, *cuts, length])
    starts = np.cumsum([0, *lengths[:-1]])
    parts = [sample(n, random.integers(0, n + 1), s) for n, s in zip(lengths, starts, strict=True)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def padded(length, left, right):
    """A sample between rows that see nothing."""
    start, end = np.zeros(length, int), np.zeros(length, int)
    inner = slice(left, length - right)
    size = length - left - right
    start[inner], end[inner] = sample(size, size // 2, left)
    return start, end


def anything(length, random):
    """Any interval for every query, empty and reversed ones too."""
    return random.integers(0, length + 1, (2, length))


KINDS = {
    "causal": lambda n, random: sample(n, 0),
    "prefix of 1": lambda n, random: sample(n, 1),
    "prefix": lambda n, random: sample(n, n // 2),
    "bidirectional": lambda n, random: sample(n, n),
    **{
        f"packed {count}": partial(lambda n, random, count: packed(n, count, random), count=count)
        for count in (1, 2, 3, 4, 5, 16)
    },
    "padded left": lambda n, random: padded(n, n // 4, 0),
    "padded right": lambda n, random: padded(n, 0, n // 4),
    "padded": lambda n, random: padded(n, n // 4, n // 5),
    "blind": lambda n, random: (np.zeros(n, int), np.zeros(n, int)),
    "anything": anything,
}


def intervals(kind, batch, length):
    """k_start and k_end [B, T] of a kind of row, other ones in every row."""
    rows = [KINDS[kind](length, np.random.default_rng(seed)) for seed in range(batch)]
    return [np.stack(part).astype(np.int32) for part in zip(*rows, strict=True)]


def inputs(batch, length, dtype, head_size=HEAD_SIZE):
    keys = jax.random.split(jax.random.key(length), 4)
    shape = batch, length, HEADS, head_size
    return [jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys]


@partial(jax.jit, static_argnums=0, static_argnames="dropout")
def output_and_gradients(attend, q, k, v, cotangent, start, end, seeds=None, dropout=0.0):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, start, end, seeds, dropout), q, k, v)
    return [out, *pull(cotangent)]


def assert_close(got, want, dtype):
    """Unit normal inputs and cotangents: results are O(1), gradients sums of up to T such terms, and
    each of a handful of roundings costs half a unit in the last place of the largest term."""
    for g, w in zip(got, want, strict=True):
        scale = max(1.0, float(jnp.abs(w).max()))
        error = jnp.abs(g.astype("float32") - w).max()
        assert error <= 8 * float(jnp.finfo(dtype).eps) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("length", "dtype"),
    [(1, "float32"), (7, "float32"), (384, "float32"), (300, "float32"), (300, "bfloat16")],
)
@pytest.mark.parametrize("name", FAST)
def test_is_the_reference(name, length, dtype, kind):
    start, end = intervals(kind, 2, length)
    arrays = inputs(2, length, dtype)
    want = output_and_gradients(
        reference.attend, *[a.astype("float32") for a in arrays], start, end
    )
    assert_close(output_and_gradients(IMPLEMENTATIONS[name], *arrays, start, end), want, dtype)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
@pytest.mark.parametrize("name", FAST)
def test_head_sizes(name, head_size):
    start, end = intervals("packed 3", 1, 200)
    arrays = inputs(1, 200, "float32", head_size)
    want = output_and_gradients(reference.attend, *arrays, start, end)
    assert_close(output_and_gradients(IMPLEMENTATIONS[name], *arrays, start, end), want, "float32")


@every_implementation
def test_a_query_that_sees_nothing_is_zero_and_has_no_gradient(name):
    start, end = intervals("padded", 1, 140)
    q, k, v, cotangent = inputs(1, 140, "float32")
    out, dq, *_ = output_and_gradients(IMPLEMENTATIONS[name], q, k, v, cotangent, start, end)
    blind = np.flatnonzero(end[0] == 0)
    assert len(blind) == 63
    assert not out[0, blind].any() and not dq[0, blind].any()


@pytest.mark.parametrize("kind", ["packed 4", "prefix", "anything"])
@every_implementation
def test_only_visible_keys_matter(name, kind):
    """Other keys outside a query's interval change no bit of its output and of its gradient, and
    other queries that do not see a key change no bit of that key's gradients."""
    length = 140
    start, end = intervals(kind, 1, length)
    q, k, v, cotangent = inputs(1, length, "float32")
    out, dq, dk, dv = output_and_gradients(IMPLEMENTATIONS[name], q, k, v, cotangent, start, end)
    position = np.arange(length)
    for at in range(3, length, 17):
        hidden = ((position < start[0, at]) | (position >= end[0, at]))[None, :, None, None]
        noisy = [jnp.where(hidden, 1e4 * jnp.flip(x, 1), x) for x in (k, v)]
        other = output_and_gradients(IMPLEMENTATIONS[name], q, *noisy, cotangent, start, end)
        np.testing.assert_array_equal(other[0][0, at], out[0, at])
        np.testing.assert_array_equal(other[1][0, at], dq[0, at])

        unseen = ((at < start[0]) | (at >= end[0]))[None, :, None, None]
        q2, cotangent2 = (jnp.where(unseen, jnp.flip(x, 1), x) for x in (q, cotangent))
        other = output_and_gradients(IMPLEMENTATIONS[name], q2, k, v, cotangent2, start, end)
        np.testing.assert_array_equal(other[2][0, at], dk[0, at])
        np.testing.assert_array_equal(other[3][0, at], dv[0, at])


@every_implementation
def test_every_visible_key_matters(name):
    length = 12
    start, end = intervals("packed 3", 1, length)
    q, k, v, noise = inputs(1, length, "float32")
    attend = jax.jit(IMPLEMENTATIONS[name])
    out = attend(q, k, v, start, end)
    for t, s in itertools.product(range(length), repeat=2):
        if start[0, t] <= s < end[0, t]:
            changed = attend(q, k, v.at[0, s].add(noise[0, s]), start, end)
            assert (changed[0, t] != out[0, t]).any()


@every_implementation
def test_fewer_queries_than_keys(name):
    """A few queries against many keys, with intervals of their own."""
    q, k, v, _ = inputs(2, 300, "float32")
    start, end = np.zeros((2, 3), np.int32), np.array([[5, 6, 7], [290, 299, 300]], np.int32)
    want = reference.attend(q[:, :3], k, v, start, end)
    got = IMPLEMENTATIONS[name](q[:, :3], k, v, start, end)
    np.testing.assert_allclose(got, want, atol=8 * np.finfo("float32").eps)


@every_implementation
def test_intervals_may_reach_beyond_the_keys(name):
    q, k, v, _ = inputs(1, 40, "float32")
    start, end = intervals("prefix", 1, 40)
    got = IMPLEMENTATIONS[name](q, k, v, start - 9, np.where(end == 40, 4000, end))
    want = reference.attend(q, k, v, start, end)
    np.testing.assert_allclose(got, want, atol=8 * np.finfo("float32").eps)


@pytest.mark.parametrize("length", [64, 300])
@pytest.mark.parametrize("name", FAST)
def test_dropout_drops_the_weights_of_the_reference(name, length):
    """The same seeds drop the same weights in every implementation, in both passes."""
    start, end = intervals("prefix", 2, length)
    arrays = inputs(2, length, "float32")
    seeds = head_seeds(jax.random.key(0), 2, HEADS)
    want = output_and_gradients(reference.attend, *arrays, start, end, seeds, dropout=0.25)
    clean = output_and_gradients(reference.attend, *arrays, start, end)
    assert (want[0] != clean[0]).any()
    got = output_and_gradients(IMPLEMENTATIONS[name], *arrays, start, end, seeds, dropout=0.25)
    assert_close(got, want, "float32")


def test_dropout_keeps_the_mean():
    start, end = intervals("prefix", 1, 64)
    q, k, v, _ = inputs(1, 64, "float32")
    clean = reference.attend(q, k, v, start, end)

    @jax.jit
    def dropped(key):
        return reference.attend(q, k, v, start, end, head_seeds(key, 1, HEADS), 0.25)

    mean = jnp.mean(jnp.stack([dropped(jax.random.key(seed)) for seed in range(200)]), 0)
    # 200 draws of a sum of weights at most 1: standard error below 0.05 for unit values.
    assert jnp.abs(mean - clean).mean() < 0.05


def test_dropout_keeps_the_stated_share_independently():
    query, key = jnp.arange(1000)[:, None], jnp.arange(1000)
    seeds = head_seeds(jax.random.key(0), 1, 2)[0]
    kept = np.stack([keep(seed[0], seed[1], query, key, 0.1) for seed in seeds])
    # A million draws a head: three standard deviations of a mean are 0.0009, and 0.003 of a
    # correlation; 1,000 draws a row and a column: five are 0.05.
    assert np.abs(kept.mean((1, 2)) - 0.9).max() < 1e-3
    assert np.abs(kept.mean(1) - 0.9).max() < 0.05
    assert np.abs(kept.mean(2) - 0.9).max() < 0.05
    unit = (kept - kept.mean()) / kept.std()
    neighbours = unit[0] * unit[1], unit[:, 1:] * unit[:, :-1], unit[..., 1:] * unit[..., :-1]
    assert max(abs(float(product.mean())) for product in neighbours) < 3e-3


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
