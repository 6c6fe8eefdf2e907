"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B: parity with transformers, decoding, generation."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, read_npz

import glmjax
from glmjax.config import GLMConfig, SpecialTokens
from glmjax.model import transformer
from glmjax.model.attention import BlankMask, KVCache
from glmjax.model.params import Params

FORWARD = jax.jit(glmjax.forward, static_argnums=0)
GREEDY = glmjax.Sampling(temperature=0)
TOKENS = SpecialTokens(mask=0, sop=0, eop=1, eos=1, pad=0)
# What differs between the official models, and two more ways to share keys.
RELATIVES = {
    "glm-4": {"rms_norm_eps": 1.5625e-7, "rope_theta": 5e6, "num_key_value_heads": 2},
    "chatglm2": {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_key_value_heads": 2},
    "one-key-head": {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_key_value_heads": 1},
    "tied": {"rms_norm_eps": 1e-5, "num_key_value_heads": 4, "tie_word_embeddings": True},
}


def positions(batch: int, length: int) -> np.ndarray:
    """They count, [B, 2, T]; the second row is not used."""
    return np.tile(np.arange(length, dtype=np.int32), (batch, 2, 1))


def causal(batch: int, length: int) -> BlankMask:
    return BlankMask.from_context(np.zeros(batch, np.int32), length=length)


def logits(config: GLMConfig, params: Params, tokens_BT: np.ndarray) -> np.ndarray:
    shape = tokens_BT.shape
    return np.asarray(FORWARD(config, params, tokens_BT, positions(*shape), causal(*shape)))


@pytest.fixture(scope="module", params=RELATIVES)
def pair(request, tmp_path_factory) -> tuple[Any, GLMConfig, Params]:
    """A random model of transformers, in which nothing is at its neutral value, and ours."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GlmForCausalLM(
        transformers.GlmConfig(
            vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=3,
            num_attention_heads=8, head_dim=8, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=1, **RELATIVES[request.param],
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, x in model.named_parameters():
            scale = 1 if "embed" in name else 1.5 * x.shape[-1] ** -0.5 if x.ndim > 1 else 0.1
            x.copy_(scale * torch.randn_like(x) + ("norm" in name))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    config, params = glmjax.load(folder)
    return model, dataclasses.replace(config, special_tokens=TOKENS), params


def test_logits_are_those_of_transformers(pair):
    torch = pytest.importorskip("torch")
    model, config, params = pair
    tokens_BT = np.random.default_rng(0).integers(2, 96, (3, 40), np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits(config, params, tokens_BT), expected, rtol=0, atol=1e-4)


def test_greedy_tokens_are_those_of_transformers(pair):
    torch = pytest.importorskip("torch")
    model, config, params = pair
    random = np.random.default_rng(1)
    prompts = [random.integers(2, 96, length).tolist() for length in (1, 5, 12)]
    generated = glmjax.generate(config, params, prompts, 16, GREEDY)
    for prompt, new in zip(prompts, generated, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
        expected = whole[0, len(prompt) :].tolist()
        assert new == [id for id in expected if id != TOKENS.eos]


def test_recorded_logits_and_tokens():
    config, params = glmjax.load(GOLDEN / "glm4")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float16"}
    config = dataclasses.replace(config, special_tokens=TOKENS)
    recorded = read_npz("glm4", "outputs")
    ids_BT, length = recorded["input_ids"], int(recorded["prompt_length"])
    np.testing.assert_allclose(
        logits(config, params, ids_BT), recorded["logits"], rtol=0, atol=1e-4
    )
    prompts = ids_BT[:, :length].tolist()
    count = recorded["tokens"].shape[1]
    assert glmjax.generate(config, params, prompts, count, GREEDY) == recorded["tokens"].tolist()


def test_the_recorded_case_is_what_transformers_says():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.GlmForCausalLM.from_pretrained(GOLDEN / "glm4", dtype=torch.float32)
    recorded = read_npz("glm4", "outputs")
    with torch.no_grad():
        found = model(torch.tensor(recorded["input_ids"], dtype=torch.long)).logits
    np.testing.assert_allclose(found, recorded["logits"], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> tuple[GLMConfig, Params]:
    config = glmjax.get_config("glm-4-tiny", initializer_scale=0.1, num_layers=3)
    return config, glmjax.init(config, jax.random.key(3))


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_decoding_with_the_cache_equals_a_forward(model, cache_dtype):
    config, params = model
    config = dataclasses.replace(config, cache_dtype=cache_dtype)
    tokens_BT = np.random.default_rng(0).integers(10, 512, (2, 24), np.int32)
    expected_BTV = logits(config, params, tokens_BT)
    cache = KVCache.empty(config, 2, 24)
    assert cache.k_NBHSK.shape == (3, 2, 2, 24, 16)
    ids, positions_B2T = tokens_BT[:, :14], positions(2, 24)
    zero_B, count_B = np.zeros(2, np.int32), np.full(2, 14)
    last_BV, cache = transformer.prefill(
        config, params, cache, ids, positions_B2T[..., :14], zero_B, count_B
    )
    tolerance = 1e-5 if cache_dtype is None else 0.05 * expected_BTV.std()
    np.testing.assert_allclose(last_BV, expected_BTV[:, 13], rtol=0, atol=tolerance)
    for start, end in ((14, 15), (15, 18), (18, 24)):
        step_BTV, cache = transformer.decode_step(
            config, params, cache, tokens_BT[:, start:end], positions_B2T[..., start:end]
        )
        np.testing.assert_allclose(step_BTV, expected_BTV[:, start:end], rtol=0, atol=tolerance)


def test_generation_stops_at_the_end_of_the_document(model):
    config, params = model
    prompt = [10, 11, 12]
    (free,) = glmjax.generate(config, params, [prompt], 8, GREEDY)
    tokens = dataclasses.replace(config.special_tokens, eos=free[3])
    config = dataclasses.replace(config, special_tokens=tokens)
    (ended,) = glmjax.generate(config, params, [prompt], 8, GREEDY)
    assert ended == free[: free.index(free[3])]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        glmjax.generate(*model, [[10], []], 8)
