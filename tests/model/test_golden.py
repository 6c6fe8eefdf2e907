"""Parity with the official PyTorch code of GLM, GLM-130B and ChatGLM-6B, in float32.

The recorded runs differ from their own float64 repetition by up to 5e-5 in the logits, hence 1e-4.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import (
    GRADIENT_STRIDE,
    LEFT_PADDED_STRIDE,
    Case,
    intervals,
    load_case,
    load_model,
    official_arrays,
    read_npz,
)

from glmjax.config import GLMConfig, Quantization
from glmjax.model import attention, transformer
from glmjax.model.attention import BlankMask
from glmjax.model.layers import layer_norm, rotary
from glmjax.model.params import Params
from glmjax.model.prefix import prefix_cache, start_cache
from glmjax.training.loss import cross_entropy

DEEP = pytest.param("chatglm6b_28layer", marks=pytest.mark.slow)
MODELS = ["glm", "glm130b", "chatglm6b_small", DEEP]
TUNED = [
    "chatglm6b_ptuning",
    pytest.param("chatglm6b_ptuning_projection", marks=pytest.mark.slow),
]
FORWARD = jax.jit(transformer.forward, static_argnums=0)


def encode(case: Case, params: Params) -> jax.Array:
    """Final hidden states of a case's batch."""
    batch = case.batch
    return transformer.encode(case.config, params, batch.tokens_BT, batch.positions_B2T, batch.mask)


class Run(NamedTuple):
    case: Case
    loss: jax.Array
    losses_BT: jax.Array
    logits_BTV: jax.Array
    gradients: dict[str, np.ndarray]


@functools.cache
def run(name: str) -> Run:
    """Forward and backward pass of a case, with the gradients under their official names."""
    # The official runs of ChatGLM-6B kept both embedding matrices apart; one case ties them here.
    case = load_case(name, tied_embeddings=name in ("glm", "glm130b", "chatglm6b_small"))
    config, batch = case.config, case.batch
    weights_BT = batch.weights_BT / batch.weights_BT.sum()

    def loss(params):
        x_BTD = encode(case, params)
        table_VD = transformer.output_table(config, params)
        total, losses_BT = cross_entropy(x_BTD, table_VD, batch.targets_BT, weights_BT)
        return total, (losses_BT, transformer.logits(config, params, x_BTD))

    value_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, aux), gradients = value_and_gradients(case.params)
    return Run(case, total, *aux, official_arrays(config, gradients))


@pytest.mark.parametrize("name", MODELS + TUNED)
def test_logits(name):
    case, logits_BTV = run(name).case, run(name).logits_BTV
    expected_BTV = case.batch.take(case.outputs["logits"])
    real = case.batch.real_BT
    np.testing.assert_allclose(logits_BTV[real], expected_BTV[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS + TUNED)
def test_logits_of_the_reference_attention(name):
    case = load_case(name, attention="reference")
    batch = case.batch
    logits_BTV = FORWARD(case.config, case.params, batch.tokens_BT, batch.positions_B2T, batch.mask)
    expected_BTV = case.batch.take(case.outputs["logits"])
    real = case.batch.real_BT
    np.testing.assert_allclose(logits_BTV[real], expected_BTV[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS + TUNED)
def test_losses(name):
    case, losses_BT = run(name).case, run(name).losses_BT
    expected = case.outputs["per_token_loss"]
    if name.startswith("chatglm"):  # the last position has no label and is not stored
        expected = np.pad(expected, [(0, 0), (0, 1)])
    # Single losses of the recorded GLM-130B run are up to 2.5e-5 from their float64 values.
    tolerance = 5e-5 if name == "glm130b" else 1e-5
    labelled = case.batch.weights_BT > 0
    np.testing.assert_allclose(
        losses_BT[labelled], case.batch.take(expected)[labelled], rtol=0, atol=tolerance
    )
    np.testing.assert_allclose(run(name).loss, case.outputs["loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS + TUNED)
def test_gradients(name):
    case, gradients = run(name).case, run(name).gradients
    stored = {
        key.removeprefix("grad."): gradient
        for key, gradient in case.outputs.items()
        if key.startswith("grad.")
    }
    if case.config.tied_embeddings and "lm_head.weight" in stored:
        stored["transformer.word_embeddings.weight"] += stored.pop("lm_head.weight")
    assert stored
    for key, expected in stored.items():
        gradient = gradients[key]
        if gradient.ndim == 2:
            gradient = gradient[::GRADIENT_STRIDE]
        error = np.abs(gradient - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"{key}: {error}"


@pytest.mark.parametrize("name", MODELS + TUNED)
def test_hidden_states(name):
    case = load_case(name)
    config, batch, params = case.config, case.batch, case.params
    angles = rotary(config, batch.positions_B2T)
    rows = len(batch.tokens_BT)
    cache = start_cache(config, params, rows, 0)
    mask = batch.mask.after(cache.length_B)

    @jax.jit
    def block(params_n, x_BTD, k_BHPK, v_BHPK):
        def attend(q, k, v):
            k = jnp.concatenate([jnp.swapaxes(k_BHPK, 1, 2), k], 1)
            v = jnp.concatenate([jnp.swapaxes(v_BHPK, 1, 2), v], 1)
            return attention.attend(config, q, k, v, mask), None

        return transformer.block(config, params_n, x_BTD, angles, attend)[0]

    states = [transformer.embed(config, params, batch.tokens_BT, batch.positions_B2T)]
    for n in range(config.num_layers):
        params_n = jax.tree.map(lambda leaf, n=n: leaf[n], params.blocks)
        states.append(block(params_n, states[-1], cache.k_NBHSK[n], cache.v_NBHSK[n]))
    if name.startswith("chatglm"):  # its last stored state is behind the final norm
        states[-1] = layer_norm(params.final_norm, states[-1], config.layer_norm_epsilon)
    for n, expected in zip(
        case.outputs["hidden_layers"], case.outputs["hidden_states"], strict=True
    ):
        expected_BTD = batch.take(expected)
        np.testing.assert_allclose(
            np.asarray(states[n])[batch.real_BT], expected_BTD[batch.real_BT],
            rtol=0, atol=1e-5 * np.abs(expected_BTD).max(), err_msg=f"layer {n}",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["chatglm6b_small", DEEP])
def test_left_padded_rows(name):
    config, params = load_model(name)
    inputs, outputs = read_npz(name, "inputs_leftpad"), read_npz(name, "outputs_leftpad")
    mask = intervals(~inputs["attention_mask"][:, 0])
    x_BTD = transformer.encode(config, params, inputs["input_ids"], inputs["position_ids"], mask)
    logits_BTV = transformer.logits(config, params, x_BTD)
    real_BT = inputs["non_pad"][:, ::LEFT_PADDED_STRIDE]
    for result, key in ((logits_BTV, "logits"), (x_BTD, "hidden_last")):
        result = np.asarray(result)[:, ::LEFT_PADDED_STRIDE]
        np.testing.assert_allclose(result[real_BT], outputs[key][real_BT], rtol=0, atol=1e-4)


def prompts(name: str) -> tuple[np.ndarray, ...]:
    """Prompts up to <sop>, padded on the right, and the tokens and positions of what follows."""
    decode = read_npz(name, "decode")
    if name == "glm":
        count = decode["context_ids"].shape[1] + 1
        ids, positions = decode["full_input_ids"], decode["full_position_ids"]
        return (
            ids[:, :count], positions[..., :count], np.array([count]),
            decode["tokens"], positions[..., count:], decode["step_logits"],
        )  # fmt: skip
    ids_BT, positions_B2T = decode["prompt_ids"], decode["prompt_position_ids"]
    # The last query sees all keys but the padding.
    padding_B = decode["prompt_attention_mask"][:, 0, -1].sum(-1)
    ids_BT = np.stack([np.roll(ids, -n) for ids, n in zip(ids_BT, padding_B, strict=True)])
    positions_B2T = np.stack(
        [np.roll(rows, -n, axis=-1) for rows, n in zip(positions_B2T, padding_B, strict=True)]
    )
    steps_B2T = np.moveaxis(decode["step_position_ids"], 1, 2)[..., 1:]
    length_B = ids_BT.shape[1] - padding_B
    return ids_BT, positions_B2T, length_B, decode["tokens"], steps_B2T, decode["step_logits"]


@pytest.mark.parametrize("name", ["glm", "chatglm6b_small", DEEP, *TUNED])
def test_decoding_with_the_cache(name):
    config, params = load_model(name)
    ids_BT, positions_B2T, length_B, tokens_BT, steps_B2T, expected_BTV = prompts(name)
    cache = start_cache(config, params, len(ids_BT), 32)
    context_B = length_B - 1  # everything before <sop>
    prefill, step = (
        jax.jit(functools.partial(function, config, params))
        for function in (transformer.prefill, transformer.decode_step)
    )
    logits_BV, cache = prefill(cache, ids_BT, positions_B2T, context_B, length_B)
    steps = [logits_BV]
    for k in range(tokens_BT.shape[1] - 1):
        logits_B1V, cache = step(cache, tokens_BT[:, k : k + 1], steps_B2T[..., k : k + 1])
        steps.append(logits_B1V[:, 0])
    np.testing.assert_allclose(np.stack(steps, 1), expected_BTV, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(np.stack(steps, 1), -1), tokens_BT)


def test_a_prefix_must_fit_its_cache():
    config, params = load_model("chatglm6b_ptuning")
    with pytest.raises(ValueError, match="6 keys does not fit a cache of 5 slots"):
        prefix_cache(config, params.prefix, batch=1, size=5)


@pytest.mark.parametrize("stored", ["model", "model_int8", "model_int4"])
def test_quantised_weights(stored):
    config, params = load_model("chatglm6b_quantisation", stored)
    bits = None if stored == "model" else int(stored.removeprefix("model_int"))
    assert config.quantization == (bits and Quantization(bits))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == (
        {"float32"} | ({"int8", "float16"} if bits else set())
    )
    forward = read_npz("chatglm6b_quantisation", "forward")
    tokens_BT = forward["input_ids"]
    sop, gmask = config.special_tokens.sop, config.special_tokens.gmask
    context_B, mask_B = (np.argmax(tokens_BT == token, axis=1) for token in (sop, gmask))
    column_T = np.arange(tokens_BT.shape[1])
    answer_BT = column_T >= context_B[:, None]
    positions_B2T = np.stack(
        [
            np.where(answer_BT, mask_B[:, None], column_T),
            np.where(answer_BT, column_T - context_B[:, None] + 1, 0),
        ],
        axis=1,
    )
    mask = BlankMask.from_context(context_B, length=tokens_BT.shape[1])
    key = {"model": "logits_unquantised"}.get(stored, stored.removeprefix("model_") + ".logits")
    logits_BTV = FORWARD(config, params, tokens_BT, positions_B2T, mask)
    np.testing.assert_allclose(logits_BTV, forward[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "table, positions, head_size",
    [("chatglm6b_dim64", "rope_2d", 128), ("dim128", "rope_1d", 128)],
    ids=["chatglm-6b", "glm-130b"],
)
def test_rotary_tables(table, positions, head_size):
    recorded = read_npz("rotary_tables", "rotary")
    config = GLMConfig(hidden_size=head_size, num_heads=1, ffn_size=1, positions=positions)
    ids = recorded["positions"]
    cos_BTPJ, sin_BTPJ = rotary(config, np.stack([ids, ids[::-1]])[None])
    for result, name in ((cos_BTPJ, "cos"), (sin_BTPJ, "sin")):
        half = recorded[f"{table}.float.{name}"]
        expected = [half, half[::-1]] if positions == "rope_2d" else [half]
        for part, table_TK in enumerate(expected):
            doubled = np.concatenate([result[0, :, part]] * 2, axis=-1)
            np.testing.assert_allclose(doubled, table_TK, rtol=0, atol=1e-6)


def test_rotary_frequencies_are_rounded_as_in_the_official_code():
    recorded = read_npz("rotary_tables", "rotary")["dim128.half.inv_freq"]
    config = GLMConfig(hidden_size=128, num_heads=1, ffn_size=1, positions="rope_1d")
    one = np.ones((1, 2, 1), np.int32)
    for precision, equal in (("float16", True), ("float32", False)):
        cos, sin = rotary(dataclasses.replace(config, rope_frequencies=precision), one)
        angles = np.arctan2(sin, cos)[0, 0, 0]
        assert np.allclose(angles, recorded.astype(np.float32), rtol=1e-6, atol=1e-9) == equal
