"""Checksums of the files in a folder, so that a byte that changes on disk is noticed.

CRC-32 finds every burst of up to 32 flipped bits, misses one in four billion of the wider changes,
and is cheaper than reading the disk. In a job of several processes each checks its share of files.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils


def write(folder: epath.Path) -> None:
    """Writes CRC-32 and size of this process's share of the files."""
    index, count = jax.process_index(), jax.process_count()
    files = [parent / name for parent, _, names in folder.walk() for name in names]
    names = sorted(str(file.relative_to(folder)) for file in files)
    share = [name for name in names if not name.startswith("checksums-")][index::count]
    with ThreadPoolExecutor() as executor:
        sums = executor.map(lambda name: _checksum(folder / name), share)
    lines = [f"{sum} {name}" for sum, name in zip(sums, share, strict=True)]
    (folder / f"checksums-{index}-of-{count}.txt").write_text(
        "\n".join([f"{len(lines)} files: CRC-32, bytes, name", *lines])
    )


def exist(folder: epath.Path) -> bool:
    return any(folder.glob("checksums-*-of-*.txt"))


def find_damage(folder: epath.Path) -> str | None:
    """What is wrong with a checkpoint, None when every byte is as it was written.

    Processes share the work and agree on the answer.
    """
    try:
        damage = _check_share(folder, jax.process_index(), jax.process_count())
    except (OSError, ValueError) as error:
        damage = f"unreadable: {error}"
    if jax.process_count() > 1:
        healthy = multihost_utils.process_allgather(np.array(damage is None))
        if damage is None and not healthy.all():
            return f"found by process {int(np.argmin(healthy))}"
    return damage


def _check_share(folder: epath.Path, index: int, count: int) -> str | None:
    tables = sorted(folder.glob("checksums-*-of-*.txt"))
    if not tables or len(tables) != int(tables[0].stem.split("-")[-1]):
        return "checksums are missing"
    lines = []
    for table in tables:
        head, *entries = table.read_text().split("\n")
        if int(head.split()[0]) != len(entries):
            return f"{table.name} is cut short"
        lines += entries

    def check(line: str) -> str | None:
        expected, size, name = line.split(" ", 2)
        file = folder / name
        if not file.exists():
            return f"{name} is missing"
        found = _checksum(file)
        if found.split()[1] != size:
            return f"{name} has {found.split()[1]} bytes instead of {size}"
        return None if found.split()[0] == expected else f"{name} has changed"

    with ThreadPoolExecutor() as executor:
        return next(filter(None, executor.map(check, lines[index::count])), None)


def _checksum(file: epath.Path) -> str:
    """CRC-32 and size in bytes of a file, as text."""
    crc = size = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return f"{crc:08x} {size}"
