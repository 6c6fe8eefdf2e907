"""What of a folder is whole while it is written, so that interrupted work goes on with the rest."""

import fcntl
import logging
import shutil
from pathlib import Path
from typing import IO

from glmjax.training.checkpoint import CheckpointError

logger = logging.getLogger(__name__)


def open_journal(file: Path, head: str, keep: bool) -> tuple[IO[bytes], list[str]]:
    """The journal of a folder, open for more, and the lines that it has.

    Its first line, `head`, says of what work it is. If it is of other work or nothing is to be kept,
    and as long as nothing is whole, there are no lines and all else in the folder is removed. The
    folder is made if need be; while the journal is open no other process can open it.

    Raises:
        CheckpointError: another process has it open, or the folder cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        journal = open(file, "ab+")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise CheckpointError(f"cannot write in {file.parent}: {error}") from error
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        journal.close()
        raise CheckpointError(f"another process is writing {file.parent}") from error
    journal.seek(0)
    text = journal.read()
    whole = text[: text.rfind(b"\n") + 1]  # a line may have been cut short
    found, *lines = whole.decode(errors="replace").splitlines() or [""]
    is_same = keep and found == head
    if is_same and lines:
        journal.truncate(len(whole))
        return journal, lines
    if found and not is_same:
        logger.warning("removed %s: it was of another source or other settings", file.parent)
    for remains in file.parent.iterdir():
        if remains.is_dir():
            shutil.rmtree(remains)
        elif remains.name != file.name:
            remains.unlink()
    journal.truncate(0)
    journal.write(f"{head}\n".encode())
    journal.flush()
    return journal, []
