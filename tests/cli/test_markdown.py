"""Markdown while it is written."""

# ruff: noqa: RUF001 (full-width punctuation is what people write)

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from glmjax.cli.markdown import render, split_finished

TEXT = """# Title

Some **bold** words
on two lines

1. one

2. two

```python
def f():

    return 1
```
| a | b |
|---|---|
| 1 | 2 |

- x
- y

你好，世界。"""
BLOCKS = [
    "# Title",
    "Some **bold** words\non two lines",
    "1. one\n\n2. two",
    "```python\ndef f():\n\n    return 1\n```",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "- x\n- y",
]


def shown(text, height=None):
    console = Console(file=StringIO(), width=40, color_system=None, force_terminal=True)
    console.print(render(console, text, height))
    return console.file.getvalue()


def write(chunks):
    """The finished blocks and the rest after each chunk."""
    blocks, rest = [], ""
    for chunk in chunks:
        finished, rest = split_finished(rest + chunk)
        blocks += finished
    return blocks, rest


@pytest.mark.parametrize("size", [1, 3, 7, len(TEXT)])
def test_blocks_are_finished_when_the_next_one_begins(size):
    chunks = [TEXT[i : i + size] for i in range(0, len(TEXT), size)]
    assert write(chunks) == (BLOCKS[:-1], f"{BLOCKS[-1]}\n\n你好，世界。")


@pytest.mark.parametrize("text", ["", "one", "one\n\ntw", "1. a\n\n2", "```\na\n\nb\n\nc\n"])
def test_what_may_still_change_is_not_finished(text):
    assert split_finished(text) == ([], text)


@given(st.lists(st.sampled_from([*"ab#->`|*1. \n\n", "```", "- ", "\n\n"]), max_size=40))
def test_nothing_is_lost(chunks):
    blocks, rest = write(chunks)
    assert "".join([*blocks, rest]).replace("\n", "") == "".join(chunks).replace("\n", "")


def test_line_breaks_are_kept_and_lines_not_filled():
    assert shown("one\ntwo\n\nthree") == "one\ntwo\n\nthree\n"


def test_html_is_text():
    assert shown("an <b>x</b>\n\n<div>\ny") == "an <b>x</b>\n\n<div>\ny\n"


def test_the_last_lines_of_what_is_too_long():
    text = "\n".join(map(str, range(50)))
    assert shown(text, height=3) == "47\n48\n49\n"
    assert shown("one", height=3) == "one\n"
