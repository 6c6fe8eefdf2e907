"""Thousands of damaged files: each gives an error of one line or what it really holds.

The examples are drawn anew by hypothesis but are the same in every run.
"""

import argparse
import contextlib
import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from golden_cases import GOLDEN
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import load_file, save

from glmjax.interop import safetensors_files, torch_files
from glmjax.interop.folders import open_folder
from glmjax.interop.names import family_of
from glmjax.interop.official_config import official_fields, read_config
from glmjax.interop.source import open_source
from glmjax.interop.tensors import Stored
from glmjax.presets import get_config

ERRORS = (ValueError, RuntimeError, OSError)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["change", "flip", "insert", "delete", "repeat"]),
        st.integers(0, 2**20),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=6,
)


def examples(count: int):
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def damage(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """The bytes after each edit, whose position is taken modulo the length."""
    changed = bytearray(content)
    for kind, position, new in edits:
        at = position % max(len(changed), 1)
        if kind == "change":
            changed[at : at + len(new)] = new
        elif kind == "flip" and changed:
            changed[at] ^= 1 << new[0] % 8
        elif kind == "insert":
            changed[at:at] = new
        elif kind == "delete":
            del changed[at : at + new[0]]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + new[0]]
    return bytes(changed)


def attempt(function, path: Path):
    """What the function makes of the path, or None after an error that names it in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(path)
    except ERRORS as error:
        message = str(error)
        first, *rest = message.split("\n")
        assert str(path) in first and first.isprintable(), repr(message)
        assert not rest or first.endswith("do not fit its configuration:")  # a list of all of them
        assert len(message) < 3000
        return None


def assert_equal(found: Mapping[str, Stored], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].read(), array, strict=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


TENSORS = {
    "transformer.w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transformer.b": np.arange(4, dtype=np.float16),
    "lm_head.weight": np.arange(5, dtype=np.int8),
}
SAFETENSORS = save(TENSORS)
HEADER_BYTES = 8 + int.from_bytes(SAFETENSORS[:8], "little")


@examples(600)
@given(edits=EDITS)
def test_headers_of_safetensors(folder, edits):
    """Either an error, or the same as the library loads."""
    file = folder / "model.safetensors"
    header = damage(SAFETENSORS[:HEADER_BYTES], edits)
    file.write_bytes(header + SAFETENSORS[HEADER_BYTES:])
    found = attempt(safetensors_files.open_file, file)
    if found is not None:
        assert_equal(found, load_file(file))
        assert sum(place.nbytes for place in found.values()) == len(SAFETENSORS) - HEADER_BYTES


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "BOOL", "F4", ""]),
        "shape": st.lists(st.integers(-1, 9) | st.sampled_from([2**31, 2**63]), max_size=3),
        "data_offsets": st.lists(st.integers(0, 37) | st.integers(), min_size=1, max_size=3),
    }
)


@examples(300)
@given(header=st.dictionaries(st.sampled_from("ab"), ENTRIES | JSON, max_size=2) | JSON)
def test_other_headers_of_safetensors(folder, header):
    file = folder / "model.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + SAFETENSORS[HEADER_BYTES:])
    found = attempt(safetensors_files.open_file, file)
    if found is not None:
        assert_equal(found, load_file(file))


@pytest.fixture(scope="module")
def shards(folder) -> Path:
    """A Hugging Face folder of two shards and an index."""
    path = folder / "shards"
    path.mkdir()
    names = list(TENSORS)
    where = {}
    for n, part in enumerate((names[:2], names[2:]), start=1):
        file = path / f"model-0000{n}-of-00002.safetensors"
        file.write_bytes(save({name: TENSORS[name] for name in part}))
        where |= dict.fromkeys(part, file.name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


@examples(400)
@given(edits=EDITS)
def test_indexes(folder, shards, edits):
    """Either an error, or all tensors of all shards, each as it is."""
    path = folder / "damaged index"
    shutil.copytree(shards, path, dirs_exist_ok=True)
    name = "model.safetensors.index.json"
    (path / name).write_bytes(damage((shards / name).read_bytes(), edits))
    found = attempt(open_folder, path)
    if found is not None:
        assert_equal(found.ranks[0], TENSORS)


@examples(100)
@given(places=st.dictionaries(st.sampled_from(list(TENSORS)), JSON, min_size=1) | JSON)
def test_other_indexes(folder, shards, places):
    path = folder / "other index"
    shutil.copytree(shards, path, dirs_exist_ok=True)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert attempt(open_folder, path) is None


@examples(200)
@given(text=st.binary(max_size=12) | EDITS.map(lambda edits: damage(b"49300\n", edits)))
@pytest.mark.parametrize("name", ["latest", "latest_checkpointed_iteration.txt"])
def test_names_of_the_iteration(folder, name, text):
    """Nothing but an error, since the folder of the only iteration is another."""
    path = folder / name.partition(".")[0]
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(text)
    assert attempt(open_folder, path) is None


@examples(150)
@given(edits=EDITS)
@pytest.mark.parametrize("case", ["glm130b", "chatglm6b_ptuning"])
def test_configurations(folder, case, edits):
    """Either an error, or a model that all tensors fit."""
    path = folder / case
    path.mkdir(exist_ok=True)
    if not (path / "model.safetensors").exists():
        (path / "model.safetensors").symlink_to(GOLDEN / case / "model.safetensors")
    text = (GOLDEN / case / "config.json").read_bytes()
    (path / "config.json").write_bytes(damage(text, edits))
    found = attempt(open_source, path)
    if found is not None:
        sizes = load_file(GOLDEN / case / "model.safetensors")
        assert sum(np.prod(part.shape) for part in found.parts.values()) <= sum(
            array.size for array in sizes.values()
        )


@examples(100)
@given(data=st.data())
@pytest.mark.parametrize("name", ["glm-10b", "glm-130b", "chatglm-6b", "chatglm2-6b", "glm-4-9b"])
def test_values_of_configurations(name, data):
    """Either an error, or a configuration."""
    config = get_config(name)
    fields = official_fields(family_of(config), config, "float16")
    fields |= {"rope_parameters": None, "rope_ratio": 1}
    new = st.dictionaries(st.sampled_from(sorted(fields)), JSON, min_size=1, max_size=3)
    fields |= data.draw(new)
    found = attempt(lambda file: read_config(fields, {}, 1, file), Path("config.json"))
    assert found is None or found[0] == family_of(config)


@pytest.fixture(scope="module")
def archive() -> bytes:
    """A small training file of PyTorch."""
    torch = pytest.importorskip("torch")
    module = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
    module["tied"] = module["transformer.w"]
    content = {
        "module": module, "iteration": 5, "rng": np.arange(3), "args": argparse.Namespace(a=1),
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def compare_with_torch(file: Path) -> None:
    """Either an error, or the same as PyTorch loads; which looks for records by their name, and
    where the name is damaged, finds less than what was saved."""
    import torch

    found = attempt(torch_files.open_file, file)
    if found is None:
        return
    expected = TENSORS | {"tied": TENSORS["transformer.w"]}
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")
        with torch.serialization.safe_globals(torch_files._PASSED_OVER):
            content = torch.load(file, weights_only=True)
        module = content.get("module", content)
        expected = {name: x.numpy() for name, x in module.items() if isinstance(x, torch.Tensor)}
    assert_equal(found, expected)


@examples(600)
@given(edits=EDITS)
def test_archives_of_pytorch(folder, archive, edits):
    file = folder / "archive.pt"
    file.write_bytes(damage(archive, edits))
    compare_with_torch(file)


@examples(600)
@given(edits=EDITS)
def test_pickles_of_pytorch(folder, archive, edits):
    """Archives that are whole, with a damaged pickle inside, as PyTorch 1 lays them out."""
    file = folder / "pickle.pt"
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        for record in old.namelist():
            if record.endswith("data.pkl"):
                new.writestr(record, damage(old.read(record), edits))
            elif "/data/" in record or record.endswith("/version"):
                new.writestr(record, old.read(record))
    compare_with_torch(file)
