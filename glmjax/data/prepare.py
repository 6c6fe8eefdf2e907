"""Corpora tokenised once, as TFDS datasets in the cache.

A prepared corpus lies in a folder named by everything it depends on: the content of its source, the
tokenizer and the settings. Other content has another name, and TFDS fills a folder of a passing
name that it renames at the end, so what has the right name is whole.
"""

import contextlib
import functools
import io
import itertools
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from glmjax.config import DataConfig, ObjectiveConfig, SpecialTokens
from glmjax.data.blanks import text_length
from glmjax.data.cache import digest, hash_rank, locked
from glmjax.data.corpora import Record, Source, pair_source, text_sources
from glmjax.data.tokenizers import load_tokenizer, train_tokenizer
from glmjax.data.vocabularies import Tokenizer

FORMAT = 1
"""Part of every name in the cache; goes up when the same sources give other tokens."""
SPLITS = ("train", "heldout")

Row = dict[str, np.ndarray]
logger = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """A prepared source: rows {"tokens": [N]} of text, or {"text": [M], "target": [K]} of a pair."""

    name: str
    digest: str
    train: Sequence[Row]
    heldout: Sequence[Row]


class Corpora(NamedTuple):
    """Everything a run reads."""

    tokenizer: Tokenizer
    texts: tuple[Corpus, ...]
    pairs: Corpus | None
    text_length: int
    """Tokens of every row of text (N)."""

    @property
    def digest(self) -> str:
        """A name for the content of all rows, whatever their order and weights."""
        return digest(*(corpus.digest for corpus in self.texts), self.pairs and self.pairs.digest)


def prepare(
    data: DataConfig, objective: ObjectiveConfig, special_tokens: SpecialTokens | None = None
) -> Corpora:
    """Opens the corpora and the tokenizer of a run; what the cache lacks is made first.

    Of an official vocabulary that serves several models, special_tokens say for which it is.

    Raises:
        FileNotFoundError: what data.path, data.multitask or data.tokenizer names is not there.
        ValueError, ConnectionError: see `text_sources`, `read_documents`, `load_tokenizer` and
            `train_tokenizer`; also if a source has too little text for a training and a held-out row.
    """
    named = [*data.path, *data.multitask, *([data.tokenizer] if data.tokenizer else [])]
    absent = [path for path in named if not Path(path).expanduser().exists()]
    if absent:
        raise FileNotFoundError(
            f"there is no {', '.join(absent)}; put the data there or name your own with --data.path, "
            "--data.multitask and --data.tokenizer"
        )
    cache = Path(data.cache).expanduser()
    length = data.text_length or text_length(objective, data.sequence_length)
    pairs = None
    with locked(cache):
        sources = text_sources(data)
        if data.tokenizer is None:
            tokenizer: Tokenizer = _train_tokenizer(data, sources, cache)
        else:
            tokenizer = load_tokenizer(data.tokenizer, special_tokens)
        opening = tokenizer.special_tokens.cls if objective.draw == "batch" else None
        rows = functools.partial(text_rows, tokenizer=tokenizer, length=length, opening=opening)
        features = {"tokens": token_feature(tokenizer, length)}
        settings = (tokenizer.digest, length, opening)
        texts = [_open_corpus(source, rows, features, data, *settings) for source in sources]
        if data.multitask:
            rows = functools.partial(pair_rows, tokenizer=tokenizer)
            features = {field: token_feature(tokenizer, None) for field in ("text", "target")}
            pairs = _open_corpus(pair_source(data), rows, features, data, tokenizer.digest)
    return Corpora(tokenizer, tuple(texts), pairs, length)


def text_rows(
    documents: Iterable[Record], tokenizer: Tokenizer, length: int, opening: int | None
) -> Iterator[Row]:
    """Rows of `length` tokens from the stream of all documents, each with eos behind it and, for
    the models that have it, `opening` ([CLS]) before it. The rest at the end is dropped."""
    prefix = [] if opening is None else [opening]
    stream: list[int] = []
    for (text,) in documents:
        stream += [*prefix, *tokenizer.encode(text), tokenizer.special_tokens.eos]
        end = len(stream) - len(stream) % length
        block = np.array(stream[:end], token_type(tokenizer)).reshape(-1, length)
        yield from ({"tokens": tokens} for tokens in block)
        del stream[:end]


def pair_rows(pairs: Iterable[Record], tokenizer: Tokenizer) -> Iterator[Row]:
    """One row for each (text, target) pair.

    Raises:
        ValueError: a target is empty.
    """
    for number, (text, target) in enumerate(pairs, 1):
        if not target:
            raise ValueError(f"the target of pair {number} ({text[:40]!r}) is empty")
        fields = {"text": tokenizer.encode(text), "target": tokenizer.encode(target)}
        yield {field: np.array(ids, token_type(tokenizer)) for field, ids in fields.items()}


def token_type(tokenizer: Tokenizer) -> type[np.integer]:
    """The smallest type that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32


def token_feature(tokenizer: Tokenizer, length: int | None) -> tfds.features.Tensor:
    """How TFDS stores `length` ids, or any number of them."""
    return tfds.features.Tensor(shape=(length,), dtype=token_type(tokenizer), encoding="bytes")


def is_heldout(record: Record, share: float) -> bool:
    """Whether a record is never trained on: decided by its text, so no copy of it is either."""
    return hash_rank(record[0]) < share


class TokenRows(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of token rows in two splits; needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded; TFDS would look for checksums beside this file.
    url_infos: ClassVar[dict] = {}

    def __init__(
        self, rows: Callable[[str], Iterator[Row]], features: dict[str, Any], **kwargs: Any
    ):
        self._rows = rows
        self._features = features
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Row]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Row]]:
        yield from enumerate(self._rows(split))


def _train_tokenizer(data: DataConfig, sources: Sequence[Source], cache: Path) -> Tokenizer:
    """The tokenizer trained on the training documents of all sources."""
    name = digest(FORMAT, [source.digest for source in sources], data.vocab_size, data.heldout)
    folder = cache / "tokenizers" / name
    if not (folder / "tokenizer.model").exists():
        logger.info("training a vocabulary of %d tokens", data.vocab_size)
        records = (record for source in sources for record in source.read())
        documents = (record[0] for record in records if not is_heldout(record, data.heldout))
        train_tokenizer(documents, data.vocab_size).save(folder)
    return load_tokenizer(folder)


def _open_corpus(
    source: Source,
    make_rows: Callable[[Iterator[Record]], Iterator[Row]],
    features: dict[str, Any],
    data: DataConfig,
    *settings: object,
) -> Corpus:
    """The prepared rows of a source; `settings` is what they depend on beside its content."""
    name = digest(FORMAT, source.digest, data.heldout, *settings)
    folder = Path(data.cache).expanduser() / "corpora" / name

    def split_rows(split: str) -> Iterator[Row]:
        records = source.read()
        rows = make_rows(r for r in records if is_heldout(r, data.heldout) == (split == "heldout"))
        first = next(rows, None)
        if first is None:
            raise ValueError(
                f"{source.name} has too little text: its {split} documents, chosen by hash with "
                f"data.heldout = {data.heldout}, do not fill one row"
            )
        yield from itertools.chain([first], rows)

    builder = TokenRows(split_rows, features, data_dir=folder)
    if not builder.data_path.exists():
        logger.info("tokenising %s", source.name)
        # The folder is locked: what another process left there unfinished is nobody's.
        shutil.rmtree(folder, ignore_errors=True)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    # Read without our builder class, whose functions cannot travel to worker processes.
    reader = tfds.builder_from_directory(builder.data_path)
    return Corpus(source.name, name, *(reader.as_data_source(split) for split in SPLITS))
