"""How fast batches are made.

A rate is tokens of finished rows per second (rows x sequence length). Prepared: rows are read from
the prepared corpus, as in training. Online: every document is tokenised when it is needed.
"""

import itertools
import os
import time
from collections.abc import Generator

from glmjax.config import (
    DataConfig,
    Experiment,
    GLMConfig,
    ObjectiveConfig,
    Positions,
    TrainConfig,
    replace,
)
from glmjax.data.blanks import Batch, make_batch
from glmjax.data.corpora import text_sources
from glmjax.data.pipeline import batches, make_dataset
from glmjax.data.prepare import Corpora, prepare, text_rows

MIXTURES = {
    "glm": ObjectiveConfig(
        token=0.5, sentence=0.3, document_min_ratio=0.25, short_sequence=0.02, decoder_noise=0.1
    ),
    "glm-130b": ObjectiveConfig(
        token=0.3, draw="row", single_span=0.02, short_sequence=0.02, document_min_ratio=0.2,
        document_suffix=1.0, pieces_per_row=4, positions="1d",
    ),
}  # fmt: skip
"""The objectives of GLM-10B (THUDM/GLM, config/ds_block_10B.sh) and, self-supervised part, of
GLM-130B (configs/glm-130b/glm-130b.sh)."""


def run(
    data: DataConfig | None = None,
    *,
    sequence_length: int = 2048,
    batch_size: int = 64,
    workers: tuple[int, ...] = (0, 1, 2),
    seconds: float = 5.0,
) -> dict:
    """Measures both mixtures, each rate over about `seconds`.

    `data` names the text; None is the documentation of the running Python, numpy and jax. Its text
    is used again and again when there is little of it.
    """
    data = replace(data or DataConfig(), sequence_length=sequence_length)
    train = TrainConfig(batch_size=batch_size)
    result: dict = {
        "sequence_length": sequence_length, "batch_size": batch_size, "cpus": os.cpu_count(),
        "mixtures": {},
    }  # fmt: skip
    for name, objective in MIXTURES.items():
        positions: Positions = "rope_1d" if objective.positions == "1d" else "learned_2d"
        model = GLMConfig(positions=positions, max_positions=sequence_length)
        experiment = Experiment(model=model, objective=objective, data=data, train=train)
        corpora = prepare(data, objective)
        dataset = make_dataset(experiment, corpora)
        prepared = {
            str(count): _measure(batches(dataset, workers=count), seconds) for count in workers
        }
        online = _measure(_online_batches(experiment, corpora), seconds)
        result["mixtures"][name] = {"prepared": prepared, "online": online}
    return result


def show(result: dict) -> None:
    """Prints what `run` measured."""
    print(
        f"Sequence length {result['sequence_length']}, batches of {result['batch_size']}, "
        f"{result['cpus']} CPUs"
    )
    print(f"{'mixture':10} {'corpus':10} {'workers':>7} {'tokens/s':>12} {'first batch':>12}")
    for name, mixture in result["mixtures"].items():
        rows = [("prepared", count, measured) for count, measured in mixture["prepared"].items()]
        for corpus, count, measured in [*rows, ("online", "0", mixture["online"])]:
            rate, first = measured["tokens_per_second"], measured["first_batch_seconds"]
            print(f"{name:10} {corpus:10} {count:>7} {rate:>12,.0f} {first:>10.2f} s")


def _measure(stream: Generator[Batch], seconds: float) -> dict[str, float]:
    start = time.perf_counter()
    next(stream)
    first = time.perf_counter()
    # What was made ahead while nobody asked is not part of the rate.
    for _ in range(10):
        next(stream)
    tokens, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        tokens += next(stream).tokens_BT.size
    stream.close()
    return {"tokens_per_second": tokens / elapsed, "first_batch_seconds": first - start}


def _online_batches(experiment: Experiment, corpora: Corpora) -> Generator[Batch]:
    """Batches of all documents over and over, from text to rows in this thread."""
    tokenizer, objective = corpora.tokenizer, experiment.objective
    opening = tokenizer.special_tokens.cls if objective.draw == "batch" else None
    documents = [record for source in text_sources(experiment.data) for record in source.read()]
    rows = text_rows(itertools.cycle(documents), tokenizer, corpora.text_length, opening)
    for step in itertools.count():
        size = experiment.train.batch_size
        yield make_batch(
            [row["tokens"] for row in itertools.islice(rows, size)],
            objective,
            tokenizer.special_tokens,
            sequence_length=experiment.data.sequence_length,
            seed=experiment.train.seed,
            step=step,
            row_indices=range(step * size, (step + 1) * size),
            is_sentence_end_V=tokenizer.is_sentence_end,
        )
