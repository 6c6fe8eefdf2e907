"""A model on disk, opened and not yet read, in whatever format it is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from glmjax.config import GLMConfig
from glmjax.config import replace as replace_config
from glmjax.interop.folders import OfficialFolder, open_folder
from glmjax.interop.names import PREFIX, Family, family_of
from glmjax.interop.official import find_model, read_parts, read_prefix
from glmjax.interop.official_config import prefix_settings
from glmjax.model.parts import Key, Part
from glmjax.training.model_folder import open_model

Format = Literal["glmjax", "hf", "ranks"]
"""glmjax: a folder of `glmjax.save`. hf: safetensors or .bin with a config.json, as on Hugging Face.
ranks: a file for each tensor-parallel rank, as THUDM/GLM and GLM-130B have."""


@dataclass(frozen=True)
class Source:
    """A model and where it comes from; `folder` and `family` are those of official formats."""

    path: Path
    format: Format
    config: GLMConfig
    parts: Mapping[Key, Part]
    family: Family | None = None
    folder: OfficialFolder | None = None


def open_source(path: str | Path, prefix: str | Path | None = None) -> Source:
    """The model at a path, with the P-tuning v2 prefix of another path in front where one is given.

    Raises:
        FileNotFoundError: nothing is there, or a file of it is missing.
        ValueError: it is no model that glmjax knows, or its tensors do not fit its configuration.
        CheckpointError: it is damaged.
        RuntimeError: .bin and .pt files need PyTorch 2.10.
    """
    path = Path(path).expanduser()
    folder = open_folder(path)
    if folder is None:
        config, parts = open_model(path)
        source = Source(path, "glmjax", config, parts)
    else:
        if holds_prefix_alone(folder):
            raise ValueError(
                f"{path} holds a P-tuning prefix and no model; give the model it was tuned on, and "
                "this as its prefix"
            )
        file = folder.config_file or folder.path
        family, config = find_model(folder.config, folder.ranks, file)
        source = Source(
            path, "hf" if folder.kind == "hugging face" else "ranks",
            config, read_parts(config, family, folder.ranks, path), family, folder,
        )  # fmt: skip
    return source if prefix is None else _with_prefix(source, Path(prefix).expanduser())


def holds_prefix_alone(folder: OfficialFolder) -> bool:
    """Whether all tensors are of a P-tuning prefix: what the official trainer saves."""
    names = folder.ranks[0]
    return f"{PREFIX}embedding.weight" in names and all(name.startswith(PREFIX) for name in names)


def _with_prefix(source: Source, path: Path) -> Source:
    """The model with the prefix of another checkpoint, whose own model, if any, is not looked at."""
    folder = open_folder(path)
    tensors = {} if folder is None else {
        name: tensor for name, tensor in folder.ranks[0].items() if name.startswith(PREFIX)
    }  # fmt: skip
    if f"{PREFIX}embedding.weight" not in tensors:
        raise ValueError(f"{path} holds no P-tuning prefix: {PREFIX}embedding.weight is missing")
    if family_of(source.config) != "chatglm-6b":
        raise ValueError(f"{path} holds a prefix for ChatGLM-6B, which {source.path} is not")
    config = replace_config(source.config, **prefix_settings(tensors))
    parts = read_prefix(config, tensors, path)
    return replace(source, config=config, parts={**source.parts, **parts})
