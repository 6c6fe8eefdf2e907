import jax
import pytest
from jax.sharding import PartitionSpec as P

import glmjax
from glmjax.config import MeshConfig
from glmjax.model.params import param_shardings
from glmjax.sharding import constrain, make_mesh, named_sharding, partition


def test_free_axis_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_second_part_of_fsdp_is_an_axis_of_its_own():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, fsdp_line=4))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1, "fsdp_line": 4}
    spec = named_sharding(mesh, ("embed", "mlp"), (8, 3)).spec
    assert spec == P(("fsdp", "fsdp_line"), "tensor")


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=3)])
def test_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(config)


def test_logical_axes_become_mesh_axes():
    assert partition(("batch", "length", "heads")) == P(
        ("data", "fsdp", "fsdp_line"), None, "tensor"
    )


def test_a_mesh_axis_is_used_once():
    with pytest.raises(ValueError, match="twice"):
        partition(("heads", "mlp"))


def test_divisibility_error_names_axis_and_both_numbers():
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    with pytest.raises(ValueError, match=r"'heads' of blocks.qkv.kernel has size 4, .* size 8"):
        param_shardings(glmjax.get_config("glm-tiny"), mesh)


def test_constrain_pins_only_under_a_mesh():
    x = jax.numpy.zeros((8, 4))
    assert constrain(x, "batch", "stream") is x
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: constrain(x, "batch", "stream"))(x)
    expected = named_sharding(mesh, ("batch", "stream"), x.shape)
    assert pinned.sharding.is_equivalent_to(expected, x.ndim)
    assert pinned.addressable_shards[0].data.shape == (1, 4)


def test_parameters_are_born_sharded():
    config = glmjax.get_config("glm-tiny")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    alone = glmjax.init(config, jax.random.key(0))
    with jax.set_mesh(mesh):
        params = glmjax.init(config, jax.random.key(0))
    assert params.blocks.ffn_in.kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert params.blocks.ffn_in.kernel.addressable_shards[0].data.shape == (2, 32, 64)
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail("values differ"), alone, params)
