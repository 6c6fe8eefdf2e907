"""The corpus that every machine has: the documentation of Python, numpy and jax as installed.

Source files are parsed, not imported. Of each file the paragraphs of prose in its docstrings make
one text; a paragraph met before is left out, so that held-out text is not a copy of training text.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import platform
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from glmjax.data.readers import split_text

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
SHORTEST_PARAGRAPH = 60
NOT_PROSE = re.compile(r"[^\w .,;:'-]|[\d_]")
MOST_SIGNS = 0.15
"""Largest share of digits, brackets and the like in a paragraph of prose."""
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documentation_version() -> str:
    """What the corpus depends on: versions of Python, numpy and jax."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name, _ in _packages()]
    return ", ".join([f"Python {platform.python_version()}", *packages])


@functools.cache
def documentation() -> tuple[str, ...]:
    """The documents of the corpus, in order of their source files."""
    seen: set[str] = set()
    texts = [*pydoc_data.topics.topics.values(), *_docstrings()]
    prose = ("\n\n".join(_new_prose(text, seen)) for text in texts)
    return tuple(document for text in prose for document in split_text(text))


def _packages() -> list[tuple[str, Path]]:
    """Name and folder of those of numpy and jax that are installed."""
    specs = [(name, importlib.util.find_spec(name)) for name in ("numpy", "jax")]
    return [(name, Path(spec.origin).parent) for name, spec in specs if spec and spec.origin]


def _docstrings() -> Iterator[str]:
    """All docstrings of each source file, joined."""
    for root in [Path(sysconfig.get_path("stdlib")), *(folder for _, folder in _packages())]:
        for file in sorted(root.rglob("*.py")):
            if LEFT_OUT.isdisjoint(file.relative_to(root).parts):
                yield "\n\n".join(_file_docstrings(file))


def _file_docstrings(file: Path) -> Iterator[str]:
    nodes = ast.walk(ast.parse(file.read_bytes()))
    documented = (node for node in nodes if isinstance(node, Documented))
    for node in sorted(documented, key=lambda node: getattr(node, "lineno", 0)):
        yield ast.get_docstring(node) or ""


def _new_prose(text: str, seen: set[str]) -> Iterator[str]:
    """Paragraphs of prose that are not in `seen`, which they join, each on one line."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if words not in seen and _is_prose(words):
            seen.add(words)
            yield words


def _is_prose(words: str) -> bool:
    signs = len(NOT_PROSE.findall(words))
    return (
        len(words) >= SHORTEST_PARAGRAPH
        and signs <= MOST_SIGNS * len(words)
        and ">>>" not in words
        and "---" not in words
    )
