"""The same numbers whatever the implementation, recomputation, type, mesh or number of calls."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glmjax
from glmjax.config import GLMConfig, MeshConfig, replace
from glmjax.model import attention, transformer
from glmjax.model.attention import BlankMask, KVCache
from glmjax.model.layers import norm, rotary
from glmjax.model.params import abstract_params, param_shardings, specs
from glmjax.model.prefix import start_cache
from glmjax.sharding import make_mesh

FORWARD = jax.jit(transformer.forward, static_argnums=0)
ENCODE = jax.jit(transformer.encode, static_argnums=0)
EXTEND = jax.jit(transformer.extend, static_argnums=0)
# Sums of float32 in another order: some hundred roundings of 6e-8, relative to the largest value.
FLOAT32 = 2e-5


def loss(config, params, rows, dropout_key=None):
    """Mean cross entropy of the next token of each piece, and the logits."""
    logits_BTV = transformer.forward(
        config, params, rows.tokens_BT, rows.positions_B2T, rows.mask, dropout_key
    )
    log_BTV = jax.nn.log_softmax(logits_BTV)[:, :-1]
    losses_BT = -jnp.take_along_axis(log_BTV, rows.tokens_BT[:, 1:, None], -1)[..., 0]
    weights_BT = (rows.piece_BT[:, 1:] == rows.piece_BT[:, :-1]) & (rows.piece_BT[:, 1:] >= 0)
    return jnp.sum(losses_BT * weights_BT) / jnp.sum(weights_BT), logits_BTV


LOSS_AND_GRADIENTS = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)


def assert_close(results, expected):
    """Trees of float32 arrays that differ by the order of their sums at most."""

    def close(result, expected):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(result, expected, rtol=0, atol=FLOAT32 * scale)

    jax.tree.map(close, results, expected)


@pytest.fixture(scope="module")
def expected(family, rows):
    """Loss, logits and gradients of the plain model, whose dropout rates play no part."""
    return jax.device_get(LOSS_AND_GRADIENTS(family.config, family.params, rows))


def test_both_implementations_of_attention_agree(family, rows, expected):
    config = replace(family.config, attention="reference")
    assert config.attention != family.config.attention
    assert_close(LOSS_AND_GRADIENTS(config, family.params, rows), expected)


@pytest.mark.parametrize("remat", ["matmuls", "block"])
@pytest.mark.parametrize("family", ["glm-130b-tiny"], indirect=True)
def test_recomputation_changes_nothing(family, rows, expected, remat):
    config = replace(family.config, remat=remat)
    assert_close(LOSS_AND_GRADIENTS(config, family.params, rows), expected)


def test_recomputation_saves_memory():
    @functools.partial(jax.jit, static_argnums=0)
    def gradients(config: GLMConfig, params, tokens_BT, positions_B2T, mask):
        def total(params):
            return transformer.encode(config, params, tokens_BT, positions_B2T, mask).sum()

        return jax.grad(total)(params)

    def temporary_bytes(remat: str) -> int:
        config = glmjax.get_config("glm-tiny", num_layers=8, remat=remat)
        rows = jax.ShapeDtypeStruct((8, 128), jnp.int32)
        positions = jax.ShapeDtypeStruct((8, 2, 128), jnp.int32)
        lowered = gradients.lower(
            config, abstract_params(config), rows, positions, BlankMask(rows, rows)
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    none, matmuls, block = map(temporary_bytes, ("none", "matmuls", "block"))
    # "block" keeps the input of each block. "none" keeps its norms, products and activations too,
    # which are more than 16 arrays of that size.
    assert none - block > 8 * 16 * (8 * 128 * 64 * 4)
    assert block < matmuls < none


def test_bfloat16_stays_close_to_float32(family, rows, expected):
    (_, logits_BTV), _ = expected
    config = replace(family.config, dtype="bfloat16")
    inputs = family.params, rows.tokens_BT, rows.positions_B2T, rows.mask
    rounded_BTV = FORWARD(config, *inputs)
    assert rounded_BTV.dtype == jnp.float32
    assert np.any(rounded_BTV != rounded_BTV.astype(jnp.bfloat16))
    # A dozen independent roundings in every block, each by at most 2^-8 of the value.
    bound = math.sqrt(12 * config.num_layers) * 2**-8 * np.sqrt(np.mean(logits_BTV**2))
    error_BTV = np.asarray(rounded_BTV) - logits_BTV
    assert 0 < np.sqrt(np.mean(error_BTV**2)) < bound
    assert np.abs(error_BTV).max() < 6 * bound


def test_parameters_and_gradients_are_float32_whatever_the_type_of_activations(family, rows):
    config = replace(family.config, dtype="bfloat16")
    params = abstract_params(config)
    _, gradients = LOSS_AND_GRADIENTS.eval_shape(config, params, rows)
    hidden = ENCODE.eval_shape(config, params, rows.tokens_BT, rows.positions_B2T, rows.mask)
    assert hidden.dtype == jnp.bfloat16
    for tree in (params, gradients):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_scanned_layers_are_a_loop_over_blocks(family, rows):
    config, params = family

    @jax.jit
    def unrolled(params):
        def attend(q, k, v):
            return attention.attend(config, q, k, v, rows.mask), None

        angles = rotary(config, rows.positions_B2T)
        x_BTD = transformer.embed(config, params, rows.tokens_BT, rows.positions_B2T)
        for n in range(config.num_layers):
            params_n = jax.tree.map(lambda leaf, n=n: leaf[n], params.blocks)
            x_BTD, _ = transformer.block(config, params_n, x_BTD, angles, attend)
        return norm(config, params.final_norm, x_BTD)

    scanned = ENCODE(config, params, rows.tokens_BT, rows.positions_B2T, rows.mask)
    assert_close(unrolled(params), np.asarray(scanned))


@pytest.mark.parametrize("family", ["glm-tiny"], indirect=True)
def test_dropout_follows_its_key(family, rows):
    config, params = family
    inputs = rows.tokens_BT, rows.positions_B2T, rows.mask
    first, again, other = (FORWARD(config, params, *inputs, jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.all(np.any(first != other, axis=-1))


RATES = ("embedding_dropout", "attention_dropout", "hidden_dropout")


@pytest.mark.parametrize("rate", [None, *RATES])
@pytest.mark.parametrize("family", ["glm-tiny"], indirect=True)
def test_each_dropout_rate_acts_alone(family, rows, expected, rate):
    """All rates at zero are no dropout at all."""
    rates = {name: 0.1 if name == rate else 0.0 for name in RATES}
    inputs = family.params, rows.tokens_BT, rows.positions_B2T, rows.mask, jax.random.key(0)
    logits_BTV = FORWARD(replace(family.config, **rates), *inputs)
    (_, clean_BTV), _ = expected
    if rate is None:
        assert_close(logits_BTV, clean_BTV)
    else:
        real_BT = rows.piece_BT >= 0
        assert np.all(np.any(np.abs(logits_BTV - clean_BTV)[real_BT] > 1e-3, axis=-1))


def test_embedding_dropout_keeps_the_mean(rows):
    # With idle blocks, and a variance that epsilon drowns, the model is linear in its embeddings.
    config = glmjax.get_config(
        "glm-tiny", embedding_dropout=0.3, hidden_dropout=0.0, attention_dropout=0.0,
        layer_norm_epsilon=1e12, num_layers=1,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(config))
    word_VD = jax.random.normal(jax.random.key(0), params.word_embedding.shape)
    params = params.replace(
        word_embedding=word_VD, final_norm=params.final_norm.replace(scale=jnp.float32(1e6))
    )

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def encode(params, key):
        mask = BlankMask(rows.mask.k_start_BT[:1], rows.mask.k_end_BT[:1])
        return transformer.encode(
            config, params, rows.tokens_BT[:1], rows.positions_B2T[:1], mask, key
        )

    count = 2000
    samples = np.asarray(encode(params, jax.random.split(jax.random.key(1), count)))
    word_BTD = np.asarray(word_VD)[rows.tokens_BT[:1]]
    clean_BTD = word_BTD - word_BTD.mean(-1, keepdims=True)
    standard_error = samples.std(0) / math.sqrt(count)
    assert np.all(samples.std(0) > 0)
    assert np.all(np.abs(samples.mean(0) - clean_BTD) < 5 * standard_error)


def test_a_mesh_changes_nothing(family, rows, expected):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        params = jax.device_put(family.params, param_shardings(family.config, mesh))
        results = LOSS_AND_GRADIENTS(family.config, params, rows)
    assert_close(jax.device_get(results), expected)


def test_block_positions_matter_to_models_that_have_them(family, rows):
    config, params = family
    logits_BTV = FORWARD(config, params, rows.tokens_BT, rows.positions_B2T, rows.mask)
    moved_B2T = rows.positions_B2T + np.array([[0], [3]], np.int32) * (rows.positions_B2T > 0)
    moved_BTV = FORWARD(config, params, rows.tokens_BT, moved_B2T, rows.mask)
    if config.positions in ("rope_1d", "rope_half"):
        np.testing.assert_array_equal(moved_BTV, logits_BTV)
        alone_BTV = FORWARD(config, params, rows.tokens_BT, rows.positions_B2T[:, :1], rows.mask)
        np.testing.assert_array_equal(alone_BTV, logits_BTV)
    else:
        assert np.abs(moved_BTV - logits_BTV).max() > 1e-3


@pytest.mark.parametrize("family", ["glm-tiny"], indirect=True)
def test_contexts_share_one_program(family, rows):
    traces = []

    @jax.jit
    def forward(params, tokens_BT, positions_B2T, context_B):
        traces.append(context_B)
        mask = BlankMask.from_context(context_B, length=tokens_BT.shape[1])
        return transformer.forward(family.config, params, tokens_BT, positions_B2T, mask)

    outputs = [
        forward(family.params, rows.tokens_BT, rows.positions_B2T, np.full(8, context, np.int32))
        for context in (0, 7, 24)
    ]
    assert len(traces) == 1
    assert np.any(outputs[0] != outputs[1])
    assert np.any(outputs[1] != outputs[2])


WIDTH = 10
LENGTH_B = np.array([16, 13, 9, 16])


@pytest.mark.parametrize(
    "pieces",
    [
        [[8, 9, 9, 10], [8, 4, 0, 6]],
        [[5, 1, 9, 8], [1, 1, 0, 1], [10, 10, 0, 7], [0, 1, 0, 0]],
        [[9, 3, 9, 9], [1, 2, 0, 3], [2, 3, 0, 1], [4, 5, 0, 3]],
    ],
    ids=["two", "context-then-tokens", "four"],
)
def test_extending_piece_by_piece_is_one_forward(family, rows, pieces):
    """Rows advance by different counts; what pads a short piece is overwritten by the next."""
    config, params = family
    tokens_BT, positions_B2T = rows.tokens_BT[:4, :16], rows.positions_B2T[:4, :, :16]
    mask = jax.device_get(BlankMask.from_context(np.array([5, 0, 9, 8]), length=16))
    whole_BTD = np.asarray(ENCODE(config, params, tokens_BT, positions_B2T, mask))
    pieced_BTD = np.full_like(whole_BTD, np.nan)
    cache = KVCache.empty(config, batch=4, size=16 + WIDTH)
    done_B, row_B1 = np.zeros(4, np.int32), np.arange(4)[:, None]
    for count_B in np.array(pieces, np.int32):
        column_BW = np.minimum(done_B[:, None] + np.arange(WIDTH), 15)
        x_BWD, cache = EXTEND(
            config, params, cache, tokens_BT[row_B1, column_BW],
            np.moveaxis(positions_B2T[row_B1, :, column_BW], -1, 1),
            jax.tree.map(lambda bound_BT, at=column_BW: bound_BT[row_B1, at], mask),
            count_B,
        )  # fmt: skip
        row, column = np.nonzero(np.arange(WIDTH) < count_B[:, None])
        pieced_BTD[row, done_B[row] + column] = x_BWD[row, column]
        done_B += count_B
        np.testing.assert_array_equal(cache.length_B, done_B)
    np.testing.assert_array_equal(done_B, LENGTH_B)
    real_BT = np.arange(16) < LENGTH_B[:, None]
    assert_close(pieced_BTD[real_BT], whole_BTD[real_BT])


PREFIX = 5


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("family", ["glm-tiny", "glm-4-tiny"], indirect=True)
def test_a_prefix_is_a_cache_in_front_of_the_samples_that_start_their_rows(
    family, rows, projection
):
    config = replace(family.config, prefix_length=PREFIX, prefix_projection=projection)
    prefix = glmjax.init(config, jax.random.key(2)).prefix
    params = family.params.replace(prefix=prefix)
    inputs = rows.tokens_BT, rows.positions_B2T
    whole_BTD = np.asarray(ENCODE(config, params, *inputs, rows.mask))

    batch, length = rows.tokens_BT.shape
    cache = start_cache(config, params, batch, length)
    assert np.all(cache.length_B == PREFIX)
    extended_BTD, _ = EXTEND(
        config, params, cache, *inputs, rows.mask.behind(PREFIX), np.full(batch, length)
    )
    bare_BTD = np.asarray(ENCODE(family.config, family.params, *inputs, rows.mask))
    first_BT, later_BT = rows.piece_BT == 0, rows.piece_BT > 0
    assert later_BT.any()
    real_BT = rows.piece_BT >= 0
    assert_close(extended_BTD[real_BT], whole_BTD[real_BT])
    assert_close(whole_BTD[later_BT], bare_BTD[later_BT])
    assert np.all(np.any(np.abs(whole_BTD - bare_BTD)[first_BT] > 1e-3, axis=-1))


def test_a_projected_prefix_has_the_published_sizes():
    plain = specs(glmjax.get_config("chatglm-6b", prefix_length=128)).prefix
    assert plain.embedding.shape == (128, 229_376)
    projected = specs(
        glmjax.get_config("chatglm-6b", prefix_length=128, prefix_projection=True)
    ).prefix
    assert sum(math.prod(spec.shape) for spec in jax.tree.leaves(projected)) == 957_059_072
    shared = specs(glmjax.get_config("chatglm2-6b", prefix_length=128)).prefix
    assert shared.embedding.shape == (128, 28 * 2 * 2 * 128)
