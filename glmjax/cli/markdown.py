"""Markdown that is shown while it is written: whole blocks for good, the last one again and again."""

import itertools

from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.style import Style

# HTML in an answer is text, which rich would leave out.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def render(console: Console, text: str, height: int | None = None) -> Segments:
    """A text as Markdown, or its last `height` lines.

    Line breaks are kept, as people expect of a chat, and no spaces fill the ends of lines.
    """
    markdown = Markdown("")
    markdown.parsed = _PARSER.parse(text)
    for token in markdown.parsed:
        for child in token.children or []:
            if child.type == "softbreak":
                child.type = "hardbreak"
    lines = [_trim(line) for line in console.render_lines(markdown, pad=False)]
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    shown = lines[-height:] if height else lines
    return Segments([segment for line in shown for segment in (*line, Segment.line())])


def _trim(line: list[Segment]) -> list[Segment]:
    """The line without spaces at its end, unless they have a background."""
    while line and (line[-1].style or Style()).bgcolor is None:
        *before, last = line
        text = last.text.rstrip(" ")
        if text:
            return [*before, last._replace(text=text)]
        line = before
    return line


def split_finished(text: str) -> tuple[list[str], str]:
    """The blocks of an unfinished text that no more text changes, and the rest of it.

    A block is finished when another one follows and has a whole line, which says what it is.
    """
    lines = text.split("\n")
    starts = [
        token.map[0] for token in _PARSER.parse(text)
        if token.level == 0 and token.map and token.map[0] < len(lines) - 1
    ]  # fmt: skip
    starts = starts[:1] and [0, *starts[1:]]
    blocks = ["\n".join(lines[start:end]).strip("\n") for start, end in itertools.pairwise(starts)]
    return blocks, "\n".join(lines[starts[-1] if starts else 0 :])
