"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """The display of one run; holds the terminal while it is open."""

    def __init__(self, steps: int, *, enabled: bool) -> None:
        self._console = Console(stderr=True)
        self._enabled = enabled
        self._bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task("train", total=steps, loss="-", speed="-")
        self._steps = steps

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, step: int, run: Path) -> None:
        """The run begins, or continues behind the steps done earlier."""
        self._print(f"continuing {run} from step {step}" if step else f"training in {run}")
        self._bar.reset(self._task, completed=step)

    def finished(self, step: int, run: Path) -> None:
        """The run was complete before it was started again."""
        self._bar.update(self._task, completed=step)
        self._print(f"{run} finished at step {step} earlier; more --train.steps continue it")

    def logged(self, step: int, row: Mapping[str, Any]) -> None:
        """A line of metrics was written."""
        loss, speed = f"{row.get('loss', math.nan):.3f}", f"{row['tokens_per_second']:,.0f}"
        self._bar.update(self._task, completed=step, loss=loss, speed=speed)
        if not self._console.is_terminal:
            self._print(f"step {step}/{self._steps}  loss {loss}  {speed} tokens/s")

    def evaluated(self, step: int, heldout_loss: float, unigram_loss: float) -> None:
        """A held-out evaluation was made."""
        self._print(
            f"step {step}: held-out loss {heldout_loss:.3f} (unigram baseline {unigram_loss:.3f})"
        )

    def _print(self, text: str) -> None:
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
