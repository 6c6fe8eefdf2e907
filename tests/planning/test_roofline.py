import numpy as np
import pytest

from glmjax.planning import hlo, roofline
from glmjax.planning.topologies import Topology
from glmjax.presets import get_config


def network(topology, mesh, num_slices=1):
    sides = Topology(topology).sides
    chips = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1).reshape(-1, len(sides))
    places = [np.insert(chips, 0, number, axis=1) for number in range(num_slices)]
    return roofline.Network(Topology(topology, num_slices), mesh, np.concatenate(places))


def collective(kind, size, mesh, axis, how="synchronous"):
    """Over one axis of a mesh, or all of them."""
    devices = np.arange(np.prod(list(mesh.values()))).reshape(*mesh.values())
    if axis is None:
        groups = devices.reshape(1, -1)
    else:
        groups = np.moveaxis(devices, list(mesh).index(axis), -1).reshape(-1, mesh[axis])
    return hlo.Collective("c", kind, size, tuple(map(tuple, groups.tolist())), how, "")


@pytest.mark.parametrize(
    ("topology", "mesh", "axis", "kind", "seconds"),
    [
        ("v5p:4x4x8", {"fsdp": 16, "tensor": 8}, "tensor", "all-gather", 7 / 8 / (2 * 90e9)),
        ("v5p:4x4x8", {"fsdp": 16, "tensor": 8}, "fsdp", "all-gather", 15 / 16 / (4 * 90e9)),
        ("v5p:4x4x8", {"fsdp": 128}, None, "all-reduce", 2 * 127 / 128 / (6 * 90e9)),
        ("v5e:16x16", {"fsdp": 256}, None, "reduce-scatter", 255 / 256 / (4 * 45e9)),
        ("v5e:4x4", {"fsdp": 16}, None, "reduce-scatter", 15 / 16 / (2 * 45e9)),
        ("v4:2x2x1", {"fsdp": 4}, None, "all-gather", 3 / 4 / (2 * 45e9)),
    ],
    ids=["a ring", "two rings", "three rings", "a torus", "open sides", "one host"],
)
def test_collectives_use_the_links_that_their_group_spans(topology, mesh, axis, kind, seconds):
    work = collective(kind, 1.0, mesh, axis)
    assert network(topology, mesh).seconds(work) == pytest.approx(seconds)


def test_between_slices_only_the_shards_travel():
    mesh = {"data": 2, "fsdp": 128}
    across = network("v5p:4x4x8", mesh, num_slices=2)
    assert across.seconds(collective("all-reduce", 1.0, mesh, "data")) == pytest.approx(1 / 6.25e9)
    everywhere = across.seconds(collective("all-reduce", 1.0, mesh, None))
    assert everywhere == pytest.approx(2 * 127 / 128 / (6 * 90e9) + 1 / 128 / 6.25e9)


def operation(seconds):
    cycles = round(seconds * Topology("v5p:4x4x8").generation.clock)
    return hlo.Operation("o", "fusion", "", "", 0.0, cycles, 0.0)


MESH = {"fsdp": 16, "tensor": 8}
GATHER = collective("all-gather", 2 * 90e9 * 8 / 7, MESH, "tensor")  # one second
WAIT = hlo.Wait("c")


def named(name):
    return hlo.Collective(name, GATHER.kind, GATHER.size, GATHER.groups, "asynchronous", "")


@pytest.mark.parametrize(
    ("events", "step", "exposed"),
    [
        ((operation(2), GATHER), 3, 3),
        ((named("c"), operation(2), WAIT), 2, 2),
        ((named("c"), operation(0.25), WAIT, operation(1)), 2, 1.25),
        ((named("c"), named("d"), operation(1.5), WAIT, hlo.Wait("d")), 2, 2),
        ((named("c"), operation(0.5), GATHER, WAIT), 2, 1.5),
        ((hlo.Transfer("c", 1.5e10), operation(0.5), WAIT), 1, 0.5),
        ((hlo.Loop("w", 3, False, (named("c"), operation(0.75), WAIT)),), 3, 3),
    ],
    ids=[
        "synchronous",
        "covered",
        "late",
        "two on one ring",
        "a ring in use",
        "to the host",
        "every round",
    ],
)
def test_an_asynchronous_collective_costs_what_is_not_covered(events, step, exposed):
    times = roofline.estimate(
        hlo.Loop("main", 1, False, events), network("v5p:4x4x8", MESH)
    )  # fmt: skip
    assert times.step == pytest.approx(step)
    assert times.exposed == pytest.approx(exposed)


def test_an_operation_takes_at_least_as_long_as_its_bytes():
    copy = hlo.Operation("o", "copy", "", "", 0.0, 175_000, 2765e9 / 1000)
    times = roofline.estimate(hlo.Loop("main", 2, False, (copy,)), network("v5p:4x4x8", MESH))
    assert times.step == pytest.approx(2e-3)
    assert times.compute == pytest.approx(2e-4, rel=1e-3)


def test_attention_kernels_take_their_products_over_an_efficiency():
    chip = Topology("v5p:4x4x8").generation
    shapes = "s32[1,8]{1,0}", "bf16[2,96,2048,128]{3,2,1,0}"
    forward = roofline.attention_seconds(hlo.Kernel("blank_attention_forward", shapes, 0.0), chip)
    flops = 2 * 2 * 96 * 2048 * 2048 * 128 / 2 * 2
    assert forward == pytest.approx(flops / chip.peak_flops / roofline.KERNEL_EFFICIENCY)
    backward = hlo.Kernel("transpose_jvp_blank_attention_backward__", shapes, 0.0)
    assert roofline.attention_seconds(backward, chip) == pytest.approx(2.5 * forward)
    with pytest.raises(ValueError, match="how long the kernel sort takes"):
        roofline.attention_seconds(hlo.Kernel("sort", shapes, 0.0), chip)


def test_throughput_follows_from_the_step_time():
    speed = roofline.throughput(2.0, 128 * 459e12, 128 * 2048, Topology("v5p:4x4x8"))
    assert speed.utilisation == pytest.approx(0.5)
    assert speed.tokens_per_second == 1024


@pytest.mark.parametrize(
    ("name", "weights", "scores"),
    [
        ("glm-130b", 70 * (4 * 12288**2 + 3 * 12288 * 32768) + 150528 * 12288, 70 * 12288 * 2048),
        (
            "glm-4-9b",
            40 * (2 * 4096 * (4096 + 256) + 3 * 4096 * 13696) + 151552 * 4096,
            40 * 4096 * 2048,
        ),
    ],
    ids=["glm-130b", "shared-keys"],
)
def test_model_flops_are_six_for_every_weight_and_token(name, weights, scores):
    flops = roofline.model_flops(get_config(name), 3, 2048)
    assert flops == 3 * 2048 * (6 * weights + 12 * scores)
