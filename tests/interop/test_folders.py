"""Folders of official weights: detected, read, and refused when they contradict themselves."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_cases import GOLDEN
from safetensors.numpy import load_file, save_file

from glmjax.interop.folders import expected_sha256, open_folder, verify_sha256

RANKS = ["glm/mp2", "glm130b/mp2", "glm130b/mp4", "glm130b/mp2_int8", "glm130b/mp2_int4"]
HUGGING_FACE = ["glm", "glm130b", "chatglm6b_small", "chatglm6b_ptuning"]


def copy(case: str, folder: Path) -> Path:
    """A golden folder of ranks that a test may change."""
    return Path(shutil.copytree(GOLDEN / case, folder / "checkpoint"))


def sharded(folder: Path) -> Path:
    """A Hugging Face folder of two shards with an index; returns the index."""
    shards = {
        "model-00001-of-00002.safetensors": {"a": np.arange(3.0), "b": np.ones((2, 2), np.float16)},
        "model-00002-of-00002.safetensors": {"c": np.arange(4, dtype=np.int8)},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def change(index: Path, **places: object) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= places
    index.write_text(json.dumps(content))


def refused(path: Path, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        open_folder(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_glm_that_was_saved_with_a_head(tmp_path):
    tensors = load_file(GOLDEN / "glm" / "model.safetensors")
    save_file({f"glm.{name}": x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    assert open_folder(tmp_path).ranks[0].keys() == tensors.keys()


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_hugging_face_folders(case):
    folder = open_folder(GOLDEN / case)
    expected = load_file(GOLDEN / case / "model.safetensors")
    assert (folder.kind, folder.iteration, len(folder.ranks)) == ("hugging face", None, 1)
    assert folder.files == (GOLDEN / case / "model.safetensors",)
    assert folder.config == json.loads((GOLDEN / case / "config.json").read_text())
    assert folder.ranks[0].keys() == expected.keys()


def test_a_file_of_a_hugging_face_folder():
    path = GOLDEN / "chatglm6b_quantisation" / "model_int4.safetensors"
    folder = open_folder(path)
    assert folder.files == (path,)
    assert folder.config_file == path.with_name("config.json")


@pytest.mark.parametrize("case", RANKS)
def test_rank_folders(case):
    pytest.importorskip("torch")
    count = int(case.partition("mp")[2][0])
    ways_in = [GOLDEN / case, GOLDEN / case / "1", GOLDEN / case / "1/mp_rank_01_model_states.pt"]
    for path in ways_in:
        folder = open_folder(path)
        assert (folder.kind, folder.iteration, len(folder.ranks)) == ("ranks", 1, count)
        assert [file.name[:10] for file in folder.files] == [f"mp_rank_0{n}" for n in range(count)]
        assert folder.config_file == (GOLDEN / case).parent / "config.json"


@pytest.mark.parametrize("tag", ["release", "release\n", "49300", "0049300\r\n", " 7 "])
@pytest.mark.parametrize("tracker", ["latest", "latest_checkpointed_iteration.txt"])
def test_both_ways_to_name_the_iteration(tmp_path, tracker, tag):
    pytest.importorskip("torch")
    path = copy("glm/mp2", tmp_path)
    for name in ("latest", "latest_checkpointed_iteration.txt"):
        (path / name).unlink()
    (path / "1").rename(path / tag.strip())
    (path / tracker).write_text(tag)
    folder = open_folder(path)
    assert folder.iteration == ("release" if "release" in tag else int(tag))
    assert folder.path == path / tag.strip()


def test_the_configuration_nearest_to_the_weights_wins(tmp_path):
    pytest.importorskip("torch")
    path = copy("glm/mp2", tmp_path)
    assert open_folder(path).config is None
    for place in [".", "checkpoint/1", "checkpoint"]:
        file = tmp_path / place / "model_config.json"
        file.write_text('{"num_layers": 4}')
        found = open_folder(path)
        assert found.config_file == file and found.config == {"num_layers": 4}


def test_other_folders_and_files_are_not_official(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "config.json").write_text("{}")
    assert open_folder(tmp_path) is None
    assert open_folder(tmp_path / "notes.txt") is None
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_folder(tmp_path / "nothing")


def test_a_missing_rank_is_named(tmp_path):
    pytest.importorskip("torch")
    path = copy("glm130b/mp4", tmp_path)
    (path / "1/mp_rank_02_model_states.pt").unlink()
    assert refused(path, FileNotFoundError).endswith("lacks mp_rank_02_model_states.pt")


def test_without_pytorch_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refused(GOLDEN / "glm130b/mp2", RuntimeError)
    assert message.endswith(
        'needs PyTorch 2.10 or newer, and there is none: pip install "glmjax[torch]"'
    )


def test_a_missing_iteration_is_named(tmp_path):
    path = copy("glm130b/mp4", tmp_path)
    (path / "latest").write_text("2")
    assert "names iteration 2, but" in refused(path, FileNotFoundError)
    (path / "2").mkdir()
    assert "lacks mp_rank_00" in refused(path, FileNotFoundError)


@pytest.mark.parametrize(
    "text", ["", "..", "../1", "/etc", "1/../..", "1 2", "a\0b", "\xff", "1" * 1000], ids=ascii
)
def test_the_iteration_is_a_plain_name(tmp_path, text):
    path = copy("glm130b/mp4", tmp_path)
    (path / "latest").write_text(text)
    assert "not an iteration or release" in refused(path)


def test_two_iterations(tmp_path):
    path = copy("glm/mp2", tmp_path)
    (path / "latest").write_text("2")
    message = refused(path)
    assert "latest says 2 and latest_checkpointed_iteration.txt says 1" in message


def test_ranks_that_disagree(tmp_path):
    torch = pytest.importorskip("torch")
    path = copy("glm130b/mp2", tmp_path)
    file = path / "1/mp_rank_01_model_states.pt"
    content = torch.load(file, weights_only=True)
    module = content["module"]
    module["more"] = module.pop("transformer.final_layernorm.bias")
    module["transformer.final_layernorm.weight"] = torch.zeros(64)
    torch.save(content, file)
    message = refused(path)
    assert "rank 1 lacks transformer.final_layernorm.bias" in message
    assert "only rank 1 has more" in message
    assert "weight is float16 [64] in rank 0 and float32 [64] in rank 1" in message


def test_shards_are_merged(tmp_path):
    sharded(tmp_path)
    folder = open_folder(tmp_path)
    assert len(folder.files) == 2
    assert {name: place.read().tolist() for name, place in folder.ranks[0].items()} == {
        "a": [0, 1, 2], "b": [[1, 1], [1, 1]], "c": [0, 1, 2, 3],
    }  # fmt: skip


def test_shards_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    places = {}
    for n, name in enumerate(["a", "b"], start=1):
        places[name] = f"pytorch_model-0000{n}-of-00002.bin"
        torch.save({name: torch.full((2,), n)}, tmp_path / places[name])
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = open_folder(tmp_path).ranks[0]
    assert {name: place.read().tolist() for name, place in found.items()} == {
        "a": [1, 1], "b": [2, 2],
    }  # fmt: skip


def test_safetensors_win_over_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("never looked at")
    index = sharded(tmp_path)
    assert open_folder(tmp_path).files[0].suffix == ".safetensors"
    index.unlink()
    assert "index.json is missing" in refused(tmp_path, FileNotFoundError)


def test_everything_wrong_with_an_index_is_said_at_once(tmp_path):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    del content["weight_map"]["a"]
    content["weight_map"] |= {
        "c": "model-00001-of-00002.safetensors", "d": "model-00002-of-00002.safetensors",
    }  # fmt: skip
    index.write_text(json.dumps(content))
    message = refused(tmp_path)
    for problem in (
        "'c' is not in model-00001-of-00002.safetensors",
        "'d' is not in model-00002-of-00002.safetensors",
        "a in model-00001-of-00002.safetensors is not in the index",
    ):
        assert problem in message


def test_a_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    save_file({"c": np.zeros(1), "a": np.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    assert "a in model-00002-of-00002.safetensors is not in the index" in refused(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    message = refused(tmp_path, FileNotFoundError)
    assert message.endswith("lacks model-00002-of-00002.safetensors")


def test_a_shard_that_the_index_does_not_name(tmp_path):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    del content["weight_map"]["c"]
    index.write_text(json.dumps(content))
    assert "it does not name model-00002-of-00002.safetensors" in refused(tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        "../secret.safetensors", "/etc/secret.safetensors", "..", "sub/x.safetensors", "",
        "./model-00001-of-00002.safetensors", "model-00001-of-00002.bin", "a\0.safetensors",
        "..\\secret.safetensors", "~/x.safetensors", 5, None, ["a"],
    ],
    ids=ascii,
)  # fmt: skip
def test_an_index_names_only_files_beside_it(tmp_path, place):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.arange(3.0)}, tmp_path / "secret.safetensors")
    (folder / "sub").mkdir()
    save_file({"a": np.arange(3.0)}, folder / "sub/x.safetensors")
    change(sharded(folder), a=place)
    assert f"puts 'a' into {place!r}, not a .safetensors file beside it" in refused(folder)


def test_links_as_in_the_cache_of_hugging_face(tmp_path):
    snapshot = tmp_path / "snapshots" / "5b0e3f1"
    blobs = tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    sharded(snapshot)
    for file in snapshot.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blobs / digest)
        file.symlink_to(Path("../../blobs") / digest)
    assert open_folder(snapshot).ranks[0].keys() == {"a", "b", "c"}


def test_links_to_nothing_and_to_devices(tmp_path):
    file = tmp_path / "model.safetensors"
    file.symlink_to(tmp_path / "gone")
    assert "there is no file" in refused(tmp_path, FileNotFoundError)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert "is not a file" in refused(tmp_path)
    file.unlink()
    os.mkfifo(file)  # reading it would wait for ever
    assert "is not a file" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[]", "holds a list, not a JSON object", id="a list"),
        pytest.param("5", "holds a int, not a JSON object", id="a number"),
        pytest.param("{", "is not valid JSON", id="cut short"),
        pytest.param('{"a":' * 100_000, "is not valid JSON", id="nested absurdly"),
        pytest.param('{"a": 1, "a": 2}', "the key 'a' is there twice", id="a key twice"),
        pytest.param('{"a": ' + "9" * 10_000 + "}", "is not valid JSON", id="a huge number"),
        pytest.param(b"\xff\xfe{}", "is not valid JSON", id="not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object(tmp_path, name, text, message):
    sharded(tmp_path)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    found = refused(tmp_path)
    assert name in found and message in found


@pytest.mark.parametrize("places", [None, {}, [], "a", {"a": {}}], ids=str)
def test_an_index_without_a_map(tmp_path, places):
    index = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": places}))
    assert "model.safetensors.index.json" in refused(tmp_path)


def test_an_enormous_configuration_is_not_read(tmp_path):
    sharded(tmp_path)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**10)
    assert "config.json has 10,000,000,000 bytes, more than 100 MB" in refused(tmp_path)


def test_a_hash_is_verified(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    verify_sha256(file, digest)
    verify_sha256(file, digest.upper())
    with pytest.raises(ValueError, match=f"a.safetensors has SHA-256 {digest}, not 0000"):
        verify_sha256(file, "0" * 64)


def test_hashes_as_sha256sum_writes_them(tmp_path):
    assert expected_sha256(tmp_path) == {}
    digest = hashlib.sha256(b"").hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  a.bin\n{digest} *1/b.pt\n{digest}  ./c\n")
    assert expected_sha256(tmp_path) == {
        tmp_path / "a.bin": digest, tmp_path / "1/b.pt": digest, tmp_path / "c": digest,
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["xyz  a.bin", "0" * 64, f"{'0' * 64}  ../a.bin", f"{'0' * 64}  /a.bin", f"{'0' * 64}  a//b"],
)
def test_malformed_lists_of_hashes(tmp_path, line):
    (tmp_path / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(ValueError, match="SHA256SUMS"):
        expected_sha256(tmp_path)
