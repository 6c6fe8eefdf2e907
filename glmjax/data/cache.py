"""What is kept between runs: files that are whole or absent, and names made from content."""

import contextlib
import fcntl
import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a passing name and renames it, so that it is never seen in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for one process at a time; the system frees it when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    # "a", since hosts that share a mounted bucket must not all write this file.
    with open(folder / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(*parts: object) -> str:
    """A name for what the parts print as: 16 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def file_digests(files: Sequence[Path], memory: Path) -> list[str]:
    """The SHA-256 of each file, read again only when its size or modification time has changed.

    `memory` is a JSON file of what was read before.
    """
    known: dict[str, list] = json.loads(memory.read_bytes()) if memory.exists() else {}
    before = len(known), list(known.values())
    digests = []
    for file in files:
        status = file.stat()
        key, state = str(file.resolve()), [status.st_size, status.st_mtime_ns]
        if known.get(key, [])[:2] != state:
            with open(file, "rb") as stream:
                known[key] = [*state, hashlib.file_digest(stream, "sha256").hexdigest()]
        digests.append(known[key][2])
    if before != (len(known), list(known.values())):
        write_whole(memory, json.dumps(known, indent=0).encode())
    return digests


def hash_rank(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, evenly spread over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48
