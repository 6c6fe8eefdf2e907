"""A small synthetic corpus for the tests of the data side."""

import json
import random

import pytest

from glmjax.config import DataConfig

SYLLABLES = ("ka", "lo", "mir", "ten", "su", "ar", "vel", "no", "dri", "pha")


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """300 different documents of about 50 to 500 characters."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(300)]
    marks = (". ", "! ", "? ", "; ", ": ", "\n", "\u3002")
    return [
        "".join(
            " ".join(rng.choices(words, k=8)) + rng.choice(marks) for _ in range(rng.randint(1, 10))
        ).strip()
        for _ in range(300)
    ]


@pytest.fixture(scope="session")
def corpus_file(documents, tmp_path_factory):
    """The documents as a .jsonl file."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="session")
def corpus_data(corpus_file, tmp_path_factory) -> DataConfig:
    """Settings of a small prepared corpus; its cache is shared, so that it is made once."""
    cache = tmp_path_factory.mktemp("cache")
    return DataConfig(
        path=(str(corpus_file),), cache=str(cache), vocab_size=400, sequence_length=64
    )
