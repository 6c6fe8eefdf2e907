"""safetensors files: read, laid out, and refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_cases import GOLDEN
from safetensors.numpy import load_file, save_file

from glmjax.interop.safetensors_files import create_file, open_file

DTYPES = [
    np.bool_, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int8, np.uint8,
    np.int16, np.int32, np.int64,
]  # fmt: skip
FLOAT8 = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]  # not read by safetensors.numpy


def some_tensors(dtypes: list[type] = DTYPES) -> dict[str, np.ndarray]:
    """One tensor of each type, of odd sizes, none in the order of the alphabet."""
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 2, (3, 5)).astype(dtype) for dtype in dtypes]
    named = {f"{np.dtype(x.dtype).name}.weight": x for x in arrays}
    return named | {"a scalar": np.array(1.5, np.float32), "nothing": np.zeros((0, 2), np.int8)}


def write(file: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_official_weights_are_read():
    file = GOLDEN / "chatglm6b_small" / "model.safetensors"
    expected, found = load_file(file), open_file(file)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].read(), array, err_msg=name, strict=True)


def test_files_laid_out_here_are_read_by_the_library(tmp_path):
    tensors = some_tensors()
    file = tmp_path / "model.safetensors"
    places = create_file(file, {name: (x.shape, x.dtype) for name, x in tensors.items()})
    size = file.stat().st_size
    assert list(places) == list(tensors)
    for name in reversed(tensors):
        places[name].write(tensors[name])
    assert file.stat().st_size == size
    assert all(place.offset % place.dtype.itemsize == 0 for place in places.values())
    for found in (load_file(file), {name: place.read() for name, place in open_file(file).items()}):
        assert found.keys() == tensors.keys()
        for name, array in tensors.items():
            assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
            assert found[name].tobytes() == array.tobytes(), name


def test_files_laid_out_here_are_read_by_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    tensors = some_tensors(DTYPES + FLOAT8)
    file = tmp_path / "model.safetensors"
    places = create_file(file, {name: (x.shape, x.dtype) for name, x in tensors.items()})
    for name, array in tensors.items():
        places[name].write(array)
    for name, tensor in load_file(file).items():
        found = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert found == tensors[name].tobytes(), name


def test_metadata_is_kept(tmp_path):
    from safetensors import safe_open

    create_file(tmp_path / "x", {"w": ((2,), np.dtype(np.int8))}, {"format": "pt", "of": "glm"})
    with safe_open(tmp_path / "x", framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "of": "glm"}


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "x", {"w": ((2,), np.dtype(np.int8))})
    assert (tmp_path / "x").read_text() == "mine"


def test_types_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match="w has type float8_e4m3fnuz, which safetensors"):
        create_file(tmp_path / "x", {"w": ((2,), np.dtype(ml_dtypes.float8_e4m3fnuz))})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "header",
    [
        pytest.param({"w": entry(0, 80, [20])}, id="beyond the end"),
        pytest.param({"w": entry(0, 4 * 10**13, [10**13])}, id="40 TB"),
        pytest.param({"w": entry(0, 32, [8])}, id="not all of the file"),
        pytest.param({"w": entry(0, 40, [10]), "v": entry(20, 40, [5])}, id="overlap"),
        pytest.param({"w": entry(0, 16, [4]), "v": entry(20, 40, [5])}, id="gap"),
        pytest.param({"w": entry(0, 40, [5])}, id="shape is not the byte count"),
        pytest.param({"w": entry(0, 40, [10], "F16")}, id="type is not the byte count"),
        pytest.param({"w": entry(0, 40, [2**62, 2**62, 0, 10])}, id="overflow"),
        pytest.param({"w": entry(-40, 0, [10])}, id="negative offset"),
        pytest.param({"w": entry(0, 40, [-10])}, id="negative size"),
        pytest.param({"w": entry(40, 0, [10])}, id="backwards"),
        pytest.param({"w": {"dtype": "F32", "shape": [10]}}, id="no offsets"),
        pytest.param({"w": entry(0, 40, [10], "F33")}, id="unknown type"),
        pytest.param({"w": entry(0, 40, [10, 2], "F4")}, id="unsupported type"),
        pytest.param({"a\nb": entry(0, 40, [10])}, id="a name of two lines"),
        pytest.param({"\x1b[2J": entry(0, 40, [9])}, id="a name that clears the screen"),
        pytest.param([entry(0, 40, [10])], id="a list"),
        pytest.param(b"{" * 40, id="not JSON"),
        pytest.param(b'{"w":' * 100_000, id="nested absurdly"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(
            b'{"w":{"dtype":"F32","shape":[10],"data_offsets":[0,40]},'
            b'"w":{"dtype":"I32","shape":[10],"data_offsets":[0,40]}}',
            id="a name twice",
        ),
        pytest.param(
            b'{"w":{"dtype":"I32","dtype":"F32","shape":[10],"data_offsets":[0,40]}}',
            id="a field twice",
        ),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header):
    file = write(tmp_path / "model.safetensors", header, b"\0" * 40)
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        open_file(file)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-1], id="cut by a byte"),
        pytest.param(lambda content: content[:300], id="cut in the header"),
        pytest.param(lambda content: content[:5], id="cut in the length"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content + b"\0", id="a byte too many"),
        pytest.param(lambda content: (2**63).to_bytes(8, "little") + content[8:], id="huge header"),
        pytest.param(lambda content: (10**8).to_bytes(8, "little") + content[8:], id="100 MB header"),
        pytest.param(lambda content: content[8:], id="no length"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, damage: Callable[[bytes], bytes]):
    file = tmp_path / "model.safetensors"
    save_file(some_tensors(), file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid") as caught:
        open_file(file)
    assert "\n" not in str(caught.value)


def test_a_pointer_of_git_lfs_is_not_the_weights(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
    )
    with pytest.raises(
        ValueError, match=r"model\.safetensors is a Git LFS pointer, not the weights"
    ):
        open_file(file)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        open_file(tmp_path)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(RuntimeError, match=r'pip install "glmjax\[interop\]"'):
        open_file(tmp_path / "model.safetensors")
