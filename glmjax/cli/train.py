"""The command `glmjax train`."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from glmjax.cli.experiments import named_experiment
from glmjax.config import Experiment

HELP = """Trains the model that an experiment file describes.

The file is Python with a function `experiment() -> glmjax.config.Experiment`; FILE:FUNCTION takes
another function of it. Flags override fields. Run the same command again to continue a run that was
stopped or killed.

examples:
  glmjax train experiments/quickstart.py
  glmjax train experiments/quickstart.py --train.run runs/books --data.path books/ --train.steps 2000
  glmjax train experiments/quickstart.py --data.tfds tiny_shakespeare --train.run runs/shakespeare
  glmjax train experiments/quickstart.py --mesh.fsdp 4 --json"""


def main(arguments: list[str]) -> int:
    began = time.time()
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    default, program, arguments = named_experiment("train", arguments)
    experiment = tyro.cli(
        Experiment,
        default=default,
        args=arguments,
        prog=program,
        description=HELP,
        config=(tyro.conf.AvoidSubcommands,),
    )

    from glmjax.training.distributed import RESTART, joined
    from glmjax.training.loop import fit

    with joined(experiment.distributed) as job:
        summary = fit(experiment, began)
    is_main = job is None or job.process == 0
    if as_json and is_main:
        print(json.dumps(dataclasses.asdict(summary)))
    elif summary.signal is None and is_main:
        _show_results(experiment, dataclasses.asdict(summary), examples=job is None)
    if summary.signal is None:
        return 0
    if is_main:
        print(
            f"stopped by {summary.signal} and saved at step {summary.steps}; "
            "the same command continues",
            file=sys.stderr,
        )
    if job is not None:
        return RESTART
    return 130 if summary.signal == "SIGINT" else 0


def _show_results(experiment: Experiment, summary: dict[str, Any], examples: bool) -> None:
    """A table of the run's numbers, and a few held-out blanks filled by its newest checkpoint."""
    from glmjax.data.prepare import prepare
    from glmjax.inference.examples import fill_heldout
    from glmjax.training.model_folder import load_model

    run = Path(experiment.train.run)
    console = Console()
    table = Table(title=str(run), show_header=False)
    gain = summary["unigram_loss"] - summary["heldout_loss"]
    for name, value in (
        ("parameters", f"{summary['parameters']:,}"),
        ("steps", f"{summary['steps']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
        ("seconds", f"{summary['seconds']:.0f}"),
        ("held-out loss (nats per target)", f"{summary['heldout_loss']:.3f}"),
        ("unigram baseline", f"{summary['unigram_loss']:.3f}"),
        ("uniform baseline", f"{summary['uniform_loss']:.3f}"),
        ("below unigram by", f"{gain:.3f}"),
        ("loss curve", str(run / "loss.png")),
    ):
        table.add_row(name, value)
    console.print(table)
    if not examples:
        return

    config, params = load_model(run)
    corpora = prepare(experiment.data, experiment.objective, config.special_tokens)
    table = Table("held-out sentence", "truth", "filled", title="blanks filled greedily")
    for example in fill_heldout(config, params, corpora, count=6):
        table.add_row(*(_literal(text) for text in dataclasses.astuple(example)))
    console.print(table)
    print(f'try: glmjax infill --checkpoint {run} "Return the [MASK] of the array."')


def _literal(text: str) -> str:
    """Text on one line that rich prints as it is."""
    return " ".join(text.split()).replace("[", r"\[")
