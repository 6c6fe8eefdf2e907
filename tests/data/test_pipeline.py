"""The batch is a function of (seed, step), whoever asks for it and however."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import glmjax
from glmjax.config import Experiment, ObjectiveConfig, TrainConfig, replace
from glmjax.data.blanks import Batch
from glmjax.data.pipeline import batches, make_dataset, make_heldout_dataset
from glmjax.data.prepare import prepare
from glmjax.presets import get_config

MIXED = ObjectiveConfig(token=0.4, sentence=0.3, draw="row")


@pytest.fixture(scope="module")
def experiment(corpus_data):
    return Experiment(
        model=get_config("glm-tiny"),
        objective=MIXED,
        data=corpus_data,
        train=TrainConfig(batch_size=8, evaluate_batches=3, seed=1),
    )


@pytest.fixture(scope="module")
def corpora(experiment):
    return prepare(experiment.data, experiment.objective)


@pytest.fixture
def numbered(corpora):
    """The corpora with rows that are all one token, so that targets tell which row was read."""

    def number(corpus, first, count):
        rows = [
            {"tokens": np.full(corpora.text_length, first + i, np.uint16)} for i in range(count)
        ]
        return corpus._replace(train=rows, heldout=rows[::-1])

    def make(*counts):
        firsts = itertools.accumulate((20, *counts[:-1]))
        texts = (number(corpora.texts[0], *pair) for pair in zip(firsts, counts, strict=True))
        return corpora._replace(texts=tuple(texts))

    return make


def rows_read(batch) -> list[int]:
    """Which row of `numbered` corpora each row of a batch was made from."""
    return batch.tokens_BT.max(axis=1).tolist()


def assert_equal(first, second):
    for name, a, b in zip(first._fields, first, second, strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_batch_shapes(experiment, corpora):
    batch = make_dataset(experiment, corpora)[0]
    assert batch.tokens_BT.shape == (8, 64)
    assert batch.positions_B2T.shape == (8, 2, 64)
    assert batch.weights_BT.sum() > 0
    assert batch.tokens_BT.max() < corpora.tokenizer.vocab_size


def test_restart_at_every_step(experiment, corpora):
    dataset = make_dataset(experiment, corpora)
    whole = list(itertools.islice(batches(dataset), 7))
    for step in range(7):
        rest = list(itertools.islice(batches(dataset, step), 7 - step))
        assert_equal(dataset[step], whole[step])
        for a, b in zip(rest, whole[step:], strict=True):
            assert_equal(a, b)


def test_steps_can_be_asked_for_in_any_order(experiment, corpora):
    forward = [make_dataset(experiment, corpora)[step] for step in range(5)]
    dataset = make_dataset(experiment, corpora)
    for step in (3, 0, 4, 3):
        assert_equal(dataset[step], forward[step])
    assert dataset[10**9].tokens_BT.shape == (8, 64)


@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_shards_make_up_the_batch(experiment, corpora, num_shards):
    whole = make_dataset(experiment, corpora)
    parts = [
        make_dataset(experiment, corpora, shards=(shard,), num_shards=num_shards)
        for shard in range(num_shards)
    ]
    for step in (0, 5):
        joined = map(np.concatenate, zip(*(part[step] for part in parts), strict=True))
        assert_equal(whole[step], type(whole[step])(*joined))


@pytest.mark.parametrize("draw", ["batch", "row"])
def test_shards_have_the_drawn_objective(experiment, corpora, draw):
    experiment = replace(experiment, **{"objective.draw": draw})
    parts = [make_dataset(experiment, corpora, shards=(p,), num_shards=2) for p in range(2)]
    for step in range(20):
        objectives = np.concatenate([part[step].objective_B for part in parts])
        np.testing.assert_array_equal(
            objectives, make_dataset(experiment, corpora)[step].objective_B
        )
        assert draw == "row" or len(set(objectives)) == 1


def test_several_shards_follow_each_other(experiment, corpora):
    parts = make_dataset(experiment, corpora, shards=(0, 3), num_shards=4)
    whole = make_dataset(experiment, corpora)[5]
    assert_equal(parts[5], type(whole)(*(rows[[0, 1, 6, 7]] for rows in whole)))


def test_batches_that_cannot_be_cut_are_refused(experiment, corpora):
    with pytest.raises(ValueError, match="8 rows cannot be cut into 3 equal shards"):
        make_dataset(experiment, corpora, num_shards=3)
    with pytest.raises(ValueError, match="8 rows cannot be cut into 3 equal shards"):
        make_heldout_dataset(experiment, corpora, num_shards=3)
    ramped = replace(experiment, **{"train.ramp": (2, 2, 50)})
    with pytest.raises(ValueError, match="2 rows cannot be cut into 4 equal shards"):
        make_dataset(ramped, corpora, num_shards=4)


def test_too_few_rows_for_one_batch(experiment, numbered):
    with pytest.raises(ValueError, match=r"it has 7 rows .* train\.batch_size is 8"):
        make_dataset(experiment, numbered(3, 4))
    make_dataset(experiment, numbered(4, 4))


def test_seeds_differ(experiment, corpora):
    first = make_dataset(experiment, corpora)[0]
    other = make_dataset(replace(experiment, **{"train.seed": 2}), corpora)[0]
    assert (first.tokens_BT != other.tokens_BT).any(axis=1).all()


def test_epochs(experiment, numbered):
    dataset = make_dataset(experiment, numbered(24))
    epochs = [
        [row for step in range(3) for row in rows_read(dataset[3 * epoch + step])]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20, 44))
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])


def test_blanks_differ_between_epochs(experiment, numbered):
    dataset = make_dataset(experiment, numbered(8))
    masks = []
    for step in range(2):
        batch = dataset[step]
        order = np.argsort(rows_read(batch))
        masks.append(batch.weights_BT[order])
    assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((), (0.25, 0.75)), ((3.0, 1.0), (0.75, 0.25)), ((0.2, 0.2), (0.5, 0.5))],
    ids=["by-tokens", "three-to-one", "equal"],
)
def test_mixture_shares(experiment, numbered, weights, shares):
    corpora = numbered(40, 120)
    data = replace(experiment.data, path=experiment.data.path * 2, weights=weights)
    dataset = make_dataset(dataclasses.replace(experiment, data=data), corpora)
    rows = [row for step in range(100) for row in rows_read(dataset[step])]
    first = sum(row < 60 for row in rows)
    # Sources take turns, so their counts never stray from their shares.
    assert abs(first - 800 * shares[0]) <= 2
    assert len({row for row in rows if row < 60}) == 40


def skip(experiment, *ranges):
    return replace(experiment, **{"data.skip": ranges})


def test_skipped_steps(experiment, corpora):
    plain = make_dataset(experiment, corpora)
    skipped = make_dataset(skip(experiment, "3:5"), corpora)
    for step in range(3):
        assert_equal(skipped[step], plain[step])
    for step in range(3, 9):
        assert_equal(skipped[step], plain[step + 3])


def test_later_ranges_count_in_steps_of_the_run(experiment, corpora):
    once = make_dataset(skip(experiment, "3:5"), corpora)
    twice = make_dataset(skip(experiment, "3:5", "8:8"), corpora)
    for step in range(12):
        assert_equal(twice[step], once[step + (step >= 8)])


def test_skipping_in_a_ramp(experiment, numbered):
    experiment = replace(experiment, **{"train.ramp": (2, 2, 24)})
    corpora = numbered(200)
    plain, skipped = (
        make_dataset(config, corpora) for config in (experiment, skip(experiment, "2:4"))
    )
    sizes = [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    for dataset in (plain, skipped):
        assert [len(dataset[step].tokens_BT) for step in range(10)] == sizes
    order = [row for step in range(12) for row in rows_read(plain[step])]
    left = [row for step in range(10) for row in rows_read(skipped[step])]
    # The rows of steps 2, 3 and 4 are left out: 2 + 2 + 4 behind the first 4.
    assert left == (order[:4] + order[12:])[: len(left)]


def test_shards_make_up_a_growing_batch(experiment, corpora):
    experiment = replace(experiment, **{"train.ramp": (4, 2, 20)})
    whole = make_dataset(experiment, corpora)
    parts = [make_dataset(experiment, corpora, shards=(p,), num_shards=2) for p in range(2)]
    for step in range(8):
        joined = map(np.concatenate, zip(*(part[step] for part in parts), strict=True))
        assert_equal(whole[step], type(whole[step])(*joined))


@pytest.mark.parametrize("shards", [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 3), (1,), (2,)]])
def test_growing_batch_is_filled_up_with_empty_rows(experiment, corpora, shards):
    """Batches of 2, 4, 6 and 8 rows for 4 devices, which take 4 rows at once."""
    experiment = replace(experiment, **{"train.ramp": (2, 2, 24)})
    whole = make_dataset(experiment, corpora)
    parts = [
        make_dataset(experiment, corpora, shards=some, num_shards=4, multiple=4) for some in shards
    ]
    order = [shard for some in shards for shard in some]
    for step, size in ((0, 4), (4, 4), (6, 8), (8, 8)):
        joined = Batch(*map(np.concatenate, zip(*(part[step] for part in parts), strict=True)))
        assert len(joined.tokens_BT) == size
        in_order = np.argsort(np.repeat(order, size // 4), kind="stable")
        joined = Batch(*(rows[in_order] for rows in joined))
        real = len(whole[step].tokens_BT)
        assert_equal(Batch(*(rows[:real] for rows in joined)), whole[step])
        assert not any(rows[real:].any() for rows in joined)


def test_heldout_batches_are_fixed(experiment, corpora):
    dataset = make_heldout_dataset(experiment, corpora)
    other_seed = make_heldout_dataset(replace(experiment, **{"train.seed": 2}), corpora)
    assert len(dataset) == 3
    for a, b in zip(dataset, other_seed, strict=True):
        assert_equal(a, b)
    parts = [make_heldout_dataset(experiment, corpora, shards=(p,), num_shards=2) for p in (0, 1)]
    joined = map(np.concatenate, zip(*(part[1] for part in parts), strict=True))
    assert_equal(dataset[1], type(dataset[1])(*joined))


def test_heldout_rows_come_from_the_heldout_part(experiment, numbered):
    corpora = numbered(24)
    heldout = [{"tokens": np.full(corpora.text_length, 60 + i, np.uint16)} for i in range(24)]
    corpora = corpora._replace(texts=(corpora.texts[0]._replace(heldout=heldout),))
    rows = [row for batch in make_heldout_dataset(experiment, corpora) for row in rows_read(batch)]
    assert sorted(rows) == list(range(60, 84))


def test_multitask_rows(experiment, corpus_data, tmp_path):
    pairs = [{"text": f"kalo {i}", "target": "mir mir"} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    objective = dataclasses.replace(MIXED, multitask=1.0)
    data = dataclasses.replace(corpus_data, multitask=(str(path),))
    experiment = dataclasses.replace(experiment, objective=objective, data=data)
    corpora = prepare(data, objective)
    for dataset in (make_dataset(experiment, corpora), make_heldout_dataset(experiment, corpora)):
        batch = dataset[0]
        for targets, weights in zip(batch.targets_BT, batch.weights_BT, strict=True):
            assert corpora.tokenizer.decode(targets[weights > 0]) == "mir mir"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches(experiment, corpora, workers):
    dataset = make_dataset(experiment, corpora)
    iterator = batches(dataset, 2, workers)
    made = list(itertools.islice(iterator, 5))
    iterator.close()
    for step, batch in enumerate(made, 2):
        assert_equal(batch, dataset[step])


ABANDON = """
import dataclasses, sys
from glmjax.config import DataConfig, Experiment, TrainConfig
from glmjax.data.pipeline import batches, make_dataset
from glmjax.data.prepare import prepare
from glmjax.presets import get_config

if __name__ == "__main__":
    data = DataConfig(path=(sys.argv[1],), cache=sys.argv[2], vocab_size=400, sequence_length=64)
    experiment = Experiment(get_config("glm-tiny"), data=data, train=TrainConfig(batch_size=8))
    dataset = make_dataset(experiment, prepare(data, experiment.objective))
    iterator = batches(dataset, workers=int(sys.argv[3]))
    kept = [next(iterator) for _ in range(3)]
    if sys.argv[4] == "close":
        iterator.close()
    print(kept[2].tokens_BT.shape)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("end", ["close", "abandon"])
def test_no_noise_at_exit(corpus_data, corpus_file, tmp_path, workers, end):
    (tmp_path / "main.py").write_text(ABANDON)
    environment = os.environ | {"PYTHONPATH": str(Path(glmjax.__file__).parents[1])}
    arguments = [str(corpus_file), corpus_data.cache, str(workers), end]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py"), *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "(8, 64)\n", "")
