"""Tensors in PyTorch's .bin and .pt files: read and written without executing or mapping anything.

Such a file is a zip archive: a pickle that describes the objects, and one record of bytes for each
storage. `torch.load(weights_only=True)` reads the pickle, on the device "meta", where tensors have
no data but every storage knows the offset of its record.
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glmjax.interop.tensors import DTYPES, Stored, check_names, check_weights_file, one_line

MAX_PICKLE_BYTES = 100_000_000
"""Pickles of official files take less than a megabyte; they are read into memory as a whole."""


class _PassedOver:
    """Stands for what training files hold beside weights; it is given what it would be made from."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Random states, counters and the command line in training files of THUDM/GLM and GLM-130B.
_PASSED_OVER = [
    (_PassedOver, name)
    for name in (
        "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
        "numpy.ndarray", "numpy.dtype", "argparse.Namespace",
    )
]  # fmt: skip


def open_file(file: Path) -> dict[str, Stored]:
    """The tensors of the model in a file, by name; no data is read.

    Those under "module" where the file has it (THUDM/GLM, GLM-130B), else the file's own. Tensors
    may share a storage. What lies beside them is passed over.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: PyTorch is missing or too old.
        ValueError: the file holds an object that is neither tensor nor plain data, is damaged, is
            of the format before PyTorch 1.6, or a tensor in it is not stored contiguously.
    """
    check_weights_file(file)
    torch = _torch(file)
    records = _records(file)
    match _load(torch, file):
        case {"module": dict() as content}:
            pass
        case dict() as content:
            pass
        case other:
            raise ValueError(f"{file} holds a {type(other).__name__}, not tensors by name")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        found = one_line(list(content)[:10])
        raise ValueError(f"{file} has no tensors, neither by name nor in 'module'; it has {found}")
    check_names(file, tensors)
    return {name: _stored(file, name, tensor, records) for name, tensor in tensors.items()}


def create_file(
    file: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Stored]:
    """A file of full size for tensors of these shapes and types, which are then written in any order.

    It holds a plain dictionary of tensors; with `extra`, which may be empty, {"module": tensors,
    **extra} as in THUDM/GLM and GLM-130B. What is not written reads as zeros, so the file looks
    complete from the start: create it under a name that nobody looks for, and rename it at the end.

    The zip format has a CRC-32 for each record, which here is that of no data: PyTorch does not
    check it (`torch.serialization.set_crc32_options`), but unzip reports these records.

    Raises:
        FileExistsError: the file exists.
        RuntimeError: PyTorch is missing or too old.
    """
    torch = _torch(file)
    from torch._subclasses.fake_tensor import FakeTensorMode

    file.touch(exist_ok=False)
    with FakeTensorMode():
        module = {
            name: torch.empty(shape, dtype=getattr(torch, dtype.name))
            for name, (shape, dtype) in tensors.items()
        }
        content = module if extra is None else {"module": module, **extra}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, file)
    return open_file(file)


def _torch(file: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        version = "none"
    else:
        version = torch.__version__
        if tuple(map(int, version.split(".")[:2])) >= (2, 10):
            return torch
    raise RuntimeError(
        f'{file} needs PyTorch 2.10 or newer, and there is {version}: pip install "glmjax[torch]"'
    )


def _records(file: Path) -> dict[int, int]:
    """Sizes of the records of a zip archive by the offset of their first byte.

    PyTorch computes offsets from the sizes that the pickle claims; here is what is true of them.
    """
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as opened:
            records = {_start(opened, record): record for record in archive.infolist()}
    except (
        zipfile.BadZipFile, NotImplementedError, OSError, OverflowError, ValueError, struct.error,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{file} is damaged, or was saved in the format before PyTorch 1.6, which has to be "
            f"loaded and saved again with a newer one: {one_line(error)}"
        ) from None
    for record in records.values():
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{file}: the record {record.filename!r} is compressed")
        if record.filename.endswith(".pkl") and record.file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"{file}: the record {record.filename!r} has more than 100 MB")
    return {start: record.file_size for start, record in records.items()}


def _start(opened: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where a record begins: behind a header with two fields of variable length."""
    opened.seek(record.header_offset + 26)
    return record.header_offset + 30 + sum(struct.unpack("<HH", opened.read(4)))


def _load(torch: Any, file: Path) -> Any:
    """The objects in a file, its tensors on the device "meta"."""
    try:
        reader = torch._C.PyTorchFileReader(str(file))
        if reader.has_record("byteorder") and reader.get_record("byteorder") != b"little":
            # On the device "meta" PyTorch 2.13 crashes when it swaps the bytes of nothing.
            raise ValueError("its numbers are not little-endian")
        with torch.serialization.safe_globals(_PASSED_OVER):
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if not refused:
                return torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 (a damaged pickle makes anything of the unpickler)
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise ValueError(
            f"{file} is not a valid file of tensors: {type(error).__name__}: {one_line(reason)}"
        ) from None
    raise ValueError(
        f"{file} is refused: beside tensors and plain data it holds "
        f"{one_line(', '.join(sorted(refused)))}, and nothing in a checkpoint is executed"
    )


def _stored(file: Path, name: str, tensor: Any, records: Mapping[int, int]) -> Stored:
    """Where a tensor on the device "meta" has its data, held against the records of the file."""
    dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or str(tensor.layout) != "torch.strided" or tensor.is_neg():
        raise ValueError(f"{file}: {name} is a {tensor.dtype} {tensor.layout}, not supported")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{file}: {name} {list(tensor.shape)} is a view with strides {list(tensor.stride())}; "
            "only contiguous tensors are read: save it with .contiguous()"
        )
    storage = tensor.untyped_storage()
    start, size = storage._checkpoint_offset, storage.nbytes()
    first, nbytes = tensor.storage_offset() * dtype.itemsize, tensor.numel() * dtype.itemsize
    if start is None or records.get(start) != size or first + nbytes > size:
        raise ValueError(
            f"{file} is damaged: {name} {list(tensor.shape)} does not fit the record that it is in"
        )
    return Stored(file, start + first, tuple(tensor.shape), dtype)
