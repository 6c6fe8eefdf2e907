"""Whole files, locks and content names."""

import hashlib
import os

import pytest

from glmjax.data.cache import file_digests, hash_rank, write_whole


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_are_read_again_only_when_changed(tmp_path, monkeypatch):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(file.name.encode())
    memory = tmp_path / "digests.json"
    first = file_digests(files, memory)
    assert first == [hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()]

    read = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda stream, name: read.append(stream.name) or real(stream, name)
    )
    assert file_digests(files, memory) == first
    assert read == []
    before = files[1].stat()
    files[1].write_bytes(b"c")
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file_digests(files, memory) == [first[0], hashlib.sha256(b"c").hexdigest()]
    assert read == [str(files[1])]


def test_hash_rank_is_uniform():
    ranks = [hash_rank(f"document {i}") for i in range(10_000)]
    # Kolmogorov-Smirnov distance: 1.95 / sqrt(n) is exceeded once in 1000 uniform samples.
    distance = max(abs((i + 0.5) / 10_000 - rank) for i, rank in enumerate(sorted(ranks)))
    assert distance < 1.95 / 100
