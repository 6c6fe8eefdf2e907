"""The backward kernel for TPU against the gradient of the dense meaning, interpreted on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from test_blank_attention import intervals

from glmjax.kernels.blank_attention.dropout import keep
from glmjax.kernels.blank_attention.tpu_backward import BackwardTiles, backward

KINDS = ["causal", "bidirectional", "prefix", "packed 5", "padded", "blind", "anything"]
WHOLE = BackwardTiles(256, 128, 128, 1, 32 * 2**20)
# Several spans of queries and keys, so that dq waits in HBM.
SPANS = BackwardTiles(128, 128, 128, 2, 6 * 2**20)


def dense(q, k, v, start, end, seeds=None, dropout=0.0):
    """Output and base-2 log-sum-exp of [B, H, length, K] arrays."""
    s = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32)
    s *= q.shape[-1] ** -0.5
    key = jnp.arange(k.shape[2])
    visible = ((start[..., None] <= key) & (key < end[..., None]))[:, None]
    lse = jax.nn.logsumexp(s, axis=-1, where=visible)
    lse = jnp.where(visible.any(-1), lse, 1e30)
    p = jnp.where(visible, jnp.exp(s - lse[..., None]), 0)
    if seeds is not None:
        query = jnp.arange(q.shape[2])[:, None]
        kept = keep(seeds[..., 0, None, None], seeds[..., 1, None, None], query, key, dropout)
        p = jnp.where(kept, p, 0) / (1 - dropout)
    lse = jnp.where(visible.any(-1), lse * np.log2(np.e), 1e30)
    return jnp.einsum("bhts,bhsk->bhtk", p, v), lse


@partial(jax.jit, static_argnames=("tiles", "dropout", "interpret"))
def gradients(arrays, start, end, seeds=None, *, tiles, dropout=0.0, interpret=True):
    """Of the kernel, and of the dense meaning in float32."""
    q, k, v, d_out = (x.astype("float32") for x in arrays)
    attend = partial(dense, start=start, end=end, seeds=seeds, dropout=dropout)
    out, pull, lse = jax.vjp(attend, q, k, v, has_aux=True)
    got = backward(
        *arrays[:3], start, end, seeds, lse, out.astype(arrays[0].dtype), arrays[3],
        scale=q.shape[-1] ** -0.5, dropout=dropout, tiles=tiles, interpret=interpret,
    )  # fmt: skip
    return got, pull(d_out)


def inputs(length, size, head_size=64, dtype="float32"):
    shapes = [(2, 2, n, head_size) for n in (length, size, size, length)]
    keys = jax.random.split(jax.random.key(length + size), 4)
    return [jax.random.normal(*pair).astype(dtype) for pair in zip(keys, shapes, strict=True)]


def assert_close(got, want, dtype="float32"):
    """Base-2 scores and their log-sum-exp reach 16, so that rounding them moves a weight by up to 8
    units in its last place; products and sums of O(1) terms add a handful of half units."""
    epsilon = float(jnp.finfo(dtype).eps)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype
        scale = max(1.0, float(jnp.abs(y).max()))
        assert float(jnp.abs(x.astype("float32") - y).max()) <= 16 * epsilon * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tiles", [WHOLE, SPANS], ids=["one span", "spans"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_meaning(kind, tiles, dtype):
    start, end = intervals(kind, 2, 512)
    assert_close(*gradients(inputs(512, 512, dtype=dtype), start, end, tiles=tiles), dtype)


@pytest.mark.parametrize("head_size", [80, 96, 128])
def test_head_sizes(head_size):
    start, end = intervals("prefix", 2, 256)
    assert_close(*gradients(inputs(256, 256, head_size), start, end, tiles=WHOLE))


@pytest.mark.parametrize(
    ("length", "size", "tiles"),
    [
        pytest.param(256, 768, SPANS, id="one span of queries"),
        pytest.param(768, 256, SPANS, id="one span of keys"),
        pytest.param(640, 768, SPANS, id="a last span cut off"),
    ],
)
def test_other_numbers_of_keys(length, size, tiles):
    start, end = np.sort(np.random.default_rng(1).integers(0, size + 1, (2, 2, length)), axis=0)
    arrays = inputs(length, size)
    assert_close(*gradients(arrays, start.astype(np.int32), end.astype(np.int32), tiles=tiles))


@pytest.mark.parametrize("tiles", [WHOLE, SPANS], ids=["one span", "spans"])
def test_dropout_drops_the_same_weights(tiles):
    start, end = intervals("packed 5", 2, 512)
    seeds = jax.random.bits(jax.random.key(3), (2, 2, 2), jnp.uint32).astype(jnp.int32)
    assert_close(*gradients(inputs(512, 512), start, end, seeds, tiles=tiles, dropout=0.25))


@pytest.mark.parametrize("tiles", [WHOLE, SPANS], ids=["one span", "spans"])
def test_no_races_and_no_unwritten_memory(tiles):
    start, end = intervals("padded", 2, 512)
    arrays = inputs(512, 512)
    interpret = pltpu.InterpretParams(detect_races=True)
    assert_close(*gradients(arrays, start, end, tiles=tiles, interpret=interpret))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("tiles", [WHOLE, SPANS], ids=["one span", "spans"])
def test_hidden_keys_change_nothing(tiles):
    """Not a bit of a sample's gradients depends on its neighbour's keys, values or queries."""
    cut = 200
    start = np.repeat(np.array([[0, cut]], np.int32), [cut, 512 - cut], axis=1)
    end = np.maximum(np.arange(1, 513, dtype=np.int32), np.where(start, 300, 90))
    arrays = inputs(512, 512)
    other = [jnp.where(jnp.arange(512)[:, None] < cut, x, 1e4 * x[:, :, ::-1]) for x in arrays]
    start, end = (jnp.broadcast_to(x, (2, 512)) for x in (start, end))
    for got, want in zip(
        gradients(other, start, end, tiles=tiles)[0], gradients(arrays, start, end, tiles=tiles)[0],
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(got[:, :, :cut], want[:, :, :cut])
        assert (got[:, :, cut:] != want[:, :, cut:]).any()


def test_tiles_must_divide_the_sizes():
    with pytest.raises(ValueError, match=r"block_q=256.* do not divide 384 queries"):
        gradients(inputs(384, 512), *intervals("causal", 2, 384), tiles=WHOLE)
