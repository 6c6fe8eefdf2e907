"""Ids around texts, and batches padded on the left."""

import dataclasses

import numpy as np
import pytest
from tiny_vocabularies import write_byte_pairs, write_ice_text, write_word_pieces

from glmjax.data.inputs import chatglm_ids, glm_ids, pad_left
from glmjax.data.tokenizers import load_tokenizer
from glmjax.presets import CHATGLM_TOKENS, CHATGLM_V0_TOKENS, ROBERTA_TOKENS


@pytest.fixture(scope="module")
def ice_text(tmp_path_factory):
    return write_ice_text(tmp_path_factory.mktemp("ice"))


@pytest.mark.parametrize("tokens", [CHATGLM_TOKENS, CHATGLM_V0_TOKENS], ids=["slim", "v0"])
def test_chatglm_ids(tokens, ice_text):
    tokenizer = load_tokenizer(ice_text, tokens)
    hello, world = tokenizer.encode("hello [gMASK]"), tokenizer.encode("world\n")
    prompt = [*hello, tokens.gmask, tokens.sop]
    assert chatglm_ids(tokenizer, "hello [gMASK]") == prompt
    assert chatglm_ids(tokenizer, "hello [gMASK]", "world\n") == [*prompt, *world, tokens.eop]
    assert chatglm_ids(tokenizer, "", "") == [tokens.gmask, tokens.sop, tokens.eop]


def test_glm_ids(tmp_path):
    gpt2 = load_tokenizer(write_byte_pairs(tmp_path / "gpt2", "gpt2"))
    assert glm_ids(gpt2, "hello") == [50259, *gpt2.encode("hello"), 50256]
    roberta = load_tokenizer(write_byte_pairs(tmp_path / "roberta", "roberta"))
    assert glm_ids(roberta, "[MASK]") == [0, ROBERTA_TOKENS.mask, 2]
    bert = load_tokenizer(write_word_pieces(tmp_path / "bert"))
    with pytest.raises(ValueError, match=r"need \[gMASK\], which this vocabulary lacks"):
        chatglm_ids(bert, "hello")
    assert glm_ids(bert, "hello") == [101, *bert.encode("hello"), 102]


def test_left_padding():
    mask, sop = CHATGLM_TOKENS.gmask, CHATGLM_TOKENS.sop
    prompts = pad_left([[7, 8, mask, sop, 9], [mask, sop]], CHATGLM_TOKENS)
    assert prompts.tokens_BT.tolist() == [[7, 8, mask, sop, 9], [3, 3, 3, mask, sop]]
    assert prompts.positions_B2T.tolist() == [
        [[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
    ]
    assert prompts.start_B.tolist() == [0, 3]
    assert prompts.context_B.tolist() == [3, 4]


def test_padding_changes_only_the_pad_id():
    rows = [[1, 2, 130001, 130004], [130001, 130004]]
    pad = dataclasses.replace(CHATGLM_TOKENS, pad=0)
    one, other = pad_left(rows, CHATGLM_TOKENS), pad_left(rows, pad)
    assert (other.tokens_BT[1, :2] == 0).all()
    np.testing.assert_array_equal(one.positions_B2T, other.positions_B2T)


@pytest.mark.parametrize("row", [[1, 2], [1, 130001], [130004]], ids=["none", "mask", "sop"])
def test_rows_need_a_blank(row):
    with pytest.raises(ValueError, match=r"row 1 lacks \[gMASK\] \(id 130001\) or <sop>"):
        pad_left([[130001, 130004], row], CHATGLM_TOKENS)
