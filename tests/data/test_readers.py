"""Text files to documents, and the place of whatever is wrong in them."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from glmjax.data import readers
from glmjax.data.readers import find_files, read_documents, read_records, split_text

RECORDS = [{"text": "one\r\nline", "target": "a"}, {"text": "zwei \u00fc", "target": "b"}]
JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def write(path, content: bytes):
    """Writes bytes, compressed as the name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_records(tmp_path, ending):
    path = tmp_path / f"file{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        write(path, JSON_LINES)
    assert list(read_documents(path, "text")) == ["one\nline", "zwei \u00fc"]
    pairs = [("one\nline", "a"), ("zwei \u00fc", "b")]
    assert list(read_records(path, ("text", "target"))) == pairs
    with pytest.raises(
        ValueError, match=rf"file{ending}(, line 1)?: no field 'body' among 'text', 't"
    ):
        list(read_documents(path, "body"))


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.zst"])
def test_small_plain_text_is_one_document(tmp_path, ending):
    path = write(tmp_path / f"file{ending}", b"\xef\xbb\xbf\n\nTitle\r\n\r\nA line.\nlast")
    assert list(read_documents(path, "text")) == ["Title\n\nA line.\nlast"]


def test_concatenated_archives_are_read_whole(tmp_path):
    path = tmp_path / "file.jsonl.zst"
    path.write_bytes(zstandard.compress(JSON_LINES) * 3)
    assert len(list(read_documents(path, "text"))) == 6
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(gzip.compress(JSON_LINES) * 3)
    assert len(list(read_documents(path, "text"))) == 6


def test_lines_survive_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 7)
    path = write(tmp_path / "file.jsonl.zst", JSON_LINES * 5)
    assert list(read_documents(path, "text")) == ["one\nline", "zwei \u00fc"] * 5


def test_large_plain_text_is_split_at_blank_lines():
    paragraphs = [f"paragraph {i}\n" + "words and more\n" * 20 for i in range(200)]
    text = "\n".join(paragraphs)
    documents = list(split_text(text))
    assert "\n\n".join(documents) == text.strip("\n")
    assert all(document.startswith("paragraph") for document in documents)
    sizes = [len(document) for document in documents[:-1]]
    assert min(sizes) >= 4000 and max(sizes) < 4000 + len(paragraphs[-1]) + 1


@pytest.mark.parametrize("separator", ["\n", " "], ids=["lines", "one-line"])
def test_text_without_blank_lines_is_split(separator):
    text = separator.join(f"word{i}" for i in range(20_000))
    documents = list(split_text(text))
    assert max(map(len, documents)) <= 2 * 16_000
    assert len(documents) > 5
    assert "".join("".join(documents).split()) == "".join(text.split())


def test_folders_are_read_in_order_of_name(tmp_path):
    for name in ("b.txt", "a/z.jsonl", "a/c.txt.gz", "README.md", ".hidden.txt", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path))]
    assert names == ["a/c.txt.gz", "a/z.jsonl", "b.txt"]
    assert find_files(str(tmp_path / "b.txt")) == [tmp_path / "b.txt"]


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*/absent"):
        find_files(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"folder .* holds no text file; known endings are \.txt"):
        find_files(str(tmp_path))
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.pdf is not a text file"):
        find_files(str(tmp_path / "a.pdf"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nbad \xff\n", r"a\.txt, line 2: not UTF-8 \(byte 0xff at column 5\)"),
        ("a.txt", b"good\nend \xe4\xb8", r"a\.txt, line 2: not UTF-8 \(byte 0xe4 at column 5\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: invalid JSON"),
        ("a.jsonl.gz", b'\n\n{"text": "x"\n', r"a\.jsonl\.gz, line 3: invalid JSON"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', r"line 2: no field 'text' among 'body'"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' is int, not a string"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: field 'text' is NoneType, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: field 'text' holds half a surrogate pair"),
        ("a.parquet", b"PAR1 nonsense", r"a\.parquet, record 1: the file is truncated or damaged"),
    ],
)  # fmt: skip
def test_bad_content_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(path, "text"))


def test_non_string_parquet_record(tmp_path):
    table = pyarrow.table({"text": ["a", None, "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, record 2: field 'text' is NoneType"):
        list(read_documents(tmp_path / "a.parquet", "text"))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst"])
@pytest.mark.parametrize("damage", ["truncated", "not-an-archive"])
def test_damaged_archives(tmp_path, ending, damage):
    path = write(tmp_path / f"file{ending}", JSON_LINES * 100)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] if damage == "truncated" else b"plain text" + whole)
    with pytest.raises(
        ValueError, match=rf"file{ending}, line \d+: the file is truncated or damaged"
    ):
        list(read_documents(path, "text"))


def test_truncation_names_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 50)
    lines = b"".join(b'{"text": "%d"}\n' % (7**i) for i in range(1000))
    path = write(tmp_path / "file.jsonl.zst", lines)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"file\.jsonl\.zst, line \d{2,3}: .*no end") as error:
        list(read_documents(path, "text"))
    assert error.value.__cause__ is not None


def test_pairs_need_fields(tmp_path):
    path = write(tmp_path / "a.txt", b"text")
    with pytest.raises(ValueError, match=r"a\.txt has no fields; text and target need \.jsonl"):
        list(read_records(path, ("text", "target")))
