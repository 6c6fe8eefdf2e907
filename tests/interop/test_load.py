"""`glmjax.load` of every format, its options and its refusals."""

import json
import shutil

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN
from official_tensors import assert_same, read_tensors
from safetensors.numpy import load_file, save_file

import glmjax
from glmjax.config import MeshConfig, Quantization
from glmjax.sharding import make_mesh

RANKS = ["glm/mp2", "glm130b/mp2", "glm130b/mp4"]


@pytest.mark.parametrize("case", RANKS)
def test_ranks_hold_the_same_parameters(case):
    pytest.importorskip("torch")
    config, params = glmjax.load(GOLDEN / case)
    whole_config, whole = glmjax.load(GOLDEN / case.split("/")[0])
    assert config == whole_config
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float16"}
    assert_same(jax.tree.map(lambda leaf: leaf.astype("float32"), params),
                jax.tree.map(lambda leaf: leaf.astype("float32"), whole))  # fmt: skip


@pytest.mark.parametrize("path", ["glm/mp2/1", "glm/mp2/1/mp_rank_01_model_states.pt", "glm/mp2/"])
def test_parts_of_a_folder_of_ranks_name_it(path):
    pytest.importorskip("torch")
    assert_same(glmjax.load(f"{GOLDEN}/{path}")[1], glmjax.load(GOLDEN / "glm/mp2")[1])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", ["glm", "chatglm6b_small"])
def test_bin_files(case, shards, tmp_path):
    torch = pytest.importorskip("torch")
    shutil.copy(GOLDEN / case / "config.json", tmp_path)
    tensors = {
        name: torch.from_numpy(x.copy())
        for name, x in load_file(GOLDEN / case / "model.safetensors").items()
    }
    names = list(tensors)
    files = {
        f"pytorch_model-{i + 1:05}-of-{shards:05}.bin": names[i::shards] for i in range(shards)
    }
    if shards == 1:
        files = {"pytorch_model.bin": names}
    else:
        where = {name: file for file, held in files.items() for name in held}
        index = {"metadata": {"total_size": 7}, "weight_map": where}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file, held in files.items():
        torch.save({name: tensors[name] for name in held}, tmp_path / file)
    assert_same(glmjax.load(tmp_path)[1], glmjax.load(GOLDEN / case)[1])


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_kept(bits):
    path = GOLDEN / "chatglm6b_quantisation" / f"model_int{bits}.safetensors"
    config, params = glmjax.load(path)
    assert config.quantization == Quantization(bits)
    (tensors,) = read_tensors(path)
    stored = tensors["transformer.layers.1.mlp.dense_4h_to_h.weight"]
    np.testing.assert_array_equal(params.blocks.ffn_out.kernel.values[1], stored)
    scale = tensors["transformer.layers.1.mlp.dense_4h_to_h.weight_scale"]
    np.testing.assert_array_equal(params.blocks.ffn_out.kernel.scale[1, 0], scale)
    assert params.blocks.ffn_out.kernel.scale.dtype == scale.dtype == np.float16


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_while_loading_is_the_official_release(bits):
    folder = GOLDEN / "chatglm6b_quantisation"
    config, params = glmjax.load(
        folder / "model.safetensors", dtype="float16", quantize=f"int{bits}"
    )
    expected_config, expected = glmjax.load(
        folder / f"model_int{bits}.safetensors", dtype="float16"
    )
    assert config == expected_config
    assert_same(params, expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_become_floats(bits, dtype):
    """Multiplied in that type: float16 as the official GPU code does, float32 exactly."""
    path = GOLDEN / "chatglm6b_quantisation" / f"model_int{bits}.safetensors"
    config, params = glmjax.load(path, quantize="float", dtype=dtype)
    assert config.quantization is None
    (tensors,) = read_tensors(path)
    name = "transformer.layers.1.attention.dense.weight"
    values, scale = tensors[name], tensors[f"{name}_scale"]
    if bits == 4:
        values = np.stack([values >> 4, (values << 4) >> 4], -1).reshape(48, 48)
    expected = values.astype(dtype) * scale.astype(dtype)[:, None]
    kernel = params.blocks.attention_out.kernel[1]
    assert kernel.dtype == dtype
    np.testing.assert_array_equal(kernel.reshape(48, 48), expected.T)


def test_other_integers_are_refused():
    path = GOLDEN / "chatglm6b_quantisation" / "model_int4.safetensors"
    with pytest.raises(ValueError, match="kernels of int4, which cannot become int8"):
        glmjax.load(path, quantize="int8")
    assert_same(glmjax.load(path, quantize="int4")[1], glmjax.load(path)[1])


def test_floats_are_cast_and_scales_are_not():
    path = GOLDEN / "chatglm6b_quantisation" / "model_int8.safetensors"
    _, params = glmjax.load(path, dtype="bfloat16")
    assert params.blocks.qkv.kernel.scale.dtype == np.float16
    assert params.blocks.qkv.kernel.values.dtype == np.int8
    assert params.blocks.qkv.bias.dtype == params.word_embedding.dtype == "bfloat16"


def test_parameters_are_loaded_onto_the_mesh():
    _, expected = glmjax.load(GOLDEN / "glm")
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        _, params = glmjax.load(GOLDEN / "glm")
    kernel = params.blocks.ffn_in.kernel
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 32, 128)
    assert_same(params, expected)


def prefix_folder(folder):
    """What the official trainer saves: the tensors of the prefix alone."""
    tensors = load_file(GOLDEN / "chatglm6b_ptuning" / "model.safetensors")
    prefix = {name: x for name, x in tensors.items() if "prefix_encoder" in name}
    model = {name: x for name, x in tensors.items() if name not in prefix}
    for name, held in (("prefix", prefix), ("model", model)):
        (folder / name).mkdir()
        save_file(held, folder / name / "model.safetensors")
        shutil.copy(GOLDEN / "chatglm6b_ptuning" / "config.json", folder / name)
    return folder / "model", folder / "prefix"


def test_a_prefix_is_put_in_front(tmp_path):
    model, prefix = prefix_folder(tmp_path)
    assert glmjax.load(model)[0].prefix_length == 0
    config, params = glmjax.load(model, prefix=prefix)
    expected_config, expected = glmjax.load(GOLDEN / "chatglm6b_ptuning")
    assert config == expected_config and config.prefix_length == 6
    assert_same(params, expected)


def test_a_prefix_alone_is_no_model(tmp_path):
    model, prefix = prefix_folder(tmp_path)
    with pytest.raises(ValueError, match="holds a P-tuning prefix and no model"):
        glmjax.load(prefix)
    with pytest.raises(ValueError, match="holds no P-tuning prefix"):
        glmjax.load(model, prefix=model)
    with pytest.raises(ValueError, match="holds a prefix for ChatGLM-6B"):
        glmjax.load(GOLDEN / "glm", prefix=prefix)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        glmjax.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no model"):
        glmjax.load(tmp_path)


def test_ranks_without_a_configuration_are_known_by_their_shape(tmp_path):
    """GLM-130B's own folders have no config.json; heads follow from the rotary frequencies."""
    pytest.importorskip("torch")
    shutil.copytree(GOLDEN / "glm130b/mp2", tmp_path / "deep" / "down")
    config, params = glmjax.load(tmp_path / "deep" / "down")
    assert (config.num_heads, config.ffn_size, config.positions) == (8, 168, "rope_1d")
    assert_same(params, glmjax.load(GOLDEN / "glm130b/mp2")[1])


def test_a_model_of_unknown_heads_asks_for_a_configuration(tmp_path):
    pytest.importorskip("torch")
    shutil.copytree(GOLDEN / "glm/mp2", tmp_path / "deep" / "down")
    with pytest.raises(ValueError, match=r"number of heads is unknown: put a config\.json"):
        glmjax.load(tmp_path / "deep" / "down")
