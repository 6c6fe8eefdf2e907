"""Tensors at an offset in a file."""

import resource
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from glmjax.interop.tensors import DTYPES, Stored, is_finite

FLOATS = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def stored(file: Path, array: np.ndarray, offset: int = 3) -> Stored:
    """A place for the array in a file with other bytes around it."""
    file.write_bytes(b"\xff" * (offset + array.nbytes + 5))
    return Stored(file, offset, array.shape, array.dtype)


@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (7,)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_what_is_written_is_read(tmp_path, name, shape):
    values = np.random.default_rng(0).integers(0, 2, shape).astype(DTYPES[name])
    place = stored(tmp_path / "data", values)
    place.write(values)
    found = place.read()
    assert (found.dtype, found.shape) == (values.dtype, shape)
    assert found.tobytes() == values.tobytes()
    content = (tmp_path / "data").read_bytes()
    assert content == b"\xff" * 3 + values.tobytes() + b"\xff" * 5


def test_arrays_that_are_not_contiguous_are_written_in_their_order(tmp_path):
    values = np.arange(12, dtype=np.int32).reshape(3, 4).T
    place = stored(tmp_path / "data", values)
    place.write(values)
    np.testing.assert_array_equal(place.read(), values)


def test_each_read_is_memory_of_its_own(tmp_path):
    place = stored(tmp_path / "data", np.zeros(4, np.float32))
    first = place.read()
    first[:] = 1
    assert not np.array_equal(place.read(), first)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3), np.float16), np.zeros((3, 2), np.float32)], ids=["type", "shape"]
)
def test_another_tensor_does_not_fit(tmp_path, array):
    place = stored(tmp_path / "data", np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"has room for float32 \[2, 3\], not for float"):
        place.write(array)


@pytest.mark.parametrize("action", ["read", "write"])
def test_a_file_that_ends_too_early(tmp_path, action):
    array = np.zeros(100, np.float32)
    place = stored(tmp_path / "data", array)
    with open(tmp_path / "data", "r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"data is cut short: it ends at byte 200 .* 3 to 403"):
        place.read() if action == "read" else place.write(array)
    assert (tmp_path / "data").stat().st_size == 200


def test_a_false_size_takes_no_memory(tmp_path):
    (tmp_path / "data").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="cut short"):
        Stored(tmp_path / "data", 0, (10**13,), np.dtype(np.int8)).read()


def test_reading_holds_one_tensor(tmp_path):
    """A file of 1 GB, all holes, is gone through with 64 MB at a time."""
    nbytes = 64 * 2**20
    with open(tmp_path / "data", "wb") as file:
        file.truncate(16 * nbytes)
    places = [
        Stored(tmp_path / "data", n * nbytes, (nbytes,), np.dtype(np.int8)) for n in range(16)
    ]
    places[0].read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not any(place.read()[-1] for place in places)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80 * 1024  # KB


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
def test_one_value_that_is_not_finite_is_seen(dtype, value):
    values = np.random.default_rng(0).standard_normal((30, 20)).astype(dtype)
    assert is_finite(values) and is_finite(np.array(ml_dtypes.finfo(dtype).min, dtype))
    values[17, 3] = value  # in float8_e4m3fn infinity becomes NaN
    assert not is_finite(values)


def test_all_bits_of_float16_and_bfloat16():
    bits = np.arange(2**16, dtype=np.uint16)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        found = [is_finite(value[None]) for value in bits.view(dtype)]
        with np.errstate(invalid="ignore"):  # numpy warns of NaN when it changes the type
            assert found == np.isfinite(bits.view(dtype).astype(np.float64)).tolist()


def test_integers_and_nothing_are_finite():
    assert is_finite(np.array([-128, 127], np.int8)) and is_finite(np.zeros((0, 3), np.float16))
