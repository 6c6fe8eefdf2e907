"""Checkpoints on the disk of a host come back bit for bit, or are not taken."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.config import Experiment, MeshConfig, replace
from glmjax.sharding import make_mesh
from glmjax.training.local import LocalCheckpoints

EXPERIMENT = Experiment()


def make_state(mesh: jax.sharding.Mesh, step: int) -> dict[str, jax.Array]:
    values = {
        "split": np.arange(64, dtype=np.float32).reshape(16, 4) + step,
        "half": np.array([1.5, -0.0, np.inf, np.nan, 3e-40, 1, 2, 3], jnp.bfloat16),
        "step": np.int32(step),
    }
    specs = {"split": PartitionSpec("fsdp", "tensor"), "half": PartitionSpec(("data", "fsdp"))}
    return {
        name: jax.device_put(value, NamedSharding(mesh, specs.get(name, PartitionSpec())))
        for name, value in values.items()
    }


def abstract(state: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in state.items()
    }


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture
def local(tmp_path: Path, mesh) -> LocalCheckpoints:
    """Local checkpoints of steps 2 and 3."""
    local = LocalCheckpoints(str(tmp_path), "run")
    for step in (1, 2, 3):
        local.save(step, make_state(mesh, step), EXPERIMENT)
    local.wait()
    return local


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_newest_comes_back_bit_for_bit(local, mesh, tmp_path):
    assert files(tmp_path) == ["2.npz", "3.npz"]
    expected = make_state(mesh, 3)
    again = LocalCheckpoints(str(tmp_path), "run")
    assert again.newest(abstract(expected)) == 3
    found = again.restore(3, abstract(expected), EXPERIMENT)
    for name, x in expected.items():
        assert (found[name].dtype, found[name].sharding) == (x.dtype, x.sharding)
        assert np.asarray(found[name]).tobytes() == np.asarray(x).tobytes()


def test_saved_state_may_be_donated_at_once(tmp_path, mesh):
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.device_put(jnp.zeros(1 << 20), NamedSharding(mesh, PartitionSpec("data")))
    local = LocalCheckpoints(str(tmp_path), "run")
    local.save(1, {"x": x}, EXPERIMENT)
    shape = abstract({"x": x})
    for _ in range(8):
        x = add_one(x)
    local.wait()
    np.testing.assert_array_equal(local.restore(1, shape, EXPERIMENT)["x"], 0)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_file_is_passed_over(local, mesh, tmp_path, damage, caplog):
    (file,) = tmp_path.rglob("3.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    size = {"flip": len(content), "cut": len(content) // 2, "empty": 0}[damage]
    file.write_bytes(content[:size])
    with caplog.at_level(logging.WARNING):
        assert local.newest(abstract(make_state(mesh, 0))) == 2
    assert f"{file} is of no use" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda state, mesh: state | {"more": state["step"]},
        lambda state, mesh: {name: state[name] for name in ("split", "step")},
        lambda state, mesh: make_state(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), 0),
    ],
    ids=["more-leaves", "fewer-leaves", "another-mesh"],
)
def test_other_parts_than_needed_are_not_taken(local, mesh, change):
    assert local.newest(abstract(change(make_state(mesh, 0), mesh))) == -1


def test_another_run_has_none(local, mesh, tmp_path):
    assert LocalCheckpoints(str(tmp_path), "other").newest(abstract(make_state(mesh, 0))) == -1


def test_another_configuration_is_refused(local, mesh):
    other = replace(EXPERIMENT, **{"optimizer.clip": 2.0})
    with pytest.raises(ValueError, match=r"optimizer\.clip: 1\.0 -> 2\.0"):
        local.restore(3, abstract(make_state(mesh, 0)), other)


def test_what_is_behind_the_step_a_run_goes_on_from_is_dropped(local, tmp_path):
    local.drop_after(2)
    assert files(tmp_path) == ["2.npz"]


def test_full_disk_is_a_warning(local, mesh, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    local.save(4, make_state(mesh, 4), EXPERIMENT)
    local.wait()
    assert "no local checkpoint of step 4" in caplog.text
    assert files(tmp_path) == ["2.npz", "3.npz"]
