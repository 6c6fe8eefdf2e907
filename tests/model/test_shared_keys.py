"""Heads of queries that share a head of keys and values (grouped-query attention)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.config import GLMConfig
from glmjax.kernels.blank_attention import dropout as dropout_bits
from glmjax.kernels.blank_attention import reference, tpu
from glmjax.kernels.blank_attention.tiles import BackwardTiles, ForwardTiles, Tiles
from glmjax.model import attention
from glmjax.model.attention import BlankMask

HEADS, SHARED, LENGTH = 8, 4, 40
CONFIG = GLMConfig(num_heads=HEADS, num_kv_heads=HEADS // SHARED, hidden_size=HEADS * 16)
TILES = Tiles(ForwardTiles(128, 128, 2), BackwardTiles(128, 128, 128, 1))


@pytest.fixture(params=["reference", "blockwise", "tpu"])
def attend(request, monkeypatch):
    """`attention.attend` by an implementation, that for TPUs interpreted."""

    def interpreted(q, k, v, start, end, key, rate, **settings):
        seeds = None if key is None else dropout_bits.head_seeds(key, q.shape[0], q.shape[2])
        rate = 0.0 if key is None else rate
        return tpu.attend(q, k, v, start, end, seeds, rate, tiles=TILES, interpret=True)

    if request.param == "tpu":
        monkeypatch.setattr(attention.blank_attention, "attend", interpreted)
    return partial(attention.attend, dataclasses.replace(CONFIG, attention=request.param))


@pytest.fixture(scope="module")
def case():
    """q, k and v, the gradient of the output, and a mask."""
    random = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(random.standard_normal((2, LENGTH, heads, 16), np.float32))
        for heads in (HEADS, HEADS // SHARED, HEADS // SHARED, HEADS)
    )
    mask = BlankMask.from_context(jnp.array([0, LENGTH // 2]), length=LENGTH)
    return (q, k, v), d_out, mask


def test_shared_keys_are_repeated_keys(attend, case):
    """Outputs, and gradients, which sum over the heads that share a key."""
    arrays, d_out, mask = case

    def repeated(q, k, v):
        k, v = (jnp.repeat(x, SHARED, axis=2) for x in (k, v))
        return reference.attend(q, k, v, mask.k_start_BT, mask.k_end_BT)

    found, pull = jax.vjp(lambda *arrays: attend(*arrays, mask), *arrays)
    expected, expected_pull = jax.vjp(repeated, *arrays)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for gradient, right in zip(pull(d_out), expected_pull(d_out), strict=True):
        np.testing.assert_allclose(gradient, right, rtol=0, atol=3e-5)


def test_every_head_drops_weights_of_its_own(attend, case):
    (q, k, _), d_out, mask = case
    q = jnp.zeros_like(q)  # Equal weights: what is left of each shows in the values of ones.
    key, v = jax.random.key(1), jnp.ones_like(k)
    config = dataclasses.replace(CONFIG, attention="reference")
    found, pull = jax.vjp(lambda v: attend(q, k, v, mask, key), v)
    expected, expected_pull = jax.vjp(lambda v: attention.attend(config, q, k, v, mask, key), v)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(pull(d_out)[0], expected_pull(d_out)[0], rtol=0, atol=3e-5)
    kept_BTH = np.asarray(found)[..., 0]
    assert abs(kept_BTH.mean() - 1) < 0.05
    assert not np.any(np.ptp(kept_BTH[1, LENGTH // 2 :], axis=-1) == 0)
