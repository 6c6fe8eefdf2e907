"""Files of PyTorch: read, laid out, and refused. Nothing in them runs."""

import argparse
import os
import random
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_cases import GOLDEN

torch = pytest.importorskip("torch")

from glmjax.interop.torch_files import create_file, open_file

GOLDEN_FILES = sorted(GOLDEN.glob("*/mp*/1/*.pt"))


def save(folder: Path, content: object, **options: object) -> Path:
    file = folder / "weights.pt"
    torch.save(content, file, **options)
    return file


def refused(file: Path) -> str:
    """The message of the error that reading the file ends in."""
    with pytest.raises(ValueError) as caught:
        open_file(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(file: Path, name: str, content: bytes, compress: int = zipfile.ZIP_STORED) -> Path:
    """The archive, as PyTorch 1 lays it out, with other content in the record of this name."""
    with zipfile.ZipFile(file) as archive:
        records = {record: archive.read(record) for record in archive.namelist()}
    del records[f"{file.stem}/.format_version"], records[f"{file.stem}/.storage_alignment"]
    assert sum(record.endswith(name) for record in records) == 1
    with zipfile.ZipFile(file, "w", compress) as archive:
        for record, old in records.items():
            archive.writestr(record, content if record.endswith(name) else old)
    return file


class RunsACommand:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("file", GOLDEN_FILES, ids=lambda file: "-".join(file.parts[-4:]))
def test_official_files_are_read(file):
    expected = torch.load(file, weights_only=True)["module"]
    found = open_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].read(), tensor.numpy(), name, strict=True)


def test_golden_files_are_here():
    assert len(GOLDEN_FILES) >= 12


def test_plain_files_are_read(tmp_path):
    weight = torch.randn(3, 4)
    found = open_file(save(tmp_path, {"weight": weight, "a.b": weight.bfloat16()}))
    np.testing.assert_array_equal(found["weight"].read(), weight.numpy(), strict=True)
    assert found["a.b"].read().dtype == ml_dtypes.bfloat16


def test_files_of_older_versions_are_read(tmp_path):
    """They have no records of the format's version, which newer versions compute offsets by."""
    tensors = {name: torch.randn(n) for n, name in enumerate("abc", start=1)}
    found = open_file(rewrite(save(tmp_path, tensors), "version", b"3\n"))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].read(), tensor.numpy(), strict=True)


def test_tensors_may_share_a_storage(tmp_path):
    whole = torch.randn(6, 4)
    content = {"whole": whole, "tied": whole, "rows": whole[2:4], "row": whole[5]}
    found = open_file(save(tmp_path, content))
    for name, tensor in content.items():
        np.testing.assert_array_equal(found[name].read(), tensor.numpy(), strict=True)


def test_what_training_files_hold_beside_weights_is_passed_over(tmp_path):
    weight = torch.randn(3, 4)
    content = {
        "module": {"weight": torch.nn.Parameter(weight)},
        "iteration": 49300,
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "optimizer": {"state": {0: {"exp_avg": weight.clone()}}, "lr": np.float64(1e-4)},
        "sparse_tensor_module_names": {"word_embeddings.weight"},
        "args": argparse.Namespace(num_layers=2, params_dtype=torch.float16),
    }
    found = open_file(save(tmp_path, content))
    assert list(found) == ["weight"]
    np.testing.assert_array_equal(found["weight"].read(), weight.numpy())


@pytest.mark.parametrize("module", [True, False], ids=["module", "plain"])
def test_files_laid_out_here_are_read_by_pytorch(tmp_path, module):
    numbers = np.random.default_rng(0)
    tensors = {
        "transformer.w": numbers.standard_normal((3, 5)).astype(np.float16),
        "bfloat16": numbers.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "int8": numbers.integers(-128, 128, (5, 3)).astype(np.int8),
        "scalar": np.array(1.5, np.float32),
        "nothing": np.zeros((0, 4), np.float32),
        "bool": numbers.integers(0, 2, 9).astype(bool),
    }
    file = tmp_path / "weights.pt"
    extra = {"iteration": 49300} if module else None
    places = create_file(file, {name: (x.shape, x.dtype) for name, x in tensors.items()}, extra)
    size = file.stat().st_size
    for name in reversed(tensors):
        places[name].write(tensors[name])
    assert file.stat().st_size == size
    for mmap in (True, False):
        content = torch.load(file, weights_only=True, mmap=mmap)
        if module:
            assert content["iteration"] == 49300
            content = content["module"]
        assert list(content) == list(tensors)
        for name, array in tensors.items():
            assert content[name].shape == array.shape
            found = content[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert found == array.tobytes(), name


def test_laying_out_a_large_file_takes_no_space(tmp_path):
    spec = {f"w{n}": ((65536, 16384), np.dtype(np.float16)) for n in range(4)}
    file = tmp_path / "weights.pt"
    places = create_file(file, spec)
    assert file.stat().st_size > 8 * 2**30 and file.stat().st_blocks * 512 < 2**20
    assert [place.nbytes for place in places.values()] == [2 * 2**30] * 4


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "x", {"w": ((2,), np.dtype(np.int8))})
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["beside", "inside", "instead"])
def test_a_malicious_pickle_does_not_run(tmp_path, place, protocol):
    mark = tmp_path / "it ran"
    attack = RunsACommand(f"touch '{mark}'")
    content = {
        "beside": {"module": {"w": torch.zeros(2)}, "optimizer": attack},
        "inside": {"module": {"w": attack}},
        "instead": attack,
    }[place]
    file = save(tmp_path, content, pickle_protocol=protocol)
    message = refused(file)
    assert protocol == 4 or "it holds posix.system" in message
    assert not mark.exists()
    torch.load(file, weights_only=False)  # so the file is a real attack
    assert mark.exists()


def test_a_class_of_the_authors_is_named(tmp_path):
    content = {"module": {"w": torch.zeros(2)}, "scaler": RunsACommand}
    assert f"it holds {__name__}.RunsACommand" in refused(save(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"w": torch.zeros(4, 6).t()}, "w [6, 4] is a view with strides [1, 6]", id="transposed"),
        pytest.param({"w": torch.zeros(1).expand(9)}, "w [9] is a view with strides [0]", id="expanded"),
        pytest.param({"w": torch.eye(3).to_sparse()}, "torch.sparse_coo, not supported", id="sparse"),
        pytest.param({"w": torch.zeros(2, dtype=torch.complex64)}, "torch.complex64", id="complex"),
        pytest.param({"w": torch._neg_view(torch.ones(2))}, "not supported", id="negated view"),
        pytest.param({"w": torch.empty(3, device="meta")}, "w [3] does not fit", id="no data"),
        pytest.param({"a\nb": torch.zeros(2)}, r"a tensor called 'a\nb'", id="a name of two lines"),
        pytest.param({"\x1b[2J": torch.zeros(2)}, r"called '\x1b[2J'", id="a name that clears the screen"),
        pytest.param({5: torch.zeros(2)}, "a tensor called 5", id="a number for a name"),
        pytest.param([torch.zeros(2)], "holds a list", id="a list"),
        pytest.param(torch.zeros(2), "holds a Tensor", id="one tensor"),
        pytest.param({}, "has no tensors", id="empty"),
        pytest.param({"model": {"w": torch.zeros(2)}}, "it has ['model']", id="other nesting"),
    ],
)  # fmt: skip
def test_what_is_no_plain_tensor_by_name_is_refused(tmp_path, content, message):
    assert message in refused(save(tmp_path, content))


def test_the_format_before_pytorch_1_6(tmp_path):
    file = save(tmp_path, {"w": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    assert "before PyTorch 1.6" in refused(file)


def test_numbers_of_the_other_endianness(tmp_path):
    file = save(tmp_path, {"w": torch.zeros(2)})
    assert "not little-endian" in refused(rewrite(file, "byteorder", b"big"))


def test_compressed_archives(tmp_path):
    file = save(tmp_path, {"w": torch.zeros(2)})
    message = refused(rewrite(file, "byteorder", b"little", zipfile.ZIP_DEFLATED))
    assert "is compressed" in message


@pytest.mark.parametrize("size", [0, 4, 8, 4000])
def test_records_of_another_size_than_the_pickle_claims(tmp_path, size):
    file = save(tmp_path, {"w": torch.zeros(3), "v": torch.zeros(2)})
    assert "w [3] does not fit the record" in refused(rewrite(file, "data/0", b"\0" * size))


def test_a_tensor_that_claims_terabytes(tmp_path):
    file = save(tmp_path, {"w": torch.zeros(2571)})
    with zipfile.ZipFile(file) as archive:
        pickle = archive.read("weights/data.pkl")
    size, claim = b"M\x0b\x0a", b"\x8a\x06" + (10**13).to_bytes(6, "little")
    assert pickle.count(size) == 2  # of the storage and of the tensor
    message = refused(rewrite(file, "data.pkl", pickle.replace(size, claim)))
    assert "w [10000000000000] does not fit the record" in message


def test_a_view_that_begins_behind_its_record(tmp_path):
    file = save(tmp_path, {"w": torch.zeros(3)})
    with zipfile.ZipFile(file) as archive:
        pickle = archive.read("weights/data.pkl")
    begin, end = b"QK\x00K\x03", b"QK\x01K\x03"
    assert pickle.count(begin) == 1
    message = refused(rewrite(file, "data.pkl", pickle.replace(begin, end)))
    assert "w [3] does not fit the record" in message


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9, -1], ids=str)
def test_files_cut_short(tmp_path, keep):
    file = save(tmp_path, {"w": torch.randn(100)})
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.truncate(int(size * keep) if 0 < keep < 1 else keep % size)
    assert "is damaged" in refused(file)


def test_a_pointer_of_git_lfs_is_not_the_weights(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "is a Git LFS pointer, not the weights; git lfs pull" in refused(file)


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117"])
def test_an_old_pytorch_is_refused(tmp_path, monkeypatch, version):
    file = save(tmp_path, {"w": torch.zeros(2)})
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(RuntimeError, match=r'needs PyTorch 2\.10 .* pip install "glmjax\[torch\]"'):
        open_file(file)
