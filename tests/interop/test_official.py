"""Official tensors to parts and back."""

import json

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, load_model, official_arrays
from official_tensors import assert_same, build, in_memory, read_tensors

from glmjax import get_config
from glmjax.config import GLMConfig
from glmjax.interop import layout
from glmjax.interop.names import family_of
from glmjax.interop.official import read_parts
from glmjax.interop.places import find_places
from glmjax.model.params import Params, abstract_params
from glmjax.model.parts import assemble

CASES = ["glm", "glm130b", "chatglm6b_small", "chatglm6b_28layer"]
TUNED = ["chatglm6b_ptuning", "chatglm6b_ptuning_projection"]


def fields_of(case: str) -> dict:
    return json.loads((GOLDEN / case / "config.json").read_text())


def tensors_of(case: str, name: str = "model") -> dict[str, np.ndarray]:
    return read_tensors(GOLDEN / case / f"{name}.safetensors")[0]


def random_params(config: GLMConfig) -> Params:
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: random.standard_normal(leaf.shape, np.float32), abstract_params(config)
    )


@pytest.mark.parametrize("case", CASES + TUNED)
def test_round_trip_is_exact(case):
    config, params = load_model(case)
    written = official_arrays(config, params)
    stored = {name: x for name, x in tensors_of(case).items() if name != "lm_head.weight"}
    assert written.keys() == stored.keys()
    for name, array in written.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous
        np.testing.assert_array_equal(array, stored[name].astype(np.float32), err_msg=name)


@pytest.mark.parametrize("name", ["glm-tiny", "glm-130b-tiny", "chatglm-tiny"])
def test_own_models_survive_the_official_names(name):
    config = get_config(name)
    params = random_params(config)
    tensors = in_memory(official_arrays(config, params))
    assert_same(assemble(config, read_parts(config, family_of(config), [tensors])), params)


def test_types_are_those_of_the_tensors():
    tensors = tensors_of("chatglm6b_small")
    for name, array in tensors.items():
        tensors[name] = array.astype(np.float32 if "layernorm" in name else np.float16)
    _, params = build(fields_of("chatglm6b_small"), tensors)
    assert params.blocks.ffn_norm.scale.dtype == params.final_norm.bias.dtype == np.float32
    assert params.blocks.qkv.kernel.dtype == params.word_embedding.dtype == np.float16


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


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "float64"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_copies_of_transposed_arrays(axes, dtype):
    array = np.arange(3 * 70 * 5).reshape(3, 70, 5).astype(dtype).transpose(axes)
    copy = layout.contiguous(array)
    assert copy.flags.c_contiguous
    np.testing.assert_array_equal(copy, array)
    np.testing.assert_array_equal(layout.contiguous(array[:, 1:]), array[:, 1:])


def test_everything_wrong_is_reported_at_once():
    tensors = tensors_of("glm")
    del tensors["transformer.layers.1.mlp.dense_4h_to_h.bias"]
    tensors["word_embeddings.weight"] = tensors["word_embeddings.weight"][:-1]
    tensors["transformer.layers.4.mlp.dense_4h_to_h.bias"] = np.zeros(64, np.float16)
    tensors["transformer.final_layernorm.bias"] = np.zeros(64, np.int64)
    with pytest.raises(ValueError) as error:
        build(fields_of("glm"), tensors)
    assert str(error.value).splitlines()[1:] == [
        "  wrong shape: word_embeddings.weight [271, 64], expected [272, 64]",
        "  missing: transformer.layers.1.mlp.dense_4h_to_h.bias [64]",
        "  wrong type: transformer.final_layernorm.bias int64, expected float16 or bfloat16 or float32",
        "  unexpected: transformer.layers.4.mlp.dense_4h_to_h.bias [64]",
    ]


def test_layers_of_different_types_are_reported():
    tensors = tensors_of("glm")
    name = "transformer.layers.2.mlp.dense_h_to_4h.weight"
    tensors[name] = tensors[name].astype(np.float64).astype(np.float32)
    tensors = {n: x if n == name else x.astype(np.float16) for n, x in tensors.items()}
    with pytest.raises(ValueError, match=r"layers\.2\.mlp.* float32, but float16 in layer 0"):
        build(fields_of("glm"), tensors)


def test_integers_need_their_scale():
    tensors = tensors_of("chatglm6b_quantisation", "model_int4")
    del tensors["transformer.layers.0.attention.query_key_value.weight_scale"]
    tensors["transformer.layers.1.mlp.dense_h_to_4h.weight_scale"] = np.zeros(3, np.float16)
    with pytest.raises(ValueError) as error:
        build(fields_of("chatglm6b_quantisation"), tensors)
    assert str(error.value).splitlines()[1:] == [
        "  missing: transformer.layers.0.attention.query_key_value.weight_scale [144]",
        "  wrong shape: transformer.layers.1.mlp.dense_h_to_4h.weight_scale [3], expected [192]",
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(bad):
    tensors = tensors_of("glm130b")
    name = "transformer.layers.3.attention.dense.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][5, 7] = bad
    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity"):
        build(fields_of("glm130b"), tensors)


def test_stored_rotary_frequencies_are_ignored():
    tensors = tensors_of("glm130b")
    _, params = build(fields_of("glm130b"), tensors)
    tensors["transformer.layers.0.attention.rotary_emb.inv_freq"] = np.zeros(4, np.float16)
    assert_same(build(fields_of("glm130b"), tensors)[1], params)


def test_an_output_layer_of_its_own_is_kept():
    tensors = tensors_of("chatglm6b_small")
    assert build(fields_of("chatglm6b_small"), tensors)[0].tied_embeddings
    tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]
    config, params = build(fields_of("chatglm6b_small"), tensors)
    assert not config.tied_embeddings
    np.testing.assert_array_equal(params.output_embedding, 2 * params.word_embedding)
    np.testing.assert_array_equal(
        official_arrays(config, params)["lm_head.weight"], tensors["lm_head.weight"]
    )


def test_a_prefix_that_does_not_fit_is_reported():
    tensors = tensors_of("chatglm6b_ptuning")
    name = "transformer.prefix_encoder.embedding.weight"
    tensors[name] = tensors[name][:, :-1]
    with pytest.raises(ValueError, match=r"wrong shape: .*prefix_encoder.*\[6, 287\]"):
        build(fields_of("chatglm6b_ptuning"), tensors)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", ["glm", "glm130b"])
def test_shares_of_ranks_make_up_the_model(case, ranks):
    """Official shapes of a rank, by the columns that tensor parallelism splits."""
    config, _ = load_model(case)
    places = find_places(config, family_of(config), ranks)
    shapes = {place.tensor: place.shape for found in places.values() for place in found}
    layer, D = "transformer.layers.0.", config.hidden_size
    halves = 2 if case == "glm130b" else 1
    assert shapes[layer + "attention.query_key_value.weight"] == (3 * D // ranks, D)
    assert shapes[layer + "attention.dense.weight"] == (D, D // ranks)
    assert shapes[layer + "mlp.dense_h_to_4h.weight"] == (halves * config.ffn_size // ranks, D)
    assert shapes[layer + "mlp.dense_4h_to_h.weight"] == (D, config.ffn_size // ranks)
    assert shapes[layer + "mlp.dense_4h_to_h.bias"] == (D,)


def test_ranks_that_do_not_divide_a_model_are_refused():
    config, _ = load_model("glm")
    with pytest.raises(ValueError, match="3 ranks do not divide vocab = 272 of word_embedding"):
        find_places(config, "glm", 3)


def test_a_model_of_no_official_family_is_refused():
    with pytest.raises(ValueError, match="no official format holds a model with positions"):
        family_of(get_config("glm-tiny", norm="deepnorm"))


RELATIVE = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "multi_query_group_num": 2,
    "ffn_hidden_size": 24, "padded_vocab_size": 60, "seq_length": 64, "model_type": "chatglm",
    "layernorm_epsilon": 1e-5, "rope_ratio": 2,
}  # fmt: skip


def relative_tensors() -> dict[str, np.ndarray]:
    """A tiny ChatGLM2-6B with random weights under its own names."""
    random = np.random.default_rng(1)
    layer = "transformer.encoder.layers.{}."
    shapes = {
        "transformer.embedding.word_embeddings.weight": (60, 32),
        "transformer.encoder.final_layernorm.weight": (32,),
        "transformer.output_layer.weight": (60, 32),
    }
    for n in range(2):
        shapes |= {
            layer.format(n) + "input_layernorm.weight": (32,),
            layer.format(n) + "self_attention.query_key_value.weight": (64, 32),
            layer.format(n) + "self_attention.query_key_value.bias": (64,),
            layer.format(n) + "self_attention.dense.weight": (32, 32),
            layer.format(n) + "post_attention_layernorm.weight": (32,),
            layer.format(n) + "mlp.dense_h_to_4h.weight": (48, 32),
            layer.format(n) + "mlp.dense_4h_to_h.weight": (32, 24),
        }
    return {name: random.standard_normal(s).astype(np.float16) for name, s in shapes.items()}


def test_fused_rows_of_chatglm2_are_queries_then_keys_then_values():
    tensors = relative_tensors()
    config, params = build(RELATIVE, tensors)
    assert (config.kv_heads, config.rope_base, config.tied_embeddings) == (2, 20000.0, False)
    fused = tensors["transformer.encoder.layers.1.self_attention.query_key_value.weight"]
    np.testing.assert_array_equal(params.blocks.q.kernel[1, :, 3, 5], fused[3 * 8 + 5])
    np.testing.assert_array_equal(params.blocks.kv.kernel[1, :, 0, 1, 5], fused[32 + 8 + 5])
    np.testing.assert_array_equal(params.blocks.kv.kernel[1, :, 1, 1, 5], fused[48 + 8 + 5])


def test_chatglm2_is_written_in_the_names_of_glm_4():
    config, params = build(RELATIVE, relative_tensors())
    parts = find_places(config, "glm-4")
    held = {}
    for key, places in parts.items():
        leaf = params
        for name in key[0].split("."):
            leaf = getattr(leaf, name)
        array = np.asarray(leaf if key[1] is None else leaf[key[1]])
        for place in places:
            held[place.tensor] = layout.to_official(
                place.layout, place.spec.axes, array[place.entry]
            )
    assert held["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    assert_same(assemble(config, read_parts(config, "glm-4", [in_memory(held)])), params)
