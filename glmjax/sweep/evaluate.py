"""Held-out losses of a trained model, on blanks of other kinds than it was trained on."""

import json
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.config import Experiment, GLMConfig, MeshConfig, config_from_json
from glmjax.data.blanks import Batch
from glmjax.data.pipeline import make_heldout_dataset
from glmjax.data.prepare import Corpora, prepare
from glmjax.model.params import Params
from glmjax.sharding import make_mesh
from glmjax.training.model_folder import load_model
from glmjax.training.step import mean_losses


def open_trained(run: Path) -> tuple[Experiment, Params]:
    """The experiment of a run folder, and the parameters of its newest checkpoint."""
    experiment = config_from_json(Experiment, json.loads((run / "config.json").read_text()))
    return experiment, load_model(run)[1]


def heldout_batches(experiment: Experiment) -> list[Batch]:
    """The batches of the experiment's held-out evaluations, with its objective."""
    return list(make_heldout_dataset(experiment, corpora_of(experiment)))


def corpora_of(experiment: Experiment) -> Corpora:
    """The corpora of an experiment, from the cache if they have been prepared."""
    return prepare(experiment.data, experiment.objective, experiment.model.special_tokens)


def heldout_losses(config: GLMConfig, params: Params, batches: list[Batch]) -> dict[str, float]:
    """What `mean_losses` says, with all devices at work."""
    mesh = make_mesh(MeshConfig())
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        return mean_losses(config, params, batches, mesh)
