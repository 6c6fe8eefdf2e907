"""Sources of documents and when they count as changed."""

import json
import os
import socket
import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds

from glmjax.config import DataConfig
from glmjax.data.corpora import pair_source, text_sources
from glmjax.data.documentation import documentation, documentation_version


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_every_path_is_a_source(tmp_path):
    (tmp_path / "folder").mkdir()
    write_records(tmp_path / "folder" / "b.jsonl", [{"body": "three"}, {"body": " \n"}])
    (tmp_path / "folder" / "a.txt").write_text("two\n")
    write_records(tmp_path / "c.jsonl", [{"body": "one"}])
    paths = (str(tmp_path / "c.jsonl"), str(tmp_path / "folder"))
    data = DataConfig(path=paths, cache=str(tmp_path / "cache"), text_field="body")
    sources = text_sources(data)
    assert [source.name for source in sources] == list(paths)
    assert [list(source.read()) for source in sources] == [[("one",)], [("two",), ("three",)]]


def test_content_names_a_source(tmp_path):
    path = tmp_path / "a.jsonl"
    data = DataConfig(path=(str(path),), cache=str(tmp_path / "cache"))

    def name_after(text, time):
        write_records(path, [{"text": text, "body": text}])
        os.utime(path, ns=(time, time))
        return text_sources(data)[0].digest

    first = name_after("one", 10**18)
    assert name_after("two", 10**18 + 1) != first
    assert name_after("one", 10**18 + 2) == first
    other_field = DataConfig(path=data.path, cache=data.cache, text_field="body")
    assert text_sources(other_field)[0].digest != first
    (tmp_path / "moved").mkdir()
    path = path.rename(tmp_path / "moved" / "a.jsonl")
    moved = DataConfig(path=(str(path),), cache=data.cache)
    assert text_sources(moved)[0].digest == first


def test_pairs_of_all_paths_are_one_source(tmp_path):
    write_records(tmp_path / "a.jsonl", [{"text": "question", "target": "answer"}])
    write_records(tmp_path / "b.jsonl", [{"text": "1 + 1", "target": "2"}])
    paths = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    source = pair_source(DataConfig(multitask=paths, cache=str(tmp_path / "cache")))
    assert list(source.read()) == [("question", "answer"), ("1 + 1", "2")]


class LocalBooks(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset of one long text and one short one."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": np.int32})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": "one paragraph\n\n" * 1000, "id": 0}
        yield 1, {"text": "short \u00fc", "id": 1}


@pytest.fixture(scope="module")
def local_books(tmp_path_factory):
    """A folder that TFDS knows, with the prepared dataset."""
    folder = tmp_path_factory.mktemp("tfds")
    LocalBooks(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(folder)
    return folder


def test_prepared_tfds_dataset(local_books):
    data = DataConfig(tfds=("local_books",), cache=str(local_books / "cache"))
    (source,) = text_sources(data)
    texts = [text for (text,) in source.read()]
    assert texts[-1] == "short \u00fc"
    assert "\n\n".join(texts[:-1]) == ("one paragraph\n\n" * 1000).strip()
    assert len(texts) == 5
    assert source.digest == text_sources(data)[0].digest


def test_tfds_field_errors(local_books):
    data = DataConfig(tfds=("local_books",), cache=str(local_books / "cache"), text_field="body")
    with pytest.raises(ValueError, match=r"'local_books' has no field 'body' among '(text|id)'"):
        text_sources(data)
    data = DataConfig(tfds=("local_books",), cache=str(local_books / "cache"), text_field="id")
    with pytest.raises(ValueError, match=r"'local_books', record 1: field 'id' is .*, not text"):
        list(text_sources(data)[0].read())


def test_unknown_tfds_dataset(tmp_path):
    data = DataConfig(tfds=("no_such_dataset",), cache=str(tmp_path))
    with pytest.raises(ValueError, match="the TFDS catalogue has no dataset 'no_such_dataset'"):
        text_sources(data)


def test_tfds_without_network(tmp_path, monkeypatch):
    def fail(*_):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    data = DataConfig(tfds=("tiny_shakespeare",), cache=str(tmp_path))
    with pytest.raises(
        ConnectionError, match=r"'tiny_shakespeare' is not prepared in .* no network"
    ):
        text_sources(data)


@pytest.mark.slow
def test_documentation_is_prose():
    texts = documentation()
    assert sum(map(len, texts)) > 2_000_000
    assert len(set(texts)) == len(texts)
    paragraphs = [part for text in texts for part in text.split("\n\n")]
    assert not any(">>>" in part for part in paragraphs)
    assert max(map(len, texts)) <= 32_000
    (source,) = text_sources(DataConfig())
    assert [text for (text,) in source.read()] == list(texts)
    assert source.name == documentation_version()
