"""Prepared rows: what they hold, when they are made again, and that they are never half made."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_vocabularies import write_byte_pairs, write_ice_text

import glmjax
from glmjax.config import Experiment, ObjectiveConfig, TrainConfig
from glmjax.data import prepare as preparing
from glmjax.data.pipeline import make_dataset
from glmjax.data.prepare import SPLITS, TokenRows, is_heldout, prepare, token_feature, token_type
from glmjax.presets import get_config

BY_BATCH = ObjectiveConfig()
BY_ROW = ObjectiveConfig(draw="row")


def stream(rows) -> list[int]:
    return [int(token) for row in rows for token in row["tokens"]]


def run_script(script: str, *arguments: str) -> subprocess.Popen:
    """Starts Python on a script beside this process, with the same glmjax."""
    environment = os.environ | {"PYTHONPATH": str(Path(glmjax.__file__).parents[1])}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("objective", [BY_BATCH, BY_ROW], ids=["with-cls", "without-cls"])
def test_rows_are_the_documents(corpus_data, documents, objective):
    corpora = prepare(corpus_data, objective)
    tokens = corpora.tokenizer.special_tokens
    opening = [tokens.cls] if objective.draw == "batch" else []
    for split, rows in (("train", corpora.texts[0].train), ("heldout", corpora.texts[0].heldout)):
        expected = []
        for text in documents:
            if is_heldout((text,), corpus_data.heldout) == (split == "heldout"):
                expected += [*opening, *corpora.tokenizer.encode(text), tokens.eos]
        assert len(rows) == len(expected) // corpora.text_length > 1
        assert rows[0]["tokens"].shape == (corpora.text_length,)
        assert rows[0]["tokens"].dtype == np.uint16
        assert stream(rows) == expected[: len(rows) * corpora.text_length]


@pytest.mark.parametrize(
    ("model", "preset", "write"),
    [
        ("glm-tiny", "glm-10b", lambda folder: write_byte_pairs(folder, "gpt2").parent),
        ("glm-130b-tiny", "glm-130b", write_ice_text),
    ],
    ids=["gpt2", "ice-text"],
)
def test_official_vocabularies(corpus_data, documents, tmp_path, model, preset, write):
    """`data.tokenizer` may be an official file or folder; batches are drawn with its ids."""
    published = get_config(preset)
    data = dataclasses.replace(
        corpus_data, cache=str(tmp_path), tokenizer=str(write(tmp_path / "v"))
    )
    config = get_config(
        model, vocab_size=published.vocab_size, special_tokens=published.special_tokens
    )
    positions = "1d" if model == "glm-130b-tiny" else "2d"
    objective = ObjectiveConfig(token=0.5, sentence=0.5, draw="row", positions=positions)
    corpora = prepare(data, objective, config.special_tokens)
    tokens, encode = published.special_tokens, corpora.tokenizer.encode
    expected = []
    for text in documents:
        if not is_heldout((text,), data.heldout):
            expected += [*encode(text), tokens.eos]
    rows = stream(corpora.texts[0].train)
    assert rows == expected[: len(rows)]

    train = TrainConfig(batch_size=8)
    batch = make_dataset(Experiment(config, objective, data, train=train), corpora)[0]
    assert {tokens.mask, tokens.smask, tokens.sop} <= set(batch.tokens_BT.flat)
    assert {*batch.tokens_BT.flat} - {*tokens.masks, tokens.sop, tokens.pad} <= set(expected)
    assert tokens.eop in batch.targets_BT[batch.weights_BT > 0]


def test_text_length_is_a_setting(corpus_data):
    assert prepare(dataclasses.replace(corpus_data, text_length=50), BY_BATCH).text_length == 50
    assert 32 < prepare(corpus_data, BY_BATCH).text_length < 64


def test_heldout_share():
    for share, deviation in ((0.1, 30), (0.3, 46)):
        count = sum(is_heldout((f"text {i}",), share) for i in range(10_000))
        assert abs(count - 10_000 * share) < 4 * deviation
    assert is_heldout(("same", "a"), 0.5) == is_heldout(("same", "b"), 0.5)


def test_the_vocabulary_is_not_trained_on_heldout_documents(
    corpus_data, documents, tmp_path, monkeypatch
):
    seen: list[str] = []
    train_tokenizer = preparing.train_tokenizer

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(preparing, "train_tokenizer", spy)
    prepare(dataclasses.replace(corpus_data, cache=str(tmp_path)), BY_BATCH)
    assert seen == [text for text in documents if not is_heldout((text,), corpus_data.heldout)]


def test_everything_is_made_once(corpus_data, monkeypatch):
    first = prepare(corpus_data, BY_BATCH)

    def fail(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(preparing, "train_tokenizer", fail)
    monkeypatch.setattr(preparing, "text_rows", fail)
    again = prepare(corpus_data, BY_BATCH)
    assert again.digest == first.digest
    assert stream(again.texts[0].train) == stream(first.texts[0].train)


def test_changed_files_are_noticed(corpus_data, documents, tmp_path):
    path = tmp_path / "corpus.jsonl"

    def prepare_texts(texts):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        data = dataclasses.replace(corpus_data, path=(str(path),), cache=str(tmp_path / "cache"))
        return prepare(data, BY_BATCH)

    before = prepare_texts(documents)
    swapped = [text.replace("ka", "lo") for text in documents]
    after = prepare_texts(swapped)
    assert after.digest != before.digest
    decoded = after.tokenizer.decode(stream(after.texts[0].train))
    assert "ka" not in decoded and "lo" in decoded


@pytest.mark.parametrize(
    "changes",
    [{"heldout": 0.2}, {"vocab_size": 390}, {"text_length": 40}, {"tokenizer": "other"}],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_name_the_corpus(corpus_data, documents, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    preparing.train_tokenizer(documents, 300).save(Path("other"))
    first = prepare(corpus_data, BY_BATCH)
    other = prepare(dataclasses.replace(corpus_data, **changes), BY_BATCH)
    assert other.digest != first.digest


def test_sources_stay_apart(corpus_data, documents, tmp_path):
    (tmp_path / "second.txt").write_text("\n\n".join(documents[::-1]))
    data = dataclasses.replace(
        corpus_data, path=(*corpus_data.path, str(tmp_path / "second.txt")), heldout=0.4
    )
    corpora = prepare(data, BY_BATCH)
    assert [corpus.name for corpus in corpora.texts] == list(data.path)
    assert stream(corpora.texts[0].train) != stream(corpora.texts[1].train)


def test_pairs(corpus_data, tmp_path):
    records = [{"text": f"kalo {i}", "target": "mir" * (i % 5 + 1)} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    corpora = prepare(dataclasses.replace(corpus_data, multitask=(str(path),)), BY_BATCH)
    decode = corpora.tokenizer.decode
    for split, rows in zip(SPLITS, (corpora.pairs.train, corpora.pairs.heldout), strict=True):
        expected = [
            (r["text"], r["target"])
            for r in records
            if is_heldout((r["text"],), corpus_data.heldout) == (split == "heldout")
        ]
        assert [(decode(row["text"]), decode(row["target"])) for row in rows] == expected != []


def test_large_vocabularies_are_stored_in_int32(tmp_path):
    tokenizer = SimpleNamespace(vocab_size=150_344)
    assert token_type(SimpleNamespace(vocab_size=65_536)) is np.uint16
    assert token_type(tokenizer) is np.int32
    ids = np.array([0, 65_536, 150_343], np.int32)
    features = {"tokens": token_feature(tokenizer, 3)}
    builder = TokenRows(lambda split: iter([{"tokens": ids}]), features, data_dir=tmp_path)
    builder.download_and_prepare()
    assert builder.as_data_source("train")[0]["tokens"].tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"text": "kalo mir"}] * 3,
            r"corpus\.jsonl has too little text: its (train|heldout) documents",
        ),
        ([{"body": "kalo"}], r"corpus\.jsonl, line 1: no field 'text'"),
        ([{"text": "kalo " * 99, "target": ""}] * 30, r"corpus\.jsonl has too little text"),
    ],
    ids=["too-little", "no-field", "one-document"],
)
def test_bad_corpora_leave_nothing(corpus_data, documents, tmp_path, records, message):
    preparing.train_tokenizer(documents, 300).save(tmp_path)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = dataclasses.replace(
        corpus_data, path=(str(path),), cache=str(tmp_path / "cache"), tokenizer=str(tmp_path)
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            prepare(data, BY_BATCH)
    assert not list((tmp_path / "cache").rglob("dataset_info.json"))
    assert not list((tmp_path / "cache").rglob("*.array_record*"))


def test_empty_targets_are_refused(corpus_data, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"text": "kalo", "target": "mir"}\n{"text": "mirten", "target": ""}\n' * 20)
    data = dataclasses.replace(corpus_data, multitask=(str(path),), heldout=0.5)
    with pytest.raises(ValueError, match=r"the target of pair \d+ \('mirten'\) is empty"):
        prepare(data, BY_BATCH)


KILLED = """
import os, signal, sys
from glmjax.config import DataConfig, ObjectiveConfig
from glmjax.data import prepare as preparing

def killed_rows(*arguments, **settings):
    for number, row in enumerate(text_rows(*arguments, **settings)):
        if number == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

text_rows, preparing.text_rows = preparing.text_rows, killed_rows
data = DataConfig(path=(sys.argv[1],), cache=sys.argv[2], vocab_size=400, sequence_length=64)
preparing.prepare(data, ObjectiveConfig())
"""

PREPARE = """
import sys
from glmjax.config import DataConfig, ObjectiveConfig
from glmjax.data.prepare import prepare

data = DataConfig(path=(sys.argv[1],), cache=sys.argv[2], vocab_size=400, sequence_length=64)
corpora = prepare(data, ObjectiveConfig())
print(corpora.digest, len(corpora.texts[0].train), "tensorflow" in sys.modules)
"""


def test_killed_preparation_is_made_again(corpus_data, corpus_file, tmp_path):
    process = run_script(KILLED, str(corpus_file), str(tmp_path))
    assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.rglob("incomplete*"))
    corpora = prepare(dataclasses.replace(corpus_data, cache=str(tmp_path)), BY_BATCH)
    whole = prepare(corpus_data, BY_BATCH)
    assert corpora.digest == whole.digest
    assert stream(corpora.texts[0].train) == stream(whole.texts[0].train)
    assert not list(tmp_path.rglob("incomplete*"))


@pytest.mark.slow
def test_two_processes_prepare_at_once_without_tensorflow(corpus_data, corpus_file, tmp_path):
    processes = [run_script(PREPARE, str(corpus_file), str(tmp_path)) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    whole = prepare(corpus_data, BY_BATCH)
    assert outputs == [f"{whole.digest} {len(whole.texts[0].train)} False\n"] * 2
