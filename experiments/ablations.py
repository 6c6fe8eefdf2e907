"""All ablations, one after another, and a table of what became of each trend.

    python -m experiments.documents                      # writes the documents of one of them
    python -m experiments.ablations                      # takes the flags of `glmjax sweep`
    python -m experiments.ablations --scale gpu --jobs 4

What one of them trained serves the others. The table goes to OUT/ablations_SCALE.md.
"""

import importlib
import sys
from pathlib import Path

import tyro

from glmjax.cli import sweep as command
from glmjax.data.cache import write_whole
from glmjax.sweep.ablation import summary_line
from glmjax.sweep.results import read_results

ABLATIONS = (
    "positions", "feed_forward", "norms", "embedding_shrink", "objectives", "context", "span_order",
    "decoder_noise", "documents", "softmax_precision",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    files = [Path(__file__).with_name(f"{name}.py") for name in ABLATIONS]
    flags = tyro.cli(command.SweepFlags, args=[str(files[0]), *arguments])
    statuses = [command.main([str(file), *arguments]) for file in files]
    if not flags.list and flags.trial is None:
        table = summary_table(flags.out, flags.scale)
        write_whole(flags.out / f"ablations_{flags.scale}.md", table.encode())
    return max(statuses)


def summary_table(out: Path, scale: str) -> str:
    """A row for each ablation whose results are in a folder."""
    lines = ["| file | question | what became of the trend |", "| --- | --- | --- |"]
    for name in ABLATIONS:
        results = out / f"{name}_{scale}.parquet"
        if results.exists():
            module = importlib.import_module(f"experiments.{name}")
            question = (module.__doc__ or name).splitlines()[0]
            rows = read_results(results)
            lines.append(summary_line(f"{name}.py", question, rows, module.METRICS, module.TRENDS))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
