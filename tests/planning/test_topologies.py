import pytest

from glmjax.planning.topologies import (
    GENERATIONS,
    Topology,
    absent_devices,
    absent_mesh,
    compile_absent,
    find_topology,
)


@pytest.mark.parametrize(
    ("generation", "head_size", "cycles"),
    [
        ("v5p", 128, 1024),
        ("v5p", 80, 1024),
        ("v6e", 128, 512),
        ("v6e", 256, 512),
        ("v4", 256, 2048),
    ],
)
def test_attention_is_bound_by_whole_matrix_units(generation, head_size, cycles):
    chip = GENERATIONS[generation]
    assert chip.attention_cycles(512 * 512, head_size, products=2) == cycles


def test_unknown_generations_are_named():
    with pytest.raises(ValueError, match="no TPU generation 'v9'; known are v4, v5e"):
        absent_mesh("v9")


def describe(generation):
    (device,) = absent_mesh(generation).devices.flat
    return device.platform, device.device_kind, device.num_cores


@pytest.mark.tpu
@pytest.mark.parametrize("generation", GENERATIONS)
def test_an_absent_chip_is_what_the_table_says(generation):
    chip = GENERATIONS[generation]
    assert compile_absent(describe, generation) == ("tpu", chip.device_kind, chip.cores)


def count(topology):
    return len(absent_devices(topology))


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_one_chip_is_a_slice(topology):
    assert compile_absent(count, topology) == Topology(topology).num_devices


@pytest.mark.parametrize(
    ("generation", "chips", "name"),
    [
        ("v5p", 4, "v5p:2x2x1"),
        ("v5p", 16, "v5p:2x2x4"),
        ("v5p", 128, "v5p:4x4x8"),
        ("v5p", 768, "v5p:8x8x12"),
        ("v5p", 1024, "v5p:8x8x16"),
        ("v4", 512, "v4:8x8x8"),
        ("tpu7x", 64, "tpu7x:4x4x4"),
        ("v5e", 8, "v5e:2x4"),
        ("v6e", 256, "v6e:16x16"),
    ],
)
def test_the_most_compact_slice_has_that_many_chips(generation, chips, name):
    topology = find_topology(generation, chips)
    assert (topology.name, topology.num_slices, topology.chips) == (name, 1, chips)


def test_what_is_too_large_for_a_pod_is_several_slices():
    assert find_topology("v6e", 1024) == Topology("v6e:16x16", num_slices=4)
    assert str(find_topology("v5p", 12288)) == "2 x v5p:16x16x24"


@pytest.mark.parametrize(
    ("topology", "devices"),
    [(Topology("v5p:4x4x8"), 128), (Topology("tpu7x:2x2x1", 2), 16), (Topology("v5e:16x16"), 256)],
    ids=str,
)
def test_a_topology_knows_its_devices(topology, devices):
    assert topology.num_devices == devices


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Topology("v9:4x4"), "no TPU generation 'v9'; known are v4, v5e"),
        (lambda: Topology("v5p"), "a topology is a name such as v5p:8x8x16, got 'v5p'"),
        (lambda: Topology("v5p:4xfour"), "a topology is a name"),
        (lambda: Topology("v5p:16x16"), "a slice of v5p has 3 sides, such as v5p:2x2x1"),
        (lambda: Topology("v5e:16x32"), "'v5e:16x32' is no slice of v5e, which has up to 256 chips"),
        (lambda: Topology("v5e:4x4", 0), "the number of slices must be positive, got 0"),
        (lambda: find_topology("v5p", 7), "no slices of v5p have 7 chips"),
        (lambda: find_topology("v5e", 257), "no slices of v5e have 257 chips"),
        (lambda: find_topology("v9", 4), "no TPU generation 'v9'"),
    ],
    ids=["generation", "no sides", "words", "too few sides", "too large", "no slices", "odd",
         "uneven slices", "unknown"],
)  # fmt: skip
def test_wrong_topologies_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("glmjax.planning.topologies.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "glmjax\[plan\]"'):
        compile_absent(describe, "v5p")


def test_clocks_are_what_peaks_imply():
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in GENERATIONS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


def count_devices(topology, num_slices):
    devices = absent_devices(topology, num_slices)
    return len(devices), {getattr(device, "slice_index", 0) for device in devices}


@pytest.mark.tpu
@pytest.mark.parametrize(
    "topology",
    [Topology("v4:8x8x16"), Topology("v5e:16x16"), Topology("v5p:4x4x8", 2), Topology("v6e:2x4"),
     Topology("tpu7x:2x2x2")],
    ids=str,
)  # fmt: skip
def test_libtpu_knows_as_many_devices(topology):
    counted, slices = compile_absent(count_devices, topology.name, topology.num_slices)
    assert (counted, len(slices)) == (topology.num_devices, topology.num_slices)
