"""The command `python -m experiments.reproduce`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from experiments.reproduce import (
    compute,
    figures,
    memory,
    model,
    objective,
    parameters,
    report,
    schedule,
    scores,
)
from experiments.reproduce.number import Number
from glmjax.data.cache import write_whole

TOPICS = (parameters, compute, schedule, memory, model, objective, scores)
HELP = """Computes the published numbers of the GLM family that need no training run and no weights.

Prints published, ours, difference, how ours was obtained and the source, and writes
reproduction.md, reproduction.json and figures. Ends with status 1 when a number differs for no
known reason. Takes seconds.

examples:
  python -m experiments.reproduce
  python -m experiments.reproduce --out reproduction"""


@dataclass(frozen=True)
class Flags:
    out: Path = Path(__file__).parents[1] / "results"
    """Folder that the report is written to."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the report; 1 if a number differs for no known reason."""
    flags = tyro.cli(
        Flags, args=arguments, prog="python -m experiments.reproduce", description=HELP
    )
    numbers = all_numbers()
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
        write_whole(flags.out / "reproduction.md", report.to_markdown(numbers).encode())
        write_whole(flags.out / "reproduction.json", report.to_json(numbers).encode())
        figures.draw(flags.out)
    except OSError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    # A pipe has no width of its own.
    report.show(numbers, Console(width=None if sys.stdout.isatty() else 200))
    return int(any(number.verdict == "differs" for number in numbers))


def all_numbers() -> list[Number]:
    """Every number, topic by topic."""
    return [number for topic in TOPICS for number in topic.numbers()]


if __name__ == "__main__":
    sys.exit(main())
