"""The cache of keys and values: its layout, its int8 form, and the TPU path under a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import glmjax
from glmjax.config import MeshConfig, replace
from glmjax.inference.generate import generate
from glmjax.inference.sampling import Sampling
from glmjax.kernels import blank_attention
from glmjax.model import attention, params, transformer
from glmjax.model.attention import BlankMask, KVCache
from glmjax.presets import TRAINED_TOKENS
from glmjax.sharding import make_mesh

PROMPTS = [
    [30, 31, 32, TRAINED_TOKENS.gmask, TRAINED_TOKENS.sop],
    [TRAINED_TOKENS.cls, 40, TRAINED_TOKENS.mask, 41, TRAINED_TOKENS.eos, TRAINED_TOKENS.sop],
    [TRAINED_TOKENS.gmask, TRAINED_TOKENS.sop],
]


def filled(config, batch, size, T):
    """A cache with size tokens in each row of layer 1, and T queries that see all of them."""
    rng = np.random.default_rng(0)
    shape = (batch, size, config.num_heads, config.head_size)
    k_BTHK, v_BTHK = rng.standard_normal((2, *shape), np.float32)
    q_BTHK = rng.standard_normal((batch, T, *shape[2:]), np.float32)
    cache = attention.write(config, KVCache.empty(config, batch, size), 1, k_BTHK, v_BTHK)
    bounds = np.zeros((batch, T), np.int32), np.full((batch, T), size, np.int32)
    return q_BTHK, k_BTHK, v_BTHK, cache, BlankMask(*bounds)


@pytest.mark.parametrize("T", [1, 12], ids=["decoding", "prefill"])
def test_an_int8_cache_is_as_close_as_its_steps(glm, T):
    """Every number is off by at most half a step, the largest of its token and head over 254."""
    config = replace(glm[0], cache_dtype="int8")
    q_BTHK, k_BTHK, v_BTHK, cache, mask = filled(config, 3, 40, T)
    positions_BT = np.full((3, T), 40, np.int32)
    out_BTHK = attention.attend_cache(config, cache, mask, positions_BT)(cache, 1, q_BTHK)
    exact_BTHK = attention.attend(glm[0], q_BTHK, k_BTHK, v_BTHK, mask)

    step_BSH = np.abs(k_BTHK).max(-1) / 254
    # A score moves by at most the sum of |q| times half a step, a weight by its exponential.
    shift_BTHS = np.abs(q_BTHK).sum(-1)[..., None] * np.swapaxes(step_BSH, 1, 2)[:, None]
    shift_BTH = shift_BTHS.max(-1) * config.head_size**-0.5
    v_max_BH = np.abs(v_BTHK).max((1, 3))
    bound_BTH = (np.expm1(2 * shift_BTH) + 1 / 254) * v_max_BH[:, None]
    error_BTH = np.abs(out_BTHK - exact_BTHK).max(-1)
    assert np.all(error_BTH <= bound_BTH)
    assert np.any(error_BTH > 0)


def test_an_int8_cache_is_written_with_one_scale_per_token_and_head(glm):
    config = replace(glm[0], cache_dtype="int8")
    _, k_BTHK, v_BTHK, cache, _ = filled(config, 2, 10, 1)
    for x_BTHK, int8, scale in (
        (k_BTHK, cache.k_NBHSK, cache.k_scale_NBHS),
        (v_BTHK, cache.v_NBHSK, cache.v_scale_NBHS),
    ):
        assert int8.dtype == jnp.int8
        stored_BHSK = int8[1] * scale[1][..., None]
        error_BHSK = np.abs(stored_BHSK - np.swapaxes(x_BTHK, 1, 2))
        half_BHS = np.swapaxes(np.abs(x_BTHK).max(-1), 1, 2) / 254
        assert np.all(error_BHSK <= half_BHS[..., None] * (1 + 1e-5))
        assert not np.any(int8[0]) and not np.any(scale[0])


def test_tokens_of_nothing_are_zero_in_an_int8_cache(glm):
    config = replace(glm[0], cache_dtype="int8")
    zeros_BTHK = jnp.zeros((2, 3, config.num_heads, config.head_size))
    cache = attention.write(config, KVCache.empty(config, 2, 8), 0, zeros_BTHK, zeros_BTHK)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(cache))


def test_an_int8_cache_generates_the_same_alone_and_together(glm):
    config = replace(glm[0], cache_dtype="int8")
    sampling = Sampling(temperature=0.8, seed=3)
    together = generate(config, glm[1], PROMPTS, 6, sampling)
    assert together == [generate(config, glm[1], [ids], 6, sampling)[0] for ids in PROMPTS]


@pytest.mark.parametrize(("size", "slots"), [(0, 0), (40, 40), (128, 128), (129, 256), (256, 256)])
def test_large_caches_have_whole_tiles(size, slots):
    config = glmjax.get_config("glm-tiny")
    assert KVCache.empty(config, 1, size).k_NBHSK.shape[3] == slots


@pytest.mark.parametrize(
    ("sizes", "cache_dtype"), [((1, 1, 1), "float32"), ((2, 2, 2), "int8")], ids=["alone", "mesh"]
)
def test_the_tpu_path_decodes_what_plain_xla_does(monkeypatch, glm, sizes, cache_dtype):
    config, weights = glm
    config = replace(config, cache_dtype=cache_dtype)
    rng = np.random.default_rng(0)
    batch, T = 4, 2
    tokens_BT = rng.integers(20, 500, (batch, T))
    length_B = np.array([9, 0, 30, 17], np.int32)
    positions_B2T = np.stack([length_B[:, None] + np.arange(T), np.zeros((batch, T))], 1)
    cache = KVCache.empty(config, batch, 64)
    shape = (batch, 30, config.num_heads, config.head_size)
    for n in range(config.num_layers):
        cache = attention.write(config, cache, n, *rng.standard_normal((2, *shape), np.float32))
    cache = cache.replace(length_B=jnp.asarray(length_B))

    def step(implementation, weights):
        step = functools.partial(
            transformer.decode_step, replace(config, attention=implementation), weights
        )
        return jax.jit(step)(cache, tokens_BT, positions_B2T.astype(np.int32))

    expected = step("blockwise", weights)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    monkeypatch.setattr(blank_attention, "platform", lambda: "tpu")
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        sharded = jax.device_put(weights, params.param_shardings(config, mesh))
        logits, extended = step("tpu", sharded)
    np.testing.assert_allclose(logits, expected[0], rtol=0, atol=2e-5 * np.abs(expected[0]).max())
    np.testing.assert_array_equal(extended.length_B, expected[1].length_B)
    np.testing.assert_allclose(
        extended.k_NBHSK.astype(jnp.float32), expected[1].k_NBHSK.astype(jnp.float32),
        rtol=0, atol=1 if cache_dtype == "int8" else 1e-5,  # Halves may round either way.
    )  # fmt: skip
