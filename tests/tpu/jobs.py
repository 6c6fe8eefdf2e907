"""Jobs for the tests of the launch files."""

from pathlib import Path

import tyro

from glmjax.cli.experiments import load_experiment
from glmjax.config import Experiment
from tpu.job import Job

FOLDER = Path(__file__).parents[2] / "tpu"
DESCRIPTION = FOLDER / "glm_130b.toml"


def make_job(topology: str, **changes) -> Job:
    values = {
        "name": "glm",
        "project": "my-project",
        "zone": "us-east5-a",
        "image": "us-east5-docker.pkg.dev/my-project/glmjax/glmjax:1",
        "bucket": "my-bucket",
        "command": ("glmjax", "train", "experiments/glm_10b.py"),
    }
    return Job(topology=topology, **{**values, **changes})


def described_experiment(job: Job) -> Experiment:
    """The experiment that a job's command trains."""
    program, command, path, *flags = job.command
    assert (program, command) == ("glmjax", "train")
    return tyro.cli(
        Experiment,
        default=load_experiment(FOLDER.parent / path),
        args=flags,
        config=(tyro.conf.AvoidSubcommands,),
    )
