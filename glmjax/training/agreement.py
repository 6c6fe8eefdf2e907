"""What the processes of a job must have in common before they train."""

import hashlib
import uuid
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils


def check_equal(value: str, what: str) -> None:
    """Checks that a value is the same in all processes.

    Raises:
        ValueError: it is not; names the processes that differ from process 0.
    """
    mine = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    of_all = multihost_utils.process_allgather(mine).reshape(jax.process_count(), -1)
    others = np.flatnonzero((of_all != of_all[0]).any(axis=1)).tolist()
    if others:
        raise ValueError(f"{what} of processes {others} differs from that of process 0")


def from_process_0(name: uuid.UUID) -> uuid.UUID:
    """The name that process 0 has."""
    given = multihost_utils.broadcast_one_to_all(np.frombuffer(name.bytes, np.uint8))
    return uuid.UUID(bytes=np.asarray(given, np.uint8).tobytes())


def check_shared(folder: Path) -> None:
    """Checks that all processes see the same folder, which is made if need be.

    Raises:
        ValueError: they do not; names those that see another than process 0.
    """
    if jax.process_count() == 1:
        return
    mark = folder / f".{from_process_0(uuid.uuid4()).hex}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    multihost_utils.sync_global_devices("mark")
    sees = multihost_utils.process_allgather(np.array(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    blind = np.flatnonzero(~sees).tolist()
    if blind:
        raise ValueError(
            f"processes {blind} do not see {folder} of process 0; it must be on a file system that "
            "all hosts share"
        )
