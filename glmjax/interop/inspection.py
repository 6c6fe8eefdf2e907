"""What is in a checkpoint, without reading its weights."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glmjax.config import GLMConfig, config_to_json
from glmjax.interop.convert import VOCABULARY_FILES, verify_checksums
from glmjax.interop.folders import OfficialFolder, open_folder
from glmjax.interop.names import PREFIX, Family
from glmjax.interop.official import find_model, find_problems
from glmjax.interop.source import holds_prefix_alone
from glmjax.interop.transform import describe
from glmjax.model.params import count_params
from glmjax.presets import PRESETS
from glmjax.training.model_folder import open_model

_FORMATS = {
    "glmjax": "glmjax (orbax)",
    "hugging face": "Hugging Face",
    "ranks": "tensor-parallel ranks",
}


@dataclass(frozen=True)
class Report:
    """What `inspect` found."""

    path: str
    format: str
    model: str
    """Name of the published model with this shape, or of the family."""
    parameters: int
    """Exact number of weights, a tied output layer counted once."""
    bytes: int
    """Size of all tensors."""
    tensors: int
    dtypes: dict[str, int]
    """Number of tensors of each type."""
    files: list[str]
    ranks: int = 1
    iteration: int | str | None = None
    quantization: str | None = None
    prefix_length: int = 0
    vocabulary: list[str] = field(default_factory=list)
    """Vocabulary files beside the weights."""
    problems: list[str] = field(default_factory=list)
    """Missing, unexpected and wrong tensors."""
    config: dict[str, Any] = field(default_factory=dict)
    """The model as glmjax describes it."""


def inspect(path: str | Path, verify: bool = False) -> Report:
    """Format, model, parameters, types, size and everything that is wrong with the tensors.

    With `verify` the files must have the SHA-256 that SHA256SUMS beside them lists.

    Raises:
        FileNotFoundError, ValueError, CheckpointError, RuntimeError: it cannot be opened at all, see
            `glmjax.load`.
    """
    path = Path(path).expanduser()
    folder = open_folder(path)
    if verify:
        verify_checksums(path)
    if folder is None:
        config, parts = open_model(path)
        return Report(
            path=str(path), format=_FORMATS["glmjax"], config=config_to_json(config),
            bytes=sum(math.prod(part.shape) * part.dtype.itemsize for part in parts.values()),
            tensors=len(parts), dtypes=dict(Counter(part.dtype.name for part in parts.values())),
            files=[path.name], **_model(config, None),
        )  # fmt: skip
    return _official(path, folder)


def _official(path: Path, folder: OfficialFolder) -> Report:
    stored = [tensor for tensors in folder.ranks for tensor in tensors.values()]
    about: dict[str, Any] = {
        "path": str(path), "format": _FORMATS[folder.kind], "tensors": len(folder.ranks[0]),
        "bytes": sum(tensor.nbytes for tensor in stored),
        "dtypes": dict(Counter(tensor.dtype.name for tensor in folder.ranks[0].values())),
        "files": [file.name for file in folder.files],
        "ranks": len(folder.ranks), "iteration": folder.iteration,
        "vocabulary": [name for name in VOCABULARY_FILES if (folder.path / name).is_file()],
    }  # fmt: skip
    if holds_prefix_alone(folder):
        sizes = {name: math.prod(tensor.shape) for name, tensor in folder.ranks[0].items()}
        length = folder.ranks[0][f"{PREFIX}embedding.weight"].shape[0]
        return Report(
            **about,
            model="P-tuning v2 prefix",
            parameters=sum(sizes.values()),
            prefix_length=length,
        )
    family, config = find_model(folder.config, folder.ranks, folder.config_file or folder.path)
    problems = find_problems(config, family, folder.ranks)
    return Report(
        **about, **_model(config, family), problems=problems, config=config_to_json(config)
    )


def _model(config: GLMConfig, family: Family | None) -> dict[str, Any]:
    name = config.name
    if name not in PRESETS and family is not None:
        name = f"{family} of another size"
    return {
        "model": name,
        "parameters": count_params(config),
        "quantization": config.quantization and describe(config.quantization),
        "prefix_length": config.prefix_length,
    }


def show(report: Report, console: Console) -> None:
    """Prints a report as a table, and below it what is wrong."""
    table = Table(title=report.path, show_header=False)
    rows: dict[str, Any] = {
        "format": report.format,
        "model": report.model,
        "parameters": f"{report.parameters:,}",
        "tensors": f"{report.tensors:,}"
        + (f" on each of {report.ranks} ranks" if report.ranks > 1 else ""),
        "types": ", ".join(f"{count} {dtype}" for dtype, count in report.dtypes.items()),
        "size": f"{report.bytes:,} bytes in {len(report.files)} files",
        "iteration": report.iteration,
        "quantised": report.quantization,
        "prefix": f"{report.prefix_length} keys in front of every layer"
        if report.prefix_length
        else None,
        "vocabulary": ", ".join(report.vocabulary) or "no file of one here",
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, escape(str(value)))
    console.print(table)
    for problem in report.problems:
        console.print(escape(problem), style="red", soft_wrap=True, highlight=False)
    if not report.problems:
        console.print("every tensor is there and has the right shape and type")
