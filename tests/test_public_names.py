"""What `import glmjax` offers, from a preset to generated tokens."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, read_npz

import glmjax
from glmjax.config import SpecialTokens
from glmjax.presets import TRAINED_TOKENS

# flax itself imports rich.
HEAVY = {
    "tensorflow", "tensorflow_datasets", "grain", "sentencepiece", "pyarrow", "tyro", "matplotlib",
    "safetensors", "torch",
}  # fmt: skip


def test_import_is_light():
    code = f"import sys, glmjax\nprint({HEAVY!r} & sys.modules.keys())"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("name", ["glm-tiny", "glm-130b-tiny", "chatglm-tiny"])
def test_a_saved_model_is_loaded_whole(tmp_path, name):
    config = glmjax.get_config(name, embedding_dropout=0.25)
    params = glmjax.init(config, jax.random.key(0))
    glmjax.save(tmp_path / "model", config, params)
    loaded_config, loaded = glmjax.load(tmp_path / "model")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert glmjax.count_params(loaded_config) == sum(x.size for x in jax.tree.leaves(loaded))


@pytest.fixture(scope="module")
def official():
    pytest.importorskip("safetensors")
    return glmjax.load(GOLDEN / "glm")


def test_an_official_folder_gives_the_recorded_logits(official):
    config, params = official
    inputs, outputs = read_npz("glm", "inputs"), read_npz("glm", "outputs")
    mask = glmjax.BlankMask.from_context(inputs["sep"], length=inputs["input_ids"].shape[1])
    forward = jax.jit(glmjax.forward, static_argnums=0)
    logits_BTV = forward(config, params, inputs["input_ids"], inputs["position_ids"], mask)
    np.testing.assert_allclose(logits_BTV, outputs["logits"], rtol=0, atol=1e-4)


def test_an_official_folder_is_converted_by_load_and_save(official, tmp_path):
    glmjax.save(tmp_path / "copy", *official)
    config, params = glmjax.load(tmp_path / "copy")
    assert config == official[0]
    jax.tree.map(np.testing.assert_array_equal, params, official[1])


def test_an_official_folder_generates_the_recorded_tokens(official):
    decode = read_npz("glm", "decode")
    prompt = [*decode["context_ids"][0].tolist(), int(decode["start_token"])]
    (tokens,) = decode["tokens"].tolist()
    sampling = glmjax.Sampling(temperature=0.0)
    new = glmjax.generate(*official, [prompt], max_new_tokens=len(tokens), sampling=sampling)
    assert new == [tokens]


class Letters:
    """Two ids for two letters; blanks are underscores."""

    special_tokens: SpecialTokens = TRAINED_TOKENS

    def encode_prompt(self, text):
        return [{"a": 20, "b": 21, "_": TRAINED_TOKENS.mask}[letter] for letter in text]

    def decode(self, ids):
        return "".join({20: "a", 21: "b"}.get(id, "?") for id in ids)


def test_infill_fills_text():
    config = glmjax.get_config("glm-tiny")
    params = glmjax.init(config, jax.random.key(0))
    sampling = glmjax.Sampling(temperature=0.0)
    filled = glmjax.infill(config, params, Letters(), ["ab_ba", "aab"], 4, sampling)
    assert [text.startswith(("ab", "aab")) for text in filled] == [True, True]
    assert filled[0].endswith("ba")
    assert 4 <= len(filled[0]) <= 8


def test_every_listed_preset_is_a_configuration():
    assert [glmjax.get_config(name).name for name in glmjax.list_configs()] == glmjax.list_configs()
