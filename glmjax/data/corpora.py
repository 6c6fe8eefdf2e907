"""What `DataConfig` names as text, as sources of documents with a name for their content."""

import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from glmjax.config import DataConfig
from glmjax.data.cache import digest, file_digests
from glmjax.data.documentation import documentation, documentation_version
from glmjax.data.readers import find_files, read_documents, read_records, split_text

Record = tuple[str, ...]
"""A document, (text,), or a multi-task pair, (text, target)."""


class Source(NamedTuple):
    """Text from one place."""

    name: str
    """How messages call it."""
    digest: str
    """Changes when the text does."""
    read: Callable[[], Iterator[Record]]
    """All records, in the same order every time."""


def text_sources(data: DataConfig) -> list[Source]:
    """The entries of data.path, then of data.tfds; without any, the documentation at hand.

    Raises:
        FileNotFoundError: an entry does not exist.
        ValueError: an entry holds no text, or is no text dataset.
        ConnectionError: a TFDS dataset would have to be downloaded and there is no network.
    """
    sources = [_files_source((path,), (data.text_field,), data) for path in data.path]
    sources += [_tfds_source(name, data.text_field) for name in data.tfds]
    if not sources:
        version = documentation_version()
        sources.append(
            Source(version, digest(version), lambda: ((text,) for text in documentation()))
        )
    return sources


def pair_source(data: DataConfig) -> Source:
    """The (text, target) pairs of data.multitask."""
    return _files_source(data.multitask, (data.text_field, data.target_field), data)


def _files_source(paths: tuple[str, ...], fields: tuple[str, ...], data: DataConfig) -> Source:
    files = [file for path in paths for file in find_files(path)]
    contents = file_digests(files, Path(data.cache).expanduser() / "digests.json")
    endings = [file.suffixes for file in files]

    def read() -> Iterator[Record]:
        for file in files:
            if len(fields) > 1:
                yield from read_records(file, fields)
            else:
                yield from ((text,) for text in read_documents(file, *fields))

    return Source(", ".join(paths), digest(fields, endings, contents), read)


def _tfds_source(name: str, text_field: str) -> Source:
    """The train split of a TFDS dataset; texts are cut like plain text, since some are one long one."""
    builder = _tfds_builder(name)
    if text_field not in builder.info.features:
        raise ValueError(
            f"the TFDS dataset {name!r} has no field {text_field!r} among "
            f"{', '.join(map(repr, builder.info.features))}"
        )

    def read() -> Iterator[Record]:
        for number, example in enumerate(builder.as_data_source("train"), 1):
            kind = type(example[text_field]).__name__
            if kind != "bytes":
                place = f"the TFDS dataset {name!r}, record {number}"
                raise ValueError(f"{place}: field {text_field!r} is {kind}, not text")
            yield from ((text,) for text in split_text(example[text_field].decode()))

    train = builder.info.splits["train"]
    return Source(name, digest(builder.info.full_name, text_field, train.shard_lengths), read)


def _tfds_builder(name: str) -> Any:
    """A TFDS dataset that is prepared for random access, downloaded first where that is needed."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # the catalogue knows older datasets only then

    try:
        builder = tfds.builder(name, file_format="array_record")
        if not builder.data_path.exists():
            require_network(f"the TFDS dataset {name!r} is not prepared in {builder.data_dir}")
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError:
        raise ValueError(f"the TFDS catalogue has no dataset {name!r}") from None
    except ImportError as error:
        raise ValueError(
            f"preparing the TFDS dataset {name!r} needs more packages: {error}"
        ) from error
    return builder


def require_network(reason: str) -> None:
    """Fails at once without a network, where the TFDS downloader tries for minutes.

    Raises:
        ConnectionError: no name can be resolved, and no proxy is set that would do it.
    """
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo("storage.googleapis.com", 443)
    except OSError:
        raise ConnectionError(f"{reason} and there is no network to download it") from None
