"""Large arrays from and to files, in blocks that leave the page cache at once.

A model goes through a machine once. Left to itself the kernel keeps all of it, pushes out what
others had there, and makes the program wait when there is no room left.
"""

import os
import sys
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

BLOCK_BYTES = 1 << 24


def read(file: BinaryIO, array: np.ndarray) -> Iterator[memoryview]:
    """Fills a contiguous array from the position of a file; gives each block of bytes that is there,
    the last one short where the file ends early."""
    start = file.tell()
    for block in _blocks(array):
        count = file.readinto(block)  # type: ignore[attr-defined]
        _drop(file, start)
        yield block[:count]


def write(file: BinaryIO, array: np.ndarray) -> Iterator[memoryview]:
    """Writes a contiguous array at the position of a file; gives each block of bytes that has gone."""
    for block in _blocks(array):
        file.write(block)
        file.flush()
        _drop(file, 0)  # with the blocks before, which are on disk by now
        yield block


def _blocks(array: np.ndarray) -> Iterator[memoryview]:
    data = array.reshape(-1).view(np.uint8).data
    for start in range(0, len(data), BLOCK_BYTES):
        yield data[start : start + BLOCK_BYTES]


def _drop(file: BinaryIO, start: int) -> None:
    """What was read or written from here on is not kept; what is not on disk yet goes there."""
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), start, max(0, file.tell() - start), os.POSIX_FADV_DONTNEED)
