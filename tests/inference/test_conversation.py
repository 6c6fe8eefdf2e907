"""Conversations: prompts, answers piece by piece, and what is refused."""

# ruff: noqa: RUF001 (full-width punctuation is what this is about)

import dataclasses
import itertools
import os
from pathlib import Path

import jax
import pytest
import tiny_chat
import tiny_vocabularies
from hypothesis import example, given, settings
from hypothesis import strategies as st

import glmjax
from glmjax.data.chat import chat_prompt, tidy_answer
from glmjax.data.inputs import chatglm_ids
from glmjax.data.tokenizers import load_tokenizer, train_tokenizer
from glmjax.inference import chat
from glmjax.inference.chat import Round, Speaker, answer, answer_text, make_prompt
from glmjax.inference.infill import infill
from glmjax.inference.sampling import Sampling
from glmjax.presets import GPT2_TOKENS, TRAINED_TOKENS

GREEDY = Sampling(temperature=0)
ROUNDS = (Round("hi", "hello"), Round("who?", "one more"), Round("the café", "12 worlds"))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    config, params = tiny_chat.make_model()
    tokenizer = load_tokenizer(tiny_chat.write_vocabulary(tmp_path_factory.mktemp("ice")))
    return Speaker(config, params, tokenizer, 8)


@pytest.fixture(scope="module")
def continuing():
    """A GLM with a vocabulary of glmjax, which knows no conversations."""
    tokenizer = train_tokenizer(["the cat sat on the mat. 你好, 世界!"] * 20, 285)
    config = glmjax.get_config("glm-tiny", initializer_scale=0.1, tied_embeddings=False)
    return Speaker(config, glmjax.init(config, jax.random.key(2)), tokenizer, 8)


@pytest.mark.parametrize("count", range(4))
def test_prompts_of_chatglm_are_the_official_ones(speaker, count):
    prompt = make_prompt(dataclasses.replace(speaker, max_new_tokens=1), ROUNDS[:count], "why?")
    text = chat_prompt("why?", ROUNDS[:count])
    assert prompt == (chatglm_ids(speaker.tokenizer, text), 0)


def test_rounds_give_way_from_the_front(speaker):
    lengths = [
        len(make_prompt(dataclasses.replace(speaker, max_new_tokens=1), ROUNDS[n:], "why?").ids)
        for n in range(4)
    ]
    assert lengths == sorted(lengths, reverse=True)
    for dropped, length in enumerate(lengths):
        tight = dataclasses.replace(speaker, max_new_tokens=speaker.config.max_positions - length)
        assert make_prompt(tight, ROUNDS, "why?") == (
            chatglm_ids(speaker.tokenizer, chat_prompt("why?", ROUNDS[dropped:])), dropped
        )  # fmt: skip
    tight = dataclasses.replace(tight, max_new_tokens=tight.max_new_tokens + 1)
    with pytest.raises(ValueError, match=rf"the question has {lengths[-1]} tokens; with max_new"):
        make_prompt(tight, ROUNDS, "why?")


@pytest.mark.parametrize("question", ["", "  \n "])
def test_an_empty_question_is_refused(speaker, question):
    with pytest.raises(ValueError, match="the question is empty"):
        make_prompt(speaker, (), question)


def test_an_answer_is_what_is_generated(speaker):
    prompt = make_prompt(speaker, ROUNDS[:1], "why?")
    (ids,) = glmjax.generate(speaker.config, speaker.params, [prompt.ids], 8, GREEDY)
    pieces = list(answer(speaker, prompt, GREEDY))
    assert "".join(piece.text for piece in pieces) == tidy_answer(speaker.tokenizer.decode(ids))
    assert [piece.num_tokens for piece in pieces] == [*range(1, 9), 8]
    assert [piece.end for piece in pieces] == [None] * 8 + ["length"]


def test_an_answer_that_ends_by_itself(speaker, monkeypatch):
    monkeypatch.setattr(chat, "stream", lambda *_: iter([[40], [50, 60]]))
    assert list(answer(speaker, make_prompt(speaker, (), "hi"), GREEDY))[-1].end == "done"


def test_a_stopped_answer_keeps_what_was_said(speaker):
    asked = itertools.count()
    prompt = make_prompt(speaker, ROUNDS[:1], "why?")
    whole = "".join(piece.text for piece in answer(speaker, prompt, GREEDY))
    pieces = list(answer(speaker, prompt, GREEDY, lambda: next(asked) == 2))
    said = "".join(piece.text for piece in pieces)
    assert [(piece.num_tokens, piece.end) for piece in pieces] == [
        (1, None), (2, None), (3, "stopped"),
    ]  # fmt: skip
    assert said and whole.startswith(said) and len(said) < len(whole)


def test_other_models_continue_the_text(continuing):
    rounds = (Round("the cat", " sat"), Round("on", " the mat"))
    ids = continuing.tokenizer.encode("the cat sat\non the mat\n你好")
    (filled,) = infill(continuing.config, continuing.params, [ids], 8, GREEDY)
    prompt = make_prompt(continuing, rounds, "你好")
    pieces = list(answer(continuing, prompt, GREEDY))
    assert "".join(piece.text for piece in pieces) == continuing.tokenizer.decode(filled.pieces[0])


def test_a_vocabulary_without_gmask_has_a_mask_before_the_end(continuing):
    tokens = dataclasses.replace(TRAINED_TOKENS, gmask=None)
    config = dataclasses.replace(continuing.config, special_tokens=tokens)
    tokenizer = dataclasses.replace(continuing.tokenizer, special_tokens=tokens)
    ids = make_prompt(Speaker(config, None, tokenizer, 8), (), "the cat").ids
    text = [tokens.cls, *tokenizer.encode("the cat"), tokens.mask]
    assert ids == [*text, tokens.eos, tokens.sop]


def test_a_blank_is_left_to_infill(tmp_path):
    tokenizer = load_tokenizer(tiny_vocabularies.write_byte_pairs(tmp_path, "gpt2"))
    config = glmjax.get_config("glm-tiny", vocab_size=50304, special_tokens=GPT2_TOKENS)
    with pytest.raises(ValueError, match="glmjax infill"):
        make_prompt(Speaker(config, None, tokenizer, 8), (), "hello [MASK].")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens must be in \[1, 160\).*got 0"),
        ({"max_new_tokens": 160}, r"has 160 positions; got 160"),
        ({"config": glmjax.get_config("glm-4-tiny")}, "'glm-4-tiny' cannot chat here"),
        ({"config": glmjax.get_config("chatglm-tiny")}, "the tokenizer has .*, but model 'chatglm"),
    ],
    ids=["none", "all", "vocabulary", "other"],
)
def test_models_that_cannot_answer(speaker, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(speaker, **changes)


@pytest.fixture(scope="module")
def vocabularies(speaker, continuing, tmp_path_factory):
    """Speakers with vocabularies whose texts come about in different ways."""
    if official := os.environ.get("GLMJAX_VOCABULARIES"):
        byte_pairs = load_tokenizer(Path(official) / "gpt2")
    else:
        folder = tmp_path_factory.mktemp("gpt2")
        byte_pairs = load_tokenizer(tiny_vocabularies.write_byte_pairs(folder, "gpt2"))
    config = glmjax.get_config("glm-tiny", vocab_size=50304, special_tokens=GPT2_TOKENS)
    return [speaker, continuing, Speaker(config, None, byte_pairs, 8)]


# Whatever a later character may change: marks, spaces, contractions, spelled layout, the date.
TEXTS = st.sampled_from(
    [
        " ", "'", "n't", "n", "t", "'m", "s", "v", "e", "re", ".", ",", "!", "?", ":", ";", "你", "好",
        "<", "n", ">", "\n", "\t", "  ", "   ", "|", "_", "2", "tab", "blank", "[", "[[", "训练", "时间",
        "]]", "训", "练时间]]", "😀", "é", "\u3000", "word",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(0, 2))
def test_pieces_are_the_text_decoded_at_once(vocabularies, data, which):
    speaker = vocabularies[which]
    encoded = TEXTS.map(speaker.tokenizer.encode)
    # From the middle of a text: a single piece, or bytes of a character.
    inner = TEXTS.map(lambda text: speaker.tokenizer.encode(f"a{text}")[1:])
    cut = st.tuples(inner, st.integers(0, 3)).map(lambda pair: pair[0][pair[1] :])
    any_id = st.integers(0, speaker.tokenizer.vocab_size - 1).map(lambda id: [id])
    lists = data.draw(st.lists(st.one_of(encoded, inner, cut, any_id), max_size=12))
    check_pieces(speaker, lists)


def byte_ids(content):
    """Tokens of ChatGLM-6B for single bytes."""
    return [[130088 + byte] for byte in content]


@example(byte_ids("你".encode()))
@example([*byte_ids("😀".encode()[:2]), *byte_ids("你".encode())])
@example(byte_ids("你好".encode()[:5]))
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=10).map(byte_ids))
def test_no_piece_ends_inside_a_character(vocabularies, lists):
    check_pieces(vocabularies[0], lists)


def check_pieces(speaker, lists):
    """Nothing is taken back, and in the end the text is there, also after every stop."""
    ids = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "stream", lambda *_: iter(lists))
        pieces = [piece.text for piece in answer(speaker, chat.Prompt([], 0), GREEDY)]
    shown = list(itertools.accumulate(pieces))
    for new, text in zip(lists, shown, strict=False):
        ids += new
        assert answer_text(speaker, ids).startswith(text)
    assert shown[-1] == answer_text(speaker, [id for new in lists for id in new])


def test_chinese_of_several_tokens_comes_in_whole_characters(speaker):
    ids = [130088 + byte for byte in "你好,世界".encode()]
    lists = [[id] for id in ids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "stream", lambda *_: iter(lists))
        pieces = [piece.text for piece in answer(speaker, chat.Prompt([], 0), GREEDY)]
    assert [text for text in pieces if text] == ["你", "好", "，", "世", "界"]
