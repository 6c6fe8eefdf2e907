"""The command `glmjax inspect`."""

import dataclasses
import json
from dataclasses import dataclass

import tyro
from rich.console import Console

HELP = """Says what a checkpoint holds: format, model, exact number of parameters, types, and every
tensor that is missing, unexpected or of the wrong shape. Weights are not read. Exit status 1 when
something is wrong with it.

examples:
  glmjax inspect chatglm-6b
  glmjax inspect glm-130b-sat --json
  glmjax inspect runs/quickstart
  glmjax inspect chatglm-6b --verify"""


@dataclass(frozen=True)
class InspectFlags:
    path: tyro.conf.Positional[str]
    """A folder, or one of its files."""
    verify: bool = False
    """Also compare the files with the SHA-256 that SHA256SUMS beside them lists."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(arguments: list[str]) -> int:
    flags = tyro.cli(InspectFlags, args=arguments, prog="glmjax inspect", description=HELP)

    from glmjax.interop import inspection

    report = inspection.inspect(flags.path, flags.verify)
    if flags.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        inspection.show(report, Console())
    return 1 if report.problems else 0
