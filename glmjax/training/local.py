"""Checkpoints on the disks of the hosts themselves, between the durable ones.

Each process writes what its own devices hold to one file, and reads it back to the same devices:
nothing travels. They help when processes start again on the same hosts; a host that is lost takes
its file with it, and the run goes on from the durable checkpoint. The file is a zip archive of
numpy arrays, whose checksums tell whether it is whole.
"""

import json
import logging
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from glmjax.config import Experiment, config_from_json, config_to_json
from glmjax.training.history import check_continuation

logger = logging.getLogger(__name__)

KEEP = 2
EXPERIMENT = "experiment"


class LocalCheckpoints:
    """This process's part of the local checkpoints of one run."""

    def __init__(self, directory: str, run_id: str):
        """`run_id` tells the run from others that had the same folder."""
        share = f"process-{jax.process_index()}-of-{jax.process_count()}"
        self._folder = Path(directory).expanduser() / run_id / share
        self._folder.mkdir(parents=True, exist_ok=True)
        self._executor = ThreadPoolExecutor(1, "local-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Any, experiment: Experiment) -> None:
        """Copies the state off the devices and writes it in the background, then drops all but the
        newest two. A failure is reported and harms nothing."""
        self.wait()
        arrays = {EXPERIMENT: np.array(json.dumps(config_to_json(experiment)))}
        for i, leaf in enumerate(jax.tree.leaves(state)):
            for shard in leaf.addressable_shards:
                name = _part_name(i, shard.index)
                if name not in arrays:
                    arrays[name] = np.array(shard.data)  # a copy: the state is donated next
        self._pending = self._executor.submit(self._write, step, arrays)

    def newest(self, abstract_state: Any) -> int:
        """The newest step of which every process has its part whole; -1 when there is none.

        All processes ask together.
        """
        whole = [step for step in self._steps() if self._is_whole(step, abstract_state)]
        mine = np.full(KEEP + 1, -1, np.int32)  # a crash may leave one more than are kept
        mine[: len(whole)] = whole[-len(mine) :]
        of_all = multihost_utils.process_allgather(mine).reshape(jax.process_count(), -1)
        return max(set.intersection(*({-1, *map(int, steps)} for steps in of_all)))

    def restore(self, step: int, abstract_state: Any, experiment: Experiment) -> Any:
        """The state of a step, with the shardings of `abstract_state`, from which it was saved.

        Raises:
            ValueError: it belongs to another configuration, see `check_continuation`.
        """
        with np.load(self._file(step)) as arrays:
            saved = config_from_json(Experiment, json.loads(str(arrays[EXPERIMENT])))
            check_continuation(saved, experiment, step, str(self._file(step)))
            leaves, structure = jax.tree.flatten(abstract_state)
            return jax.tree.unflatten(
                structure, [_place(i, leaf, arrays) for i, leaf in enumerate(leaves)]
            )

    def drop_after(self, step: int) -> None:
        """Removes what a run that goes on from an earlier step has left."""
        for later in self._steps():
            if later > step:
                self._file(later).unlink()

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        if self._pending is not None:
            self._pending.result()

    def _write(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        partial = self._folder / "partial"
        try:
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            partial.rename(self._file(step))
        except OSError as error:
            logger.warning("no local checkpoint of step %d in %s: %s", step, self._folder, error)
            partial.unlink(missing_ok=True)
        for old in self._steps()[:-KEEP]:
            self._file(old).unlink()

    def _is_whole(self, step: int, abstract_state: Any) -> bool:
        """Whether the file has, undamaged, every part that the devices of this process need."""
        needed = {f"{EXPERIMENT}.npy"}
        for i, leaf in enumerate(jax.tree.leaves(abstract_state)):
            indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            needed |= {f"{_part_name(i, index)}.npy" for index in indices}
        try:
            with zipfile.ZipFile(self._file(step)) as archive:
                damage = "other parts" if set(archive.namelist()) != needed else archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            damage = str(error)
        if damage:
            logger.warning("local checkpoint %s is of no use: %s", self._file(step), damage)
        return damage is None

    def _steps(self) -> list[int]:
        return sorted(int(file.stem) for file in self._folder.glob("*.npz"))

    def _file(self, step: int) -> Path:
        return self._folder / f"{step}.npz"


def _place(i: int, leaf: jax.ShapeDtypeStruct, arrays: Mapping[str, np.ndarray]) -> jax.Array:
    """One leaf of the state from its parts."""

    def part(index: Any) -> np.ndarray:
        # numpy forgets the names of types that are not its own, such as bfloat16.
        return arrays[_part_name(i, index)].view(leaf.dtype)

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _part_name(leaf: int, index: tuple[slice, ...]) -> str:
    """The name of one part of the state: of which leaf, and where it begins and ends."""
    return ",".join([str(leaf), *(f"{part.start or 0}:{part.stop or ''}" for part in index)])
