"""Conversations with ChatGLM as text: prompts and answers.

Source: Hugging Face THUDM/chatglm-6b, modeling_chatglm.py; THUDM/chatglm2-6b for the other style.
"""

import re
from collections.abc import Sequence
from typing import Literal

_FULL_WIDTH = {",": "\uff0c", "!": "\uff01", ":": "\uff1a", ";": "\uff1b", "?": "\uff1f"}
_CHINESE = "[\u4e00-\u9fff]"
_TRAINING_TIME = "[[\u8bad\u7ec3\u65f6\u95f4]]"
_BEGINNINGS = "|".join(re.escape(_TRAINING_TIME[:n]) for n in range(1, len(_TRAINING_TIME)))
# The ends of a text that more text may change: white space and marks, part of a character, of a
# contraction whose space is closed, of a spelled line break, tab or run of spaces, of the date.
_UNSETTLED = re.compile(
    rf"([\s'\ufffd]|(?<!{_CHINESE})[,!:;?]|[ ']n?'?|[ '][vr]|<n?|<\|[a-z]*(_\d*)?\|?|{_BEGINNINGS})\Z"
)


def chat_prompt(
    query: str,
    history: Sequence[tuple[str, str]] = (),
    style: Literal["chatglm-6b", "chatglm2-6b"] = "chatglm-6b",
) -> str:
    """A conversation that waits for its next answer; history holds (query, answer) pairs.

    ChatGLM-6B counts rounds from 0 and reads a first query as it is. ChatGLM2-6B counts from 1,
    also when there is no history, and leaves blank lines.
    """
    if style == "chatglm-6b" and not history:
        return query
    first, gap = (0, "\n") if style == "chatglm-6b" else (1, "\n\n")
    rounds = [*history, (query, "")]
    text = "".join(
        f"[Round {number}]{gap}\u95ee\uff1a{asked}{gap}\u7b54\uff1a{answer}{gap}"
        for number, (asked, answer) in enumerate(rounds, first)
    )
    return text.removesuffix(gap)


def tidy_answer(text: str) -> str:
    """A decoded answer as ChatGLM-6B shows it: full-width punctuation beside Chinese characters."""
    text = text.strip().replace(_TRAINING_TIME, "2023\u5e74")
    for mark, wide in _FULL_WIDTH.items():
        text = re.sub(f"({_CHINESE}){re.escape(mark)}", rf"\1{wide}", text)
        text = re.sub(f"{re.escape(mark)}({_CHINESE})", rf"{wide}\1", text)
    return text


def settled(text: str) -> str:
    """The beginning of an unfinished decoded text that stays as it is, also in `tidy_answer`.

    What is left out is white space, marks that become full-width if Chinese follows, characters of
    which bytes are missing, and the like.
    """
    while found := _UNSETTLED.search(text):
        text = text[: found.start()]
    return text
