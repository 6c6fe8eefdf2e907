"""The forward kernel for TPU, interpreted: output and log-sum-exp against dense attention."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from glmjax.kernels.blank_attention.dropout import keep
from glmjax.kernels.blank_attention.key_ranges import key_ranges, query_ranges
from glmjax.kernels.blank_attention.tpu_forward import ForwardTiles, forward

HEADS = 2


def intervals(kind: str, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """k_start and k_end [2, T] of a kind of row; with more keys than queries, the last ones."""
    random = np.random.default_rng(7)
    q = np.arange(queries) + keys - queries
    start, end = np.zeros((2, queries), np.int32), np.zeros((2, queries), np.int32)
    if kind == "causal":
        end[:] = q + 1
    elif kind == "prefix":
        end[0], end[1] = np.maximum(q + 1, keys // 3), keys
    elif kind == "packed":
        start[:] = q // 80 * 80
        end[:] = np.maximum(q + 1, start + 30)
    elif kind == "padded":
        seen = slice(queries // 4, queries - queries // 5)
        start[:, seen], end[:, seen] = 40, np.maximum(q + 1, 170)[seen]
    elif kind == "any":
        start[:] = random.integers(0, keys, (2, queries))
        end[:] = np.minimum(start + random.integers(-20, keys // 2, (2, queries)), keys)
    return start, end


def inputs(queries: int, keys: int, dtype: str, size: int = 64) -> list[jax.Array]:
    seeds = jax.random.split(jax.random.key(queries + keys), 3)
    lengths = queries, keys, keys
    return [
        jax.random.normal(seed, (2, HEADS, length, size)).astype(dtype)
        for seed, length in zip(seeds, lengths, strict=True)
    ]


def dense(q_BHTK, k_BHSK, v_BHSK, k_start_BT, k_end_BT, seeds_BH2=None, dropout=0.0):
    """Output and base-2 log-sum-exp by the definition, in float32."""
    q_BHTK, k_BHSK, v_BHSK = (x.astype("float32") for x in (q_BHTK, k_BHSK, v_BHSK))
    s_BHTS = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK) * q_BHTK.shape[-1] ** -0.5
    key_S = jnp.arange(k_BHSK.shape[2])
    visible_BTS = (k_start_BT[..., None] <= key_S) & (key_S < k_end_BT[..., None])
    s_BHTS = jnp.where(visible_BTS[:, None], s_BHTS, -jnp.inf)
    lse_BHT = jax.nn.logsumexp(s_BHTS, axis=-1)
    blind_BHT = jnp.isneginf(lse_BHT)
    p_BHTS = jnp.exp(s_BHTS - jnp.where(blind_BHT, 0, lse_BHT)[..., None])
    if seeds_BH2 is not None:
        query_seed, key_seed = (seeds_BH2[..., n, None, None] for n in (0, 1))
        query_T1 = jnp.arange(q_BHTK.shape[2])[:, None]
        p_BHTS *= keep(query_seed, key_seed, query_T1, key_S, dropout) / (1 - dropout)
    out_BHTK = jnp.einsum("bhts,bhsk->bhtk", p_BHTS, v_BHSK)
    return out_BHTK, jnp.where(blind_BHT, 1e30, lse_BHT / math.log(2))


@partial(jax.jit, static_argnames=("tiles", "dropout", "interpret"))
def run(*arguments, tiles, dropout=0.0, interpret=True):
    scale = arguments[0].shape[-1] ** -0.5
    return forward(*arguments, scale=scale, dropout=dropout, tiles=tiles, interpret=interpret)


def check(got, want, dtype):
    # Unit normal inputs: outputs are averages of values. A handful of roundings in the type of the
    # inputs for the output; the log-sum-exp, of size 10, stays in float32.
    epsilon = float(jnp.finfo(dtype).eps)
    assert jnp.abs(got[0].astype("float32") - want[0]).max() <= 8 * epsilon
    np.testing.assert_allclose(got[1], want[1], atol=16 * np.finfo("float32").eps * 10)


# VMEM of which half holds one block of keys and values, twice.
ONE_BLOCK = 2 * 4 * 256 * 128 * 4
TILES = {
    "resident": ForwardTiles(128, 256, 1),
    "two-heads": ForwardTiles(128, 256, 2),
    "wide-queries": ForwardTiles(256, 128, 2),
    "streamed": ForwardTiles(128, 256, 1, ONE_BLOCK),
    "ragged": ForwardTiles(128, 256, 1, 2 * ONE_BLOCK),  # parts of two and of one block
}
BOTH_FORMS = pytest.mark.parametrize(
    "tiles", [TILES["two-heads"], TILES["streamed"]], ids=["resident", "streamed"]
)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("kind", ["causal", "prefix", "packed", "padded", "any", "blind"])
def test_output_and_lse(kind, tiles):
    arguments = *inputs(512, 768, "float32"), *intervals(kind, 512, 768)
    check(run(*arguments, tiles=tiles), dense(*arguments), "float32")


@pytest.mark.parametrize(
    ("dtype", "size"), [("bfloat16", 64), ("bfloat16", 80), ("float32", 96), ("bfloat16", 128)]
)
def test_head_sizes_and_types(dtype, size):
    arguments = *inputs(128, 128, dtype, size), *intervals("packed", 128, 128)
    got = run(*arguments, tiles=ForwardTiles(128, 128, 1))
    assert got[0].dtype == dtype and got[1].dtype == jnp.float32
    check(got, dense(*arguments), dtype)


@BOTH_FORMS
def test_memory_of_the_device_is_used_in_order(tiles, capfd):
    """The interpreter that models VMEM and copies finds no race, and no use of unwritten memory."""
    arguments = *inputs(256, 512, "float32"), *intervals("padded", 256, 512)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(run(*arguments, tiles=tiles, interpret=interpret), dense(*arguments), "float32")
    assert "RACE" not in capfd.readouterr().out


@BOTH_FORMS
def test_dropout_keeps_the_weights_that_its_definition_keeps(tiles):
    seeds_BH2 = jax.random.randint(jax.random.key(3), (2, HEADS, 2), -(2**31), 2**31 - 1)
    arguments = *inputs(128, 512, "float32"), *intervals("prefix", 128, 512), seeds_BH2
    got = run(*arguments, tiles=tiles, dropout=0.25)
    check(got, dense(*arguments, dropout=0.25), "float32")


@BOTH_FORMS
def test_hidden_keys_do_not_matter(tiles):
    """Huge values outside all intervals of a block's queries change no bit of its output."""
    start, end = np.full((2, 128), 100, np.int32), np.full((2, 128), 300, np.int32)
    start[:, 7], end[:, 7] = 0, 0
    q, k, v = inputs(128, 512, "float32")
    hidden = (jnp.arange(512) < 100) | (jnp.arange(512) >= 300)
    huge_k, huge_v = (jnp.where(hidden[:, None], 1e30, x) for x in (k, v))
    for got, want in zip(
        run(q, huge_k, huge_v, start, end, tiles=tiles), run(q, k, v, start, end, tiles=tiles),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(got, want)


def test_tiles_must_divide_the_sizes():
    arguments = *inputs(256, 384, "float32"), *intervals("causal", 256, 384)
    with pytest.raises(ValueError, match="do not divide 256 queries, 384 keys and 2 heads"):
        run(*arguments, tiles=ForwardTiles(128, 256, 2))


@pytest.mark.parametrize("kind", ["causal", "prefix", "packed", "padded", "any", "blind"])
def test_ranges_hold_what_they_say(kind):
    """Every visible key is in a visited block, and blocks seen entirely have no hidden key."""
    q, k, T, S = 32, 64, 256, 320
    start, end = intervals(kind, T, S)
    key = np.arange(S)
    visible = (start[..., None] <= key) & (key < end[..., None])
    blocks = visible.reshape(2, T // q, q, S // k, k)
    sees = visible.any(-1).reshape(2, T // q, q, 1, 1)
    some, entire = blocks.any((2, 4)), (blocks | ~sees).all((2, 4))
    ranges = key_ranges(start, end, q, k)

    def inside(first, last, size):
        first, last = np.asarray(first)[..., None], np.asarray(last)[..., None]
        return (first <= np.arange(size)) & (np.arange(size) < last)

    for got, axis in ((ranges, 1), (query_ranges(ranges, S // k), 2)):
        visit = inside(got.first, got.last, some.shape[3 - axis])
        full = inside(got.full_first, got.full_last, some.shape[3 - axis])
        some_, entire_ = (x if axis == 1 else x.swapaxes(1, 2) for x in (some, entire))
        assert not (some_ & ~visit).any() and not (full & ~entire_).any()
        # The range begins and ends with a block that is seen.
        np.testing.assert_array_equal(got.first[some_.any(-1)], some_.argmax(-1)[some_.any(-1)])
    if kind in ("causal", "prefix"):
        assert (inside(ranges.full_first, ranges.full_last, S // k) == entire).all()
