"""What ablations vary: post-norm, sandwich norm, ALiBi and a softmax in bfloat16."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_transformer import (  # noqa: F401
    ENCODE,
    FORWARD,
    LOSS_AND_GRADIENTS,
    expected,
    test_a_mesh_changes_nothing,
    test_both_implementations_of_attention_agree,
    test_extending_piece_by_piece_is_one_forward,
)

import glmjax
from glmjax.config import Experiment, GLMConfig, ObjectiveConfig, replace
from glmjax.interop.names import family_of
from glmjax.model import transformer
from glmjax.model.attention import KVCache
from glmjax.training.optimizer import decays

VARIANTS: dict[str, dict[str, str]] = {
    "post": {"norm": "post"},
    "sandwich": {"norm": "sandwich"},
    "alibi": {"positions": "alibi"},
    "bfloat16 softmax": {"softmax_dtype": "bfloat16"},
}
PREFILL, DECODE = (
    jax.jit(function, static_argnums=0)
    for function in (transformer.prefill, transformer.decode_step)
)
SIZES = {"vocab_size": 96, "ffn_size": 128}


@pytest.fixture(scope="module", params=["sandwich", "alibi"])
def family(request, model_of):
    """For tests that all models pass; post-norm is DeepNorm with another number there."""
    return model_of(glmjax.get_config("glm-tiny", **SIZES, **VARIANTS[request.param]))


def meaning(config: GLMConfig, params, tokens_T, positions_T, start_T, end_T) -> np.ndarray:
    """Hidden states [T, D] of one row, each norm and distance written out, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(layer, x_TD):
        centred = x_TD - x_TD.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_epsilon)
        return centred / scale * layer.scale + layer.bias

    def attention(p, x_TD):
        q, k, v = np.einsum("td,dchk->chtk", x_TD, p.qkv.kernel) + p.qkv.bias[:, :, None]
        s_HTS = q @ k.swapaxes(1, 2) / math.sqrt(config.head_size)
        if config.positions == "alibi":
            slope_H11 = 2.0 ** (-8 * np.arange(1, config.num_heads + 1)[:, None, None] / len(q))
            s_HTS -= slope_H11 * np.abs(positions_T[:, None] - positions_T)
        key_S = np.arange(len(x_TD))
        visible_TS = (start_T[:, None] <= key_S) & (key_S < end_T[:, None])
        p_HTS = np.where(visible_TS, np.exp(s_HTS), 0)
        p_HTS /= np.maximum(p_HTS.sum(-1, keepdims=True), 1e-30)
        return np.einsum("hts,hsk,hkd->td", p_HTS, v, p.attention_out.kernel) + p.attention_out.bias

    def ffn(p, x_TD):
        f_TF = np.asarray(jax.nn.gelu(x_TD @ p.ffn_in.kernel + p.ffn_in.bias))
        return f_TF @ p.ffn_out.kernel + p.ffn_out.bias

    x_TD = params.word_embedding[tokens_T]
    blocks = [jax.tree.map(lambda x, n=n: x[n], params.blocks) for n in range(config.num_layers)]
    if config.norm == "post":
        # Each branch with the norm behind it, which is the next one of the model.
        branches = [(branch, p) for p in blocks for branch in (attention, ffn)]
        norms = [p_norm for p in blocks for p_norm in (p.attention_norm, p.ffn_norm)]
        x_TD = norm(norms[0], x_TD)
        for (branch, p), behind in zip(branches, [*norms[1:], params.final_norm], strict=True):
            x_TD = norm(behind, x_TD + branch(p, x_TD))
        return x_TD
    for p in blocks:
        branch_TD = attention(p, norm(p.attention_norm, x_TD))
        if config.norm == "sandwich":
            branch_TD = norm(p.attention_out_norm, branch_TD)
        x_TD = x_TD + branch_TD
        branch_TD = ffn(p, norm(p.ffn_norm, x_TD))
        if config.norm == "sandwich":
            branch_TD = norm(p.ffn_out_norm, branch_TD)
        x_TD = x_TD + branch_TD
    return norm(params.final_norm, x_TD)


@pytest.mark.parametrize("norm", ["post", "sandwich", "pre"])
def test_models_are_their_equations(model_of, rows, norm):
    """With packed and padded rows; positions are ALiBi's, which need no table."""
    config = glmjax.get_config("glm-tiny", **SIZES, norm=norm, positions="alibi")
    params = model_of(config).params
    found = ENCODE(config, params, rows.tokens_BT, rows.positions_B2T, rows.mask)
    for b in range(3):
        real_T = rows.piece_BT[b] >= 0
        right_TD = meaning(
            config, params, rows.tokens_BT[b], rows.positions_B2T[b, 0],
            rows.mask.k_start_BT[b], rows.mask.k_end_BT[b],
        )  # fmt: skip
        np.testing.assert_allclose(found[b][real_T], right_TD[real_T], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_follow_the_formulas(variant):
    config = glmjax.get_config("glm-tiny", **VARIANTS[variant])
    N, D, F, V = config.num_layers, config.hidden_size, config.ffn_size, config.vocab_size
    norms = 4 if variant == "sandwich" else 2
    tables = 0 if variant == "alibi" else 2 * (config.max_positions + 1) * D
    block = 4 * D * D + 4 * D + (D * F + F) + (F * D + D) + norms * 2 * D
    assert glmjax.count_params(config) == V * D + tables + N * block + 2 * D


def test_norms_behind_branches_do_not_decay():
    decayed = decays(glmjax.get_config("glm-tiny", norm="sandwich"))
    assert not any(jax.tree.leaves(decayed.blocks.attention_out_norm))
    assert not any(jax.tree.leaves(decayed.blocks.ffn_out_norm))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_reduces_the_loss(rows, variant):
    """From ln V to well below within twenty steps on one batch."""
    config = glmjax.get_config("glm-tiny", **SIZES, **VARIANTS[variant])
    params, adam = glmjax.init(config, jax.random.key(0)), optax.adam(3e-3)
    state, losses = adam.init(params), []

    @jax.jit
    def change(params, state, gradients):
        updates, state = adam.update(gradients, state)
        return optax.apply_updates(params, updates), state

    for key in jax.random.split(jax.random.key(1), 20):
        (loss, _), gradients = LOSS_AND_GRADIENTS(config, params, rows, key)
        params, state = change(params, state, gradients)
        losses.append(float(loss))
    assert abs(losses[0] - math.log(96)) < 0.3
    assert losses[-1] < losses[0] - 0.5


def test_alibi_in_an_int8_cache(model_of, rows):
    """Positions stay exact where keys and values are rounded."""
    config = glmjax.get_config("glm-tiny", **SIZES, positions="alibi", max_positions=1000)
    params = model_of(config).params
    tokens_BT, context_B = rows.tokens_BT, np.full(8, 12, np.int32)
    position_BT = 300 + 7 * np.broadcast_to(np.arange(24, dtype=np.int32), (8, 24))
    positions_B2T = np.stack([position_BT, np.zeros_like(position_BT)], 1)
    mask = glmjax.BlankMask.from_context(context_B, length=24)
    right_BTV = FORWARD(config, params, tokens_BT, positions_B2T, mask)

    narrow = replace(config, cache_dtype="int8")
    _, cache = PREFILL(
        narrow, params, KVCache.empty(narrow, 8, 24), tokens_BT[:, :12], positions_B2T[:, :, :12],
        context_B, context_B,
    )  # fmt: skip
    found_BTV, cache = DECODE(narrow, params, cache, tokens_BT[:, 12:], positions_B2T[:, :, 12:])
    assert cache.position_1BHS.dtype == jnp.int32
    np.testing.assert_array_equal(cache.position_1BHS[0, :, 0], position_BT)
    error = np.sqrt(np.mean((found_BTV - right_BTV[:, 12:]) ** 2) / np.mean(right_BTV**2))
    assert 0 < error < 0.02


def test_a_cached_softmax_is_rounded_too(model_of, rows):
    config = glmjax.get_config("glm-tiny", **SIZES, softmax_dtype="bfloat16")
    params, context_B = model_of(config).params, np.full(8, 12, np.int32)
    inputs = rows.tokens_BT, rows.positions_B2T
    mask = glmjax.BlankMask.from_context(context_B, length=24)
    right_BTV = FORWARD(config, params, *inputs, mask)
    exact_BTV = FORWARD(replace(config, softmax_dtype="float32"), params, *inputs, mask)
    _, cache = PREFILL(
        config, params, KVCache.empty(config, 8, 24), *(x[..., :12] for x in inputs),
        context_B, context_B,
    )  # fmt: skip
    found_BTV, _ = DECODE(config, params, cache, *(x[..., 12:] for x in inputs))
    loss = np.abs(exact_BTV - right_BTV)[:, 12:].mean()
    assert np.abs(found_BTV - right_BTV[:, 12:]).mean() < 0.1 * loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GLMConfig(positions="alibi", num_kv_heads=4),
            "positions = 'alibi' takes neither num_kv_heads = 4",
        ),
        (
            lambda: GLMConfig(positions="alibi", prefix_length=8),
            "'alibi' takes neither .* nor prefix_length = 8",
        ),
        (
            lambda: GLMConfig(positions="alibi", attention="tpu"),
            "attention = 'tpu' has no positions = 'alibi'",
        ),
        (
            lambda: GLMConfig(softmax_dtype="bfloat16", attention="cudnn"),
            "attention = 'cudnn' has no softmax_dtype = 'bfloat16'",
        ),
        (
            lambda: Experiment(model=GLMConfig(positions="alibi")),
            "objective.positions = '2d' does not fit model.positions = 'alibi'",
        ),
        (lambda: family_of(GLMConfig(norm="post")), "no official format .* norm = 'post'"),
        (lambda: family_of(GLMConfig(norm="sandwich")), "no official format .* norm = 'sandwich'"),
        (lambda: family_of(GLMConfig(positions="alibi")), "no official format .* = 'alibi'"),
    ],
)
def test_what_variants_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_alibi_takes_the_1d_positions_of_the_objective():
    experiment = Experiment(
        model=GLMConfig(positions="alibi"), objective=ObjectiveConfig(positions="1d")
    )
    assert experiment.model.positions == "alibi"


def test_a_variant_is_saved_and_loaded(tmp_path):
    config = glmjax.get_config("glm-tiny", norm="sandwich", softmax_dtype="bfloat16")
    params = glmjax.init(config, jax.random.key(0))
    glmjax.save(tmp_path / "model", config, params)
    loaded, loaded_params = glmjax.load(tmp_path / "model")
    assert loaded == config
    jax.tree.map(np.testing.assert_array_equal, loaded_params, params)
