"""Official names and layouts to parameters and back."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, load_model
from safetensors.numpy import load_file, save_file

from glmjax import get_config
from glmjax.config import GLMConfig, MeshConfig
from glmjax.interop import layout
from glmjax.interop.official import (
    from_official,
    load_official,
    prefix_from_official,
    prefix_to_official,
    to_official,
)
from glmjax.interop.official_config import read_config
from glmjax.model.params import Params, abstract_params
from glmjax.sharding import make_mesh

CASES = ["glm", "glm130b", "chatglm6b_small", "chatglm6b_28layer"]


def tensors_of(case: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / case / "model.safetensors")


def random_params(config: GLMConfig) -> Params:
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: random.standard_normal(leaf.shape, np.float32), abstract_params(config)
    )


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case):
    config, params = load_official(GOLDEN / case)
    written = to_official(config, params)
    stored = tensors_of(case)
    if case == "chatglm6b_28layer":  # its copy of the word embedding is left out of the file
        stored["lm_head.weight"] = stored["transformer.word_embeddings.weight"]
    assert written.keys() == stored.keys()
    for name, array in written.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous
        np.testing.assert_array_equal(array, stored[name].astype(np.float32), err_msg=name)


@pytest.mark.parametrize("name", ["glm-tiny", "glm-130b-tiny", "chatglm-tiny"])
def test_own_models_survive_the_official_format(name):
    config = get_config(name)
    params = random_params(config)
    again = from_official(config, to_official(config, params))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), again) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(config)
    )


@pytest.mark.parametrize("case", ["chatglm6b_ptuning", "chatglm6b_ptuning_projection"])
def test_prefix_round_trip_is_exact(case):
    config, _, prefix = load_model(case)
    stored = {name: x for name, x in tensors_of(case).items() if "prefix_encoder" in name}
    written = prefix_to_official(config, prefix)
    assert written.keys() == stored.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(array, stored[name].astype(np.float32), err_msg=name)


def test_a_model_without_a_prefix_says_so():
    config, _, _ = load_model("chatglm6b_small")
    with pytest.raises(ValueError, match=r"transformer\.prefix_encoder\.embedding\.weight"):
        prefix_from_official(config, tensors_of("chatglm6b_small"))


def test_rows_of_the_query_key_value_matrix():
    axes, shape = ("embed", "qkv", "heads", "head"), (5, 3, 2, 4)
    thirds, per_head = "(qkv heads head) embed", "(heads qkv head) embed"
    rows = np.arange(24)[:, None] * np.ones((1, 5))
    # Row of the third of q, k, v = c, head h, index k.
    assert layout.from_official(thirds, axes, shape, rows)[0, 2, 1, 3] == 2 * 8 + 1 * 4 + 3
    assert layout.from_official(per_head, axes, shape, rows)[0, 2, 1, 3] == 1 * 12 + 2 * 4 + 3
    for name in (thirds, per_head):
        assert layout.official_shape(name, axes, shape) == (24, 5)
        parameter = layout.from_official(name, axes, shape, rows)
        np.testing.assert_array_equal(layout.to_official(name, axes, parameter), rows)


def test_everything_wrong_is_reported_at_once():
    config, _ = load_official(GOLDEN / "glm")
    tensors = tensors_of("glm")
    del tensors["transformer.layers.1.mlp.dense_4h_to_h.bias"]
    tensors["word_embeddings.weight"] = tensors["word_embeddings.weight"][:-1]
    tensors["transformer.layers.4.mlp.dense_4h_to_h.bias"] = np.zeros(64, np.float16)
    with pytest.raises(ValueError) as error:
        from_official(config, tensors)
    assert str(error.value).splitlines()[1:] == [
        "  wrong shape: word_embeddings.weight [271, 64], expected [272, 64]",
        "  missing: transformer.layers.1.mlp.dense_4h_to_h.bias [64]",
        "  unexpected: transformer.layers.4.mlp.dense_4h_to_h.bias [64]",
    ]


def test_integers_need_their_scale():
    config, _, _ = load_model("chatglm6b_quantisation", "model_int4")
    tensors = load_file(GOLDEN / "chatglm6b_quantisation" / "model_int4.safetensors")
    del tensors["transformer.layers.0.attention.dense.weight_scale"]
    tensors["transformer.layers.1.mlp.dense_h_to_4h.weight_scale"] = np.zeros(3, np.float16)
    with pytest.raises(ValueError) as error:
        from_official(config, tensors)
    assert str(error.value).splitlines()[1:] == [
        "  missing: transformer.layers.0.attention.dense.weight_scale [48]",
        "  wrong shape: transformer.layers.1.mlp.dense_h_to_4h.weight_scale [3], expected [192]",
    ]


def test_stored_rotary_frequencies_are_ignored():
    config, params = load_official(GOLDEN / "glm130b")
    tensors = tensors_of("glm130b")
    tensors["transformer.layers.0.attention.rotary_emb.inv_freq"] = np.zeros(4, np.float16)
    jax.tree.map(np.testing.assert_array_equal, from_official(config, tensors), params)


def test_an_output_layer_of_its_own_is_kept(tmp_path):
    tensors = tensors_of("chatglm6b_small")
    assert load_official(GOLDEN / "chatglm6b_small")[0].tied_embeddings
    tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]
    shutil.copy(GOLDEN / "chatglm6b_small" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    config, params = load_official(tmp_path)
    assert not config.tied_embeddings
    np.testing.assert_array_equal(params.output_embedding, 2 * params.word_embedding)
    np.testing.assert_array_equal(
        to_official(config, params)["lm_head.weight"], tensors["lm_head.weight"].astype(np.float32)
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        from_official(dataclasses.replace(config, tied_embeddings=True), tensors)


def test_parameters_are_loaded_onto_the_mesh():
    config, expected = load_official(GOLDEN / "glm")
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        params = from_official(config, tensors_of("glm"))
    kernel = params.blocks.ffn_in.kernel
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 32, 128)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_model_of_no_official_family_is_refused():
    config = get_config("glm-tiny", norm="deepnorm")
    with pytest.raises(ValueError, match="no official format holds a model with positions"):
        to_official(config, random_params(config))


def write_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


GLM_10B = {
    "model_type": "glm", "num_layers": 48, "vocab_size": 50304, "hidden_size": 4096,
    "num_attention_heads": 64, "max_sequence_length": 1024, "block_position_encoding": True,
    "embedding_dropout_prob": 0.1, "attention_dropout_prob": 0.1, "output_dropout_prob": 0.1,
}  # fmt: skip
CHATGLM_6B = {
    "model_type": "chatglm", "num_layers": 28, "vocab_size": 130528, "hidden_size": 4096,
    "num_attention_heads": 32, "inner_hidden_size": 16384, "max_sequence_length": 2048,
    "layernorm_epsilon": 1e-5, "position_encoding_2d": True, "bos_token_id": 130004,
    "eos_token_id": 130005, "mask_token_id": 130000, "gmask_token_id": 130001, "pad_token_id": 3,
}  # fmt: skip
GLM_130B = {
    "model_class": "GLM130B", "num_layers": 70, "vocab_size": 150528, "hidden_size": 12288,
    "inner_hidden_size": 32768, "num_attention_heads": 96, "max_sequence_length": 2048,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields, preset",
    [(GLM_10B, "glm-10b"), (GLM_130B, "glm-130b"), (CHATGLM_6B, "chatglm-6b")],
    ids=["glm", "glm-130b", "chatglm"],
)
def test_published_configurations_are_the_presets(fields, preset, tmp_path):
    assert read_config(write_config(tmp_path, **fields)) == get_config(preset)


def test_options_of_the_file_win_over_the_preset(tmp_path):
    changed = GLM_10B | {"max_sequence_length": 2048, "output_dropout_prob": 0.0}
    config = read_config(write_config(tmp_path, **changed))
    assert (config.max_positions, config.hidden_dropout, config.ffn_size) == (2048, 0.0, 16384)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "llama"}, "'llama' model"),
        ({"model_type": "glm", "num_layers": 2}, "lacks hidden_size, num_attention_heads"),
        (GLM_10B | {"relative_encoding": True}, "relative_encoding = True"),
        (CHATGLM_6B | {"position_encoding_2d": False}, "position_encoding_2d = False"),
        (GLM_10B | {"num_attention_heads": 60}, "num_heads = 60 does not divide"),
    ],
    ids=["family", "field", "relative", "1d", "heads"],
)
def test_foreign_configurations_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_config(write_config(tmp_path, **fields))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_official(tmp_path)
    write_config(tmp_path, **GLM_10B)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_official(tmp_path)
