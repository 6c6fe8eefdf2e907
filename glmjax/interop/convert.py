"""Any format to any format, a layer at a time."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from glmjax.config import GLMConfig
from glmjax.interop import lora as adapters
from glmjax.interop.destination import SHARD_BYTES, Official, create_official
from glmjax.interop.folders import expected_sha256, verify_sha256
from glmjax.interop.layout import contiguous
from glmjax.interop.source import Format, Source, open_source
from glmjax.interop.transform import Dtype, Quantize, transform
from glmjax.model.params import Params
from glmjax.model.parts import Key, Part, read_ahead, take_apart
from glmjax.training.model_folder import create_model

VOCABULARY_FILES = (
    "ice_text.model", "cog-pretrain.model", "tokenizer.model", "tokenizer_config.json",
    "vocab.json", "merges.txt", "vocab.txt", "gpt2-vocab.json", "gpt2-merges.txt",
    "roberta-vocab.json", "roberta-merges.txt", "bert-base-uncased-vocab.txt", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files beside the weights that tokenizers read; they travel with the model."""

Progress = Callable[[int, int], Any]
"""Called with the bytes that are done and those of the whole model."""


def convert(
    source: str | Path,
    target: str | Path,
    to: Format = "glmjax",
    *,
    ranks: int = 1,
    dtype: Dtype | None = None,
    quantize: Quantize | None = None,
    prefix: str | Path | None = None,
    lora: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    progress: Progress = lambda done, total: None,
) -> GLMConfig:
    """Reads a model in any format that `load` knows and writes it in another; returns what it is.

    `to` is glmjax, hf (safetensors and config.json as on Hugging Face) or ranks (a PyTorch file for
    each of `ranks` tensor-parallel ranks, as THUDM/GLM and GLM-130B have). Types stay as they are
    unless `dtype` or `quantize` say otherwise, and then so do all bits; with ranks, what is
    quantised has scales for each rank's share, as the official tools make them. Vocabulary files
    beside the source are copied. No more than about two layers are in memory. A conversion that was
    interrupted goes on when it is called again; until it is whole, TARGET does not exist.

    With `verify` the files must have the SHA-256 that the source's SHA256SUMS lists.

    Raises:
        FileExistsError: the target holds something else.
        FileNotFoundError, ValueError, CheckpointError, RuntimeError: as `load`.
    """
    opened = open_source(source, prefix)
    if lora is not None:
        opened = adapters.merge(opened, lora, quantize)
    if verify:
        verify_checksums(opened.path)
    shards = ranks if to == "ranks" else 1
    config, parts = transform(opened.config, opened.parts, dtype, quantize, shards)
    target = Path(target).expanduser()
    official = None
    if to != "glmjax":
        iteration = opened.folder.iteration if opened.folder else None
        official = Official(target, to, ranks, shard_bytes, iteration)
    # Values and scales of a kernel come of one reading, which must not be done twice at a time.
    threads = 2 if quantize in (None, "float") else 1
    sources = _fingerprint(opened, prefix, lora)
    _write(official or target, config, parts, sources, progress, threads)
    for name in VOCABULARY_FILES:
        file = opened.path / name
        if file.is_file() and not (target / name).exists():
            shutil.copyfile(file, target / name)
    return config


def export(
    target: str | Path,
    config: GLMConfig,
    params: Params,
    to: Literal["hf", "ranks"] = "hf",
    *,
    ranks: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model that is in memory in an official format, see `convert`.

    Raises:
        FileExistsError: the target holds something else.
        ValueError: no official format holds such a model.
    """
    official = Official(Path(target), to, ranks, shard_bytes)
    _write(official, config, take_apart(config, params), None, lambda done, total: None)


def verify_checksums(path: Path) -> int:
    """Compares files with the SHA-256 that SHA256SUMS beside them lists; returns how many.

    Raises:
        FileNotFoundError: there is no SHA256SUMS, or a file that it lists is missing.
        ValueError: a file differs.
    """
    folder = path if path.is_dir() else path.parent
    sums = expected_sha256(folder)
    if not sums:
        raise FileNotFoundError(f"{folder} has no SHA256SUMS to verify its files by")
    for file, expected in sums.items():
        verify_sha256(file, expected)
    return len(sums)


def _write(
    target: Path | Official,
    config: GLMConfig,
    parts: Mapping[Key, Part],
    source: str | None,
    progress: Progress,
    threads: int = 1,
) -> None:
    dtypes = {name: part.dtype for (name, _), part in parts.items()}
    if isinstance(target, Official):
        writing = create_official(target, config, dtypes, source)
    else:
        writing = create_model(target, config, dtypes, source)
    sizes = {key: math.prod(part.shape) * part.dtype.itemsize for key, part in parts.items()}
    total = sum(sizes.values())
    with writing as writers:
        done = total - sum(sizes[key] for key in writers)
        progress(done, total)
        left = {key: parts[key] for key in parts if key in writers}
        if not isinstance(target, Official):  # whose writers transpose, mostly back
            left = {key: _contiguous(part) for key, part in left.items()}
        for key, array in read_ahead(left, threads):
            writers[key](array)
            done += sizes[key]
            progress(done, total)


def _contiguous(part: Part) -> Part:
    """The part, which is read as a contiguous array."""
    return part._replace(read=lambda: contiguous(part.read()))


def _fingerprint(source: Source, *added: str | Path | None) -> str:
    """A text that changes when the files of the source do, or those of what is added to it."""
    if source.folder is not None:
        files = list(source.folder.files)
    else:
        files = sorted(file for file in source.path.rglob("*") if file.is_file())
    for path in (Path(path).expanduser() for path in added if path is not None):
        files += sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(str(file.resolve()), file.stat()) for file in files]
    text = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()
