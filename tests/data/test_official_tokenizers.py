"""The official vocabularies against the recorded results of the official tokenizers.

The vocabulary files are their owners': GLMJAX_VOCABULARIES names a folder with chatglm-6b/ice_text.model
and tokenizer_config.json, gpt2/ and roberta/ with vocab.json and merges.txt (or gpt2-vocab.json and
so on), bert-base-uncased/vocab.txt and glm-chinese/cog-pretrain.model.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from glmjax.data.chat import chat_prompt
from glmjax.data.inputs import chatglm_ids, pad_left
from glmjax.data.tokenizers import load_tokenizer
from glmjax.data.vocabularies import close_spaces
from glmjax.presets import (
    CHATGLM_TOKENS,
    CHATGLM_V0_TOKENS,
    CHINESE_ORIGINAL_TOKENS,
    ICETK_TOKENS,
)

FOLDER = os.environ.get("GLMJAX_VOCABULARIES")
GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization"
COMMANDS = {
    "pad": "pad", "eos": "eos", "ENC": "cls", "MASK": "mask", "sMASK": "smask", "gMASK": "gmask",
    "sop": "sop", "eop": "eop", "dBLOCK": "dblock",
}  # fmt: skip
SPELLING = ("gpt2", "roberta", "bert-base-uncased", "glm-chinese")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="GLMJAX_VOCABULARIES names no folder of official vocabularies"
)


def recorded(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def load(name, special_tokens=None):
    return load_tokenizer(Path(FOLDER) / name, special_tokens)


@pytest.fixture(scope="module")
def chatglm():
    return load("chatglm-6b")


@pytest.mark.parametrize("name", SPELLING)
def test_glm(name):
    tokenizer, golden = load(name), recorded(name)
    assert len(golden["cases"]) == 210
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode_prompt(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


@pytest.mark.parametrize("name", SPELLING)
def test_special_tokens_of_glm(name):
    tokenizer, golden = load(name), recorded(name)
    assert tokenizer.vocab_size == golden["num_tokens"]
    for command, token in golden["command_tokens"].items():
        if command in COMMANDS:
            assert getattr(tokenizer.special_tokens, COMMANDS[command]) == token["id"]
    spelled = {token["token"]: token["id"] for token in golden["command_tokens"].values()}
    assert tokenizer.commands == spelled


def test_chatglm(chatglm):
    golden = recorded("chatglm-6b")
    assert chatglm.vocab_size == golden["vocab_size"]
    assert len(golden["cases"]) == 210
    for case in golden["cases"]:
        text = case["text"]
        assert chatglm.encode(text) == case["ids_no_special"] == case["sp_ids"], text
        assert chatglm_ids(chatglm, text) == case["ids"], text
        assert chatglm.decode(case["ids"]) == case["decoded"], text
        assert chatglm.decode(case["ids_no_special"]) == case["decoded_no_special"], text
        assert close_spaces(case["sp_decoded"]) == case["decoded"], text


def test_chatglm_of_before_april_2023_has_ids_20000_higher(chatglm, tmp_path):
    (tmp_path / "ice_text.model").write_bytes(
        (Path(FOLDER) / "chatglm-6b/ice_text.model").read_bytes()
    )
    older = load_tokenizer(tmp_path, CHATGLM_V0_TOKENS)
    assert older.vocab_size == chatglm.vocab_size + 20000
    for case in recorded("chatglm-6b")["cases"]:
        ids = [id + 20000 for id in case["ids"]]
        assert chatglm_ids(older, case["text"]) == ids, case["text"]
        assert older.decode(ids) == case["decoded"], case["text"]


def test_chats(chatglm):
    golden = recorded("chatglm-6b")
    assert len(golden["chat"]) == 5
    for case in golden["chat"]:
        prompt = chat_prompt(case["query"], case["history"])
        assert prompt == case["prompt"]
        assert chatglm_ids(chatglm, prompt) == case["ids"]
        assert chatglm.decode(case["ids"]) == case["decoded"]
    for case in golden["pair"]:
        assert chatglm_ids(chatglm, case["a"], case["b"]) == case["ids"]


def test_left_padded_batch(chatglm):
    golden = recorded("chatglm-6b")["padded_batch"]
    rows = [chatglm_ids(chatglm, text) for text in golden["texts"]]
    prompts = pad_left(rows, chatglm.special_tokens)
    np.testing.assert_array_equal(prompts.tokens_BT, golden["input_ids"])
    np.testing.assert_array_equal(prompts.positions_B2T, golden["position_ids"])
    index_T = np.arange(prompts.tokens_BT.shape[1])
    for row, masked_TT in enumerate(golden["attention_mask_true_means_masked"]):
        start = prompts.start_B[row]
        end_T = np.maximum(index_T + 1, prompts.context_B[row])
        sees_TT = (start <= index_T) & (index_T < end_T[:, None])
        np.testing.assert_array_equal(sees_TT[start:], ~np.array(masked_TT[0], bool)[start:])


def test_glm_130b():
    tokenizer, golden = load("chatglm-6b", ICETK_TOKENS), recorded("glm-130b")
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]
    tokens, ids = tokenizer.special_tokens, golden["special_tokens"]
    assert (tokens.mask, tokens.gmask, tokens.smask) == (
        ids["[MASK]"],
        ids["[gMASK]"],
        ids["[sMASK]"],
    )
    assert (tokens.sop, tokens.eop, tokens.eos) == (ids["sop"], ids["eop"], ids["eos"])
    ends = [20007, 20012, 20027, 20031, 20035, 83823, 145670]
    assert np.flatnonzero(tokenizer.is_sentence_end).tolist() == ends


@pytest.mark.parametrize(
    ("name", "special_tokens"),
    [*((name, None) for name in (*SPELLING, "chatglm-6b")), ("chatglm-6b", ICETK_TOKENS)],
    ids=[*SPELLING, "chatglm-6b", "glm-130b"],
)
def test_saved_vocabularies_load_as_what_they_were(name, special_tokens, tmp_path):
    tokenizer = load(name, special_tokens)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.digest == tokenizer.digest
    assert again.special_tokens == tokenizer.special_tokens
    for case in recorded("gpt2")["cases"][::20]:
        assert again.encode(case["text"]) == tokenizer.encode(case["text"])


def test_blanks_in_prompts():
    text = "The capital of [sMASK], of France, is\n [MASK]. [gMASK]"
    tokenizer = load("chatglm-6b", ICETK_TOKENS)
    expected = [*tokenizer.encode("The capital of"), 150002, *tokenizer.encode(", of France, is")]
    expected += [150000, *tokenizer.encode("."), 150001]
    assert tokenizer.encode_prompt(text) == expected
    masks = {CHATGLM_TOKENS.mask, CHATGLM_TOKENS.smask, CHATGLM_TOKENS.gmask}
    chatglm = load("chatglm-6b")
    assert masks.isdisjoint(chatglm.encode(text))
    assert [id for id in chatglm.encode_prompt(text) if id in masks] == [130002, 130000, 130001]


def test_glm_10b_chinese_of_thudm_opens_long_blanks_by_eop():
    tokenizer = load("glm-chinese", CHINESE_ORIGINAL_TOKENS)
    assert tokenizer.encode("[gMASK]") == [50007] == [tokenizer.special_tokens.eop]
    assert tokenizer.encode("[MASK] [sMASK] [dBLOCK]") == [50003, 50008, 50009]


def test_only_the_official_dummy_prefix_opens_a_text(chatglm):
    ids = chatglm.encode("Hello", dummy_prefix=False)
    assert chatglm.encode("\nHello")[2:] == ids != chatglm.encode("Hello")
