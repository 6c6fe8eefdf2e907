"""The command `glmjax sweep`."""

import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from glmjax.cli.experiments import load_module
from glmjax.config import replace
from glmjax.sweep.trials import Scale, Sweep, run_folder

HELP = """Trains everything a sweep file describes, and writes what came out.

The file is Python with a function `sweep(scale) -> glmjax.sweep.trials.Sweep`. Trials that are done
are not computed again, also where another sweep made them; run the same command again to continue.
Each trial is a process with its own part of the machine and an ordinary run folder, so that
`glmjax runs` and `glmjax compare` show it. Results go to OUT/NAME_SCALE.parquet, .md and .png.

examples:
  glmjax sweep experiments/positions.py --list
  glmjax sweep experiments/positions.py --data classics_en classics_zh
  glmjax sweep experiments/scaling.py --scale gpu --jobs 4
  glmjax sweep experiments/scaling.py --scale pod --trial 3     one trial here, as in a Slurm array
  glmjax sweep experiments/scaling.py --report                  from the Parquet file alone"""


@dataclass(frozen=True)
class SweepFlags:
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Python file of the sweep."""
    scale: Scale = "cpu"
    """How large its models and budgets are. tiny: seconds, cpu: two cores, gpu: one GPU of 141 GB,
    pod: a slice of TPUs."""
    data: tuple[Path, ...] = ()
    """Files or folders of text in place of those the sweep names."""
    runs: Path = Path("runs/sweep")
    """Folder of the run folders."""
    out: Path = Path("experiments/results")
    """Folder of the results."""
    jobs: int | None = None
    """Trials that run at once; None: one for each core, 4 on a GPU, 1 on a pod."""
    trial: int | None = None
    """Train this trial alone, in this process, and write no results."""
    list: bool = False
    """Show the trials and what is left of them; train nothing."""
    report: bool = False
    """Make the report again from the Parquet file; train nothing."""
    json: bool = False
    """Print the results as JSON."""


def main(arguments: list[str]) -> int:
    flags = tyro.cli(SweepFlags, args=arguments, prog="glmjax sweep", description=HELP)
    sweep, title = load_sweep(flags.file, flags.scale)
    if flags.data:
        absent = [str(path) for path in flags.data if not path.exists()]
        if absent:
            raise FileNotFoundError(f"there is no {', '.join(absent)}")
        path = tuple(str(path) for path in flags.data)
        trials = [
            dataclasses.replace(trial, experiment=replace(trial.experiment, **{"data.path": path}))
            for trial in sweep.trials
        ]
        sweep = dataclasses.replace(sweep, trials=tuple(trials))
    if flags.list:
        return _list(sweep, flags)
    if flags.trial is not None:
        return _train(sweep, flags.trial, flags, shlex.join(["glmjax", "sweep", *arguments]))
    if not flags.report:
        status = _run(sweep, flags)
        if status:
            return status
    return _report(sweep, title, flags)


def load_sweep(path: Path, scale: Scale) -> tuple[Sweep, str]:
    """The sweep that a Python file describes, and the first line of its docstring.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not define `sweep(scale) -> Sweep`.
    """
    # Sweep files share what they have in common as python -m would find it.
    sys.path.insert(0, os.getcwd())
    module = load_module(path, "sweep")
    make = getattr(module, "sweep", None)
    if make is None or not isinstance(sweep := make(scale), Sweep):
        raise ValueError(f"{path} does not define sweep(scale) -> glmjax.sweep.trials.Sweep")
    return sweep, (module.__doc__ or sweep.name).splitlines()[0]


def _list(sweep: Sweep, flags: SweepFlags) -> int:
    from glmjax.model.params import count_params
    from glmjax.sweep.execute import is_done, training_flops
    from glmjax.sweep.results import outcome

    table = Table("", "trial", "state", "parameters", "steps", "FLOPs", "folder")
    for i, trial in enumerate(sweep.trials):
        run = run_folder(trial, flags.runs)
        state = "done" if is_done(sweep, trial, flags.runs) else "begun" if run.exists() else "-"
        table.add_row(
            str(i), trial.name, "diverged" if outcome(run) == "diverged" else state,
            f"{count_params(trial.experiment.model):,}", f"{trial.experiment.train.steps:,}",
            f"{training_flops(trial):.1e}", run.name,
        )  # fmt: skip
    Console().print(table)
    return 0


def _train(sweep: Sweep, index: int, flags: SweepFlags, command: str) -> int:
    if not 0 <= index < len(sweep.trials):
        raise ValueError(
            f"--trial {index} is none of the trials 0 to {len(sweep.trials) - 1} of {sweep.name}"
        )
    from glmjax.sweep.execute import train_trial
    from glmjax.training.distributed import joined

    trial = sweep.trials[index]
    with joined(trial.experiment.distributed):
        train_trial(sweep, trial, flags.runs, command)
    return 0


def _run(sweep: Sweep, flags: SweepFlags) -> int:
    """Trains what is left, showing how far it is."""
    from glmjax.sweep.execute import Progress, run_sweep

    cores = len(os.sched_getaffinity(0))
    jobs = flags.jobs
    if jobs is None:
        jobs = {"tiny": cores, "cpu": cores, "gpu": 4, "pod": 1}[flags.scale]
    if jobs < 1:
        raise ValueError(f"--jobs must be positive, got {jobs}")
    same = ["--scale", flags.scale, "--runs", str(flags.runs)]
    if flags.data:
        same += ["--data", *map(str, flags.data)]

    def command(index: int) -> Sequence[str]:
        program = [sys.executable, "-m", "glmjax", "sweep", str(flags.file), *same]
        return [*program, "--trial", str(index)]

    console = Console(stderr=True, highlight=False)
    bar = RichProgress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}% of FLOPs"),
        TimeRemainingColumn(), TextColumn("{task.fields[running]}", markup=False),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task(sweep.name, total=1.0, running="")

    def report(progress: Progress) -> None:
        running = ", ".join(f"{name} {step}/{steps}" for name, step, steps in progress.running)
        bar.update(task, completed=progress.share, running=running)
        if progress.finished is not None:
            name, seconds = progress.finished
            line = f"{progress.done}/{progress.trials}  {name}  {seconds:.0f} s"
            console.print(line, markup=False)

    # A signal ends the loop like Ctrl-C does: the trials save, and the same command continues.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with bar:
        failed = run_sweep(sweep, flags.runs, command, jobs, report)
    if failed:
        console.print(f"glmjax sweep: {len(failed)} of {len(sweep.trials)} trials failed")
    return 1 if failed else 0


def _report(sweep: Sweep, title: str, flags: SweepFlags) -> int:
    """Writes the results of a sweep, and shows what is said of them."""
    from glmjax.data.cache import write_whole
    from glmjax.sweep.results import collect, made_by, read_results, write_results

    stem = flags.out / f"{sweep.name}_{flags.scale}"
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.report:
        results = read_results(Path(f"{stem}.parquet"))
    else:
        results = collect(sweep, flags.runs)
        write_results(Path(f"{stem}.parquet"), results)
    text = f"# {title}\n\n{made_by(results)}\n\n{sweep.report(results, stem)}"
    write_whole(Path(f"{stem}.md"), (text.rstrip() + "\n").encode())
    if flags.json:
        print(json.dumps([dataclasses.asdict(result) for result in results]))
    else:
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    return 0
