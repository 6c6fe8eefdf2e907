"""Official checkpoints, written in parts.

While it is written a folder is called NAME.unfinished and keeps a journal of the parts that are on
disk, from which an interrupted conversion goes on; it gets its name when it is whole.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath

from glmjax.config import GLMConfig, Quantization, config_to_json
from glmjax.interop import safetensors_files, torch_files
from glmjax.interop.folders import JOURNAL
from glmjax.interop.names import INPUT, INV_FREQ, OUTPUT, Family, family_of
from glmjax.interop.official import part_writers
from glmjax.interop.official_config import official_fields
from glmjax.interop.places import find_places, tensor_shapes
from glmjax.interop.tensors import Stored
from glmjax.interop.transform import describe
from glmjax.model.layers import rotary_frequencies
from glmjax.model.parts import Key
from glmjax.training.checkpoint import UNFINISHED, failure_reported
from glmjax.training.journal import open_journal

SHARD_BYTES = 5 * 10**9
"""Size of one safetensors file, as Hugging Face has it."""

Sizes = dict[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and type of tensors by name."""


@dataclass(frozen=True)
class Official:
    """Where and how a model is written: hf, safetensors with a config.json; ranks, a file of PyTorch
    for each of so many tensor-parallel ranks."""

    path: Path
    format: Literal["hf", "ranks"]
    num_ranks: int = 1
    shard_bytes: int = SHARD_BYTES
    iteration: int | str | None = None


@contextlib.contextmanager
def create_official(
    target: Official, config: GLMConfig, dtypes: Mapping[str, Any], source: str | None
) -> Iterator[dict[Key, Callable[[np.ndarray], None]]]:
    """Writes a model in an official format: gives the function that writes each part that is not
    on disk yet.

    `dtypes` has the stored type of every parameter by its dotted name, `source` is a text that
    identifies the values: remains of the same work are continued, others removed, as are all with
    a source of None.

    Raises:
        FileExistsError: something is there already.
        RuntimeError: ranks need PyTorch 2.10; or another process is writing there.
        ValueError: no official format holds such a model, or a part was left out.
    """
    family = family_of(config)
    _check_quantization(config)
    path = target.path.expanduser().absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; not overwriting it")
    sizes = _tensor_sizes(config, family, target, dtypes)
    types = {name: np.dtype(dtype).name for name, dtype in dtypes.items()}
    kind = [target.format, target.num_ranks, target.shard_bytes, target.iteration]
    head = json.dumps([source, *kind, config_to_json(config), types])
    folder = path.with_name(path.name + UNFINISHED)
    journal, lines = open_journal(folder / JOURNAL, head, keep=source is not None)
    with journal:
        if not lines:
            with failure_reported(epath.Path(folder), keep=True):
                _create_files(folder, config, family, target, sizes)
        ranks = _open_files(folder, target, sizes)
        writers = part_writers(config, family, ranks)
        files = {stored.file for tensors in ranks for stored in tensors.values()}
        done = {(name, layer) for name, layer in map(json.loads, lines)}
        waiting: list[Key] = []
        noted: list[Future[None]] = []

        def note(keys: Sequence[Key]) -> None:
            for file in files:
                _sync(file)
            journal.writelines(f"{json.dumps(key)}\n".encode() for key in keys)
            journal.flush()
            done.update(keys)

        def write(key: Key, array: np.ndarray) -> None:
            if waiting and waiting[-1][1] != key[1]:  # the layer before is whole
                noted.append(executor.submit(note, [*waiting]))
                waiting.clear()
            with failure_reported(epath.Path(folder), keep=True):
                writers[key](array)
            waiting.append(key)

        with ThreadPoolExecutor(1, "journal") as executor:  # the next layer does not wait for disks
            yield {key: partial(write, key) for key in writers if key not in done}
        with failure_reported(epath.Path(folder), keep=True):
            for future in noted:
                future.result()
            note(waiting)
        left_out = [key for key in writers if key not in done]
        if left_out:
            raise ValueError(f"{len(left_out)} parts were not written, the first is {left_out[0]}")
    (folder / JOURNAL).unlink()
    if path.exists():
        path.rmdir()
    folder.rename(path)


def _check_quantization(config: GLMConfig) -> None:
    kind = config.quantization
    if kind is not None and kind != Quantization(kind.bits, kind.shards):
        raise ValueError(
            f"no official format holds a model in {describe(kind)}: only all kernels of the blocks by "
            "absmax, with a scale for each row of a rank"
        )


def _tensor_sizes(
    config: GLMConfig, family: Family, target: Official, dtypes: Mapping[str, Any]
) -> Sizes:
    """The tensors of every rank, in the order in which they are written."""
    places = find_places(config, family, target.num_ranks)
    shapes = tensor_shapes(places)
    types = {
        place.tensor: np.dtype(dtypes[name])
        for (name, _), found in places.items() for place in found
    }  # fmt: skip
    sizes = {name: (shape, types[name]) for name, shape in shapes.items()}
    for name, frequencies in _frequencies(config, family).items():
        sizes[name] = (frequencies.shape, frequencies.dtype)
    if family == "chatglm-6b" and config.tied_embeddings:
        sizes[OUTPUT] = sizes[INPUT]
    return sizes


def _frequencies(config: GLMConfig, family: Family) -> dict[str, np.ndarray]:
    """The rotary frequencies of each layer, which official files hold and official code ignores."""
    if family not in ("glm-130b", "chatglm-6b"):
        return {}
    frequencies = rotary_frequencies(config).astype(np.float16)
    return {
        f"transformer.layers.{n}.attention.rotary_emb.{INV_FREQ}": frequencies
        for n in range(config.num_layers)
    }


def _files(target: Official, sizes: Sizes) -> list[tuple[str, Sizes]]:
    """Names of the files, from the folder of the checkpoint, and the tensors of each."""
    if target.format == "ranks":
        folder = _tag(target)
        return [
            (f"{folder}/mp_rank_{rank:02}_model_states.pt", sizes)
            for rank in range(target.num_ranks)
        ]
    shards: list[Sizes] = [{}]
    room = target.shard_bytes
    for name, (shape, dtype) in sizes.items():
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if nbytes > room and shards[-1]:
            shards.append({})
            room = target.shard_bytes
        shards[-1][name] = (shape, dtype)
        room -= nbytes
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    count = len(shards)
    return [
        (f"model-{i:05}-of-{count:05}.safetensors", shard)
        for i, shard in enumerate(shards, start=1)
    ]


def _tag(target: Official) -> str:
    return str("release" if target.iteration is None else target.iteration)


def _create_files(
    folder: Path, config: GLMConfig, family: Family, target: Official, sizes: Sizes
) -> None:
    """Everything but the weights: files of full size, the index, the configuration."""
    files = _files(target, sizes)
    frequencies = _frequencies(config, family)
    for name, tensors in files:
        (folder / name).parent.mkdir(exist_ok=True)
        if target.format == "hf":
            stored = safetensors_files.create_file(folder / name, tensors)
        else:
            extra = {"iteration": target.iteration} if isinstance(target.iteration, int) else {}
            stored = torch_files.create_file(folder / name, tensors, extra)
        for tensor in frequencies.keys() & stored.keys():
            stored[tensor].write(frequencies[tensor])
    types = [dtype.name for _, dtype in sizes.values() if dtype.kind != "i"]
    fields = official_fields(family, config, max(set(types), key=types.count))
    _write_json(folder / "config.json", fields)
    if len(files) > 1 and target.format == "hf":
        total = sum(
            int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in sizes.values()
        )
        where = {tensor: name for name, tensors in files for tensor in tensors}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": where},
        )
    if target.format == "ranks":
        for tracker in ("latest", "latest_checkpointed_iteration.txt"):
            (folder / tracker).write_text(_tag(target))


def _open_files(folder: Path, target: Official, sizes: Sizes) -> Sequence[Mapping[str, Stored]]:
    files = [folder / name for name, _ in _files(target, sizes)]
    if target.format == "ranks":
        return [torch_files.open_file(file) for file in files]
    shards = [safetensors_files.open_file(file) for file in files]
    return [{name: stored for shard in shards for name, stored in shard.items()}]


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
