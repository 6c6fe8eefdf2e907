"""Any format to any other and back, to the bit."""

import json
import shutil

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, load_model
from official_tensors import assert_same, assert_same_tensors, read_tensors
from safetensors.numpy import load_file, save_file

import glmjax
from glmjax.interop.convert import convert, export

HUGGING_FACE = [
    "glm", "glm130b", "chatglm6b_small", "chatglm6b_ptuning", "chatglm6b_ptuning_projection",
    "chatglm6b_quantisation/model_int8.safetensors",
    "chatglm6b_quantisation/model_int4.safetensors",
]  # fmt: skip
RANKS = ["glm/mp2", "glm130b/mp2", "glm130b/mp4", "glm130b/mp2_int8", "glm130b/mp2_int4"]


@pytest.fixture
def source(request):
    """A golden checkpoint; those in PyTorch's format need it."""
    if request.param in RANKS:
        pytest.importorskip("torch")
    return GOLDEN / request.param


@pytest.mark.parametrize("source", HUGGING_FACE + RANKS, indirect=True)
def test_to_glmjax_and_back(source, tmp_path):
    config = convert(source, tmp_path / "model")
    loaded, params = glmjax.load(tmp_path / "model")
    assert loaded == config
    assert_same(params, glmjax.load(source)[1])
    if "mp" in source.name:
        convert(tmp_path / "model", tmp_path / "back", "ranks", ranks=int(source.name[2]))
    else:
        convert(tmp_path / "model", tmp_path / "back", "hf")
    again, stored = read_tensors(tmp_path / "back"), read_tensors(source)
    for tensors in (*again, *stored):  # the golden folders hold these here and there
        for name in [name for name in tensors if "inv_freq" in name or name == "lm_head.weight"]:
            del tensors[name]
    assert_same_tensors(again, stored)
    assert glmjax.load(tmp_path / "back")[0] == config


@pytest.mark.parametrize("source", HUGGING_FACE, indirect=True)
def test_hugging_face_folders_of_several_files(source, tmp_path):
    convert(source, tmp_path / "hf", "hf", shard_bytes=30_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors" and len(names) > 2
    tensors = {name: x for file in names for name, x in load_file(tmp_path / "hf" / file).items()}
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert_same(glmjax.load(tmp_path / "hf")[1], glmjax.load(source)[1])


@pytest.mark.parametrize("case, ranks", [
    ("glm", 1), ("glm", 2), ("glm", 4), ("glm130b", 1), ("glm130b", 2), ("glm130b", 8),
])  # fmt: skip
def test_ranks_and_back(case, ranks, tmp_path):
    pytest.importorskip("torch")
    convert(GOLDEN / case, tmp_path / "ranks", "ranks", ranks=ranks)
    assert len(list((tmp_path / "ranks" / "release").iterdir())) == ranks
    assert (tmp_path / "ranks" / "latest").read_text() == "release"
    config, params = glmjax.load(tmp_path / "ranks")
    assert config == glmjax.load(GOLDEN / case)[0]
    assert_same(params, glmjax.load(GOLDEN / case)[1])


@pytest.mark.parametrize("source, ranks, expected", [
    ("glm130b/mp4", 2, "glm130b/mp2"),
    ("glm130b/mp2", 4, "glm130b/mp4"),
])  # fmt: skip
def test_other_numbers_of_ranks_are_those_of_the_official_tool(source, ranks, expected, tmp_path):
    pytest.importorskip("torch")
    convert(GOLDEN / source, tmp_path / "ranks", "ranks", ranks=ranks)
    assert_same_tensors(read_tensors(tmp_path / "ranks"), read_tensors(GOLDEN / expected))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_ranks_are_those_of_the_official_tool(bits, tmp_path):
    pytest.importorskip("torch")
    convert(GOLDEN / "glm130b/mp4", tmp_path / "ranks", "ranks", ranks=2, quantize=bits)
    expected = read_tensors(GOLDEN / f"glm130b/mp2_{bits}")
    assert_same_tensors(read_tensors(tmp_path / "ranks"), expected)


@pytest.mark.parametrize("ranks", [1, 4])
def test_scales_of_ranks_go_to_as_many_ranks_or_more(ranks, tmp_path):
    pytest.importorskip("torch")
    source = GOLDEN / "glm130b/mp2_int4"
    if ranks == 1:
        with pytest.raises(ValueError, match=r"2 scales a row of .* do not fit 1 rank"):
            convert(source, tmp_path / "ranks", "ranks", ranks=ranks)
        assert not (tmp_path / "ranks").exists()
        return
    convert(source, tmp_path / "ranks", "ranks", ranks=ranks)
    floats = [
        glmjax.load(path, quantize="float", dtype="float32")[1]
        for path in (source, tmp_path / "ranks")
    ]
    assert_same(*floats)


def test_chatglm_has_all_the_tensors_of_the_original(tmp_path):
    config, params = load_model("chatglm6b_small")
    export(tmp_path / "hf", config, params)
    (tensors,) = read_tensors(tmp_path / "hf")
    assert len(tensors) == 13 * config.num_layers + 4
    np.testing.assert_array_equal(
        tensors["lm_head.weight"], tensors["transformer.word_embeddings.weight"]
    )
    frequencies = tensors["transformer.layers.3.attention.rotary_emb.inv_freq"]
    np.testing.assert_array_equal(frequencies, np.array([1, 0.1, 0.01, 0.001], np.float16))
    assert frequencies.dtype == np.float16
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    original = json.loads((GOLDEN / "chatglm6b_small" / "config.json").read_text())
    assert {name: fields[name] for name in original if name != "architectures"} == {
        name: value for name, value in original.items() if name != "architectures"
    }


def test_transformers_reads_and_writes_the_same_glm_4(tmp_path):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    config = glmjax.get_config("glm-4-tiny", rope_base=50_000.0)
    noise = jax.random.key(1)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(noise, leaf.shape),
        glmjax.init(config, jax.random.key(0)),
    )
    export(tmp_path / "ours", config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    )
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
    with torch.no_grad():
        expected_BTV = model(torch.tensor(tokens_BT)).logits.numpy()
    positions_B2T = np.zeros((2, 2, 20), int) + np.arange(20)
    mask = glmjax.BlankMask.from_context(np.zeros(2, int), length=20)
    logits_BTV = glmjax.forward(config, params, tokens_BT, positions_B2T, mask)
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    assert_same(glmjax.load(tmp_path / "theirs")[1], params)
    assert glmjax.load(tmp_path / "theirs")[0] == glmjax.load(tmp_path / "ours")[0]


def test_vocabulary_files_travel_with_the_model(tmp_path):
    shutil.copytree(GOLDEN / "chatglm6b_small", tmp_path / "source")
    (tmp_path / "source" / "ice_text.model").write_bytes(b"pieces")
    convert(tmp_path / "source", tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "back", "hf")
    assert (tmp_path / "back" / "ice_text.model").read_bytes() == b"pieces"
    assert not (tmp_path / "back" / "inputs.npz").exists()


@pytest.mark.parametrize("to", ["hf", "glmjax"])
def test_what_is_there_is_not_overwritten(to, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not overwriting it"):
        convert(GOLDEN / "glm", tmp_path / "target", to)
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["thesis.txt"]


def test_a_bad_value_stops_a_conversion_and_nothing_looks_finished(tmp_path):
    shutil.copy(GOLDEN / "glm" / "config.json", tmp_path)
    tensors = load_file(GOLDEN / "glm" / "model.safetensors")
    tensors["transformer.layers.3.mlp.dense_4h_to_h.weight"][2, 3] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    for to in ("hf", "glmjax"):
        with pytest.raises(ValueError, match=r"layers\.3\.mlp\.dense_4h_to_h\.weight in .* NaN"):
            convert(tmp_path, tmp_path / "target", to)
        assert not (tmp_path / "target").exists()


def test_checksums_are_verified(tmp_path):
    shutil.copytree(GOLDEN / "glm", tmp_path / "source")
    with pytest.raises(FileNotFoundError, match="has no SHA256SUMS"):
        convert(tmp_path / "source", tmp_path / "target", verify=True)
    (tmp_path / "source" / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    with pytest.raises(ValueError, match=r"model\.safetensors has SHA-256 .*, not 0000"):
        convert(tmp_path / "source", tmp_path / "target", verify=True)
    assert not (tmp_path / "target").exists()


def test_progress_counts_the_bytes_of_the_model(tmp_path):
    seen = []
    convert(GOLDEN / "glm", tmp_path / "target", progress=lambda *counts: seen.append(counts))
    total = sum(x.nbytes for x in read_tensors(GOLDEN / "glm")[0].values())
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
