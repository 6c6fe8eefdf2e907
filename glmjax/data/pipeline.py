"""Prepared corpora to batches with Grain. The batch is a function of (seed, step).

Every source is shuffled anew each epoch and repeated for ever; their mixture is one endless sequence
of rows, and a step owns a range of it. Nothing has to be replayed: any step can be computed at any
time, by any number of processes and workers.
"""

import atexit
import sys
import weakref
from collections.abc import Callable, Generator, Sequence

import grain
import numpy as np
from absl import flags

from glmjax.config import DataConfig, Experiment, TrainConfig
from glmjax.data.blanks import Batch, make_batch
from glmjax.data.prepare import Corpora
from glmjax.data.ramp import batch_size_at, batch_sizes, rows_before

HELDOUT_SEED = 0
"""Held-out rows and their blanks are the same for every run."""


def make_dataset(
    experiment: Experiment,
    corpora: Corpora,
    *,
    shards: Sequence[int] = (0,),
    num_shards: int = 1,
    multiple: int = 1,
) -> grain.MapDataset[Batch]:
    """The training batches. Cut into `num_shards` equal ranges of rows, the batch of a step gives
    those of `shards`, one behind the other, as element `step`.

    A growing batch that is no multiple of `multiple` rows ends in empty rows.

    Raises:
        ValueError: the corpus has too few rows for one batch, or a batch cannot be cut.
    """
    data, train = experiment.data, experiment.train
    for size in batch_sizes(train):
        _check_divisible(_filled(size, multiple), num_shards)
    num_rows = sum(len(corpus.train) for corpus in corpora.texts)
    if num_rows < train.batch_size:
        raise ValueError(
            f"the corpus is too small for one batch: it has {num_rows} rows of "
            f"{corpora.text_length} tokens, and train.batch_size is {train.batch_size}"
        )
    make = _batch_maker(experiment, corpora, "train", train.seed)

    def batch_of_step(step: int) -> Batch:
        size = batch_size_at(train, step)
        skipped_steps, skipped_rows = _skipped(data, train, step)
        first = rows_before(train, step) + skipped_rows
        indices = _rows_of_shards(first, _filled(size, multiple) // num_shards, shards)
        present = [index for index in indices if index < first + size]
        batch, empty = make(step + skipped_steps, present), len(indices) - len(present)
        if not empty:
            return batch
        return Batch(*(np.pad(x, [(0, empty), *[(0, 0)] * (x.ndim - 1)]) for x in batch))

    return grain.MapDataset.range(sys.maxsize).map(batch_of_step)


def make_heldout_dataset(
    experiment: Experiment, corpora: Corpora, *, shards: Sequence[int] = (0,), num_shards: int = 1
) -> grain.MapDataset[Batch]:
    """The train.evaluate_batches batches of every held-out evaluation, cut as in `make_dataset`.

    They do not depend on train.seed. A held-out part of fewer rows is read more than once, with
    other blanks each time.
    """
    size = experiment.train.batch_size // num_shards
    _check_divisible(experiment.train.batch_size, num_shards)
    make = _batch_maker(experiment, corpora, "heldout", HELDOUT_SEED)

    def batch_of_index(index: int) -> Batch:
        first = index * experiment.train.batch_size
        return make(index, _rows_of_shards(first, size, shards))

    return grain.MapDataset.range(experiment.train.evaluate_batches).map(batch_of_index)


def batches(
    dataset: grain.MapDataset[Batch], first_step: int = 0, workers: int = 0
) -> Generator[Batch]:
    """The elements from `first_step` on, made ahead by one thread, or by `workers` processes.

    Close the generator to stop them. Workers are started anew, so a script that asks for them
    keeps its body under `if __name__ == "__main__"`.
    """
    # A second thread would only wait for the first: making a batch holds the interpreter lock.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    stream = dataset[first_step:].to_iter_dataset(options)
    if not workers:
        return _drain(stream)
    # Grain reads absl flags, which nobody has parsed outside absl.app.run.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    # Workers hand over shared memory, which they take back.
    stream = stream.mp_prefetch(processes).map(lambda batch: Batch(*map(np.copy, batch)))
    generator = _drain(stream)
    # A program that ends with an open generator stops its workers before Python goes down.
    atexit.register(_close, weakref.ref(generator))
    return generator


def _drain(stream: grain.IterDataset[Batch]) -> Generator[Batch]:
    iterator = iter(stream)
    try:
        yield from iterator
    finally:
        iterator.close()


def _close(reference: weakref.ref[Generator[Batch]]) -> None:
    generator = reference()
    if generator is not None:
        generator.close()


def _batch_maker(
    experiment: Experiment, corpora: Corpora, split: str, seed: int
) -> Callable[[int, Sequence[int]], Batch]:
    """The function of (step, rows of the mixture) that reads rows and draws their blanks."""
    objective, length = experiment.objective, experiment.data.sequence_length
    tokens, is_sentence_end = corpora.tokenizer.special_tokens, corpora.tokenizer.is_sentence_end
    sources = [getattr(corpus, split) for corpus in corpora.texts]
    seeds = np.random.SeedSequence(seed).generate_state(len(sources))
    endless = [
        grain.MapDataset.source(source).shuffle(seed=int(source_seed)).repeat()
        for source, source_seed in zip(sources, seeds, strict=True)
    ]
    weights = experiment.data.weights or [len(corpus.train) for corpus in corpora.texts]
    rows = grain.MapDataset.mix(endless, weights)
    pairs = corpora.pairs and grain.MapDataset.source(getattr(corpora.pairs, split)).map(_pair)

    def make(step: int, indices: Sequence[int]) -> Batch:
        return make_batch(
            [rows[index]["tokens"] for index in indices],
            objective,
            tokens,
            sequence_length=length,
            seed=seed,
            step=step,
            row_indices=indices,
            is_sentence_end_V=is_sentence_end,
            pairs=pairs,
        )

    return make


def _pair(row: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return row["text"], row["target"]


def _skipped(data: DataConfig, train: TrainConfig, step: int) -> tuple[int, int]:
    """Steps and rows that the ranges of data.skip leave out before a step."""
    begun = [(first, last + 1) for first, last in data.skip_ranges() if first <= step]
    rows = (rows_before(train, end) - rows_before(train, first) for first, end in begun)
    return sum(end - first for first, end in begun), sum(rows)


def _rows_of_shards(first: int, size: int, shards: Sequence[int]) -> list[int]:
    """The rows of some shards of `size` rows of a batch that begins at row `first`."""
    return [first + shard * size + row for shard in shards for row in range(size)]


def _filled(size: int, multiple: int) -> int:
    """The next multiple of a number of rows."""
    return -(-size // multiple) * multiple


def _check_divisible(size: int, num_shards: int) -> None:
    if size % num_shards:
        raise ValueError(f"a batch of {size} rows cannot be cut into {num_shards} equal shards")
