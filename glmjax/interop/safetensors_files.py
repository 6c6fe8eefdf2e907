"""Tensors in safetensors files, https://huggingface.co/docs/safetensors: read and written.

A file is 8 bytes with the length of a header, the header in JSON, and the tensors without gaps.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from glmjax.interop.json_files import parse_json
from glmjax.interop.tensors import Stored, check_names, check_weights_file, one_line

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def open_file(file: Path) -> dict[str, Stored]:
    """The tensors in a file, by name; no data is read.

    The `safetensors` library checks the header: tensors must fill the file exactly, without gaps
    or overlaps, each with as many bytes as its shape and type take.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the package safetensors is missing.
        ValueError: the file is not a safetensors file, is cut short, or its header lies.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise RuntimeError(
            f'{file} needs the package safetensors: pip install "glmjax[interop]"'
        ) from None
    check_weights_file(file)
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is not a valid safetensors file: {one_line(error)}") from None
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = parse_json(opened.read(length), f"the header of {file}")
    header.pop("__metadata__", None)
    check_names(file, header)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{file}: {name} has type {entry['dtype']}, which is not supported")
    return {
        name: Stored(
            file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]),
            np.dtype(_DTYPES[entry["dtype"]]),
        )
        for name, entry in header.items()
    }  # fmt: skip


def create_file(
    file: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Stored]:
    """A file of full size for tensors of these shapes and types, which are then written in any order.

    What is not written reads as zeros, so the file looks complete from the start: create it under
    a name that nobody looks for, and rename it when the last tensor is in.

    Raises:
        FileExistsError: the file exists.
        ValueError: a type that the format does not have.
    """
    for name, (_, dtype) in tensors.items():
        if dtype not in _NAMES:
            raise ValueError(f"{name} has type {dtype}, which safetensors files do not hold")
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    # Wide types first, as the library does, so that every tensor is aligned.
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with open(file, "xb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    stored = open_file(file)
    return {name: stored[name] for name in tensors}
