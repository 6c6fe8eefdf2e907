"""Official tensors in memory and on disk, for the tests of the interop package."""

from pathlib import Path

import jax
import numpy as np

from glmjax.config import GLMConfig
from glmjax.interop.folders import open_folder
from glmjax.interop.official import find_model, read_parts
from glmjax.model.params import Params
from glmjax.model.parts import Part, assemble


def read_tensors(path: Path) -> list[dict[str, np.ndarray]]:
    """All tensors of an official checkpoint, of one dictionary a rank."""
    return [
        {name: stored.read() for name, stored in tensors.items()}
        for tensors in open_folder(path).ranks
    ]


def in_memory(tensors: dict[str, np.ndarray]) -> dict[str, Part]:
    return {name: Part(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}


def build(fields: dict | None, *ranks: dict[str, np.ndarray]) -> tuple[GLMConfig, Params]:
    """The model of official tensors in memory."""
    held = [in_memory(tensors) for tensors in ranks]
    family, config = find_model(fields, held, Path("config.json"))
    return config, assemble(config, read_parts(config, family, held))


def assert_same(a: Params, b: Params) -> None:
    """Asserts that two models have the same bits and types."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def assert_same_tensors(a: list[dict], b: list[dict]) -> None:
    """Asserts that the ranks of two checkpoints hold the same tensors to the bit."""
    assert [tensors.keys() for tensors in a] == [tensors.keys() for tensors in b]
    for found, expected in zip(a, b, strict=True):
        for name, array in expected.items():
            assert found[name].dtype == array.dtype, name
            np.testing.assert_array_equal(found[name], array, err_msg=name)
