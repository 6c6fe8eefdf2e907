"""Checksums of the files in a folder, so that a byte that changes on disk is noticed.

CRC-32 finds every burst of up to 32 flipped bits, misses one in four billion of the wider changes,
and is cheaper than reading the disk. In a job of several processes each checks its share of files.
"""

import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils


def write(
    folder: epath.Path, index: int, count: int, known: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes CRC-32 and size of share `index` of `count` of the files; those known are not read."""
    files = [parent / name for parent, _, names in folder.walk() for name in names]
    names = sorted(str(file.relative_to(folder)) for file in files)
    share = [name for name in names if not name.startswith("checksums-")][index::count]
    with ThreadPoolExecutor() as executor:
        sums = executor.map(lambda name: known.get(name) or of_file(folder / name), share)
    lines = [f"{sum} {name}" for name, sum in zip(share, sums, strict=True)]
    (folder / f"checksums-{index}-of-{count}.txt").write_text(
        "\n".join([f"{len(lines)} files: CRC-32, bytes, name", *lines])
    )


def exist(folder: epath.Path) -> bool:
    return any(folder.glob("checksums-*-of-*.txt"))


def read(folder: epath.Path) -> dict[str, str]:
    """CRC-32 and size of every file by its name.

    Raises:
        OSError, ValueError: they are not whole.
    """
    tables = sorted(folder.glob("checksums-*-of-*.txt"))
    if not tables or len(tables) != int(tables[0].stem.split("-")[-1]):
        raise ValueError("checksums are missing")
    sums: dict[str, str] = {}
    for table in tables:
        head, *lines = table.read_text().split("\n")
        if int(head.split()[0]) != len(lines):
            raise ValueError(f"{table.name} is cut short")
        sums |= dict(parse(line) for line in lines)
    return sums


def parse(line: str) -> tuple[str, str]:
    """Name, and CRC-32 and size, of one line of a table."""
    crc, size, name = line.split(" ", 2)
    return name, f"{crc} {size}"


def find_damage(
    folder: epath.Path, wanted: Callable[[str], bool] = lambda name: True
) -> str | None:
    """What is wrong with a checkpoint, None when every byte of the wanted files is as written.

    Processes share the work and agree on the answer.
    """
    try:
        names = {name: sum for name, sum in read(folder).items() if wanted(name)}
        share = list(names.items())[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor() as executor:
            found = executor.map(lambda entry: _check(folder, *entry), share)
            damage = next(filter(None, found), None)
    except (OSError, ValueError) as error:
        damage = f"unreadable: {error}"
    if jax.process_count() > 1:
        healthy = multihost_utils.process_allgather(np.array(damage is None))
        if damage is None and not healthy.all():
            return f"found by process {int(np.argmin(healthy))}"
    return damage


def _check(folder: epath.Path, name: str, expected: str) -> str | None:
    file = folder / name
    return difference(name, of_file(file), expected) if file.exists() else f"{name} is missing"


def difference(name: str, found: str, expected: str) -> str | None:
    """What is wrong with a file of this checksum, None when it is the expected one."""
    size, expected_size = found.split()[1], expected.split()[1]
    if size != expected_size:
        return f"{name} has {size} bytes instead of {expected_size}"
    return None if found == expected else f"{name} has changed"


def of_file(file: epath.Path) -> str:
    """CRC-32 and size in bytes of a file, as text."""
    crc = size = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return f"{crc:08x} {size}"
