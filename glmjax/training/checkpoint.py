"""Checkpoints that are either whole or noticed not to be.

One checkpoint is one folder: `state/` (orbax), `metadata.json` (the configuration and what made it)
and the checksum of every file. It is written under the name STEP.unfinished and renamed to STEP
when all of that is on disk, so a folder with a number for a name was once whole, and its checksums
tell whether it still is. A model saved alone is such a folder too, see `model_folder`. All uses of
orbax are in this file; nothing in a checkpoint is ever executed.
"""

import contextlib
import functools
import json
import logging
import math
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from glmjax.config import (
    DistributedConfig,
    Experiment,
    config_from_json,
    config_to_json,
)
from glmjax.model.params import leaf_name
from glmjax.training import checksums
from glmjax.training.distributed import barrier
from glmjax.training.history import check_continuation
from glmjax.version import __version__

logger = logging.getLogger(__name__)

UNFINISHED, REPLACED = ".unfinished", ".replaced"
LARGE_LAYER_BYTES = 1 << 20

# What orbax cannot do it raises, and this file reports; its running commentary, and the one of its
# writes that fail after the first has, is not for users.
for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(
        lambda record: "orbax" not in record.pathname + record.getMessage()
    )


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those there can be read."""


class Checkpoints:
    """The checkpoints of one run: a folder of steps, of which the newest `keep` are kept."""

    def __init__(
        self,
        directory: str | Path,
        keep: int,
        barrier_seconds: int = DistributedConfig.barrier_seconds,
    ):
        """Makes the folder if need be and clears away what an interrupted save left behind.

        `barrier_seconds` is how long the processes of a job wait for each other's part of a save.

        Raises:
            CheckpointError: the folder cannot be made.
        """
        self.directory = absolute_path(directory)
        self._keep = keep
        self._damaged: set[int] = set()
        self._barrier_seconds = barrier_seconds
        self._checkpointer = _checkpointer(barrier_seconds)
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {self.directory}: {error}") from error
        for folder in self._remove_remains():
            logger.warning("removed %s: its save was interrupted", folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return _steps(self.directory)

    def save(self, step: int, state: Any, experiment: Experiment) -> None:
        """Starts to write a tree of arrays and returns once the arrays may be overwritten.

        The save before it is waited for. A step that is there already is left as it is, unless
        `restore_latest` found it damaged. Older checkpoints are removed when this one is whole.

        Raises:
            CheckpointError: this or the previous save failed, say because the disk is full.
        """
        self.wait()
        if step in set(self.steps()) - self._damaged:
            return
        metadata = {
            **versions(),
            "step": step,
            "seed": experiment.train.seed,
            "experiment": config_to_json(experiment),
        }
        folder = self.directory / f"{step}{UNFINISHED}"
        self._remove_remains()
        with failure_reported(folder):
            _start_writing(self._checkpointer, folder, state, metadata)
        self._pending = self._executor.submit(self._finish, step)

    def wait(self) -> None:
        """Waits until the last save is whole.

        Raises:
            CheckpointError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and frees the threads.

        Raises:
            CheckpointError: the save failed.
        """
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            self._checkpointer.close()

    def restore_latest(
        self, abstract_state: Any, experiment: Experiment, after: int = -1
    ) -> tuple[int, Any] | None:
        """The step and state of the newest whole checkpoint; None when none is after step `after`.

        Damaged ones are reported and passed over. The state goes to the shardings of
        `abstract_state`, a tree of `jax.ShapeDtypeStruct`, whatever mesh it was saved from.

        Raises:
            CheckpointError: there are checkpoints and all are damaged.
            ValueError: it belongs to another configuration, see `check_continuation`.
        """
        self.wait()
        step, self._damaged = newest_whole(self.directory, after)
        if step is None:
            return None
        folder = self.directory / str(step)
        saved = config_from_json(Experiment, read_metadata(folder)["experiment"])
        check_continuation(saved, experiment, step, str(folder))
        return step, _restore(folder, abstract_state)

    def _remove_remains(self) -> list[epath.Path]:
        """Removes what interrupted or failed saves left behind; returns the unfinished folders."""
        if jax.process_index() != 0:
            return []
        for folder in self.directory.glob(f"*{REPLACED}"):
            folder.rmtree()
        unfinished = list(self.directory.glob(f"*{UNFINISHED}"))
        for folder in unfinished:
            folder.rmtree()
        return unfinished

    def _finish(self, step: int) -> None:
        """Completes a save in the background; only then removes checkpoints no longer wanted."""
        folder = self.directory / f"{step}{UNFINISHED}"
        with failure_reported(folder):
            target = self.directory / str(step)
            _finish_writing(self._checkpointer, folder, target, self._barrier_seconds)
        older = [s for s in self.steps() if s < step and s not in self._damaged]
        unwanted = {*older[: max(0, len(older) + 1 - self._keep)], *(self._damaged - {step})}
        self._damaged = set()
        if jax.process_index() == 0:
            for s in unwanted:
                (self.directory / str(s)).rmtree()


def check_vacant(target: epath.Path) -> None:
    """Refuses to write a model where something else is.

    Raises:
        FileExistsError: it is there.
    """
    vacant = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not vacant and not (checksums.exist(target) and "model" in read_metadata(target)):
        raise FileExistsError(f"{target} exists and is not a glmjax model; not overwriting it")


def save_tree(target: epath.Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Writes a tree of arrays, of which each process of a job has a share.

    Raises:
        CheckpointError: the disk is full, or the like.
    """
    folder = target.with_name(target.name + UNFINISHED)
    seconds = DistributedConfig.barrier_seconds
    with _checkpointer(seconds) as checkpointer, failure_reported(folder):
        _start_writing(checkpointer, folder, tree, metadata)
        _finish_writing(checkpointer, folder, target, seconds)


def _checkpointer(barrier_seconds: int) -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(), async_options=ocp.AsyncOptions(timeout_secs=barrier_seconds)
    )


def _start_writing(
    checkpointer: ocp.AsyncCheckpointer, folder: epath.Path, state: Any, metadata: dict[str, Any]
) -> None:
    """Copies the state off the devices and begins to write it to a new folder."""
    if jax.process_index() == 0:
        if folder.exists():
            folder.rmtree()
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2))
    with jax.transfer_guard("allow"):
        save_args = jax.tree_util.tree_map_with_path(_save_args, state)
        checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(state, save_args=save_args))


def _save_args(path: tuple[Any, ...], leaf: jax.Array) -> ocp.SaveArgs:
    """One chunk for each large layer, so that it can be read without the others."""
    if "blocks." not in leaf_name(path):
        return ocp.SaveArgs()
    _, *layer = leaf.sharding.shard_shape(leaf.shape)
    layer_bytes = math.prod(layer) * leaf.dtype.itemsize
    if layer_bytes < LARGE_LAYER_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=layer_bytes, shard_axes=(0,))


def _finish_writing(
    checkpointer: ocp.AsyncCheckpointer, folder: epath.Path, target: epath.Path, seconds: int
) -> None:
    """Waits for the data, adds checksums and gives the folder its final name."""
    checkpointer.wait_until_finished()
    checksums.write(folder, jax.process_index(), jax.process_count())
    barrier(f"the checksums of {target}", seconds)
    if jax.process_index() == 0:
        give_name(folder, target)
    barrier(f"the new name of {target}", seconds)


def give_name(folder: epath.Path, target: epath.Path) -> None:
    """Gives a whole folder its final name; what has that name is removed."""
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        if replaced.exists():  # this was interrupted before
            replaced.rmtree()
        target.rename(replaced)
    folder.rename(target)
    if replaced.exists():
        replaced.rmtree()


@contextlib.contextmanager
def failure_reported(folder: epath.Path, keep: bool = False) -> Iterator[None]:
    """Turns whatever stops a save into one `CheckpointError`, and frees the disk unless told to keep."""
    try:
        yield
    except Exception as error:
        if not keep and jax.process_index() == 0 and folder.exists():
            with contextlib.suppress(OSError):  # writes under way may still add files
                folder.rmtree()
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        kept = f", and {folder} keeps what is whole" if keep else ""
        raise CheckpointError(
            f"could not save {folder.with_suffix('')} ({cause}); what was saved before is unharmed"
            + kept
        ) from error


def _restore(folder: epath.Path, abstract_state: Any) -> Any:
    """The leaves of a checkpoint that `abstract_state` names, placed by its shardings."""
    default = jax.device_put(0).sharding
    abstract_state = jax.tree.map(
        lambda leaf: leaf if leaf.sharding else leaf.update(sharding=default), abstract_state
    )
    with jax.transfer_guard("allow"), ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                abstract_state,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
                partial_restore=True,
            ),
        )


def newest_whole(directory: epath.Path, after: int = -1) -> tuple[int | None, set[int]]:
    """The newest whole step after `after`, and the damaged ones behind it, which are reported.

    Raises:
        CheckpointError: every step is damaged, and there is no `after` to fall back on.
    """
    damaged: dict[int, str] = {}
    whole = None
    for step in reversed([step for step in _steps(directory) if step > after]):
        damage = checksums.find_damage(directory / str(step))
        if damage is None:
            whole = step
            break
        damaged[step] = damage
    if damaged and whole is None and after < 0:
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(f"every checkpoint in {directory} is damaged: {reasons}")
    for step, reason in damaged.items():
        logger.warning(
            "checkpoint %s is damaged (%s); step %d is used instead",
            directory / str(step), reason, after if whole is None else whole,
        )  # fmt: skip
    return whole, set(damaged)


def _steps(directory: epath.Path) -> list[int]:
    return sorted(int(folder.name) for folder in directory.iterdir() if folder.name.isdecimal())


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    return json.loads((folder / "metadata.json").read_text())


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of glmjax and jax, and the git commit when glmjax runs from its repository."""
    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        result = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True)
        commit = result.stdout.strip() or None
    return {"glmjax": __version__, "commit": commit, "jax": jax.__version__}


def absolute_path(path: str | Path) -> epath.Path:
    return epath.Path(path).expanduser().resolve()
