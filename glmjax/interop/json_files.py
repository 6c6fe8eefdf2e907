"""JSON that others wrote: configurations, indexes, headers."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 100_000_000
"""The limit that safetensors sets for headers; official indexes and configurations take kilobytes."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than 100 MB, or does not hold one well-formed object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than 100 MB")
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """The object that a text in UTF-8 holds; `source` names it in errors.

    Raises:
        ValueError: the text is not one well-formed object, or an object in it repeats a key.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if isinstance(value, dict):
        return value
    raise ValueError(f"{source} holds a {type(value).__name__}, not a JSON object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, entry in pairs:
        if name in value:
            raise ValueError(f"the key {name!r} is there twice")
        value[name] = entry
    return value
