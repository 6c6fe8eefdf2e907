"""Where every array of the training state lies, as text, so that a change of layout shows.

`GLMJAX_WRITE_LAYOUTS=1 make test` writes the files anew.
"""

import os
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from glmjax.config import Experiment, MeshConfig, ObjectiveConfig, OptimizerConfig
from glmjax.model.params import leaf_name
from glmjax.presets import get_config
from glmjax.training.step import abstract_state

FOLDER = Path(__file__).parent / "golden" / "layouts"
MESHES = {
    "glm-base": {"fsdp-16": MeshConfig(data=1, fsdp=16)},
    "glm-10b": {"fsdp-16-tensor-4": MeshConfig(data=1, fsdp=16, tensor=4)},
    "chatglm-6b": {"fsdp-4": MeshConfig(data=1, fsdp=4)},
    "glm-4-9b": {"fsdp-4-tensor-2": MeshConfig(data=1, fsdp=4, tensor=2)},
    "glm-130b": {
        "fsdp-32-line-4": MeshConfig(data=1, fsdp=32, fsdp_line=4),
        "fsdp-128-tensor-8": MeshConfig(data=1, fsdp=128, tensor=8),
        "data-2-fsdp-128-line-8": MeshConfig(data=2, fsdp=128, fsdp_line=8),
    },
}
CASES = [(model, mesh) for model, meshes in MESHES.items() for mesh in meshes]


def listing(experiment: Experiment, config: MeshConfig) -> str:
    """`name shape dtype spec` of every array."""
    sizes = {axis: size for axis, size in vars(config).items() if size > 1 or axis != "fsdp_line"}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state(experiment, mesh)):
        spec = ", ".join(
            "+".join([entry] if isinstance(entry, str) else entry or ["-"])
            for entry in leaf.sharding.spec
        )
        lines.append(f"{leaf_name(path)} {list(leaf.shape)} {leaf.dtype} ({spec})")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("model", "mesh"), CASES, ids=["-".join(case) for case in CASES])
def test_layouts_are_as_written(model, mesh):
    config = get_config(model)
    rule = "1d" if config.positions in ("rope_1d", "rope_half") else "2d"
    experiment = Experiment(model=config, objective=ObjectiveConfig(positions=rule))
    found, file = listing(experiment, MESHES[model][mesh]), FOLDER / f"{model}-{mesh}.txt"
    if os.environ.get("GLMJAX_WRITE_LAYOUTS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(found)
    assert found == file.read_text()


def test_small_moments_lie_like_their_parameters():
    optimizer = OptimizerConfig(moments="int8")
    experiment = Experiment(model=get_config("glm-base"), optimizer=optimizer)
    lines = listing(experiment, MeshConfig(data=1, fsdp=16)).splitlines()
    kernel = next(line for line in lines if "mu.blocks.qkv.kernel.code" in line)
    scale = next(line for line in lines if "mu.blocks.qkv.kernel.scale" in line)
    assert kernel.endswith("[12, 768, 3, 12, 64] int8 (-, fsdp, -, tensor, -)")
    assert scale.endswith("[12, 768, 3, 12, 1] float32 (-, fsdp, -, tensor, -)")
