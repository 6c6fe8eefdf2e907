"""config.json of official models, both ways."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_cases import GOLDEN

from glmjax import get_config
from glmjax.config import replace
from glmjax.interop.names import family_of
from glmjax.interop.official_config import official_fields, read_config
from glmjax.model.parts import Part

WHERE = Path("config.json")
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
CHATGLM_6B_V0 = CHATGLM_6B | {
    "vocab_size": 150528, "bos_token_id": 150004, "eos_token_id": 150005,
    "mask_token_id": 150000, "gmask_token_id": 150001, "pad_token_id": 0,
}  # fmt: skip
GLM_130B = {
    "model_class": "GLM130B", "num_layers": 70, "vocab_size": 150528, "hidden_size": 12288,
    "inner_hidden_size": 32768, "num_attention_heads": 96, "max_sequence_length": 2048,
}  # fmt: skip
CHATGLM2_6B = {
    "model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32,
    "multi_query_group_num": 2, "ffn_hidden_size": 13696, "padded_vocab_size": 65024,
    "seq_length": 32768, "layernorm_epsilon": 1e-5, "rmsnorm": True, "add_qkv_bias": True,
    "add_bias_linear": False,
}  # fmt: skip
GLM_4_9B = {
    "model_type": "glm", "num_hidden_layers": 40, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 2, "intermediate_size": 13696, "vocab_size": 151552,
    "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0,
    "attention_bias": True, "partial_rotary_factor": 0.5, "hidden_act": "silu", "head_dim": 128,
}  # fmt: skip


def read(fields, tensors=None):
    return read_config(fields, tensors or {}, 1, WHERE)


@pytest.mark.parametrize(
    "fields, preset",
    [
        (GLM_10B, "glm-10b"), (GLM_130B, "glm-130b"), (CHATGLM_6B, "chatglm-6b"),
        (CHATGLM_6B_V0, "chatglm-6b-v0"), (GLM_4_9B, "glm-4-9b"),
    ],
    ids=["glm", "glm-130b", "chatglm", "chatglm-v0", "glm-4"],
)  # fmt: skip
def test_published_configurations_are_the_presets(fields, preset):
    assert read(fields)[1] == get_config(preset)


def test_chatglm2():
    family, config = read(CHATGLM2_6B)
    assert family == "chatglm2-6b"
    assert replace(config, name="") == replace(get_config("chatglm2-6b"), name="")


@pytest.mark.parametrize("name", ["glm-10b", "glm-base", "glm-130b", "chatglm-6b", "chatglm-6b-v0",
                                  "glm-4-9b", "glm-130b-tiny"])  # fmt: skip
def test_written_fields_give_the_model_back(name):
    config = get_config(name)
    fields = json.loads(json.dumps(official_fields(family_of(config), config, "float16")))
    family, again = read(fields)
    assert family == family_of(config)
    assert replace(again, name=name, initializer_scale=config.initializer_scale,
                   embedding_gradient_scale=config.embedding_gradient_scale) == config  # fmt: skip


def test_options_of_the_file_win_over_the_preset():
    _, config = read(GLM_10B | {"max_sequence_length": 2048, "output_dropout_prob": 0.0})
    assert (config.max_positions, config.hidden_dropout, config.ffn_size) == (2048, 0.0, 16384)


def test_position_tables_win_over_the_file():
    """SwissArmyTransformer counts one position more than THUDM/GLM."""
    table = np.zeros((1025, 4096), np.float16)
    tensors = {
        "transformer.position_embeddings.weight": Part(table.shape, table.dtype, lambda: table)
    }
    assert read(GLM_10B | {"max_sequence_length": 1025}, tensors)[1].max_positions == 1024


def test_generic_ids_of_a_hugging_face_glm_are_passed_over():
    """transformers may add ids of its own, which are not <sop> and <eop>."""
    fields = GLM_10B | {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 1}
    assert read(fields)[1] == get_config("glm-10b")


def test_glm_10b_chinese_of_thudm_has_the_original_numbering():
    """Without a config.json it is a folder of THUDM/GLM, whose [gMASK] is <eop>."""
    shapes = {
        "word_embeddings.weight": (50048, 4096),
        "transformer.layers.0.mlp.dense_h_to_4h.weight": (16384, 4096),
        "transformer.layers.0.mlp.dense_4h_to_h.weight": (4096, 16384),
        "transformer.layers.0.attention.dense.weight": (4096, 4096),
        **{f"transformer.layers.{n}.input_layernorm.weight": (4096,) for n in range(48)},
    }
    tensors = {name: Part(s, np.dtype(np.float16), None) for name, s in shapes.items()}
    family, config = read_config(None, tensors, 1, WHERE)
    assert (family, config.name) == ("glm", "glm-10b-chinese")
    assert config.special_tokens.gmask == config.special_tokens.eop == 50007
    assert get_config("glm-10b-chinese").special_tokens.gmask == 50009


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "llama"}, "it describes a 'llama' model"),
        ({"model_type": "glm", "num_layers": 2}, "it lacks hidden_size, num_attention_heads"),
        (GLM_10B | {"relative_encoding": True}, "relative_encoding = True"),
        (GLM_10B | {"attention_scale": 8.0}, "attention_scale = 8.0"),
        (CHATGLM_6B | {"position_encoding_2d": False}, "position_encoding_2d = False"),
        (GLM_10B | {"num_attention_heads": 60}, "num_heads = 60 does not divide"),
        (GLM_10B | {"num_layers": -1}, "num_layers = -1 is not a positive number"),
        (GLM_10B | {"num_layers": "48"}, "num_layers must be a number, got '48'"),
        (GLM_10B | {"hidden_size": True}, "hidden_size must be a number, got True"),
        (GLM_10B | {"output_dropout_prob": "a"}, "output_dropout_prob must be a number, got 'a'"),
        (GLM_10B | {"command_tokens": [1]}, "command_tokens must be an object"),
        (CHATGLM_6B | {"bos_token_id": 150004}, "sop = 150004 is outside vocab_size = 130528"),
        (GLM_4_9B | {"partial_rotary_factor": 1.0}, "partial_rotary_factor = 1.0, only 0.5"),
        (GLM_4_9B | {"rope_parameters": {"rope_type": "yarn"}}, "rotary parameters .*yarn"),
        (GLM_4_9B | {"rope_parameters": 7}, "config.json: "),
        (CHATGLM_6B | {"bos_token_id": 1.5}, "bos_token_id must be a number, got 1.5"),
    ],
)
def test_foreign_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        read(fields)
    assert str(error.value).startswith("config.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["glm", "glm130b", "chatglm6b_small"])
def test_unknown_fields_are_passed_over(case):
    fields = json.loads((GOLDEN / case / "config.json").read_text())
    assert read(fields | {"transformers_version": "4.27.1", "new": [1, {"a": None}]}) == read(
        fields
    )
