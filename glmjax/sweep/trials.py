"""A sweep: trainings that belong together, described by a Python file.

The file has a function `sweep(scale) -> Sweep`. Trials with the same settings have the same folder,
whichever sweep they belong to, so that what was trained for one serves the others.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glmjax.config import Experiment, replace
from glmjax.data.cache import digest
from glmjax.training.history import changed_fields

if TYPE_CHECKING:
    from glmjax.sweep.results import Result

Scale = Literal["tiny", "cpu", "gpu", "pod"]
"""tiny: seconds, for tests. cpu: two cores, an hour. gpu: one GPU of 141 GB, half an hour. pod: a
slice of TPUs."""

Factor = str | int | float | bool


@dataclass(frozen=True)
class Trial:
    """One training of a sweep."""

    factors: Mapping[str, Factor]
    """What it is among the others, such as {"positions": "alibi"}; without the seed."""
    experiment: Experiment

    @property
    def seed(self) -> int:
        return self.experiment.train.seed

    @property
    def name(self) -> str:
        """Its factors and seed in a line."""
        factors = {**self.factors, "seed": self.seed}
        return " ".join(f"{name}={_short(value)}" for name, value in factors.items())


def _short(value: Factor) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Sweep:
    """Trainings, what is measured on each, and what is said of them."""

    name: str
    trials: tuple[Trial, ...]
    report: Callable[[Sequence["Result"], Path], str]
    """Makes Markdown of the results, and pictures beside a path, whose names begin with its name."""
    evaluate: Callable[[Path], Mapping[str, float]] | None = None
    """More numbers of a run folder whose training is finished."""

    def __post_init__(self) -> None:
        names = [trial.name for trial in self.trials]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sweep {self.name} has two trials {name}")
        if not names:
            raise ValueError(f"sweep {self.name} has no trials")


def vary(
    base: Experiment, variants: Mapping[str, Mapping[str, object]], factor: str, seeds: int
) -> tuple[Trial, ...]:
    """Trials of one factor: the base with the changes of each variant, for each of so many seeds,
    all variants with one seed before the next.

    `variants` has the fields that change by the variant's name, as `glmjax.config.replace` takes
    them; the seeds are 0, 1, ...
    """
    return tuple(
        Trial({factor: name}, replace(base, **{**changes, "train.seed": seed}))
        for seed in range(seeds)
        for name, changes in variants.items()
    )


def settings_digest(experiment: Experiment) -> str:
    """A name for what a training computes: every setting that is not its default, but for where it
    runs and writes to. Of paths to text only the last part counts."""
    default = Experiment()
    names = tuple(Path(path).name for path in experiment.data.path)
    settings = replace(
        experiment,
        distributed=default.distributed,
        **{
            "data.path": names,
            "data.cache": default.data.cache,
            "train.run": default.train.run,
            "train.compilation_cache": default.train.compilation_cache,
        },
    )
    return digest(changed_fields(default, settings))[:10]


def run_folder(trial: Trial, root: Path) -> Path:
    """Where a trial trains: the folder that any sweep gave to the same settings, else a new one."""
    identity = settings_digest(trial.experiment)
    present = sorted(root.glob(f"*-{identity}"))
    slug = re.sub(r"[^a-z0-9.]+", "-", trial.name.lower()).strip("-")
    return present[0] if present else root / f"{slug}-{identity}"
