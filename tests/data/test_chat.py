"""Conversations as prompts, and answers as they are shown."""

# ruff: noqa: RUF001 (full-width punctuation is what this is about)

import pytest

from glmjax.data.chat import chat_prompt, settled, tidy_answer

HISTORY = [("hi", "hello"), ("who?", "GLM")]


def test_a_first_query_is_the_prompt():
    assert chat_prompt("hi [Round 0]") == "hi [Round 0]"


def test_rounds_count_from_0():
    assert chat_prompt("why?", HISTORY) == (
        "[Round 0]\n问：hi\n答：hello\n[Round 1]\n问：who?\n答：GLM\n[Round 2]\n问：why?\n答："
    )


def test_rounds_of_chatglm2_count_from_1():
    assert chat_prompt("hi", style="chatglm2-6b") == "[Round 1]\n\n问：hi\n\n答："
    assert chat_prompt("why?", HISTORY[:1], style="chatglm2-6b") == (
        "[Round 1]\n\n问：hi\n\n答：hello\n\n[Round 2]\n\n问：why?\n\n答："
    )


@pytest.mark.parametrize(
    ("decoded", "shown"),
    [
        ("  你好 \n", "你好"),
        ("你好,世界!", "你好，世界！"),
        ("时间:12:30;好?", "时间：12:30；好？"),
        ("hello, world!", "hello, world!"),
        ("GLM:你好", "GLM：你好"),
        (",,你", ",，你"),
        ("你,,你", "你，，你"),
        ("截至[[训练时间]],好.", "截至2023年，好."),
        ("", ""),
    ],
    ids=["strip", "left", "numbers", "english", "right", "one", "two", "date", "empty"],
)
def test_answers_are_tidied(decoded, shown):
    assert tidy_answer(decoded) == shown
    assert tidy_answer(shown) == shown


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("hello", "hello"),
        ("hello ", "hello"),
        ("hello,", "hello"),
        ("你好,", "你好,"),
        ("你好\ufffd\ufffd", "你好"),
        ("they do n", "they do"),
        ("they 'v", "they"),
        ("line<", "line"),
        ("line<|blank_1", "line"),
        ("截至[[训练时", "截至"),
        ("截至[[训练时间]]", "截至[[训练时间]]"),
        ("well, [[", "well"),
        (" \n", ""),
    ],
)
def test_what_more_text_may_change_is_not_settled(text, beginning):
    assert settled(text) == beginning
