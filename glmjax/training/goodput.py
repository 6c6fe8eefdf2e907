"""Where the time of a run went, over all starts of it: the ledger goodput.jsonl.

Every second belongs to one kind. A line tells how many steps are done and how many seconds each
kind took since the line before; the first line of a start tells from which step it goes on, and
when it began. What earlier starts did behind that step is lost work.
"""

import contextlib
import itertools
import json
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from glmjax.training.metrics import read_metrics, truncate_metrics

Kind = Literal["init", "compile", "data", "step", "evaluate", "checkpoint"]


class Ledger:
    """The clock of one process, which `path` makes write lines."""

    def __init__(self, began: float, path: Path | None):
        """`began` is the Unix time from which on the process counts, as "init"."""
        self.run_id = uuid.uuid4()
        """A name that the run keeps over all starts."""
        self._path, self._began = path, began
        self._kind: Kind = "init"
        self._since = began
        self._seconds: dict[str, float] = {}
        self._noted: dict[str, float] = {}
        self._lines: list[dict[str, Any]] = []
        if path is not None and path.exists():
            truncate_metrics(path, sys.maxsize)  # a crash may have cut the last line short
            self._lines = read_metrics(path)
            self.run_id = uuid.UUID(self._lines[0]["run"]) if self._lines else self.run_id

    def start(self, step: int) -> None:
        """This process goes on from a step."""
        line = {"step": step, "time": self._began, "run": self.run_id.hex}
        self._write(line)
        self._earlier = seconds_spent([*self._lines, line])

    def enter(self, kind: Kind) -> None:
        """From now on time is of this kind."""
        now = time.time()
        self._seconds[self._kind] = self._seconds.get(self._kind, 0) + now - self._since
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def spending(self, kind: Kind) -> Iterator[None]:
        """The time inside is of this kind."""
        before = self._kind
        self.enter(kind)
        yield
        self.enter(before)

    def note(self, step: int) -> dict[str, float]:
        """Writes a line; returns the share of each kind in the time of the whole run so far."""
        self.enter(self._kind)
        new = {kind: spent - self._noted.get(kind, 0) for kind, spent in self._seconds.items()}
        self._noted = dict(self._seconds)
        self._write({"step": step, "time": self._since, "seconds": new})
        kinds = self._earlier.keys() | self._seconds.keys()
        spent = {k: self._earlier.get(k, 0) + self._seconds.get(k, 0) for k in sorted(kinds)}
        return {kind: seconds / sum(spent.values()) for kind, seconds in spent.items()}

    def _write(self, line: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def seconds_spent(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The seconds of each kind that a ledger tells of, those of lost steps as "lost", and those
    between the last line of a start and the next start as "down"."""
    spent: dict[str, float] = defaultdict(float)
    redone_from = sys.maxsize
    for before, line in reversed(list(itertools.pairwise(lines))):
        if "run" in line:
            redone_from = min(redone_from, line["step"])
            spent["down"] += max(0, line["time"] - before["time"])
            continue
        steps = line["step"] - before["step"]
        kept = min(steps, max(0, redone_from - before["step"]))
        for kind, seconds in line["seconds"].items():
            lost = seconds * (steps - kept) / steps if kind in ("data", "step") and steps else 0
            spent[kind] += seconds - lost
            spent["lost"] += lost
    return {kind: seconds for kind, seconds in spent.items() if seconds}
