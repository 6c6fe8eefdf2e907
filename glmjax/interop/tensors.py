"""Tensors in files: where their bytes are, and plain reads and writes of exactly those bytes.

Files are not mapped into memory and no handle stays open, so that a program that goes through a
checkpoint tensor by tensor holds one tensor. `safetensors_files` and `torch_files` find the bytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from glmjax.training import streaming

DTYPES = {
    np.dtype(dtype).name: np.dtype(dtype)
    for dtype in (
        np.float16, np.float32, np.float64, ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu,
        np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.bool_,
    )
}  # fmt: skip
"""The types that tensors in files may have, by the name that numpy and PyTorch share."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Stored:
    """A tensor in row-major order at a byte offset in a file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor in memory of its own.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        with open(self.file, "rb") as file:
            self._check_size(file.seek(0, 2))
            array = np.empty(self.shape, self.dtype)
            file.seek(self.offset)
            count = sum(len(block) for block in streaming.read(file, array))
            self._check_size(self.offset + count)
        return array

    def write(self, array: np.ndarray) -> None:
        """Puts the tensor in its place in a file that has its full size already.

        Raises:
            ValueError: the array has another shape or type, or the file is too short.
        """
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(
                f"{self.file} has room for {self.dtype} {list(self.shape)}, "
                f"not for {array.dtype} {list(array.shape)}"
            )
        with open(self.file, "r+b") as file:
            self._check_size(file.seek(0, 2))
            file.seek(self.offset)
            for _ in streaming.write(file, np.ascontiguousarray(array)):
                pass

    def _check_size(self, size: int) -> None:
        if size < self.offset + self.nbytes:
            raise ValueError(
                f"{self.file} is cut short: it ends at byte {size} of a tensor that takes bytes "
                f"{self.offset} to {self.offset + self.nbytes}"
            )


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is infinite or NaN, at the speed of memory and without a copy.

    Sign aside, bits of floats are ordered as integers, and infinity and NaN come last.
    """
    if array.dtype.kind in "biu" or array.size == 0:
        return True
    if array.dtype.itemsize == 1:  # some float8 types have no infinity
        return bool(np.isfinite(array).all())
    signed, unsigned = f"i{array.dtype.itemsize}", f"u{array.dtype.itemsize}"
    infinity, minus_infinity = np.array([np.inf, -np.inf], array.dtype).view(unsigned)
    return bool(array.view(signed).max() < infinity and array.view(unsigned).max() < minus_infinity)


def check_weights_file(file: Path) -> None:
    """Refuses what stands where weights should be: nothing, a folder, a device, a pointer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, or is the small text that Git LFS puts in its place.
    """
    if not file.exists():
        raise FileNotFoundError(f"there is no file {file}")
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    with open(file, "rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the weights; git lfs pull fetches them"
            )


def check_names(file: Path, names: Iterable[object]) -> None:
    """Refuses names that would not be safe to print.

    Raises:
        ValueError: a name is no text, is longer than 500 characters, or has control characters.
    """
    for name in names:
        if not (isinstance(name, str) and len(name) <= 500 and name.isprintable()):
            raise ValueError(f"{file} has a tensor called {repr(name)[:100]}")


def one_line(text: object) -> str:
    """Foreign text for an error message: 200 characters without control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:200])
