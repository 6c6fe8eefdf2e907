"""Text files to documents, with the file and line or record of whatever is wrong in them.

Line ends become "\\n". Plain text is cut into documents at blank lines; every record of a .jsonl or
.parquet file is one document.
"""

import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

ENDINGS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DOCUMENT_SIZE = 4000
"""Characters after which the next blank line ends a document of plain text."""
LONGEST_DOCUMENT = 4 * DOCUMENT_SIZE
"""Characters after which any line ends it."""
CHUNK = 1 << 20


def find_files(path: str) -> list[Path]:
    """The text files that a path stands for: itself, or all below a folder, in order of name.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file is of no known kind, or the folder holds none that is.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"there is no file or folder {root}")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("[!.]*") if p.is_file())
    known = [file for file in files if file.name.endswith(ENDINGS)]
    if not known:
        subject = f"{root} is not a" if root.is_file() else f"folder {root} holds no"
        raise ValueError(f"{subject} text file; known endings are {', '.join(ENDINGS)}")
    return known


def read_documents(file: Path, text_field: str) -> Iterator[str]:
    """The documents of one file; `text_field` names the text in .jsonl and .parquet records.

    Raises:
        ValueError: not UTF-8, truncated, invalid JSON, a missing field or one that is not a string.
    """
    if file.name.endswith((".txt", ".txt.gz", ".txt.zst")):
        yield from group_lines(line for _, line in _lines(file))
    else:
        for (text,) in read_records(file, (text_field,)):
            if text.strip():
                yield text


def read_records(file: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Those fields of every record of a .jsonl or .parquet file.

    Raises:
        ValueError: as `read_documents`, or the file has no records.
    """
    if file.name.endswith(".parquet"):
        records = _parquet_records(file, fields)
    elif file.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        records = _json_records(file)
    else:
        raise ValueError(f"{file} has no fields; {' and '.join(fields)} need .jsonl or .parquet")
    for place, record in records:
        yield tuple(_text(record, field, place) for field in fields)


def split_text(text: str) -> Iterator[str]:
    """The documents of a plain text, see `group_lines`."""
    return group_lines(io.StringIO(text.replace("\r\n", "\n")))


def group_lines(lines: Iterable[str]) -> Iterator[str]:
    """Joins lines into documents that end at the first blank line after DOCUMENT_SIZE characters,
    or at any line, or inside an endless one, after LONGEST_DOCUMENT."""
    part: list[str] = []
    size = 0
    for line in lines:
        for start in range(0, len(line), LONGEST_DOCUMENT):
            piece = line[start : start + LONGEST_DOCUMENT]
            if (size >= DOCUMENT_SIZE and not piece.strip()) or size >= LONGEST_DOCUMENT:
                yield "".join(part).strip("\n")
                part, size = [], 0
            if part or piece.strip():
                part.append(piece)
                size += len(piece)
    if part:
        yield "".join(part).strip("\n")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, decompressed and decoded."""
    number, rest = 0, b""
    try:
        for chunk in _chunks(file):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                number += 1
                yield number, _decode(line + b"\n", file, number)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file}, line {number + 1}: the file is truncated or damaged ({error})"
        ) from error
    if rest:
        yield number + 1, _decode(rest, file, number + 1)


def _decode(line: bytes, file: Path, number: int) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{file}, line {number}: not UTF-8 ({byte})") from None
    return text.replace("\r\n", "\n")


def _chunks(file: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file."""
    if file.suffix == ".zst":
        yield from _zstandard_chunks(file)
    else:
        open_file = gzip.open if file.suffix == ".gz" else open
        with open_file(file, "rb") as stream:
            yield from iter(lambda: stream.read(CHUNK), b"")


def _zstandard_chunks(file: Path) -> Iterator[bytes]:
    """Frame by frame: the library's own file reader takes a truncated frame for the end."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    with open(file, "rb") as stream:
        for chunk in iter(lambda: stream.read(CHUNK), b""):
            while chunk:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise EOFError(error) from None
                chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the last Zstandard frame has no end")


def _json_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of JSON lines with their places."""
    for number, line in _lines(file):
        place = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: invalid JSON ({error.msg} at column {error.colno})"
            ) from None
        kind = type(record).__name__
        if kind != "dict":
            raise ValueError(f"{place}: expected a JSON object, got {kind}")
        yield place, record


def _parquet_records(file: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table with their places; only the wanted columns are read."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    with open(file, "rb") as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            for field in fields:
                _require_field(field, table.schema_arrow.names, str(file))
            for batch in table.iter_batches(columns=list(fields)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, record {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            place = f"{file}, record {number + 1}"
            raise ValueError(f"{place}: the file is truncated or damaged ({error})") from error


def _text(record: dict[str, Any], field: str, place: str) -> str:
    _require_field(field, record, place)
    text, kind = record[field], type(record[field]).__name__
    if kind != "str":
        raise ValueError(f"{place}: field {field!r} is {kind}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: field {field!r} holds half a surrogate pair") from None
    return text.replace("\r\n", "\n")


def _require_field(field: str, names: Collection[str], place: str) -> None:
    if field not in names:
        raise ValueError(f"{place}: no field {field!r} among {', '.join(map(repr, names))}")
