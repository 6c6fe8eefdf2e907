import pytest

from glmjax.planning.topologies import GENERATIONS, absent_mesh, compile_absent


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
