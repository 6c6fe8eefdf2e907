"""Opens a model from whatever folder holds it."""

from pathlib import Path

from glmjax.config import GLMConfig
from glmjax.interop.official import load_official
from glmjax.model.params import Params
from glmjax.training.checkpoint import load_model


def load(path: str | Path) -> tuple[GLMConfig, Params]:
    """The configuration and float32 parameters of a model, on the mesh of `jax.set_mesh` if set.

    Reads a folder of `glmjax.save`, a run of `glmjax train` (its newest whole checkpoint), one
    checkpoint of it, or an official checkpoint: a folder of config.json and model.safetensors.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is none of these, or its tensors do not fit its configuration.
        CheckpointError: it is damaged.
    """
    folder = Path(path).expanduser()
    official = (folder / "model.safetensors").exists()
    return load_official(folder) if official else load_model(folder)
