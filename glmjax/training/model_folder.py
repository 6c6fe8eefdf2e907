"""Models on disk, written and read one layer of one parameter at a time.

A model folder holds `metadata.json`, the checksum of every file, and `state/`, which orbax restores:
each parameter is a zarr array of uncompressed chunks of one layer, so that a chunk file is the bytes
of one part; where layers differ, each has arrays of its own. While it is written it is called NAME.unfinished and lists the parts that are whole,
from which an interrupted conversion goes on.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath

from glmjax.config import GLMConfig, config_from_json, config_to_json
from glmjax.model.params import Params, blocks_apart
from glmjax.model.parts import Key, Part, assemble, leaf_of, part_specs, read_ahead, take_apart
from glmjax.training import checksums, streaming
from glmjax.training.checkpoint import (
    UNFINISHED,
    CheckpointError,
    absolute_path,
    check_vacant,
    failure_reported,
    give_name,
    newest_whole,
    read_metadata,
    save_tree,
    versions,
)
from glmjax.training.journal import open_journal

JOURNAL = "checksums-so-far.txt"


@contextlib.contextmanager
def create_model(
    path: str | Path, config: GLMConfig, dtypes: Mapping[str, Any], source: str | None
) -> Iterator[dict[Key, Callable[[np.ndarray], None]]]:
    """Writes a model in parts: gives the function that writes each part that is not on disk yet.

    `dtypes` has the stored type of every parameter by its dotted name. When all parts are written
    the folder gets its name, and a model of that name is replaced. When the work is cut short, the
    parts that are whole stay in PATH.unfinished, and the next call with the same configuration,
    types and `source`, a text that identifies the values, goes on with the rest; the remains of
    other work are removed. With a source of None nothing is kept. Threads may share the functions.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: a part has another shape or type, or was left out.
        CheckpointError: the disk is full, or the like.
    """
    target = absolute_path(path)
    check_vacant(target)
    folder = target.with_name(target.name + UNFINISHED)
    expected, apart = part_specs(config), blocks_apart(config)
    keep = source is not None
    journal, sums = _resume(folder, config, dtypes, source)
    noted: list[Future[None]] = []

    def file_name(key: Key) -> str:
        return _file_name(leaf_of(key, apart), expected[key].shape)

    def left() -> list[Key]:
        return [key for key in expected if file_name(key) not in sums]

    def write(key: Key, array: np.ndarray) -> None:
        shape, dtype = expected[key].shape, np.dtype(dtypes[key[0]])
        if (array.shape, array.dtype) != (shape, dtype):
            raise ValueError(
                f"{_describe(key)} must be {dtype}{list(shape)}, not "
                f"{array.dtype}{list(array.shape)}"
            )
        file = file_name(key)
        with failure_reported(folder, keep):
            sum = _write_part(folder / file, np.ascontiguousarray(array))
        noted.append(executor.submit(note, file, sum))

    def note(file: str, sum: str) -> None:
        """Adds a part to the journal once it is on the disk and not only on the way to it."""
        with (folder / file).open("rb") as stream:
            os.fsync(stream.fileno())
        journal.write(f"{sum} {file}\n".encode())
        journal.flush()
        sums[file] = sum

    with journal:
        with failure_reported(folder, keep):
            _check_space(folder, {key: expected[key].shape for key in left()}, dtypes)
        with ThreadPoolExecutor() as executor:
            yield {key: functools.partial(write, key) for key in left()}
        with failure_reported(folder, keep):
            for future in noted:
                future.result()
        if left():
            first = _describe(left()[0])
            raise ValueError(f"{len(left())} parts of {target} were not written: {first} and so on")
        with failure_reported(folder, keep):
            checksums.write(folder, 0, 1, sums)
            give_name(folder, target)
            (target / JOURNAL).unlink()


def open_model(path: str | Path) -> tuple[GLMConfig, dict[Key, Part]]:
    """The configuration and the parts of the model in a folder, none of them read yet.

    The folder is a saved model, a run, its checkpoints, or one of these; of several checkpoints the
    newest whole one is taken. Parts have the types that are stored. Files that hold one part are
    checked when it is read, which raises `CheckpointError` too; all others are checked here.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not a glmjax checkpoint.
        CheckpointError: it is damaged.
    """
    folder = _find(absolute_path(path))
    sums = checksums.read(folder)
    metadata = read_metadata(folder)
    model = metadata["model"] if "model" in metadata else metadata["experiment"]["model"]
    config = config_from_json(GLMConfig, model)
    arrays: dict[str, tensorstore.TensorStore] = {}
    parts: dict[Key, Part] = {}
    apart = blocks_apart(config)
    for key, spec in part_specs(config).items():
        name, layer = leaf_of(key, apart)
        if name not in arrays:
            arrays[name] = _open_array(folder / "state", name)
        array = arrays[name] if layer is None else arrays[name][layer]
        if array.shape != spec.shape:
            raise CheckpointError(
                f"{folder} holds {_describe(key)} as {list(array.shape)}, but its configuration "
                f"says {list(spec.shape)}"
            )
        dtype = array.dtype.numpy_dtype
        file = _file_name((name, layer), spec.shape)
        if _is_database(folder / "state"):
            read = functools.partial(_read_slice, array)
        elif file in sums:
            read = functools.partial(_read_part, folder, file, sums[file], spec.shape, dtype)
        else:
            raise CheckpointError(f"{folder} is damaged: {file} has no checksum")
        parts[key] = Part(spec.shape, dtype, read)
    return config, parts


def save_model(path: str | Path, config: GLMConfig, params: Params) -> None:
    """Writes a model to a folder; one that is there already is replaced when the new one is whole.

    The stored types are those of the parameters, which may be in any arrangement. In a job of
    several processes each writes its share of all arrays, and the folder has the form of training
    checkpoints.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: several processes have the parameters in another arrangement than `STORED`.
        CheckpointError: the disk is full, or the like.
    """
    if jax.process_count() > 1:
        if not _is_stored(config, params):
            raise ValueError(
                "a job of several processes saves a model as it is stored, not as it lies for decoding"
            )
        target = absolute_path(path)
        check_vacant(target)
        save_tree(target, {"params": params}, {**versions(), "model": config_to_json(config)})
        return
    parts = take_apart(config, params)
    dtypes = {name: part.dtype for (name, _), part in parts.items()}
    with create_model(path, config, dtypes, source=None) as write:
        for key, array in read_ahead(parts):
            write[key](array)


def load_model(path: str | Path) -> tuple[GLMConfig, Params]:
    """The model in a folder, see `open_model`, on the mesh of `jax.set_mesh` if one is set.

    The parameters have the types that are stored.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not a glmjax checkpoint.
        CheckpointError: it is damaged.
    """
    config, parts = open_model(path)
    return config, assemble(config, parts)


def _find(folder: epath.Path) -> epath.Path:
    """The folder of a model or of a training state, whole but for files that hold one part."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist")
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if checksums.exist(folder):
        damage = checksums.find_damage(folder, lambda name: not _is_part(name))
        if damage:
            raise CheckpointError(f"{folder} is damaged: {damage}")
        return folder
    step = newest_whole(folder)[0] if folder.is_dir() else None
    if step is None:
        raise ValueError(
            f"{folder} holds no model: no checkpoint of glmjax, and no official weights "
            "(model.safetensors, pytorch_model.bin, mp_rank_XX_model_states.pt)"
        )
    return folder / str(step)


def _is_stored(config: GLMConfig, params: Params) -> bool:
    is_int4 = any(leaf.dtype == jnp.int4 for leaf in jax.tree.leaves(params))
    return isinstance(params.blocks, tuple) == blocks_apart(config) and not is_int4


def _file_name(leaf: Key, shape: tuple[int, ...]) -> str:
    """Where a part, told by its leaf, lies in its model folder: the chunk of a zarr array that orbax
    calls params.NAME."""
    name, layer = leaf
    indices = [0] * len(shape) if layer is None else [layer, *[0] * len(shape)]
    return f"state/params.{name}/{'.'.join(map(str, indices))}"


def _is_part(name: str) -> bool:
    return name.startswith("state/params.") and not name.endswith("/.zarray")


def _describe(key: Key) -> str:
    name, layer = key
    return name if layer is None else f"{name} of layer {layer}"


def _resume(
    folder: epath.Path, config: GLMConfig, dtypes: Mapping[str, Any], source: str | None
) -> tuple[IO[bytes], dict[str, str]]:
    """The list of whole parts, open for more, and the checksums of those that it has by file."""
    types = {name: np.dtype(dtype).name for name, dtype in dtypes.items()}
    head = json.dumps({"source": source, "model": config_to_json(config), "types": types})
    journal, lines = open_journal(Path(folder / JOURNAL), head, keep=source is not None)
    if not lines:
        with failure_reported(folder):
            _create_arrays(folder, config, dtypes)
    sums = dict(map(checksums.parse, lines))
    return journal, {name: sum for name, sum in sums.items() if (folder / name).exists()}


def _check_space(
    folder: epath.Path, shapes: Mapping[Key, tuple[int, ...]], dtypes: Mapping[str, Any]
) -> None:
    """Refuses at the start what would fill the disk in the end."""
    needed = sum(
        math.prod(shape) * np.dtype(dtypes[name]).itemsize for (name, _), shape in shapes.items()
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{needed / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free")


def _create_arrays(folder: epath.Path, config: GLMConfig, dtypes: Mapping[str, Any]) -> None:
    """Writes all of a model but its parts, as orbax does with use_ocdbt = False."""
    state = folder / "state"
    state.mkdir(parents=True)
    metadata = {**versions(), "model": config_to_json(config)}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2))
    tree = {}
    apart = blocks_apart(config)
    for key, spec in part_specs(config).items():
        name, layer = leaf_of(key, apart)
        if layer not in (None, 0):
            continue
        layers, one = ((), ()) if layer is None else ((config.num_layers,), (1,))
        tensorstore.open(
            _zarr(state, name) | {"metadata": {"compressor": None}},
            create=True,
            dtype=tensorstore.dtype(np.dtype(dtypes[key[0]])),
            shape=(*layers, *spec.shape),
            chunk_layout=tensorstore.ChunkLayout(chunk_shape=(*one, *spec.shape)),
        ).result()
        keys = ("params", *name.split("."))
        tree[str(keys)] = {
            "key_metadata": [  # 1: of a sequence, 2: of a dictionary
                {"key": key, "key_type": 1 if key.isdecimal() else 2} for key in keys
            ],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    (state / "_METADATA").write_text(
        json.dumps({"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False})
    )


def _zarr(state: epath.Path, name: str) -> dict[str, Any]:
    """Where tensorstore finds a parameter in what orbax wrote."""
    store: dict[str, Any] = {"driver": "file", "path": f"{state}/"}
    if _is_database(state):
        store = {"driver": "ocdbt", "base": store}
    return {"driver": "zarr", "kvstore": store, "path": f"params.{name}/"}


def _is_database(state: epath.Path) -> bool:
    """Whether arrays lie together in few files, as orbax writes them, and not in files of parts."""
    return (state / "manifest.ocdbt").exists()


def _open_array(state: epath.Path, name: str) -> tensorstore.TensorStore:
    try:
        return tensorstore.open(_zarr(state, name), open=True, read=True).result()
    except ValueError as error:
        cause = str(error).splitlines()[0]
        raise CheckpointError(f"{state.parent} lacks the parameter {name} ({cause})") from error


def _write_part(file: epath.Path, array: np.ndarray) -> str:
    """Writes a file and returns its checksum."""
    crc = 0
    with file.open("wb") as stream:
        for block in streaming.write(stream, array):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x} {array.nbytes}"


def _read_part(
    folder: epath.Path, name: str, sum: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """A part from the file that holds it alone, checked on the way."""
    try:
        array, crc = np.empty(shape, dtype), 0
        with (folder / name).open("rb") as stream:
            for block in streaming.read(stream, array):
                crc = zlib.crc32(block, crc)
            size = os.fstat(stream.fileno()).st_size
        damage = checksums.difference(name, f"{crc:08x} {size}", sum)
    except OSError as error:
        damage = f"{name}: {error.strerror}"
    if damage:
        raise CheckpointError(f"{folder} is damaged: {damage}")
    return array


def _read_slice(array: tensorstore.TensorStore) -> np.ndarray:
    return array.read().result()
